"""Masks as index tensors: which tokens an encoder sees (``keep``) and which it must predict (``drop``).

Masks are drawn per sample in the data workers from the sample's own generator, never inside the model: the same sample
has the same mask on any device, world size, worker count or after a resume.
"""

from math import prod
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mmssl.contracts import Grid

MaskKind = Literal["random"]


def kept_tokens(grid: Grid, ratio: float) -> int:
    """Return how many tokens of a grid stay visible when the fraction ``ratio`` is masked: at least one, never all.

    MAE keeps ``int(N * (1 - ratio))``; the small addend keeps 10 * (1 - 0.9) = 0.99999... from becoming 0. Raises
    ValueError for a grid of one token.
    """
    tokens = prod(grid)
    if tokens < 2:
        raise ValueError(f"masking needs at least 2 tokens, but the grid {grid} has {tokens}")
    return min(max(int(tokens * (1 - ratio) + 1e-6), 1), tokens - 1)


class RandomMask:
    """Uniformly random masking without replacement (MAE, arXiv:2111.06377, section 3).

    Calling it returns ``{"keep": int64 [K], "drop": int64 [M]}``, both sorted: the order of tokens means nothing to a
    Transformer, and sorted gathers touch memory in order.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def __call__(self, rng: np.random.Generator, grid: Grid) -> dict[str, np.ndarray[Any, Any]]:
        """Draw the mask of one sample on its token grid."""
        order, kept = rng.permutation(prod(grid)), kept_tokens(grid, self.ratio)
        return {"keep": np.sort(order[:kept]), "drop": np.sort(order[kept:])}


MASKS = {"random": RandomMask}


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by index: [B, N, D] at [B, K] -> [B, K, D]; a table [N, D] is picked from for every row alike."""
    if tokens.ndim == 2:
        return tokens[index]
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
