"""Classification scores with bootstrap intervals, and the table that shows them."""

import math
import warnings
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]
"""Test samples per class and outcome, int64 [..., classes, 3]: outside the best 5, within them, and the very best."""


class Score(NamedTuple):
    """A fraction (0 to 1) with the ends of its confidence interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return {"value", "low", "high"} for JSON."""
        return self._asdict()

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        return f"{self.value:.1%} ({100 * self.low:.1f}-{100 * self.high:.1f})"


def classification_scores(
    scores: Tensor, target: Tensor, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> dict[str, Score]:
    """Return "top1", "top5" (only for more than 5 classes) and "mean_per_class" of class scores [n, C] float.

    ``target`` is int64 [n]. Equal scores are ordered by class, so a constant classifier gets no more than the share of
    the first classes. "mean_per_class" is the mean recall over the classes that the test set (in a resample: that
    resample) holds. Intervals are percentiles of ``resamples`` bootstrap resamples of the test samples. Raises
    ValueError for NaN, for shapes that do not fit and for an empty test set.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1] or not len(target):
        raise ValueError(f"scores [n, C] and target [n] are needed, but got {[*scores.shape]} and {[*target.shape]}")
    return rank_scores(target_rank(scores, target), target, scores.shape[1], None, seed, resamples, confidence)


def rank_scores(
    rank: Tensor,
    target: Tensor,
    num_classes: int,
    groups: Tensor | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Score]:
    """Return the ``classification_scores`` of samples of which ``target_rank`` is known, int64 [n].

    Samples of one of the ``groups`` int64 [n], such as the frames of a file, are not independent: resamples are then of
    groups, each with all its samples.
    """
    outcome = ((rank < 5).long() + (rank < 1).long()).numpy()
    present, row = np.unique(target.cpu().numpy(), return_inverse=True)
    cell = row * 3 + outcome
    if groups is None:
        draw = _of_samples(np.bincount(cell, minlength=3 * len(present)))
    else:
        names, group = np.unique(groups.numpy(), return_inverse=True)
        cells = np.bincount(group * 3 * len(present) + cell, minlength=3 * len(present) * len(names))
        draw = _of_groups(cells.reshape(len(names), -1))
    counts = np.bincount(cell, minlength=3 * len(present)).reshape(-1, 3)
    result = _bootstrap(counts, draw, seed, resamples, confidence)
    if num_classes <= 5:
        del result["top5"]
    return result


def accuracy(correct: Tensor, confidence: float = 0.95) -> Score:
    """Return the share of True in ``correct`` (bool [n]) with Wilson's score interval.

    (Wilson, J. Am. Stat. Assoc. 22, 1927.) A bootstrap would give 0 of 18 an interval of no width.
    """
    if correct.ndim != 1 or not len(correct):
        raise ValueError(f"correct must be a non-empty vector, but has shape {[*correct.shape]}")
    n, share, z = len(correct), float(correct.double().mean()), NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Score(share, max(0.0, centre - half), min(1.0, centre + half))


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Return each class's average precision, float64 [C], for scores [n, C] and targets [n, C] of 0 and 1.

    It is the mean over the positives of the precision at their score: no interpolation, equal scores at once, as
    scikit-learn's. NaN for a class without a positive.
    """
    if scores.ndim != 2 or target.shape != scores.shape or not len(target):
        raise ValueError(f"scores and targets [n, C] are needed, but got {[*scores.shape]} and {[*target.shape]}")
    if scores.isnan().any():
        raise ValueError("class scores hold NaN")
    return _average_precisions(_rankings(scores, target), torch.ones(len(scores), 1))[0]


def average_precision_scores(
    scores: Tensor, target: Tensor, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> tuple[Score, list[Score]]:
    """Return the mean over the classes that have a positive (mAP), and each class's average precision (NaN for others).

    Intervals are percentiles of ``resamples`` bootstrap resamples of the samples; a resample's mean is over the classes
    that have a positive in it. Raises as ``average_precision``.
    """
    values = average_precision(scores, target).numpy()
    rankings = _rankings(scores, target)
    n, rng = len(scores), np.random.default_rng(seed)
    chunk = max(16, 2**20 // n)
    parts = []
    for first in range(0, resamples, chunk):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - first))
        counts = torch.from_numpy(drawn.T).float().contiguous()
        parts.append(_average_precisions(rankings, counts).numpy())
    found = np.concatenate(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN the mean is NaN, as it should be
        tail = (1 - confidence) / 2
        means = [np.nanmean(values), *np.nanquantile(np.nanmean(found, axis=1), [tail, 1 - tail])]
        bounds = np.nanquantile(found, [tail, 1 - tail], axis=0)
    per_class = [Score(*map(float, one)) for one in zip(values, *bounds, strict=True)]
    return Score(*map(float, means)), per_class


class _Ranking(NamedTuple):
    """A class's files from the best score down to the last positive. A step is one or more equal scores with a positive
    among them, and whatever lies between it and the step before: precision is looked at where a step ends.
    """

    files: Tensor
    """Indices, int32, up to the end of the last step."""
    steps: Tensor
    """Where each step begins in ``files``, int32."""
    positives: Tensor
    """Indices of the positives alone, int32, in the same order."""
    groups: Tensor
    """Where each step begins in ``positives``, int32."""


def _rankings(scores: Tensor, target: Tensor) -> list[_Ranking | None]:
    columns = zip(scores.double().numpy().T, target.numpy().T, strict=True)
    return [_ranking(*column) if column[1].any() else None for column in columns]


def _ranking(scores: Floats, positive: np.ndarray[Any, Any]) -> _Ranking:
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1) + 1
    places = np.flatnonzero(positive[order])
    step, groups = np.unique(np.searchsorted(ends, places, side="right"), return_index=True)
    stops = ends[step]
    parts = order[: stops[-1]], np.append(0, stops[:-1]), order[places], groups
    return _Ranking(*(torch.from_numpy(part.astype(np.int32)) for part in parts))


def _average_precisions(rankings: list[_Ranking | None], counts: Tensor) -> Tensor:
    """Return float64 [resamples, classes] of files that stand ``counts`` [n, resamples] times each."""
    none = torch.full(counts.shape[1:], torch.nan, dtype=torch.float64)
    return torch.stack([none if one is None else _average_precision(one, counts) for one in rankings], dim=1)


def _average_precision(ranking: _Ranking, counts: Tensor) -> Tensor:
    # Bags add rows up, many resamples at once. float32 holds these whole numbers exactly up to 16 million files.
    seen = F.embedding_bag(ranking.files, counts, ranking.steps, mode="sum").cumsum(0)
    gained = F.embedding_bag(ranking.positives, counts, ranking.groups, mode="sum")
    hits = gained.cumsum(0)
    return (gained.double() * hits / seen.clamp(min=1)).sum(0) / hits[-1]


def target_rank(scores: Tensor, target: Tensor, chunk: int = 4096) -> Tensor:
    """Return how many classes score above each sample's own, int64 [n], in scores [n, C]; ties by class order."""
    order = torch.arange(scores.shape[1], device=scores.device)
    ranks = []
    for part, own in zip(scores.split(chunk), target.split(chunk), strict=True):
        # Every comparison with NaN is false, which would put the sample's own class first.
        if part.isnan().any():
            raise ValueError("class scores hold NaN")
        reached = part.gather(1, own[:, None])
        before = (part > reached) | ((part == reached) & (order < own[:, None]))
        ranks.append(before.sum(1))
    return torch.cat(ranks).cpu()


_Draw = Callable[[np.random.Generator, int], Counts]
"""Makes so many resamples of a test set: the number of samples per class and outcome, [resamples, classes * 3]."""


def _of_samples(cells: Counts) -> _Draw:
    # All three scores depend on a resample only through the number of samples per (class, outcome), and those numbers
    # are exactly multinomial: drawing them costs classes instead of samples, 3 C numbers where n would be needed.
    filled = np.flatnonzero(cells)
    share = cells[filled] / cells.sum()

    def draw(rng: np.random.Generator, resamples: int) -> Counts:
        drawn = np.zeros((resamples, len(cells)), dtype=np.int64)
        drawn[:, filled] = rng.multinomial(cells.sum(), share, size=resamples)
        return drawn

    return draw


def _of_groups(cells: Counts) -> _Draw:
    # As float64, in which these whole numbers are exact, the product is a fast one.
    count, values = len(cells), cells.astype(np.float64)

    def draw(rng: np.random.Generator, resamples: int) -> Counts:
        times = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
        return (times.astype(np.float64) @ values).astype(np.int64)

    return draw


def _bootstrap(counts: Counts, draw: _Draw, seed: int, resamples: int, confidence: float) -> dict[str, Score]:
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // counts.size)
    parts = []
    for first in range(0, resamples, chunk):
        drawn = draw(rng, min(chunk, resamples - first))
        parts.append(_statistics(drawn.reshape(-1, *counts.shape)))
    values = _statistics(counts[None])
    tail = (1 - confidence) / 2
    bounds = {name: np.quantile(np.concatenate([part[name] for part in parts]), [tail, 1 - tail]) for name in values}
    return {name: Score(float(value[0]), *map(float, bounds[name])) for name, value in values.items()}


def _statistics(counts: Counts) -> dict[str, np.ndarray[Any, Any]]:
    per_class = counts.sum(-1)
    total = per_class.sum(-1)
    recall = counts[..., 2] / np.maximum(per_class, 1)
    return {
        "top1": counts[..., 2].sum(-1) / total,
        "top5": counts[..., 1:].sum((-1, -2)) / total,
        "mean_per_class": recall.sum(-1) / (per_class > 0).sum(-1),
    }


def scores_as_dict(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Return named scores for JSON."""
    return {name: score.as_dict() for name, score in scores.items()}


def score_table(title: str, rows: Mapping[str, Mapping[str, Score]], over: str = "test samples") -> Table:
    """Return a table of one row per name and one column per metric, with 95 % intervals; ``over`` is what they draw."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.caption, table.caption_justify = f"95 % bootstrap intervals over {over}", "left"
    table.add_column("", overflow="fold")
    metrics = list(next(iter(rows.values())))
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right", overflow="fold")
    for name, scores in rows.items():
        table.add_row(escape(name), *(str(scores[metric]) for metric in metrics))
    return table
