"""What pre-training is worth on small sets: fine-tuning at 1, 10 and 100 % of the labels, and frozen features.

``python benchmarks/results_table.py clipart=DIR speech=DIR --out OUT`` runs the command line itself, prints every
command with what it took, and the tables as markdown. DIR holds a manifest with the splits train and test. What has
finished in OUT is not run again, so it can be stopped and started. ``scenes`` makes its own manifest from clips.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = {"1%": "0,1,2", "10%": "0,1,2", "100%": "0,1"}
GREY = ["signal.mean=[0.5,0.5,0.5]", "signal.std=[0.5,0.5,0.5]"]
IMAGE_TUNING = ["optim.base_lr=5e-3", "optim.layer_decay=0.8", "train.batch_size=64", "data.workers=1"]


@dataclass(frozen=True)
class Set:
    """How a set is pre-trained on and fine-tuned for."""

    recipe: str
    pretrain: list[str]
    steps: int
    finetune: list[str]
    finetune_steps: dict[str, int]
    """Share of the labels -> steps; one that is not here is not run."""
    label_columns: tuple[str, ...] = ("label",)


def picture_set(steps: int, *signal: str) -> Set:
    """Return the settings for small pictures."""
    pretrain = [*GREY, *signal, "train.batch_size=128", "optim.base_lr=3e-3", "data.workers=1"]
    return Set("image-mae-tiny", pretrain, steps, IMAGE_TUNING, {"1%": 100, "10%": 150, "100%": 300})


DIGITS = ("signal.size=28", "model.tokenizer.patch_size=7", "signal.crop_scale=[0.5,1.0]", "signal.flip=false")
# Up to 4 kHz; mean and deviation as `mmssl data stats` measures them; tokens of 40 ms and all frequencies.
TELEPHONE = (
    "signal.sample_rate=8000", "signal.mels=40", "signal.seconds=0.96", "signal.longest=1.92", "signal.mean=-4.976",
    "signal.std=4.466", "model.tokenizer.patch_size=[40,4]",
)  # fmt: skip
SETS = {
    "mnist": picture_set(3500, *DIGITS),
    "emoji": picture_set(3500),
    "clipart": picture_set(1500),
    "speech": Set(
        "audio-mae-tiny",
        [*TELEPHONE, "train.batch_size=128", "optim.base_lr=3e-3", "data.workers=1"],
        2000,
        ["optim.base_lr=5e-3", "optim.layer_decay=0.8", "train.batch_size=64", "data.workers=1"],
        {"1%": 100, "10%": 150, "100%": 300},
        ("label", "group"),
    ),
    "scenes": Set(
        "video-mae-tiny",
        ["signal.fps=8", "train.batch_size=32", "optim.base_lr=4e-3", "data.workers=1"],
        600,
        ["signal.fps=8", "optim.base_lr=5e-3", "optim.layer_decay=0.8", "train.batch_size=32", "data.workers=1"],
        {},
    ),
}


def scenes(videos: Path, out: Path) -> str:
    """Write a manifest of pieces of clips: which clip one is from, learned from its first 4.5 s, tested after 5.5 s."""
    with (videos / "manifest.csv").open(encoding="utf-8") as file:
        clips = [(str((videos / row["path"]).resolve()), float(row["frames"]) / float(row["fps"]))
                 for row in csv.DictReader(file)]  # fmt: skip
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "start", "end"])
        for path, seconds in clips:
            if seconds < 8:
                continue
            for start in (0.0, 1.5, 3.0):
                writer.writerow([path, Path(path).stem, "train", start, start + 1.5])
            for start in (5.5, 6.7):
                writer.writerow([path, Path(path).stem, "test", start, start + 1.2])
    return str(out)


def starts(settings: Set) -> dict[str, list[str]]:
    """Return the settings of pre-training a set, and of a run that leaves the weights as they are drawn."""
    return {
        "pre-trained": [*settings.pretrain, f"train.steps={settings.steps}"],
        # One step at a learning rate of nothing: random weights in a run folder like any other.
        "random": [*settings.pretrain, "train.steps=1", "optim.lr=1e-12"],
    }


class Commands:
    """Runs commands of mmssl once, and remembers what each printed and took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, *words: str) -> dict[str, Any]:
        """Run ``mmssl WORDS --json`` unless ``name`` has a result, and return it."""
        file = self.out / f"{name}.json"
        line = "mmssl " + " ".join(words)
        if not file.exists():
            print(f"$ {line}", file=sys.stderr, flush=True)
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "mmssl", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MMSSL_CACHE": str(self.out / "cache")},
            )  # fmt: skip
            record = {"command": line, "seconds": time.monotonic() - began, "result": json.loads(done.stdout)}
            file.write_text(json.dumps(record))
        record = json.loads(file.read_text())
        self.seconds[line] = record["seconds"]
        return record["result"]  # type: ignore[no-any-return]


def measure(name: str, data: str, run: Commands) -> dict[str, Any]:
    """Pre-train on a set, and measure everything."""
    settings, folder = SETS[name], run.out / name
    for start, words in starts(settings).items():
        if not (run.out / f"{name}-{start}.json").exists():
            shutil.rmtree(folder / start, ignore_errors=True)
        run(f"{name}-{start}", "pretrain", settings.recipe, "--data", data, "--out", str(folder / start), *words)
    return {f"{name}, {column}": measure_column(name, column, data, run) for column in settings.label_columns}


def measure_column(name: str, column: str, data: str, run: Commands) -> dict[str, Any]:
    """Measure what the labels of one column can be told by."""
    settings, folder = SETS[name], run.out / name
    halves = ["--train", data, "--test", data, "--label-column", column]
    title = name if column == "label" else f"{name}-{column}"
    result: dict[str, Any] = {"knn": {}, "linear": {}, "finetune": {}}
    for start in starts(settings):
        encoder = str(folder / start)
        result["knn"][start] = run(f"{title}-knn-{start}", "knn", encoder, *halves)
        result["linear"][start] = run(f"{title}-linear-{start}", "linear-probe", encoder, *halves)
    for labels, steps in settings.finetune_steps.items():
        for start, flag in (("pre-trained", []), ("scratch", ["--scratch"])):
            out = folder / f"finetune-{column}-{start}-{labels.rstrip('%')}"
            key = f"{title}-finetune-{start}-{labels}"
            if not (run.out / f"{key}.json").exists():
                shutil.rmtree(out, ignore_errors=True)
            words = [*halves, "--labels", labels, "--seeds", SEEDS[labels], "--out", str(out), *flag]
            result["finetune"][start, labels] = run(
                key, "finetune", str(folder / "pre-trained"), *words, *settings.finetune, f"train.steps={steps}"
            )
    return result


def percent(score: dict[str, float]) -> str:
    """Return a score with its interval."""
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as markdown."""
    lines = ["| set | labels | from scratch | pre-trained | difference |", "|---|--:|--:|--:|--:|"]
    for name, result in results.items():
        for labels in sorted({labels for _, labels in result["finetune"]}, key=lambda share: float(share.rstrip("%"))):
            cells = {
                start: result["finetune"][start, labels]["summary"]["top1"] for start in ("scratch", "pre-trained")
            }
            difference = 100 * (cells["pre-trained"]["mean"] - cells["scratch"]["mean"])
            texts = [f"{100 * c['mean']:.1f} ± {100 * c['std']:.1f}" for c in cells.values()]
            lines.append(f"| {name} | {labels} | {texts[0]} | {texts[1]} | {difference:+.1f} |")
    lines += ["", "| set | k-NN, k = 10: random weights | pre-trained |", "|---|--:|--:|"]
    for name, result in results.items():
        cells = [percent(result["knn"][start]["scores"]["10"]["top1"]) for start in ("random", "pre-trained")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += ["", "| set | linear probe (logistic): random weights | pre-trained |", "|---|--:|--:|"]
    for name, result in results.items():
        cells = [percent(result["linear"][start]["scores"]["top1"]) for start in ("random", "pre-trained")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sets that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="+", help=f"name=folder; the names are {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    run = Commands(asked.out)
    results: dict[str, dict[str, Any]] = {}
    for name, _, data in (word.partition("=") for word in asked.sets):
        made = scenes(Path(data), asked.out / "scenes.csv") if name == "scenes" else data
        results |= measure(name, made, run)
    print(tables(results))
    print("\n| seconds | command |\n|--:|---|")
    for line, seconds in run.seconds.items():
        print(f"| {seconds:.0f} | `{line}` |")


if __name__ == "__main__":
    main()
