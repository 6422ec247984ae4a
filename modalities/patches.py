"""The patch tokenizer that images, video tubes and spectrograms share: a regular grid cut over any number of axes."""

from typing import Literal

from torch import Tensor, nn

from mmssl.backbones.blocks import init_linear
from mmssl.backbones.positions import PositionKind, Positions
from mmssl.contracts import Grid, Size
from mmssl.masking import gather

TargetKind = Literal["normalized", "raw"]


class PatchTokenizer(nn.Module):
    """Cuts [B, C, *size] into non-overlapping patches and embeds them linearly, with positions.

    A patch is flattened with its channels last: (p, q, C) for pictures, as MAE orders its target.
    """

    def __init__(
        self,
        size: Size,
        patch_size: tuple[int, ...],
        channels: int,
        dim: int,
        positions: PositionKind = "sincos",
        target: TargetKind = "normalized",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.size, self.patch_size, self.channels = tuple(size), tuple(patch_size), channels
        self.dim, self.target_kind, self.eps = dim, target, eps
        self.patch_dim = channels
        for p in patch_size:
            self.patch_dim *= p
        self.grid: Grid = self.grid_of(self.size)
        self.proj = nn.Linear(self.patch_dim, dim)
        self.positions = Positions(self.grid, dim, positions)
        init_linear(self.proj)

    def grid_of(self, size: Size) -> Grid:
        """Return the grid of signals [B, C, *size]; raises ValueError where patches do not fit."""
        if len(size) != len(self.patch_size) or any(s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"size {list(size)} is not a multiple of patch size {list(self.patch_size)}")
        return tuple(s // p for s, p in zip(size, self.patch_size, strict=True))

    def patches(self, signal: Tensor) -> Tensor:
        """Cut [B, C, *size] into [B, N, P], tokens in row-major order. Nothing is learned here."""
        grid, axes = self.grid_of(signal.shape[2:]), len(self.patch_size)
        split = [n for pair in zip(grid, self.patch_size, strict=True) for n in pair]
        x = signal.reshape(*signal.shape[:2], *split)
        order = [0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1]
        return x.permute(order).reshape(signal.shape[0], -1, self.patch_dim)

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Invert ``patches`` exactly: [B, N, P] on ``grid`` (its own if None) -> [B, C, *size]."""
        grid, axes = self.grid if grid is None else grid, len(self.patch_size)
        x = patches.reshape(patches.shape[0], *grid, *self.patch_size, self.channels)
        order = [0, 1 + 2 * axes, *(i for a in range(axes) for i in (1 + a, 1 + axes + a))]
        size = [g * p for g, p in zip(grid, self.patch_size, strict=True)]
        return x.permute(order).reshape(patches.shape[0], self.channels, *size)

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the patches [B, N, P] at ``index`` [B, K], and only those, with their positions: [B, K, D]."""
        positions = self.positions(grid)
        if index is None:
            return self.proj(patches) + positions  # type: ignore[no-any-return]
        return self.proj(gather(patches, index)) + gather(positions, index)  # type: ignore[no-any-return]

    def target(self, patches: Tensor) -> Tensor:
        """Normalise each patch [B, M, P] over all its values by ``(var + eps) ** 0.5``, var unbiased, as MAE does."""
        if self.target_kind == "raw":
            return patches
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Undo ``target``: put a prediction [B, M, P] back to the scale of the true patches [B, M, P]."""
        if self.target_kind == "raw":
            return prediction
        mean, std = self._statistics(patches)
        return prediction * std + mean

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + self.eps) ** 0.5
