"""The demo: what self-supervision is for, shown on pictures that come with the package, offline and in minutes."""

import os
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from mmssl.data.listing import Listing, list_files
from mmssl.errors import UserError, nearest
from mmssl.files import write_json
from mmssl.run import Run
from modalities.encoder import MODALITIES, Encoder, load
from tasks.build import load_recipe
from tasks.features import Extractor, RawPixels, class_targets
from tasks.finetune import finetune
from tasks.knn import knn
from tasks.labels import subset
from tasks.linear_probe import linear_probe
from tasks.metrics import Score
from tasks.pretrain import pretrain
from tasks.report import Table, Words, write_report
from tasks.run_report import run_sections

PICTURES = Path(__file__).parent / "demo_data" / "pictures.tar.xz"
SHOTS = 10
RANDOM_SEED = 4
"""Of the encoder with random weights."""
PRETRAINING = {
    # 28 x 28 digits: patches of 7 leave 16 tokens, few enough to learn something from in two minutes.
    "signal.size": [28, 28],
    "signal.crop_scale": [0.5, 1.0],
    "signal.flip": False,  # a mirrored 2 is not a 2
    # The same for each channel: with ImageNet's, black is a little coloured, and normalised patches amplify that.
    "signal.mean": [0.5, 0.5, 0.5],
    "signal.std": [0.5, 0.5, 0.5],
    "model.tokenizer.patch_size": [7, 7],
    # Many small steps: 128 at a time reached with 110,000 pictures a lower loss than 256 with 150,000.
    "optim.base_lr": 3e-3,
    "train.batch_size": 128,
    "train.steps": 1000,
    "data.workers": 1,
}
FINETUNING = {
    "optim.base_lr": 5e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 50,
    "train.steps": 200,
    "data.workers": 1,
}

Rows = dict[tuple[str, str], dict[str, Score]]
"""(method, starting point) -> column -> accuracy."""


@dataclass(frozen=True)
class DemoResult:
    """The demo's table and where its report is."""

    out: Path
    rows: Rows
    columns: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        table = [
            {"method": method, "start": start, **{name: score.as_dict() for name, score in scores.items()}}
            for (method, start), scores in self.rows.items()
        ]
        return {"task": "demo", "out": str(self.out), "report": str(self.out / "report.html"), "table": table}

    def render(self, console: Console) -> None:
        """Print the table and where to look next."""
        table = RichTable(title="accuracy on test pictures", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for column in ("", "starting from", *self.columns):
            table.add_column(column)
        for (method, start), scores in self.rows.items():
            table.add_row(method, start, *(str(scores[c]) if c in scores else "" for c in self.columns))
        console.print(table)
        console.print(
            f"report: {self.out / 'report.html'}   encoder: {self.out / 'pretrained' / 'encoder'}", soft_wrap=True
        )


def demo(modality: str = "image", out: str | Path = "demo-run") -> DemoResult:
    """Pre-train a tiny MAE on handwritten digits and a few emoji, and measure it with ten labels per digit."""
    demos: dict[str, Callable[[Path], DemoResult]] = {"image": image_demo}
    if modality not in demos:
        raise UserError(f"--modality '{modality}' has no demo{nearest(modality, demos)}")
    return demos[modality](Path(out))


def image_demo(out: Path) -> DemoResult:
    """Run the demo on pictures: ``out`` gets the data, the run, two fine-tuned runs, the table and the report."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    data, run = out / "data", out / "pretrained"
    # A model this small leaves a core to the data worker: on two cores one thread trains 1.3 x faster than two.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    unpack(PICTURES, data)
    note("1 of 3: pre-training a masked autoencoder on 8,400 pictures without labels")
    pretrain(load_recipe("image-mae-tiny", PRETRAINING), data, run)
    train, test = (digits(data, split) for split in ("train", "test"))
    encoder = load(run)
    torch.manual_seed(RANDOM_SEED)
    random = Encoder(encoder.config).eval()
    few = f"{SHOTS} labels per class"
    _, targets, _ = class_targets(train, test)
    chosen = train.select(subset(targets, None, SHOTS, 0) or [])
    rows: Rows = {}
    note(f"2 of 3: fine-tuning with {few}, from the pre-trained encoder and from scratch")
    for start, scratch in (("pre-trained", False), ("scratch", True)):
        folder = out / f"finetuned-from-{start}"
        tuned = finetune(encoder, train, test, folder, shots=SHOTS, scratch=scratch, overrides=FINETUNING)
        rows["fine-tuned", start] = {few: tuned.scores["top1"]}
    note("3 of 3: linear probe and nearest neighbours on frozen features")
    starts: dict[str, Extractor] = {"pre-trained": encoder, "random weights": random, "raw pixels": RawPixels(encoder)}
    for method, measure in (("linear probe", probe_top1), ("10 nearest neighbours", knn_top1)):
        for start, extractor in starts.items():
            rows[method, start] = {few: measure(extractor, chosen, test)}
    result = DemoResult(out, rows, [few])
    write_json(out / "demo.json", result.as_dict())
    report(result, data)
    return result


def probe_top1(extractor: Extractor, train: Listing, test: Listing) -> Score:
    """Return the linear probe's accuracy."""
    return linear_probe(extractor, train, test).scores["top1"]


def knn_top1(extractor: Extractor, train: Listing, test: Listing) -> Score:
    """Return the accuracy of 10 nearest neighbours."""
    return knn(extractor, train, test, k=(10,)).scores[10]["top1"]


def note(text: str) -> None:
    """Tell what comes next."""
    print(text, file=sys.stderr, flush=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the demo's pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def digits(data: Path, split: str) -> Listing:
    """Return the digits of a split; the emoji have no labels and are there for their colours."""
    kind = MODALITIES["image"]
    listing = list_files(data, kind, split=split)
    return listing.select([i for i, source in enumerate(listing.columns["source"]) if source == "digits"])


def report(result: DemoResult, data: Path) -> None:
    """Write the demo's report over the run's: its finding first."""
    rows = result.rows
    few = result.columns[0]
    tuned, scratch = rows["fine-tuned", "pre-trained"][few], rows["fine-tuned", "scratch"][few]
    better = tuned.low > scratch.high
    title = (
        f"With {few}: {100 * tuned.value:.0f} % right after pre-training, {100 * scratch.value:.0f} % from scratch"
        if better
        else f"With {few}, pre-training made no clear difference here"
    )
    table = Table(
        "What was learned without labels",
        "Accuracy on 2,000 test digits with a 95 % bootstrap interval. Every row is what this run measured.",
        ["method", "starting from", *result.columns],
        [[method, start, *(scores.get(c, "") for c in result.columns)] for (method, start), scores in rows.items()],
        highlight=[0],
    )
    kind = MODALITIES["image"]
    held_out = list_files(data, kind, split="test")
    emoji = [i for i, source in enumerate(held_out.columns["source"]) if source == "emoji"]
    digit = [i for i, source in enumerate(held_out.columns["source"]) if source == "digits"][:: 2000 // 6]
    sections = run_sections(Run(result.out / "pretrained"), held_out.select([*digit[:6], *emoji]), held_out=True)
    words = Words(
        "How to read this",
        "An encoder learned from pictures alone, by predicting hidden patches from visible ones. Then it was given "
        f"{few}: fine-tuning trains all of it, the linear probe and the nearest neighbours use its vectors as they "
        "are. "
        "Scratch, random weights and raw pixels are the same measurements without pre-training.",
    )
    subtitle = "A masked autoencoder, pre-trained on 8,400 unlabelled pictures on this machine"
    write_report(result.out / "report.html", title, subtitle, [table, words, *sections])
