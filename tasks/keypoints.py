"""Keypoints as labels of tokens and back, and how many are found (PCK).

A point is (x, y) in pixels whose centres are whole numbers: a picture W pixels wide reaches from -0.5 to W - 0.5, and
token j of w has its centre at (j + 0.5) W / w - 0.5. Legend: t frames, k points, grid (h, w), size (H, W), N = h w.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.metrics import Score
from tasks.segments import Bools, Counts, Floats, draws, score

Heat = np.ndarray[Any, np.dtype[np.float32]]

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The shares of the scale that JHMDB is scored at."""
BOX_SHARE = 0.6
"""The scale is so much of the diagonal of the box around a body's points (Yang and Ramanan's measure on JHMDB)."""
STRONGEST = 5
"""From how many places of a heat map a point is read."""


class Tally(NamedTuple):
    """How many times each point was looked for and found in one sequence."""

    right: Counts
    """For each alpha and point: int64 [alphas, k]."""
    seen: Counts
    """For each point, int64 [k]."""


def tracked(visible: Bools) -> Bools:
    """Return what can be scored, bool [t, k]: points that are seen, and were given because they are in the first."""
    return visible & visible[:1]


def scales(truth: Floats, visible: Bools, objects: Counts) -> Floats:
    """Return the scale of each point's object in each frame, in pixels, float64 [t, k].

    It is ``BOX_SHARE`` of the diagonal of the box around the object's ``tracked`` points in that frame; ``objects``
    [k] says whose each point is. On JHMDB that is the published evaluation's box: around the truth of all
    points that were given, those that have left the picture as well. It is 0 where one point alone is left, which then
    has to be found exactly, and NaN where none is.
    """
    seen = tracked(visible)
    found = np.full(truth.shape[:2], np.nan)
    for one in np.unique(objects):
        own = objects == one
        places, known = truth[:, own], seen[:, own, None]
        low = np.where(known, places, np.inf).min(1)
        high = np.where(known, places, -np.inf).max(1)
        some = known.any((1, 2))
        found[np.ix_(some, own)] = BOX_SHARE * np.hypot(*(high - low)[some].T)[:, None]
    return found


def tally(truth: Floats, found: Floats, visible: Bools, scale: Floats, alphas: Sequence[float] = ALPHAS) -> Tally:
    """Count the points [t, k, 2] found within alpha x ``scale`` [t, k] (or [t, 1]) of the truth.

    The first frame is left out, since it was given, and so are points that are not ``tracked``. A point that was lost
    (NaN) is wrong. Raises ValueError for shapes that differ.
    """
    if truth.shape != found.shape or truth.shape[:2] != visible.shape:
        shapes = [*truth.shape], [*found.shape], [*visible.shape]
        raise ValueError(f"points [t, k, 2] twice and visible [t, k] are needed, but got {shapes}")
    seen = tracked(visible)[1:]
    distance = np.hypot(*np.moveaxis(found - truth, -1, 0))[1:]
    # Every comparison with NaN is false.
    right = [(seen & (distance <= alpha * scale[1:])).sum(0) for alpha in alphas]
    return Tally(np.array(right), seen.sum(0))


def pck(
    truth: Floats, found: Floats, visible: Bools, scale: Floats, alphas: Sequence[float] = ALPHAS
) -> dict[float, float]:
    """Return for each alpha the mean over a sequence's points of the share found, as ``tally`` counts; NaN for none."""
    counted = tally(truth, found, visible, scale, alphas)
    return {alpha: float(value) for alpha, value in zip(alphas, _means(counted.right, counted.seen), strict=True)}


def pck_scores(
    sequences: Sequence[tuple[Sequence[str], Tally]],
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Score]:
    """Return "PCK@alpha" for each alpha over sequences of (what kind each point is, its ``tally``).

    As published: points of a kind are counted together over all sequences, and the score is the mean over the kinds.
    Intervals are percentiles of bootstrap resamples of the sequences.
    """
    kinds = sorted({kind for names, _ in sequences for kind in names})
    pooled = np.stack([_pooled(names, counted, kinds) for names, counted in sequences])
    drawn = np.tensordot(draws(len(pooled), seed, resamples), pooled, axes=1)
    means = _means(drawn[:, :-1], drawn[:, -1:])
    return {f"PCK@{alpha:g}": score(column) for alpha, column in zip(alphas, means.T, strict=True)}


def _pooled(names: Sequence[str], counted: Tally, kinds: Sequence[str]) -> Counts:
    # [alphas + 1, kinds]: what was right at each alpha, and what was seen.
    member = np.array(names)[:, None] == np.array(kinds)
    pooled: Counts = np.concatenate([counted.right, counted.seen[None]]) @ member
    return pooled


def _means(right: Counts, seen: Counts) -> Floats:
    # The mean share along the last axis, over what was seen at all.
    share = np.where(seen > 0, right / np.maximum(seen, 1), 0).sum(-1)
    known = np.count_nonzero(seen, axis=-1)
    return np.where(known > 0, share / np.maximum(known, 1), np.nan)


def to_heatmaps(
    points: Floats, visible: Bools, grid: tuple[int, int], size: tuple[int, int], sigma: float = 0.5
) -> Heat:
    """Return points [k, 2] as labels of tokens: float32 [N, k + 1], the background first.

    Each is a Gaussian of ``sigma`` tokens whose peak, 1, is exactly at the point, between tokens too; all 0 for a point
    that is not ``visible`` [k]. The background is what the highest of them leaves of 1.
    """
    centre = (points + 0.5) * _tokens_per_pixel(grid, size) - 0.5
    squared = ((_places(grid)[:, None] - centre) ** 2).sum(-1)
    heat = np.where(visible, np.exp(-squared / (2 * sigma**2)), 0)
    return np.column_stack([1 - heat.max(1, initial=0), heat]).astype(np.float32)


def from_heatmaps(labels: Heat, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Floats, Bools]:
    """Return where points are in labels [N, k + 1]: pixels float64 [k, 2], and which were found, bool [k].

    A point is the mean of its ``STRONGEST`` places, weighted by their heat: at the sigma of ``to_heatmaps`` within a
    tenth of a token, but up to half a token too far inside along the picture's border. A point without heat is lost,
    its place NaN.
    """
    heat = labels[:, 1:].astype(np.float64)
    best = np.argsort(-heat, axis=0, kind="stable")[:STRONGEST]
    weight = np.take_along_axis(heat, best, axis=0).clip(min=0)
    total = weight.sum(0)
    found = total > 0
    place = (weight[..., None] * _places(grid)[best]).sum(0) / np.where(found, total, np.nan)[:, None]
    return (place + 0.5) / _tokens_per_pixel(grid, size) - 0.5, found


def _places(grid: tuple[int, int]) -> Floats:
    # (x, y) of every token, [N, 2], the rows of the grid one after the other.
    return np.indices(grid, dtype=np.float64)[::-1].reshape(2, -1).T


def _tokens_per_pixel(grid: tuple[int, int], size: tuple[int, int]) -> Floats:
    return np.array([grid[1] / size[1], grid[0] / size[0]])
