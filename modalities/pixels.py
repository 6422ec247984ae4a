"""Bytes to numbers and back: how frames and pictures are resized and normalised, whatever they are read from."""

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

Frames: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
"""RGB, uint8 [n, h, w, 3]."""
FrameSize: TypeAlias = tuple[int, int]
"""Height and width."""


def resized(frames: Frames, size: FrameSize) -> Frames:
    """Resize frames [n, H, W, 3] to [n, *size, 3] by an antialiased bicubic."""
    # In this layout, channels last, torch has a vectorised kernel that takes bytes as they are.
    small = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return small.permute(0, 2, 3, 1).numpy()


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], axis: int) -> Tensor:
    """Return bytes as float32, divided by 255, freed of the mean and divided by the deviation of each colour.

    ``axis``, counted from the end, is where the colours are. The result is a new, contiguous tensor.
    """
    factor, shift = _factors(mean, std, axis)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mul_(factor).add_(shift)


@lru_cache(maxsize=16)
def _factors(mean: tuple[float, ...], std: tuple[float, ...], axis: int) -> tuple[Tensor, Tensor]:
    # (x / 255 - mean) / std as one multiplication and one addition.
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    shape = [-1, *[1] * (-1 - axis)]
    return (1 / (255 * s)).float().view(shape), (-m / s).float().view(shape)
