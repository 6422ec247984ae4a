"""Scores of propagated masks: region similarity J, contour accuracy F and the mean IoU of parts.

J and F are those of DAVIS (Perazzi et al., CVPR 2016, section 4) as its 2017 toolkit measures them. Void is left out,
as by its measures; its evaluation never hands them any, since its reader has turned void into background by then.
Legend: t frames, [h, w] pixels, n values, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from tasks.metrics import Score

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Ids = np.ndarray[Any, np.dtype[np.uint8]]
"""Masks: the number of an object or a class, 0 for background, ``VOID`` where nobody knows."""

VOID = 255
TOLERANCE = 0.008
"""How far a contour may be off, as a share of the picture's diagonal: the value of DAVIS."""


class Statistics(NamedTuple):
    """What DAVIS says of an object's values in the frames of its sequence."""

    mean: float
    recall: float
    """The share of frames above 0.5."""
    decay: float
    """How much less the last quarter of the frames has than the first."""


class ObjectScores(NamedTuple):
    """An object's values in every scored frame, float64 [t - 2] each: the first and the last frame are left out."""

    jaccard: Floats
    boundary: Floats

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of "J" and of "F"."""
        return {"J": statistics(self.jaccard), "F": statistics(self.boundary)}


def jaccard(truth: Bools, found: Bools, void: Bools | None = None) -> float:
    """Return intersection over union of bool [h, w] without the pixels in ``void``; 1 where both are empty."""
    if void is not None:
        truth, found = truth & ~void, found & ~void
    union = np.count_nonzero(truth | found)
    return np.count_nonzero(truth & found) / union if union else 1.0


def boundary_f(truth: Bools, found: Bools, void: Bools | None = None, tolerance: float = TOLERANCE) -> float:
    """Return the F-measure of the contours of two masks, bool [h, w], from 0 to 1.

    A contour pixel is right if the other mask has one within ceil(``tolerance`` x diagonal) pixels. An empty mask has
    precision 1 and recall 0 against one that is not, and F is 1 where both have no contour.
    """
    if void is not None:
        truth, found = truth & ~void, found & ~void
    reach = math.ceil(tolerance * math.hypot(*truth.shape))
    of_truth, of_found = _contour(truth), _contour(found)
    if not len(of_truth) or not len(of_found):
        return float(len(of_truth) == len(of_found))
    precision, recall = _matched(of_found, of_truth, reach), _matched(of_truth, of_found, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(mask: Bools) -> Counts:
    # Rows and columns, [n, 2], of the pixels that differ from their right, lower or lower right neighbour. Only the
    # mask's box can have any, and the pixels around it, whose neighbours beyond are as empty as they are.
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.empty((0, 2), np.int64)
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    box = mask[top : rows[-1] + 2, left : columns[-1] + 2]
    edge = np.zeros_like(box)
    edge[:, :-1] |= box[:, :-1] ^ box[:, 1:]
    edge[:-1] |= box[:-1] ^ box[1:]
    edge[:-1, :-1] |= box[:-1, :-1] ^ box[1:, 1:]
    points: Counts = np.argwhere(edge) + np.array([top, left])
    return points


def _matched(points: Counts, others: Counts, reach: int) -> float:
    # Roots of whole numbers are rounded correctly, so the distances up to ``reach`` are exactly the disk's.
    distance, _ = cKDTree(others).query(points, distance_upper_bound=reach + 0.5)
    return np.count_nonzero(distance <= reach) / len(points)


def statistics(values: Floats) -> Statistics:
    """Return mean, recall and decay of values [n], NaN left out of the means; raises ValueError for none.

    For the decay frames are cut into four parts at evenly spaced whole numbers; neighbours share the frame between.
    """
    if not len(values):
        raise ValueError("an object needs at least one scored frame")
    cuts = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[: cuts[1] + 1], values[cuts[3] :]
    return Statistics(_mean(values), float(np.mean(values > 0.5)), _mean(first) - _mean(last))


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def object_ids(first: Ids) -> range:
    """Return the objects of a sequence: 1 up to the largest number in its first frame's mask, void left out."""
    return range(1, int(first[first != VOID].max(initial=0)) + 1)


def object_scores(truth: Ids, found: Ids) -> dict[int, ObjectScores]:
    """Return what every object of a sequence scores, given all of its annotated frames, uint8 [t, h, w] each.

    The first frame, which was given, and the last one are left out, as DAVIS does. A number that the first frame skips
    counts as an object all the same. Raises ValueError for fewer than 3 frames and for shapes that differ.
    """
    if truth.shape != found.shape or truth.ndim != 3:
        raise ValueError(f"masks [t, h, w] of one shape are needed, but got {[*truth.shape]} and {[*found.shape]}")
    if len(truth) < 3:
        raise ValueError(
            f"J and F leave out the first and the last frame, so they need 3 annotated ones, not {len(truth)}"
        )
    values = {one: np.empty((len(truth) - 2, 2)) for one in object_ids(truth[0])}
    for i, (true, guess) in enumerate(zip(truth[1:-1], found[1:-1], strict=True)):
        unknown = true == VOID
        void = unknown if unknown.any() else None
        for one, row in values.items():
            masks = true == one, guess == one
            row[i] = jaccard(*masks, void), boundary_f(*masks, void)
    return {one: ObjectScores(*row.T) for one, row in values.items()}


def davis_scores(
    sequences: Sequence[Mapping[int, ObjectScores]], seed: int = 0, resamples: int = 1000
) -> dict[str, Score]:
    """Return "J&F_mean" and the "_mean", "_recall" and "_decay" of "J" and "F", each object counting once.

    Intervals are percentiles of bootstrap resamples of the sequences. Raises ValueError for a sequence without objects
    and for no sequences.
    """
    sums = np.array([_sums(objects) for objects in sequences])
    if not len(sums) or not sums[:, 0].all():
        raise ValueError("every sequence needs an object to be scored")
    counts = draws(len(sums), seed, resamples) @ sums
    table = counts[:, 1:] / counts[:, :1]
    both = table[:, [0, 3]].mean(1)
    names = [f"{measure}_{name}" for measure in "JF" for name in Statistics._fields]
    return {"J&F_mean": score(both), **{name: score(column) for name, column in zip(names, table.T, strict=True)}}


def _sums(objects: Mapping[int, ObjectScores]) -> list[float]:
    # How many objects, and the sums over them of three statistics of J and three of F.
    rows = [[value for one in scores.statistics().values() for value in one] for scores in objects.values()]
    return [len(rows), *np.array(rows).reshape(-1, 6).sum(0)]


def draws(n: int, seed: int = 0, resamples: int = 1000) -> Counts:
    """Return how often each of n things stands in bootstrap resamples, int64 [1 + resamples, n].

    The first row is no resample: everything stands in it once.
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n), np.int64), drawn])


def score(values: Floats, confidence: float = 0.95) -> Score:
    """Return a score from its values for the rows of ``draws``; resamples for which it is not defined are left out."""
    resampled = values[1:][~np.isnan(values[1:])]
    tail = (1 - confidence) / 2
    bounds = np.quantile(resampled, [tail, 1 - tail]) if len(resampled) else (math.nan, math.nan)
    return Score(float(values[0]), *map(float, bounds))


def confusion(truth: Ids, found: Ids, classes: int) -> Counts:
    """Return how many pixels of each true class were found to be of each class, int64 [C, C], truth along the rows.

    Masks are uint8 [t, h, w]. The first frame is left out, since it was given; so is every pixel whose truth is
    ``classes`` or more, ``VOID`` above all. Raises ValueError for fewer than 2 frames, for shapes that differ and for
    found classes that do not exist.
    """
    if truth.shape != found.shape or truth.ndim != 3 or len(truth) < 2:
        raise ValueError(f"two masks [t, h, w], t > 1, are needed, but got {[*truth.shape]} and {[*found.shape]}")
    true, guess = truth[1:].ravel(), found[1:].ravel()
    known = true < classes
    guess = guess[known]
    if guess.max(initial=0) >= classes:
        raise ValueError(f"class {guess.max()} was found, but there are only {classes}")
    return np.bincount(true[known].astype(np.int64) * classes + guess, minlength=classes**2).reshape(classes, classes)


def mean_iou(counts: Counts) -> tuple[float, Floats]:
    """Return the mean IoU over the classes that occur in truth or finding, and each class's (NaN for the others).

    ``counts`` is a sum of ``confusion`` over sequences, as VIP is evaluated; the background is a class as any other.
    """
    per_class = _ious(_marginals(counts))
    return _mean(per_class), per_class


def part_scores(sequences: Sequence[Counts], seed: int = 0, resamples: int = 1000) -> tuple[Score, Floats]:
    """Return ``mean_iou`` of all sequences' ``confusion`` together, with a bootstrap interval over the sequences."""
    marginals = np.stack([_marginals(counts) for counts in sequences])
    drawn = draws(len(marginals), seed, resamples)
    per_class = _ious(np.tensordot(drawn, marginals, axes=1))
    return score(np.array([_mean(row) for row in per_class])), per_class[0]


def _marginals(counts: Counts) -> Counts:
    return np.stack([np.diagonal(counts), counts.sum(0), counts.sum(1)])


def _ious(marginals: Counts) -> Floats:
    both, found, true = np.moveaxis(marginals, -2, 0)
    union = found + true - both
    return np.where(union > 0, both / np.maximum(union, 1), np.nan)
