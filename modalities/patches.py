"""The patch tokenizer that images, video tubes and spectrograms share: a regular grid cut over any number of axes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.backbones.blocks import init_linear
from mmssl.backbones.positions import PositionKind, Positions
from mmssl.contracts import Batch, Grid, Size
from mmssl.masking import gather

TargetKind = Literal["normalized", "normalized_per_channel", "raw"]
"""What a reconstruction predicts: patches normalised over all their values (MAE), channel by channel (VideoMAE), or
the values themselves."""


def patch_grid(size: Size, patch_size: Size) -> Grid:
    """Return how many patches fit along each axis of ``size``; raises ValueError where they do not fit exactly."""
    if len(size) != len(patch_size) or any(s % p for s, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"size {list(size)} is not a multiple of patch size {list(patch_size)}")
    return tuple(s // p for s, p in zip(size, patch_size, strict=True))


class PatchTokenizer(nn.Module):
    """Cuts [B, C, *size] into non-overlapping patches and embeds them linearly, with positions.

    A patch is flattened with its channels last: (p, q, C) for pictures, as MAE orders its target. ``eps`` belongs to
    the target, and may be one number per channel where that is normalised per channel.
    """

    eps: Tensor
    overlaps, placed, symbols, edge = False, True, False, 0

    def __init__(
        self,
        size: Size,
        patch_size: tuple[int, ...],
        channels: int,
        dim: int,
        positions: PositionKind = "sincos",
        target: TargetKind = "normalized",
        eps: float | Sequence[float] = 1e-6,
        extend: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.extend = extend
        self.size, self.patch_size, self.channels = tuple(size), tuple(patch_size), channels
        self.dim, self.target_kind = dim, target
        self.register_buffer("eps", torch.tensor(eps), persistent=False)
        self.patch_dim = channels
        for p in patch_size:
            self.patch_dim *= p
        self.grid: Grid = patch_grid(self.size, self.patch_size)
        self.proj = nn.Linear(self.patch_dim, dim)
        self.positions = Positions(self.grid, dim, positions, extend)
        init_linear(self.proj)

    def learned_on(self, grid: Grid) -> None:
        """Take the positions of another grid, from which those of its own are interpolated as any other's."""
        if grid != self.positions.grid:
            self.positions = Positions(grid, self.dim, self.positions.kind, self.extend)

    def grid_of(self, size: Size) -> Grid:
        """Return the grid of signals [B, C, *size]; raises ValueError where patches do not fit."""
        return patch_grid(size, self.patch_size)

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, C, *size] of a batch into [B, N, P]."""
        return self.cut(batch["signal"])

    def pad(self, batch: Batch) -> Tensor | None:
        """Return None: nothing is padded."""
        return None

    def cut(self, signal: Tensor) -> Tensor:
        """Cut [B, C, *size] into [B, N, P], tokens in row-major order. Nothing is learned here."""
        grid, axes = patch_grid(signal.shape[2:], self.patch_size), len(self.patch_size)
        split = [n for pair in zip(grid, self.patch_size, strict=True) for n in pair]
        x = signal.reshape(*signal.shape[:2], *split)
        order = [0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1]
        return x.permute(order).reshape(signal.shape[0], -1, self.patch_dim)

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``cut`` exactly: [B, N, P] on ``grid`` (its own if None) -> [B, C, *size]."""
        grid, axes = self.grid if grid is None else grid, len(self.patch_size)
        x = patches.reshape(patches.shape[0], *grid, *self.patch_size, self.channels)
        order = [0, 1 + 2 * axes, *(i for a in range(axes) for i in (1 + a, 1 + axes + a))]
        size = [g * p for g, p in zip(grid, self.patch_size, strict=True)]
        return x.permute(order).reshape(patches.shape[0], self.channels, *size)

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the patches [B, N, P] at ``index`` [B, K], and only those, with their positions: [B, K, D]."""
        positions = self.positions(self.grid if grid is None else grid)
        if index is None:
            return self.proj(patches) + positions  # type: ignore[no-any-return]
        return self.proj(gather(patches, index)) + gather(positions, index)  # type: ignore[no-any-return]

    def target(self, patches: Tensor) -> Tensor:
        """Free each patch [B, M, P] of its mean and divide it by its deviation (unbiased), as ``target_kind`` says.

        "normalized" takes both over all values and divides by ``(var + eps) ** 0.5``, as MAE does,
        "normalized_per_channel" over a channel's values and by ``var ** 0.5 + eps``, as VideoMAE does.
        """
        if self.target_kind == "raw":
            return patches
        centred, _, scale = self._statistics(patches)
        return (centred / scale).flatten(-2)

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Undo ``target``: put a prediction [B, M, P] back to the scale of the true patches [B, M, P]."""
        if self.target_kind == "raw":
            return prediction
        centred, mean, scale = self._statistics(patches)
        return (prediction.reshape(centred.shape) * scale + mean).flatten(-2)

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # [B, M, P / G, G] less its mean, the mean and what to divide by, with G = 1 or the channels. Two simple passes
        # take a fifth of the time of torch's var.
        whole = self.target_kind == "normalized"
        x = patches.unflatten(-1, (-1, 1 if whole else self.channels))
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        std = torch.linalg.vector_norm(centred, dim=-2, keepdim=True) / (x.shape[-2] - 1) ** 0.5
        return centred, mean, (std.square() + self.eps).sqrt() if whole else std + self.eps
