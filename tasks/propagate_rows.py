"""What there is of each sequence that labels were propagated through, and of all of them over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.propagate_scores import SequenceScores, counted

MOST_LINES = 6
"""With more sequences than these, only the mean, the best and the worst one have a curve."""


@dataclass(frozen=True)
class Row:
    """One sequence: what it is, and what it scored, if it could be scored."""

    name: str
    frames: int
    seconds: float
    scored: SequenceScores | None

    @property
    def value(self) -> float:
        """Its first score; NaN where there is none."""
        return math.nan if self.scored is None else next(iter(self.scored.means.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; scores are fractions."""
        facts = {"name": self.name, "frames": self.frames, "seconds": self.seconds}
        if self.scored is None:
            return {**facts, "scores": None, "parts": None, "curve": None}
        frames, values = self.scored.curve
        curve = {"frames": list(frames), "values": list(values)}
        return {**facts, "scores": self.scored.means, "parts": self.scored.parts, "curve": curve}

    def __str__(self) -> str:
        if self.scored is None:
            return counted(self.frames, "frame")
        return f"{counted(self.frames, 'frame')}, {words(next(iter(self.scored.means)))} {self.value:.1%}"


def curves(rows: Sequence[Row]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Return a line for each of few sequences; of many, the mean, the best and the worst one."""
    scored = {row.name: row.scored.curve for row in rows if row.scored is not None}
    if len(scored) <= MOST_LINES:
        return {name: (list(frames), values) for name, (frames, values) in scored.items()}
    at: dict[int, list[float]] = {}
    for frames, values in scored.values():
        for frame, value in zip(frames, values, strict=True):
            at.setdefault(frame, []).append(value)
    order = sorted(at)
    best, worst = max(rows, key=lambda row: row.value).name, min(rows, key=lambda row: row.value).name
    return {
        "mean": (list(order), [float(np.nanmean(at[frame])) for frame in order]),
        f"best: {best}": (list(scored[best][0]), scored[best][1]),
        f"worst: {worst}": (list(scored[worst][0]), scored[worst][1]),
    }


def pace(frames_per_second: float) -> str:
    """Return a speed in words."""
    if frames_per_second < 1:
        return f"{1 / frames_per_second:.2g} seconds per frame"
    return f"{frames_per_second:.3g} frames per second"


def words(name: str) -> str:
    """Return the name of a score as people read it."""
    return name.replace("_", " ")
