"""What pre-training is worth on small picture sets: fine-tuning at 1, 10 and 100 % of the labels, and frozen features.

``python benchmarks/image_table.py clipart=DIR emoji=DIR mnist=DIR --out OUT`` runs the command line itself, prints
every command with what it took, and the tables as markdown. DIR holds a manifest with the splits train and test. What
has finished in OUT is not run again, so it can be stopped and started.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LABELS = ("1%", "10%", "100%")
SEEDS = {"1%": "0,1,2", "10%": "0,1,2", "100%": "0,1"}
GREY = ["signal.mean=[0.5,0.5,0.5]", "signal.std=[0.5,0.5,0.5]"]
SIGNAL = {
    "mnist": ["signal.size=28", "model.tokenizer.patch_size=7", "signal.crop_scale=[0.5,1.0]", "signal.flip=false"],
    "emoji": [],
    "clipart": [],
}
PRETRAIN = ["train.batch_size=128", "optim.base_lr=3e-3", "data.workers=1"]
STEPS = {"mnist": 3500, "emoji": 3500, "clipart": 1500}
FINETUNE = ["optim.base_lr=5e-3", "optim.layer_decay=0.8", "train.batch_size=64", "data.workers=1"]
FINETUNE_STEPS = {"1%": 100, "10%": 150, "100%": 300}


def starts(name: str) -> dict[str, list[str]]:
    """Return the settings of pre-training a set, and of a run that leaves the weights as they are drawn."""
    shared = [*GREY, *SIGNAL[name], *PRETRAIN]
    # One step at a learning rate of nothing: random weights in a run folder like any other.
    return {
        "pre-trained": [*shared, f"train.steps={STEPS[name]}"],
        "random": [*shared, "train.steps=1", "optim.lr=1e-12"],
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
    folder = run.out / name
    for start, words in starts(name).items():
        if not (run.out / f"{name}-{start}.json").exists():
            shutil.rmtree(folder / start, ignore_errors=True)
        run(f"{name}-{start}", "pretrain", "image-mae-tiny", "--data", data, "--out", str(folder / start), *words)
    halves = ["--train", data, "--test", data]
    result: dict[str, Any] = {"knn": {}, "linear": {}, "finetune": {}}
    for start in starts(name):
        encoder = str(folder / start)
        result["knn"][start] = run(f"{name}-knn-{start}", "knn", encoder, *halves)
        result["linear"][start] = run(f"{name}-linear-{start}", "linear-probe", encoder, *halves)
    for labels in LABELS:
        for start, flag in (("pre-trained", []), ("scratch", ["--scratch"])):
            out = folder / f"finetune-{start}-{labels.rstrip('%')}"
            key = f"{name}-finetune-{start}-{labels}"
            if not (run.out / f"{key}.json").exists():
                shutil.rmtree(out, ignore_errors=True)
            words = [*halves, "--labels", labels, "--seeds", SEEDS[labels], "--out", str(out), *flag, *FINETUNE]
            result["finetune"][start, labels] = run(
                key, "finetune", str(folder / "pre-trained"), *words, f"train.steps={FINETUNE_STEPS[labels]}"
            )
    return result


def percent(score: dict[str, float]) -> str:
    """Return a score with its interval."""
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as markdown."""
    lines = ["| set | labels | from scratch | pre-trained | difference |", "|---|--:|--:|--:|--:|"]
    for name, result in results.items():
        for labels in LABELS:
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
    parser.add_argument("sets", nargs="+", help=f"name=folder; the names are {', '.join(SIGNAL)}")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    run = Commands(asked.out)
    results = {name: measure(name, data, run) for name, _, data in (word.partition("=") for word in asked.sets)}
    print(tables(results))
    print("\n| seconds | command |\n|--:|---|")
    for line, seconds in run.seconds.items():
        print(f"| {seconds:.0f} | `{line}` |")


if __name__ == "__main__":
    main()
