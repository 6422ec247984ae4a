"""The scores of what was followed through annotated sequences: one board per kind, filled sequence by sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from tasks.keypoints import ALPHAS, Tally, pck, pck_scores, tally, tracked
from tasks.metrics import Score
from tasks.segments import VOID, Counts, ObjectScores, confusion, davis_scores, mean_iou, object_scores, part_scores
from tasks.tracks import MaskTrack, PointTrack

LEAST = {"masks": 3, "parts": 2}
"""How many annotated frames a sequence needs to be scored: J and F leave out the first and the last one."""


UNSCORED = {
    "masks": f"fewer than {LEAST['masks']} of their frames are annotated",
    "parts": f"fewer than {LEAST['parts']} of their frames are annotated",
    "keypoints": "none of their points is visible after the first frame",
}
"""Why a sequence has no score."""


def counted(number: int, word: str) -> str:
    """Return "1 object", "2 objects" and so on."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


class SequenceScores(NamedTuple):
    """What one sequence scored; fractions."""

    means: Mapping[str, float]
    """By the names of the columns of a table."""
    parts: Mapping[str, Mapping[str, float]]
    """The same for each object or class."""
    curve: tuple[Sequence[int], Sequence[float]] = ((), ())
    """Frames, and the score of each."""


class Board(Protocol):
    """Collects what sequences of one kind scored."""

    measure: str
    """What the curves show."""

    def add(self, track: Any) -> SequenceScores | None:
        """Score a sequence that was followed to its end; None where that is not possible (see ``UNSCORED``)."""
        ...

    def overall(self, seed: int) -> dict[str, Score]:
        """Return the scores over all sequences, none where no sequence was scored."""
        ...

    def classes(self) -> dict[str, float]:
        """Return the score of each class over all sequences, where there are classes."""
        ...

    def over(self) -> str:
        """Return what the scores over all sequences are means over, in words."""
        ...


@dataclass
class MaskBoard:
    """J and F as DAVIS has them."""

    measure: str = "J"
    kept: list[dict[int, ObjectScores]] = field(default_factory=list)

    def add(self, track: MaskTrack) -> SequenceScores | None:
        """Score a sequence's objects."""
        if len(track.truth) < LEAST["masks"]:
            return None
        objects = object_scores(*track.annotated())
        self.kept.append(objects)
        parts = {str(one): _davis_row(scores) for one, scores in objects.items()}
        curve = np.mean([scores.jaccard for scores in objects.values()], axis=0)
        return SequenceScores(_means(parts), parts, ([*track.truth][1:-1], curve.tolist()))

    def overall(self, seed: int) -> dict[str, Score]:
        """Return mean, recall and decay over all objects."""
        return davis_scores(self.kept, seed) if self.kept else {}

    def classes(self) -> dict[str, float]:
        """Return nothing: objects of different sequences have nothing to do with each other."""
        return {}

    def over(self) -> str:
        """Return how many objects there are."""
        return f"the {counted(sum(map(len, self.kept)), 'object')}"


def _davis_row(scores: ObjectScores) -> dict[str, float]:
    named = {f"{name}_{part}": value for name, one in scores.statistics().items()
             for part, value in one._asdict().items()}  # fmt: skip
    return {"J&F_mean": (named["J_mean"] + named["F_mean"]) / 2, **named}


def _means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(rows.values()))
    return {name: float(np.mean([row[name] for row in rows.values()])) for name in names}


@dataclass
class PartBoard:
    """The mean IoU of classes, as VIP has it."""

    measure: str = "mIoU"
    kept: list[Counts] = field(default_factory=list)

    def add(self, track: MaskTrack) -> SequenceScores | None:
        """Score a sequence's classes."""
        if len(track.truth) < LEAST["parts"]:
            return None
        counts = confusion(*track.annotated(), VOID)
        self.kept.append(counts)
        mean, per_class = mean_iou(counts)
        frames, truth, found = [*track.truth][1:], *track.annotated()
        curve = [mean_iou(confusion(truth[[i, i]], found[[i, i]], VOID))[0] for i in range(1, len(truth))]
        return SequenceScores({"mIoU": mean}, {k: {"IoU": v} for k, v in _known(per_class).items()}, (frames, curve))

    def overall(self, seed: int) -> dict[str, Score]:
        """Return the mean over the classes."""
        return {"mIoU": part_scores(self._trimmed(), seed)[0]} if self.kept else {}

    def classes(self) -> dict[str, float]:
        """Return every class's IoU."""
        return _known(part_scores(self._trimmed(), resamples=1)[1]) if self.kept else {}

    def over(self) -> str:
        """Return how many classes there are; an object is one, and so is the background."""
        return f"the {len(self.classes())} classes (the background, 0, is one)"

    def _trimmed(self) -> list[Counts]:
        # Without the classes that nobody has.
        used = np.flatnonzero(np.sum([counts.sum(0) + counts.sum(1) for counts in self.kept], axis=0))
        return [counts[: used[-1] + 1, : used[-1] + 1] for counts in self.kept]


def _known(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    return {str(i): float(value) for i, value in enumerate(values) if not np.isnan(value)}


@dataclass
class PointBoard:
    """The share of keypoints that were found."""

    measure: str = "PCK@0.1"
    kept: list[tuple[Sequence[str], Tally]] = field(default_factory=list)

    def add(self, track: PointTrack) -> SequenceScores | None:
        """Score a sequence's points."""
        points, places, scale = track.points, track.places(), track.scales()
        counts = tally(points.truth, places, points.visible, scale)
        if not counts.seen.any():
            return None
        self.kept.append((points.kinds, counts))
        means = _percents(pck(points.truth, places, points.visible, scale))
        parts = {}
        for one in np.unique(points.objects):
            own = points.objects == one
            if not counts.seen[own].any():
                continue
            parts[str(one)] = _percents(
                pck(points.truth[:, own], places[:, own], points.visible[:, own], scale[:, own])
            )
        seen, right = tracked(points.visible)[1:], track.near()[1:]
        shares = (seen & right).sum(1) / np.where(seen.any(1), seen.sum(1), np.nan)
        return SequenceScores(means, parts, (range(1, len(places)), shares.tolist()))

    def overall(self, seed: int) -> dict[str, Score]:
        """Return PCK at every share of the scale."""
        return pck_scores(self.kept, seed=seed) if self.kept else {}

    def classes(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def over(self) -> str:
        """Return how many kinds of points were looked for."""
        kinds = {kind for names, counts in self.kept for kind, seen in zip(names, counts.seen, strict=True) if seen}
        return f"the {counted(len(kinds), 'kind')} of points"


def _percents(found: Mapping[float, float]) -> dict[str, float]:
    return {f"PCK@{alpha:g}": found[alpha] for alpha in ALPHAS}


BOARDS: dict[str, type[Board]] = {"masks": MaskBoard, "parts": PartBoard, "keypoints": PointBoard}
