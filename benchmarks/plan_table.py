"""The published recipes planned on paper for 64 cards of 80 GB: ``python benchmarks/plan_table.py [RECIPE ...]``.

Nothing is measured: memory is traced on tensors without bytes, days are operations over 40 % of the peak of an H100 in
bf16. The samples of an epoch are those of the papers' data sets.
"""

import sys
from typing import Any, NamedTuple

from tasks.build import load_recipe
from tasks.plan import cards, plan

GPUS, CARD, MFU = 64, "h100", 0.4


class Paper(NamedTuple):
    """What the paper trained on, and what it says of the time."""

    samples: int
    data: str
    time: str = ""


IMAGENET, KINETICS, AUDIOSET, WIT = 1_281_167, 240_436, 2_000_000, 400_000_000
PAPERS = {
    "image-mae-b16": Paper(IMAGENET, "ImageNet-1k"),
    "image-mae-l16": Paper(IMAGENET, "ImageNet-1k"),
    "image-mae-h14": Paper(IMAGENET, "ImageNet-1k"),
    "video-mae-s16": Paper(KINETICS, "Kinetics-400"),
    "video-mae-b16": Paper(KINETICS, "Kinetics-400"),
    "video-mae-l16": Paper(KINETICS, "Kinetics-400"),
    "video-mae-h16": Paper(KINETICS, "Kinetics-400"),
    "audio-mae-b16": Paper(AUDIOSET, "AudioSet-2M"),
    "siam-mae-s16": Paper(KINETICS, "Kinetics-400"),
    "cpc-audio": Paper(28_539, "LibriSpeech 100 h"),
    "cpc-image-v2": Paper(IMAGENET, "ImageNet-1k", "1 week"),
    "clip-b32": Paper(WIT, "400 M pairs"),
    "clip-b16": Paper(WIT, "400 M pairs"),
    "clip-l14": Paper(WIT, "400 M pairs"),
}


def line(name: str, paper: Paper) -> str:
    """Return a row of the table."""
    batch, gpus = load_recipe(name).train.batch_size, GPUS
    while batch % gpus:  # a batch too small for so many
        gpus //= 2
    found = plan_at(name, gpus, paper)
    facts, best = found.facts, found.proposal
    cells: list[Any] = [name, f"{facts['parameters'] / 1e6:,.0f} M", f"{facts['batch_size']:,}", gpus]
    if best is None:
        return f"| {' | '.join(map(str, [*cells, found.problem, '', '', '']))} |"
    cut = f"chunk {best.chunk:,}" if best.chunk else f"{best.micro_batch:,} x {best.accumulate}"
    stages = {row["deepspeed_config"]: row["memory_gb"] for row in found.stages}
    memory = " / ".join(f"{stages[key]:.1f}" for key in ("zero0", "zero1", "zero2", "zero3"))
    cells += [best.deepspeed_config, cut, memory, f"{facts['gflop_per_sample_training']:,.0f}"]
    cells += [f"{facts['tflop_per_step']:,.1f}", f"{facts['steps']:,}", f"{24 * facts['days']:,.1f} h", paper.data]
    return f"| {' | '.join(map(str, [*cells, paper.time]))} |"


def plan_at(name: str, gpus: int, paper: Paper) -> Any:
    """Plan a recipe on so many cards."""
    return plan(name, machines=cards(gpus, CARD, None, None, MFU), samples=paper.samples)


def main() -> None:
    """Print the table."""
    head = "recipe | weights | batch | cards | stage | per rank | GB by stage 0 / 1 / 2 / 3 | GFLOP per sample"
    print(f"| {head} | TFLOP per step | steps | on paper | data | paper |")
    print("|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|---|---|")
    for name in sys.argv[1:] or PAPERS:
        print(line(name, PAPERS[name]), flush=True)


if __name__ == "__main__":
    main()
