"""What some modalities can do and others cannot: be seen frame by frame, be played, be heard."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from mmssl.contracts import Modality, Size


@runtime_checkable
class SeesFrames(Modality, Protocol):
    """A modality whose encoders give one grid of tokens (h, w) for each frame of a video."""

    def stills(self, frames: np.ndarray[Any, np.dtype[np.uint8]], size: Size, signal: Any, tokenizer: Any) -> Tensor:
        """Return frames uint8 [n, H, W, 3] one by one as signals, resized to ``size``: float32 [n, C, *size].

        Their grids have one step of time, where they have any.
        """
        ...


Ticks: TypeAlias = Sequence[tuple[float, str]]
"""Marks along a side of a picture: pixels from its left or its top, and what stands there."""


@runtime_checkable
class Moves(Modality, Protocol):
    """A modality whose signals [C, t, h, w] are played; its token grids begin with time."""

    def motion(self, x: Tensor, signal: Any) -> np.ndarray[Any, Any]:
        """Return what the tokenizer cuts, [C, t, h, w], as frames to be played: uint8 [t, h, w, 3]."""
        ...

    def pace(self, path: str, signal: Any) -> float:
        """Return how many frames of a file's evaluation signal pass in a second of it; raises BrokenFile."""
        ...


@runtime_checkable
class Sounds(Modality, Protocol):
    """A modality whose signals are heard, and whose pictures show frequencies over time."""

    def seconds_per_step(self, signal: Any, tokenizer: Any) -> float:
        """Return how many seconds of a file pass from one step of the token grid's time to the next."""
        ...

    def sound(self, x: Tensor, signal: Any) -> tuple[Tensor, int]:
        """Return what the tokenizer cuts, [C, *size], made audible: float32 [samples], and samples per second."""
        ...

    def axes(self, x: Tensor, signal: Any) -> tuple[Ticks, Ticks]:
        """Return where seconds (along the width) and Hz (along the height) stand on the picture of x [C, *size]."""
        ...
