"""What a report shows of an objective that binds modalities together: how often each finds the other, and the scale."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report import Curve, Section


def pair_sections(metrics: Sequence[Mapping[str, Any]], candidates: int) -> list[Section]:
    """Return accuracy both ways, the scale and each pair's loss over training, of metrics that have them.

    ``candidates`` is among how many of a batch the right one is looked for, where none of them lacks a modality.
    """
    ways = {name: f"{match[1]} to {match[2]}" for name in metrics[-1] if (match := _WAY.fullmatch(name))}
    if not ways:
        return []
    steps = [line["step"] for line in metrics]
    accuracy = {words: (steps, [line[name] for line in metrics]) for name, words in ways.items()}
    sections: list[Section] = [
        Curve(
            "Accuracy both ways",
            "step",
            "the right one found",
            {**accuracy, "by chance": (steps, [1 / candidates] * len(steps))},
            f"How often the most similar of a batch's {candidates:,} is the right one. Training batches.",
            percent=True,
        ),
        Curve(
            "Scale",
            "step",
            "factor",
            {"1 / temperature": (steps, [line["scale"] for line in metrics])},
            "What similarities are multiplied with; it is learned, and 100 is the most.",
        ),
    ]
    losses = {name: " and ".join(name.split("_")[1:]) for name in metrics[-1] if name.startswith("loss_")}
    if losses:
        series = {words: (steps, [line[name] for line in metrics]) for name, words in losses.items()}
        sections.append(Curve("Loss of each pair", "step", "loss", series))
    return sections


_WAY = re.compile(r"accuracy_(\w+)_to_(\w+)")
