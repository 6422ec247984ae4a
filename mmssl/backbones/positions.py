"""Token positions on 1-D, 2-D and 3-D grids: fixed sine-cosine or learned."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.contracts import Grid

PositionKind = Literal["sincos", "learned"]


@lru_cache(maxsize=64)
def sincos(grid: Grid, dim: int) -> Tensor:
    """Return the fixed sine-cosine table float32 [N, dim] of a grid, tokens in row-major order.

    Each axis has an equal, even share of the channels, the **last axis first**, as in MAE's 2-D table (the first half
    encodes the column, the second the row); within a share come the sines of all frequencies ``10000^(-2i/share)``,
    then the cosines (Vaswani et al., arXiv:1706.03762, section 3.5). Channels that do not divide stay zero.
    """
    share = dim // (2 * len(grid)) * 2
    if share == 0:
        raise ValueError(f"{dim} channels are too few for positions on a {len(grid)}-D grid")
    omega = 10000.0 ** (-np.arange(share // 2, dtype=np.float64) / (share / 2))
    parts = []
    for axis in np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid), indexing="ij")[::-1]:
        angle = np.outer(axis.ravel(), omega)
        parts += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(parts, axis=1)
    return torch.from_numpy(np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype(np.float32))


@lru_cache(maxsize=64)
def resized_sincos(grid: Grid, dim: int, target: Grid) -> Tensor:
    """Return ``sincos(grid, dim)`` resized to ``target``: float32 [N', dim]."""
    return resize_table(sincos(grid, dim), grid, target)


def resize_table(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """Interpolate the positions [N, dim] of the grid ``source`` to ``target``: [N', dim].

    Cubic with antialiasing on 2-D grids, as timm resizes them, linear on others. Raises ValueError for grids of
    different dimensions.
    """
    if len(source) != len(target):
        raise ValueError(f"positions on a {len(source)}-D grid cannot serve a {len(target)}-D one")
    lattice = table.T.reshape(1, table.shape[1], *source)
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(target)]
    resized = F.interpolate(lattice, size=target, mode=mode, align_corners=False, antialias=len(target) == 2)
    return resized.reshape(table.shape[1], -1).T


class Positions(nn.Module):
    """A table of positions [N, dim] for a grid, and for other grids than its own on demand.

    The table is interpolated to another grid, fixed or learned: a picture twice as large is the same picture, and its
    corners keep the corners' positions (as MAE's fine-tuning at 448 pixels does).
    """

    table: Tensor

    def __init__(self, grid: Grid, dim: int, kind: PositionKind = "sincos") -> None:
        super().__init__()
        self.grid, self.dim, self.kind = tuple(grid), dim, kind
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(int(np.prod(grid)), dim))
            nn.init.trunc_normal_(self.table, std=0.02)
        else:
            planning = torch.get_default_device().type == "meta"  # shapes alone are wanted
            table = torch.empty(int(np.prod(grid)), dim) if planning else sincos(self.grid, dim).clone()
            self.register_buffer("table", table, persistent=False)

    def forward(self, grid: Grid | None = None) -> Tensor:
        """Return the table [N, dim] of ``grid`` (its own if None)."""
        if grid is None or tuple(grid) == self.grid:
            return self.table
        if self.kind == "sincos":
            return resized_sincos(self.grid, self.dim, tuple(grid)).to(self.table)
        return resize_table(self.table, self.grid, tuple(grid))
