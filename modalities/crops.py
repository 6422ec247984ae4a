"""The tokenizer of pictures whose patches overlap, each seen by a residual network alone, as CPC has them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.resnet import Bottleneck, ResNet
from mmssl.contracts import Batch, Grid, Size
from mmssl.masking import gather
from modalities.patch_augment import augment_patches


class Crops(nn.Module):
    """Cuts pictures [B, 3, h, w] into patches that begin every ``stride`` pixels, and makes a token of each.

    A patch is flattened with its channels last, (p, q, 3), and its token depends on nothing but its pixels: it does not
    say where it is. Implements ``Tokenizer``.
    """

    mean: Tensor
    std: Tensor
    overlaps, placed, symbols, edge = True, False, False, 0
    extend: tuple[int, ...] = ()
    channels = 3

    def __init__(
        self,
        size: Size,
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        network: ResNet,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """``mean`` and ``std`` are what pictures were normalised with; raises ValueError where patches do not fit."""
        super().__init__()
        self.network, self.dim = network, network.dim
        self.size: Size = tuple(size)
        self.patch_size: Size = tuple(patch_size)
        self.stride = tuple(stride)
        self.patch_dim = patch_size[0] * patch_size[1] * self.channels
        self.grid = self.grid_of(self.size)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def widens(self) -> float:
        """Activations per value of the signal where there are most, behind the stem or in the first block."""
        stem, first = self.network.stem, self.network.blocks[0]
        assert isinstance(first, Bottleneck)
        per_pixel = max(stem.out_channels / 4, first.widen.out_channels / 16)
        return max(1.0, math.prod(self.grid) * self.patch_dim * per_pixel / (math.prod(self.size) * self.channels**2))

    def learned_on(self, grid: Grid) -> None:
        """Take no notice: there are no positions."""

    def grid_of(self, size: Size) -> Grid:
        """Return the rows and columns of patches in pictures [B, 3, *size]; raises ValueError where they do not fit."""
        sides = list(zip(size, self.patch_size, self.stride, strict=True))
        fits = [p + max(0, round((side - p) / step)) * step for side, p, step in sides]
        if fits != list(size):
            raise ValueError(
                f"a picture of {list(size)} pixels does not divide into patches of {list(self.patch_size)} every "
                f"{list(self.stride)} pixels; the nearest size that does is {fits}"
            )
        return tuple((side - p) // step + 1 for side, p, step in sides)

    def patches(self, batch: Batch) -> Tensor:
        """Cut the ``signal`` [B, 3, h, w] of a batch into [B, N, P], changed one by one where its keys say so.

        Those are ``PatchViews``'s, which evaluation does not have.
        """
        cut = self._cut(batch["signal"])
        return augment_patches(cut, batch, self.mean, self.std).flatten(2)

    def pad(self, batch: Batch) -> Tensor | None:
        """Return None: nothing is padded."""
        return None

    def _cut(self, signal: Tensor) -> Tensor:
        # [B, 3, h, w] -> [B, N, p, q, 3], in row-major order.
        self.grid_of(signal.shape[2:])
        (p, q), (down, right) = self.patch_size, self.stride
        windows = signal.unfold(2, p, down).unfold(3, q, right)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(1, 2)

    def unpatch(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """Put patches [B, N, P] on ``grid`` (its own if None) together to [B, 3, h, w]: the mean where they overlap."""
        rows, columns = self.grid if grid is None else grid
        (p, q), (down, right) = self.patch_size, self.stride
        size = p + (rows - 1) * down, q + (columns - 1) * right
        blocks = patches.unflatten(2, (p * q, self.channels)).permute(0, 3, 2, 1).flatten(1, 2)
        total = F.fold(blocks, size, (p, q), stride=(down, right))
        ones = F.fold(torch.ones_like(blocks[:1, : p * q]), size, (p, q), stride=(down, right))
        return total / ones

    def embed(self, patches: Tensor, index: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Embed the patches [B, N, P] at ``index`` [B, K], and only those, each by itself: [B, K, D]."""
        chosen = patches if index is None else gather(patches, index)
        # A view: in memory the channels stay last, as convolutions on a CPU like it.
        pictures = chosen.flatten(0, 1).unflatten(1, (*self.patch_size, self.channels)).permute(0, 3, 1, 2)
        tokens: Tensor = self.network(pictures).unflatten(0, chosen.shape[:2])
        return tokens

    def target(self, patches: Tensor) -> Tensor:
        """Return the pixels as they are."""
        return patches

    def untarget(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Return the pixels as they are."""
        return prediction
