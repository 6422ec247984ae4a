"""A masked convolutional context over the rows of a lattice, as PixelCNN's (van den Oord et al., arXiv:1606.05328).

A token's output sees its own row and those above, to both sides, and nothing below.

Shape legend: B samples, h rows and w columns of tokens, D' width of the tokens, D width of the context.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.config import OrderedConfig
from mmssl.contracts import Grid


class PixelCNNConfig(OrderedConfig):
    """Shape of the context; CPC v2 has 5 blocks of 256 channels (Henaff et al., arXiv:1905.09272, appendix A)."""

    name: Literal["pixelcnn"] = "pixelcnn"
    dim: Annotated[int, Field(gt=0)] = 256
    """Width of the context."""
    depth: Annotated[int, Field(gt=0)] = 5
    """Blocks: each sees one row further up and one column further to either side."""
    hidden: Annotated[int, Field(gt=0)] | None = None
    """Channels within a block; null is ``dim``."""

    def build(self) -> "PixelCNN":
        """Make the module, freshly initialised."""
        return PixelCNN(self.reads, self.dim, self.depth, self.hidden or self.dim)


class PixelCNN(nn.Module):
    """Residual blocks of masked convolutions over [B, h * w, D'] tokens in row-major order."""

    def __init__(self, reads: int, dim: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.reader = nn.Linear(reads, dim) if reads != dim else nn.Identity()
        self.blocks = nn.ModuleList(RowBlock(dim, hidden) for _ in range(depth))

    def forward(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Map [B, h * w, D'] on the ``grid`` (h, w) to [B, h * w, D]; raises ValueError for no such grid."""
        return self.layers(tokens, pad, seeds, grid)[-1]

    def layers(
        self, tokens: Tensor, pad: Tensor | None = None, seeds: Tensor | None = None, grid: Grid | None = None
    ) -> list[Tensor]:
        """Return the output of every block: tensors [B, h * w, D]."""
        if grid is None or len(grid) != 2:
            raise ValueError(f"the backbone 'pixelcnn' needs tokens in rows and columns, but their grid is {grid}")
        if pad is not None:
            raise ValueError("the backbone 'pixelcnn' has no padding")
        x, outputs = self.reader(tokens).transpose(1, 2).unflatten(2, grid), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x.flatten(2).transpose(1, 2))
        return outputs


class RowBlock(nn.Module):
    """A shortcut around: narrow, look to both sides within the row, look one row up, widen."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(dim, hidden, 1)
        self.across = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(hidden, hidden, (2, 1))
        self.widen = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, D, h, w] to [B, D, h, w]."""
        y = self.across(F.relu(self.narrow(F.relu(x))))
        y = self.down(F.relu(F.pad(y, (0, 0, 1, 0))))
        return torch.add(x, self.widen(F.relu(y)))
