"""Transformer blocks in which a token sees its own window of the grid only: Audio-MAE's local decoder.

Huang et al., arXiv:2207.06405, section 3.2: what a patch of a spectrogram holds depends on its neighbours, so windows
of w x w tokens attend to themselves, and every other block moves the windows by half of one, so that knowledge spreads
(Liu et al., arXiv:2103.14030, section 3.2). Tokens have the decoder's positions; there is no bias per offset.

Shape legend: B samples, L tokens of the sequence (in any order, perhaps not all of the grid), N places of the grid,
W windows of S slots, D width. A slot holds a token or nobody.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.blocks import MLP, Attention, attend
from mmssl.contracts import Grid
from mmssl.masking import gather


def cells(grid: Grid, window: int, shifted: bool, device: torch.device | None = None) -> Tensor:
    """Return which place of the grid each slot of each window stands for: int64 [W, S], N where it is outside.

    Windows are ``window`` long on every axis, or as long as the axis where that is shorter, and then never shifted.
    Shifted ones begin half a window earlier. Those at the border are cut there: no window joins opposite borders.
    """
    lattice = torch.arange(prod(grid), device=device).view(grid)
    sides = [min(window, length) for length in grid]
    around: list[int] = []  # what to add before and after each axis, the last axis first
    for length, side in reversed(list(zip(grid, sides, strict=True))):
        before = side - side // 2 if shifted and side < length else 0
        around += [before, -(before + length) % side]
    lattice = F.pad(lattice, around, value=prod(grid))
    split = [n for length, side in zip(lattice.shape, sides, strict=True) for n in (length // side, side)]
    axes = 2 * len(grid)
    return lattice.view(split).permute(*range(0, axes, 2), *range(1, axes, 2)).reshape(-1, prod(sides))


class Windows(NamedTuple):
    """Which tokens are in which window."""

    tokens: Tensor
    """int64 [B, W, S]: the token in each slot; an arbitrary one where there is nobody."""
    slots: Tensor
    """int64 [B, L]: the slot of each token, counted over all windows."""
    hidden: Tensor | None
    """bool [B, W, S]: slots that nobody may look into, for they are empty or hold padding; None if there are none."""


def arrange(cells: Tensor, places: Tensor, total: int, pad: Tensor | None = None) -> Windows:
    """Put tokens at ``places`` [B, L] of a grid of ``total`` into its ``cells`` [W, S]; ``pad`` [B, L] is padding."""
    batch, length = places.shape
    order = torch.arange(cells.numel(), device=cells.device)
    tokens = places.new_full((batch, total + 1), length).scatter(1, places, order[:length].expand(batch, -1))[:, cells]
    slots = order.new_zeros(total + 1).scatter(0, cells.flatten(), order)[places]
    hidden = None
    if pad is not None or cells.numel() > length:
        pad = torch.zeros_like(places, dtype=torch.bool) if pad is None else pad
        hidden = F.pad(pad, (0, 1), value=True).gather(1, tokens.flatten(1)).view_as(tokens)
    return Windows(tokens.clamp(max=length - 1), slots, hidden)


class LocalBlock(nn.Module):
    """A pre-norm Transformer block whose attention stays within windows; its parameters are those of ``Block``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, windows: Windows, queries: int | None = None) -> Tensor:
        """Map [B, L, D] to [B, L, D], or to the last ``queries`` tokens alone, sparing the work of the others."""
        last = slice(None) if queries is None else slice(-queries, None)
        seen = self._attend(self.attn.qkv(self.norm1(x)), windows)
        x = x[:, last] + self.attn.proj(gather(seen, windows.slots[:, last]))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor, windows: Windows) -> Tensor:
        # Map [B, L, 3 D] to [B, W * S, D]. Only here do empty slots cost anything: linear layers work on tokens.
        batch, _, slots = windows.tokens.shape
        in_windows = gather(qkv, windows.tokens.flatten(1)).view(-1, slots, qkv.shape[-1])
        hidden = None if windows.hidden is None else windows.hidden.flatten(0, 1)
        q, k, v = self.attn._heads(in_windows, 3)
        out = attend(q, k, v, hidden)
        return out.transpose(1, 2).reshape(batch, -1, self.attn.dim)


def run_local(
    blocks: nn.ModuleList, window: int, x: Tensor, places: Tensor, queries: int, grid: Grid, pad: Tensor | None = None
) -> Tensor:
    """Map x [B, prefix + L, D], whose last L tokens are at ``places`` [B, L] of ``grid``, to the last ``queries``.

    The windows of every other block are shifted. Places that no token stands for and tokens with ``pad`` [B, L] are
    seen by nobody. A prefix (a class token) is in no window and left out, as in Audio-MAE.
    """
    x = x[:, x.shape[1] - places.shape[1] :]
    layouts = [
        arrange(cells(grid, window, shifted, x.device), places, prod(grid), pad)
        for shifted in (False, True)[: len(blocks)]
    ]
    for i, block in enumerate(blocks):
        x = block(x, layouts[i % 2], queries if i == len(blocks) - 1 else None)
    return x
