"""Token positions on 1-D, 2-D and 3-D grids: fixed sine-cosine or learned."""

from collections.abc import Collection
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
def resized_sincos(grid: Grid, dim: int, target: Grid, extend: tuple[int, ...] = ()) -> Tensor:
    """Return ``sincos(grid, dim)`` resized to ``target``, the axes in ``extend`` counted on: float32 [N', dim]."""
    _same_axes(grid, target)
    source = tuple(target[a] if a in extend else n for a, n in enumerate(grid))
    return resize_table(sincos(source, dim), source, target, extend)


def resize_table(table: Tensor, source: Grid, target: Grid, extend: Collection[int] = ()) -> Tensor:
    """Interpolate the positions [N, dim] of the grid ``source`` to ``target``: [N', dim].

    Cubic with antialiasing for two axes, as timm resizes them, linear for one or three. An axis in ``extend`` is apart:
    the others are resized step by step along it (the frames of a video one by one), and itself it is cut where
    ``target`` is shorter and interpolated linearly where it is longer. Raises ValueError for grids of different
    dimensions.
    """
    _same_axes(source, target)
    lattice = table.reshape(*source, -1)
    for axis in extend:
        lattice = lattice.narrow(axis, 0, min(source[axis], target[axis]))
    fixed = [a for a in range(len(target)) if a not in extend]
    for axes in (fixed, *([a] for a in extend)):
        lattice = _resize_axes(lattice, axes, target)
    return lattice.reshape(-1, table.shape[1])


def _resize_axes(lattice: Tensor, axes: list[int], target: Grid) -> Tensor:
    """Interpolate some axes of a lattice [*grid, dim] to their lengths in ``target``, the others step by step."""
    size = [target[a] for a in axes]
    if [lattice.shape[a] for a in axes] == size:
        return lattice
    others = [a for a in range(lattice.ndim) if a not in axes]
    x = lattice.permute(*others, *axes)
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(axes)]
    flat = x.reshape(-1, 1, *x.shape[len(others) :])
    resized = F.interpolate(flat, size=size, mode=mode, align_corners=False, antialias=len(axes) == 2)
    return resized.reshape(*x.shape[: len(others)], *size).permute(*np.argsort([*others, *axes]).tolist())


def _same_axes(source: Grid, target: Grid) -> None:
    if len(source) != len(target):
        raise ValueError(f"positions on a {len(source)}-D grid cannot serve a {len(target)}-D one")


class Positions(nn.Module):
    """A table of positions [N, dim] for a grid, and for other grids than its own on demand.

    The table is interpolated to another grid, fixed or learned: a picture twice as large is the same picture, and its
    corners keep the corners' positions (as MAE's fine-tuning at 448 pixels does). Not so along the axes in ``extend``:
    a sound twice as long goes on, and token i keeps position i. A fixed table counts on there; a learned one is cut
    where the other grid is shorter, but stretched where it is longer, for want of positions beyond its end.
    """

    table: Tensor

    def __init__(self, grid: Grid, dim: int, kind: PositionKind = "sincos", extend: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.grid, self.dim, self.kind, self.extend = tuple(grid), dim, kind, tuple(extend)
        if not set(self.extend) <= set(range(len(self.grid))):
            raise ValueError(f"extend {self.extend} names axes that the grid {self.grid} does not have")
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
            return resized_sincos(self.grid, self.dim, tuple(grid), self.extend).to(self.table)
        return resize_table(self.table, self.grid, tuple(grid), self.extend)
