"""What a report shows of an objective that predicts ahead: how well each step is told, and how much is known of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tasks.report import Curve, Section

SNAPSHOTS = (0.1, 0.3, 1.0)
"""Shares of the training after which the steps are looked at."""
MEAN_OF = 5
"""Lines of metrics that are averaged for it, at most."""

Points: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""The x and the y values of a line."""


def ahead_sections(metrics: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return accuracy by step ahead and the bound on mutual information over training, of metrics that have them."""
    steps = sorted(int(match[1]) for name in metrics[-1] if (match := re.fullmatch(r"accuracy_(\d+)", name)))
    if not steps:
        return []
    chance = float(np.exp(-metrics[-1]["log_n"]))
    by_step, lines = _snapshots(metrics, steps)
    by_step["by chance"] = (steps, [chance] * len(steps))
    times = [line["step"] for line in metrics]
    ends = dict.fromkeys((steps[0], steps[-1]))
    bounds = {
        **{f"{k} ahead": (times, [line[f"bound_{k}"] for line in metrics]) for k in ends},
        "log N, the most it can be": (times, [line["log_n"] for line in metrics]),
        "mean over steps": (times, [line["bound"] for line in metrics]),
    }
    return [
        Curve(
            "Accuracy by step ahead",
            "steps ahead",
            "the true one found",
            by_step,
            f"How often the true one scores highest of all candidates; by chance {chance:.1%}. Training batches, "
            f"{lines}.",
            percent=True,
        ),
        Curve(
            "Bound on mutual information",
            "step",
            "nats",
            bounds,
            "log N - loss: at least so much is known of what is ahead. 0 or less means that nothing is known yet.",
        ),
    ]


def _snapshots(metrics: Sequence[Mapping[str, Any]], steps: Sequence[float]) -> tuple[dict[str, Points], str]:
    """Return the accuracy of each step after each share of the training, and of how many lines it is the mean."""
    # The first line is of the first step, at which all candidates can score alike: no accuracy of what comes later.
    later = metrics[1:] or metrics
    by_step: dict[str, Points] = {}
    counts = set()
    for end in sorted({max(1, round(share * len(later))) for share in SNAPSHOTS}):
        lines = later[max(0, end - MEAN_OF) : end]
        counts.add(len(lines))
        done = lines[-1]["step"]
        values = [float(np.mean([line[f"accuracy_{k}"] for line in lines])) for k in steps]
        by_step[f"after {done:,} training step{'' if done == 1 else 's'}"] = (steps, values)
    most = max(counts)
    span = f"{most}" if len(counts) == 1 else f"{min(counts)} to {most}"
    return by_step, f"mean of {span} line{'' if most == 1 else 's'} of metrics"
