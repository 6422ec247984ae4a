"""What a report shows of an objective that predicts ahead: how well each step is told, and how much is known of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.report import Curve, Section

SNAPSHOTS = (0.1, 0.3, 1.0)
"""Shares of the training after which the steps are looked at."""
MEAN_OF = 5
"""Lines of metrics that are averaged for it."""


def ahead_sections(metrics: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return accuracy by step ahead and the bound on mutual information over training, of metrics that have them."""
    steps = sorted(int(match[1]) for name in metrics[-1] if (match := re.fullmatch(r"accuracy_(\d+)", name)))
    if not steps:
        return []
    chance = float(np.exp(-metrics[-1]["log_n"]))
    by_step = {}
    for share in SNAPSHOTS:
        end = max(1, round(share * len(metrics)))
        lines = metrics[max(0, end - MEAN_OF) : end]
        values = [float(np.mean([line[f"accuracy_{k}"] for line in lines])) for k in steps]
        by_step[f"after {lines[-1]['step']:,} training steps"] = (steps, values)
    times = [line["step"] for line in metrics]
    ends = dict.fromkeys((steps[0], steps[-1]))
    bounds = {
        **{f"{k} ahead": (times, [line[f"bound_{k}"] for line in metrics]) for k in ends},
        "log N, the most it can be": (times, [line["log_n"] for line in metrics]),
        **{
            f"{k} ahead": (times, [line[f"bound_{k}"] for line in metrics])
            for k in dict.fromkeys((steps[0], steps[-1]))
        },
        "mean over steps": (times, [line["bound"] for line in metrics]),
    }
    return [
        Curve(
            "Accuracy by step ahead",
            "steps ahead",
            "the true one found",
            by_step,
            f"How often the true moment scores highest of all candidates; by chance {chance:.1%}. Training batches, "
            f"mean of {MEAN_OF} lines of metrics.",
            percent=True,
        ),
        Curve("Bound on mutual information", "step", "nats", bounds, "log N - loss: what is known of what comes next."),
    ]
