"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of neighbours in the stream of samples.

Samples 2j and 2j + 1 of a batch are mixed with each other, by what the data worker drew for the even one. So the same
pairs are mixed in the same way on any number of ranks, micro-steps or workers, as long as a micro-batch is even.

Shapes: a signal is [B, C, *size]; a box is [B, 2 * axes], start and stop of each spatial axis in turn, as fractions of
that axis. A box in which nothing lies means mixup, or with weight 1 nothing at all.
"""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmssl.config import Piece
from mmssl.contracts import Grid


class MixConfig(Piece):
    """How training samples and their labels are mixed in pairs; off by default."""

    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Two samples are blended with a weight from Beta(this, this); 0 is off, 0.8 in MAE's fine-tuning."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """A box of one sample is put into the other, the rest has a share from Beta(this, this); 0 is off, 1.0 in MAE's."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of cutmix where both are on."""
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Probability that a pair is mixed at all."""

    @property
    def active(self) -> bool:
        """Whether any pair is ever mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class MixDraw:
    """Draws how a sample would be mixed with its neighbour; picklable, for the data worker.

    Calling it with a generator (and a token grid, which does not matter) returns ``mix_weight``, float32 [], the share
    of the sample's own content, and ``mix_box``, float32 [2 * axes], for signals of so many ``axes``: 2 for pictures,
    1 for sound.
    """

    def __init__(self, config: MixConfig, axes: int) -> None:
        self.config, self.axes = config, axes

    def __call__(self, rng: np.random.Generator, grid: Grid) -> dict[str, np.ndarray[Any, Any]]:
        """Draw for one sample; nothing is drawn where mixing is off."""
        config, weight, box = self.config, 1.0, np.zeros((self.axes, 2))
        if config.active and rng.random() < config.probability:
            cut = rng.random() < config.switch if config.mixup > 0 and config.cutmix > 0 else config.cutmix > 0
            alpha = config.cutmix if cut else config.mixup
            weight = rng.beta(alpha, alpha)
            if cut:
                box = _box(1 - weight, rng.random(self.axes))
                weight = 1 - np.diff(box).prod()
        return {"mix_weight": np.array(weight, np.float32), "mix_box": box.astype(np.float32).ravel()}


def _box(volume: float, centre: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # Equal shares of all axes around the centre, float64 [axes, 2], clipped at the border (arXiv:1905.04899, eq. 2).
    half = volume ** (1 / len(centre)) / 2
    return np.stack([centre - half, centre + half], axis=1).clip(0, 1)


def mix(signal: Tensor, weight: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each pair of neighbours as drawn for its even sample; returns the signal and the samples' own weights.

    ``signal`` is floating point [B, C, *size], ``weight`` float32 [B], ``box`` float32 [B, 2 * axes], all on one
    device. The own weight, float32 [B], is ``weight`` for mixup and the exact share of values that stayed for cutmix;
    the neighbour's is one minus it. Raises ValueError for an odd B.
    """
    size = signal.shape[2:]
    other, weight = partner(signal), _of_even(weight).float()
    start, stop = _of_even(box).unflatten(1, (len(size), 2)).unbind(2)
    weight = weight.where((start >= stop).any(1), 1.0)
    cut, count = _inside(start, stop, size)
    total = size.numel()
    blend = _column(weight, signal.ndim)
    # Chosen, not multiplied by 0 or 1: what is not mixed keeps its bits, and a NaN stays with its own sample.
    mixed = torch.lerp(other, signal, blend.to(signal.dtype)).where(blend < 1, signal)
    return other.where(cut, mixed), weight * ((total - count).float() / total)


def partner(x: Tensor) -> Tensor:
    """Swap neighbours 2j and 2j + 1 of [B, ...], as labels need it; raises ValueError for an odd B."""
    return _pairs(x).flip(1).flatten(0, 1)


def _pairs(x: Tensor) -> Tensor:
    if len(x) % 2:
        raise ValueError(f"samples are mixed in pairs, but a batch here has {len(x)}; make it even on every rank")
    return x.reshape(len(x) // 2, 2, *x.shape[1:])


def _of_even(x: Tensor) -> Tensor:
    pairs = _pairs(x)
    return pairs[:, :1].expand_as(pairs).flatten(0, 1)


def _column(x: Tensor, ndim: int) -> Tensor:
    return x.view(-1, *[1] * (ndim - 1))


def _inside(start: Tensor, stop: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Return which values have their middle in the boxes [B, axes]: bool [B, 1, *size], and how many: int64 [B]."""
    inside = torch.ones(len(start), *[1] * (len(size) + 1), dtype=torch.bool, device=start.device)
    count = torch.ones(len(start), dtype=torch.int64, device=start.device)
    for axis, length in enumerate(size):
        middle = torch.arange(length, device=start.device) + 0.5
        # The box is scaled, not the index divided: products are rounded alike on every device.
        within = (middle >= start[:, axis, None] * length) & (middle < stop[:, axis, None] * length)
        count = count * within.sum(1)
        inside = inside & within.view(-1, *[1] * (axis + 1), length, *[1] * (len(size) - axis - 1))
    return inside, count
