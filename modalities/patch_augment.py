"""What is done to every patch of a training picture by itself, all of it off by default (CPC v2, arXiv:1905.09272).

Patches that overlap share colours and edges, by which they are easily told from others; changed one by one they are
not. Every number is drawn from the sample's own seed, for its patch and its operation: it does not depend on ranks,
workers or the order in a batch. Which operations are on is said by the keys that ``PatchViews`` adds to a sample.

Shape legend: B samples, N patches each, p x q pixels of a patch, 3 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmssl.backbones.blocks import uniform
from mmssl.config import Piece
from mmssl.contracts import Batch, Size, Views
from modalities.augment import Probability, Strength

KEY = "patch_"
"""What the keys begin with: ``patch_flip``, float32 [B], and so on."""
STREAM = 1 << 40
"""The first stream of random numbers here, far from those of layers and of negatives."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601, as Pillow's)."""


class PatchAugment(Piece):
    """Changes of each patch, in this order; 0 is off."""

    flip: Probability = 0.0
    """Probability that a patch is mirrored left to right."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees by which a patch is turned at most, either way; what that uncovers is filled by reflection."""
    shear: Strength = 0.0
    """Pixels by which a patch is shifted sideways at most, either way, per pixel above or below its middle."""
    brightness: Strength = 0.0
    """The factor is uniform in 1 - this to 1 + this; so for contrast and saturation."""
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    grey: Probability = 0.0
    """Probability that a patch loses its colours."""
    colour_drop: Probability = 0.0
    """Probability that a patch loses two of its three colour channels, which become the data's mean (section 4)."""

    @property
    def active(self) -> dict[str, float]:
        """What is on, and how strong it is."""
        return {name: value for name, value in self if value > 0}


@dataclass(frozen=True)
class PatchViews:
    """Adds to the samples that ``views`` reads what is to be done to their patches: a float32 [] for what is on."""

    views: Views
    settings: PatchAugment

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the samples of ``views``; raises what they raise."""
        keys = {KEY + name: torch.tensor(value) for name, value in self.settings.active.items()}
        return [sample | keys for sample in self.views(path, rngs, size)]


def augment_patches(patches: Tensor, batch: Batch, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalised patches [B, N, p, q, 3] changed as the keys of their batch say; the very same where none do.

    ``mean`` and ``std`` [3] are what they were normalised with, on a scale of 0 to 1.
    """
    lots = _Lots(batch, patches.shape[1])
    patches = _colours(_shapes(patches, lots), lots, mean, std)
    drop = lots.happens("colour_drop")
    if drop is None:
        return patches
    chosen = (lots.draw("colour_drop", 1) * 3).long()
    return patches * (~drop | (torch.arange(3, device=patches.device) == chosen))


class _Lots:
    """What is drawn for the patches of a batch; None for what is off. Tensors [B, N, 1, 1, 1]."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def draw(self, name: str, again: int = 0) -> Tensor:
        """Return a number in [0, 1) for each patch."""
        seeds, operation = self.batch["seed"].unsqueeze(1), list(PatchAugment.model_fields).index(name)
        patch = torch.arange(self.count, device=seeds.device)
        return uniform(seeds, STREAM + (2 * operation + again << 32) + patch)[..., None, None, None]

    def happens(self, name: str) -> Tensor | None:
        """Return whether it does."""
        probability = self.batch.get(KEY + name)
        return None if probability is None else self.draw(name) < probability[:, None, None, None, None]

    def around(self, name: str) -> Tensor | None:
        """Return a number between - and + the strength."""
        strength = self.batch.get(KEY + name)
        return None if strength is None else (2 * self.draw(name) - 1) * strength[:, None, None, None, None]


def _shapes(x: Tensor, lots: _Lots) -> Tensor:
    flip, turn, shear = lots.happens("flip"), lots.around("rotate"), lots.around("shear")
    if flip is not None:
        x = torch.where(flip, x.flip(3), x)
    if turn is None and shear is None:
        return x
    angle = x.new_zeros(1) if turn is None else turn.flatten().deg2rad()
    shift = x.new_zeros(1) if shear is None else shear.flatten()
    angle, shift = torch.broadcast_tensors(angle, shift)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Where each pixel comes from, in halves of a patch's height and width: rows of x and y, sheared and then turned.
    tall = x.shape[2] / x.shape[3]
    across = torch.stack([cos, (cos * shift - sin) * tall, none], -1)
    down = torch.stack([sin / tall, sin * shift + cos, none], -1)
    pictures = x.flatten(0, 1).movedim(-1, 1)
    places = F.affine_grid(torch.stack([across, down], 1), list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, places, padding_mode="reflection", align_corners=False)
    return moved.movedim(1, -1).reshape(x.shape)


def _colours(x: Tensor, lots: _Lots, mean: Tensor, std: Tensor) -> Tensor:
    brightness, contrast = lots.around("brightness"), lots.around("contrast")
    saturation, grey = lots.around("saturation"), lots.happens("grey")
    if brightness is None and contrast is None and saturation is None and grey is None:
        return x
    x = x * std + mean
    if brightness is not None:
        x = (x * (1 + brightness)).clamp(0, 1)
    if contrast is not None:
        x = _away(x, _luma(x).mean((2, 3), keepdim=True), contrast)
    if saturation is not None:
        x = _away(x, _luma(x), saturation)
    if grey is not None:
        x = torch.where(grey, _luma(x), x)
    return (x - mean) / std


def _luma(x: Tensor) -> Tensor:
    red, green, blue = (share * channel for share, channel in zip(LUMA, x.split(1, -1), strict=True))
    luma: Tensor = red + green + blue
    return luma


def _away(x: Tensor, middle: Tensor, more: Tensor) -> Tensor:
    return (x + more * (x - middle)).clamp(0, 1)
