"""Exact nearest neighbours among float16 vectors, read where they lie: a rough look at all, a careful one at few.

The product of two float16 tensors needs no copy and waits for memory alone, but rounds. How far it can be off is known
(``ROUGH``), so that whatever might be among the best is kept and computed again in float64. What is left of the work is
numpy's: it is little, and where other processes keep the cores busy, each small operation of several threads would wait
longer for its threads than it takes.

Shape legend: b rows of a block, d values of a vector, k results.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmssl.errors import UnusableData

ROUGH = 1.25e-3
"""How far a rough score of unit vectors is from the exact one at most: 2**-11 for the query in float16, as much for the
score in float16, and the rest for sums of up to 4,000 float32 products."""
LONGEST = 1 + 2e-3
"""What a product of unit vectors may be, each value rounded to float16."""
CHUNK = 2**11
"""Vectors that are looked at carefully at a time: 8 MB of 512 values in float64."""

Array: TypeAlias = np.ndarray[Any, Any]
Best: TypeAlias = tuple[Array, Array]
"""Scores float32 and row numbers int64, best first, equal ones by row."""


def nearest(blocks: Sequence[Tensor], query: Tensor, k: int) -> Best:
    """Return the ``k`` rows nearest to ``query`` float32 [d], or all where there are fewer, as ``nearest_plain`` does.

    ``blocks`` are float16 [b, d] on the CPU; all vectors are of length 1. Raises UnusableData where one of them is not
    finite, and where one of the best is longer.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, but got {k}")
    narrow, wide, best, first = query.half(), query.double().numpy(), _nothing(), 0
    for block in blocks:
        rough = torch.mv(block, narrow).numpy().astype(np.float32)
        if not np.isfinite(rough).all():
            raise UnusableData("vectors are NaN or infinite")
        rows = np.flatnonzero(rough >= _least(rough, best, k))
        scores = exact(block.numpy(), wide, rows)
        # A processor on which the bound does not hold gives the same answer in the slow way.
        if len(rows) and np.abs(scores).max() > LONGEST:
            raise UnusableData("vectors are longer than 1")
        if len(rows) and np.abs(scores - rough[rows]).max() > ROUGH:
            return nearest_plain(blocks, query, k)
        best = merge(best, (scores, rows + first), k)
        first += len(block)
    return best


def nearest_plain(blocks: Sequence[Tensor], query: Tensor, k: int) -> Best:
    """Return the ``k`` rows with the largest products with ``query``: float64 sums, as float32; of equals the first."""
    wide, best, first = query.double().numpy(), _nothing(), 0
    for block in blocks:
        rows = np.arange(len(block))
        best = merge(best, (exact(block.numpy(), wide, rows), rows + first), k)
        first += len(block)
    return best


def exact(block: Array, query: Array, rows: Array) -> Array:
    """Return the products of rows of a block with ``query`` float64 [d], rounded to float32: equal ones of equal rows.

    (A matrix product would add up the last rows of a block in another order than the first ones.)
    """
    scores = np.empty(len(rows), np.float32)
    for i in range(0, len(rows), CHUNK):
        some = block[rows[i : i + CHUNK]].astype(np.float64)
        some *= query
        scores[i : i + CHUNK] = some.sum(1)
    return scores


def merge(a: Best, b: Best, k: int) -> Best:
    """Return the ``k`` best of both, where the rows of ``b`` come after those of ``a``, each best first or by row."""
    scores, rows = (np.concatenate(parts) for parts in zip(a, b, strict=True))
    order = np.argsort(-scores, kind="stable")[:k]
    return scores[order], rows[order]


def _least(rough: Array, best: Best, k: int) -> float:
    """Return the rough score below which no row can be among the ``k`` best."""
    known = float(best[0][-1]) - ROUGH if len(best[0]) == k else -np.inf
    if len(rough) <= k:
        return known
    # k rows of the block are at most so far below their rough scores, and any other at most so far above its own.
    return max(known, float(np.partition(rough, -k)[-k]) - 2 * ROUGH)


def _nothing() -> Best:
    return np.empty(0, np.float32), np.empty(0, np.int64)
