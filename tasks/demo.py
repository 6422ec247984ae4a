"""The demos: what self-supervision is for, shown on media that come with the package, offline and in minutes.

A demo is data: an archive, settings and what is measured (``Demo``). Running it is the same for all of them.
"""

import os
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
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
from tasks.batches import training_files
from tasks.build import load_recipe
from tasks.features import Extractor, class_targets
from tasks.finetune import finetune
from tasks.knn import knn
from tasks.labels import subset
from tasks.linear_probe import linear_probe
from tasks.metrics import Score
from tasks.pretrain import pretrain
from tasks.report import Section, Table, Words, write_report
from tasks.run_report import run_sections

DATA = Path(__file__).parent / "demo_data"
RANDOM_SEED = 4
"""Of the encoder with random weights."""
PRETRAINED, SCRATCH = "pre-trained", "scratch"
NEIGHBOURS = 10

Rows = dict[tuple[str, str], dict[str, Score]]
"""(method, starting point) -> column -> accuracy."""


@dataclass(frozen=True)
class Question:
    """What is asked of the encoder: rows of the manifest, their labels, how many of them."""

    what: str
    """What is to be recognised, in the plural: a column of the table."""
    source: str | None
    """The rows with this source; None takes all."""
    shots: int
    """Labels per class."""
    train: str = "train"
    test: str = "test"
    """Names of the splits."""
    finetuning: Mapping[str, Any] | None = None
    """Settings of fine-tuning; None does without it."""
    labels: str = "label"
    """The column of the manifest that holds them."""

    @property
    def few(self) -> str:
        """How few labels there are, in words."""
        return f"{self.shots} labels per class"

    @property
    def column(self) -> str:
        """The heading of its column."""
        return f"{self.what}, {self.few}"


@dataclass(frozen=True)
class Demo:
    """A demo's data and settings; the first question, which is to be fine-tuned for, gives the report its title."""

    name: str
    """What it is asked for by."""
    modality: str
    archive: Path
    """What is unpacked: media, and a manifest with the columns path, label, split and source."""
    recipe: str
    pretraining: Mapping[str, Any]
    questions: Sequence[Question]
    baselines: Callable[[Encoder], dict[str, Extractor]]
    """What the encoder is compared with besides itself at random, by name."""
    nouns: str
    """What is learned from, in the plural."""
    note: str
    """What the report says of the data and the baselines."""
    shown: Callable[[Listing], list[int]]
    """Which of the files of the split ``test`` are shown reconstructed."""
    learner: str = "a masked autoencoder"
    """What is pre-trained."""
    task: str = "by predicting hidden patches from visible ones"
    """How it learns."""
    drawn: Callable[[Encoder, Path], list[Section]] | None = None
    """Further sections of the report, from the encoder and the demo's folder."""


@dataclass(frozen=True)
class DemoResult:
    """The demo's table and where its report is."""

    out: Path
    rows: Rows
    columns: list[str]
    nouns: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        table = [
            {"method": method, "start": start, **{name: score.as_dict() for name, score in scores.items()}}
            for (method, start), scores in self.rows.items()
        ]
        return {"task": "demo", "out": str(self.out), "report": str(self.out / "report.html"), "table": table}

    def render(self, console: Console) -> None:
        """Print the table and where to look next."""
        title = f"accuracy on test {self.nouns}"
        table = RichTable(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for column in ("", "starting from", *self.columns):
            table.add_column(column)
        for (method, start), scores in self.rows.items():
            table.add_row(method, start, *(str(scores[c]) if c in scores else "" for c in self.columns))
        console.print(table)
        console.print(
            f"report: {self.out / 'report.html'}   encoder: {self.out / 'pretrained' / 'encoder'}", soft_wrap=True
        )


def demos() -> dict[str, Demo]:
    """Return the demos by name."""
    from tasks import demo_audio, demo_image, demo_speech, demo_video

    return {one.DEMO.name: one.DEMO for one in (demo_image, demo_video, demo_audio, demo_speech)}


def demo(modality: str = "image", out: str | Path = "demo-run") -> DemoResult:
    """Pre-train a tiny encoder on what comes with the package, and measure it with few labels."""
    known = demos()
    if modality not in known:
        raise UserError(f"--modality '{modality}' has no demo{nearest(modality, known)}")
    return run_demo(known[modality], Path(out))


def run_demo(demo: Demo, out: Path) -> DemoResult:
    """Run a demo: ``out`` gets the data, the run, two fine-tuned runs per question, the table and the report."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    data, run = out / "data", out / "pretrained"
    # A model this small leaves a core to the data worker: on two cores one thread trains 1.3 x faster than two.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    unpack(demo.archive, data)
    recipe = load_recipe(demo.recipe, demo.pretraining)
    learned_from = f"{len(training_files(recipe, data, None)):,} {demo.nouns}"
    note(f"1 of 3: pre-training {demo.learner} on {learned_from} without labels")
    pretrain(recipe, data, run)
    encoder = load(run)
    asked = [(question, *sides(question, demo.modality, data)) for question in demo.questions]
    rows: Rows = {}
    note(f"2 of 3: fine-tuning with {demo.questions[0].few}, from the pre-trained encoder and from scratch")
    for one in asked:
        fine_tune(*one, encoder, out, rows)
    note("3 of 3: linear probe and nearest neighbours on frozen features")
    torch.manual_seed(RANDOM_SEED)
    random = Encoder(encoder.config).eval()
    starts: dict[str, Extractor] = {PRETRAINED: encoder, "random weights": random, **demo.baselines(encoder)}
    for one in asked:
        frozen(*one, starts, rows)
    result = DemoResult(out, rows, [question.column for question in demo.questions], demo.nouns)
    write_json(out / "demo.json", result.as_dict())
    tests = {question.column: len(test) for question, _, test in asked}
    drawn = [] if demo.drawn is None else demo.drawn(encoder, out)
    report(demo, result, tests, learned_from, drawn)
    return result


def note(text: str) -> None:
    """Tell what comes next."""
    print(text, file=sys.stderr, flush=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a demo's data."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def sides(question: Question, modality: str, data: Path) -> tuple[Listing, Listing]:
    """Return the training and the test files that a question is about."""
    both = [list_files(data, MODALITIES[modality], split=split) for split in (question.train, question.test)]
    if question.source is None:
        return both[0], both[1]
    train, test = (
        one.select([i for i, source in enumerate(one.columns["source"]) if source == question.source]) for one in both
    )
    return train, test


def fine_tune(question: Question, train: Listing, test: Listing, encoder: Encoder, out: Path, rows: Rows) -> None:
    """Add to ``rows`` what fine-tuning with few labels reaches, from the encoder and from scratch."""
    if question.finetuning is None:
        return
    for start, scratch in ((PRETRAINED, False), (SCRATCH, True)):
        folder = out / f"{question.source or question.what}-from-{start}"
        tuned = finetune(
            encoder, train, test, folder, label_column=question.labels, shots=question.shots, scratch=scratch,
            overrides=question.finetuning,
        )  # fmt: skip
        rows.setdefault(("fine-tuned", start), {})[question.column] = tuned.scores["top1"]


def frozen(question: Question, train: Listing, test: Listing, starts: Mapping[str, Extractor], rows: Rows) -> None:
    """Add to ``rows`` what the features of every starting point reach with the labels that fine-tuning has."""
    _, targets, _ = class_targets(train, test, question.labels)
    train = train.select(subset(targets, None, question.shots, 0) or [])
    for method, measure in (("linear probe", probe_top1), (f"{NEIGHBOURS} nearest neighbours", knn_top1)):
        for start, extractor in starts.items():
            rows.setdefault((method, start), {})[question.column] = measure(extractor, train, test, question.labels)


def probe_top1(extractor: Extractor, train: Listing, test: Listing, labels: str = "label") -> Score:
    """Return the linear probe's accuracy."""
    return linear_probe(extractor, train, test, labels).scores["top1"]


def knn_top1(extractor: Extractor, train: Listing, test: Listing, labels: str = "label") -> Score:
    """Return the accuracy of nearest neighbours."""
    return knn(extractor, train, test, labels, k=(NEIGHBOURS,)).scores[NEIGHBOURS]["top1"]


def finding(question: Question, rows: Rows) -> str:
    """Return in a sentence what pre-training was good for: a difference counts where intervals do not overlap."""
    scores = {names: row[question.column] for names, row in rows.items() if question.column in row}
    tuned, scratch = scores["fine-tuned", PRETRAINED], scores["fine-tuned", SCRATCH]
    if tuned.low > scratch.high:
        return f"With {question.few}: {tuned.value:.0%} right after pre-training, {scratch.value:.0%} from scratch"
    harm = scratch.low > tuned.high
    probed = scores["linear probe", PRETRAINED]
    others = {start: one for (method, start), one in scores.items() if method == "linear probe" and start != PRETRAINED}
    best = max(others, key=lambda start: others[start].value)
    if not harm and probed.low > max(one.high for one in others.values()):
        return (
            f"With {question.few}, a linear probe is {probed.value:.0%} right after pre-training and "
            f"{others[best].value:.0%} on {best}; fine-tuning shows no clear difference"
        )
    return f"With {question.few}, pre-training {'did harm' if harm else 'made no clear difference'} here"


def report(
    demo: Demo, result: DemoResult, tests: Mapping[str, int], learned_from: str, drawn: Sequence[Section] = ()
) -> None:
    """Write the demo's report over the run's: its finding first."""
    measured = " and ".join(f"{count:,} test {column.partition(',')[0]}" for column, count in tests.items())
    table = Table(
        "What was learned without labels",
        f"Accuracy on {measured} with a 95 % bootstrap interval. Every row is what this run measured.",
        ["method", "starting from", *result.columns],
        [[*names, *(scores.get(c, "") for c in result.columns)] for names, scores in result.rows.items()],
        highlight=[i for i, (_, start) in enumerate(result.rows) if start == PRETRAINED],
    )
    test = list_files(result.out / "data", MODALITIES[demo.modality], split="test")
    sections = run_sections(Run(result.out / "pretrained"), test.select(demo.shown(test)), held_out=True)
    words = Words(
        "How to read this",
        f"An encoder learned from {demo.nouns} alone, {demo.task}. Then it was "
        "given few labels: fine-tuning trains all of it, the linear probe and the nearest neighbours use its vectors "
        f"as they are. {demo.note}",
    )
    subtitle = f"{demo.learner.capitalize()}, pre-trained on {learned_from} without labels on this machine"
    title = finding(demo.questions[0], result.rows)
    write_report(result.out / "report.html", title, subtitle, [table, words, *drawn, *sections])
