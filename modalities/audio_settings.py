"""Settings of sounds: what is cut out of a file, and what its tokens are; how many samples those need."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol, Self, TypeAlias

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mmssl.backbones.conv import Norm
from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from modalities.fbank import LogMel

DAY, SECOND_MS = 86400.0, 1000.0
"""The longest training piece in seconds, and the longest window and hop in milliseconds, that are taken seriously."""


class SpecMask(Piece):
    """SpecAugment (arXiv:1904.08779): one stripe of time and one of frequency are hidden in training.

    A stripe's width is uniform from 0 to the number given, its place uniform as well. AST and Audio-MAE fine-tune on
    AudioSet with 192 frames and 48 mel bins.
    """

    time: Annotated[int, Field(ge=0)] = 0
    """Greatest width in frames; 0 is off."""
    frequency: Annotated[int, Field(ge=0)] = 0
    """Greatest width in mel bins; 0 is off."""

    @property
    def active(self) -> bool:
        """Whether anything is ever hidden."""
        return self.time > 0 or self.frequency > 0

    def draw(self, rng: np.random.Generator, frames: int, mels: int) -> Tensor:
        """Return the first and the last frame (exclusive) and the same of mel bins: int64 [4]."""
        edges = []
        for most, length in ((self.time, frames), (self.frequency, mels)):
            width = int(rng.integers(min(most, length) + 1))
            start = int(rng.integers(length - width + 1))
            edges += [start, start + width]
        return torch.tensor(edges)


class AudioSignal(Piece):
    """How a decoded sound becomes a signal, and what its spectrogram is."""

    sample_rate: Annotated[int, Field(gt=0)] = 16000
    """Samples per second; files of other rates are resampled."""
    seconds: Annotated[float, Field(gt=0, le=DAY)] = 10.24
    """Training: duration of a piece. 10.24 makes 1024 frames (Audio-MAE, arXiv:2207.06405, section 4.2)."""
    mels: Annotated[int, Field(gt=0)] = 128
    """Mel bins of the spectrogram."""
    window_ms: Annotated[float, Field(gt=0, le=SECOND_MS)] = 25.0
    """Milliseconds that a frame looks at."""
    hop_ms: Annotated[float, Field(gt=0, le=SECOND_MS)] = 10.0
    """Milliseconds from frame to frame."""
    low_hz: Annotated[float, Field(ge=0)] = 20.0
    """Where the lowest mel bin begins."""
    high_hz: Annotated[float, Field(gt=0)] | None = None
    """Where the highest mel bin ends; null is half the sample rate."""
    mean: tuple[float] = (-4.268,)
    """Subtracted from the log-mel spectrogram (AudioSet's)."""
    std: tuple[float] = (9.138,)
    """Divided by. AST and Audio-MAE divide by twice AudioSet's standard deviation of 4.569, so these are 2 x 4.569."""
    fill: Literal["pad", "repeat"] = "pad"
    """Training, where a file is shorter than ``seconds``. pad: zeros follow, which nobody sees and nothing scores.
    repeat: the sound goes round and round, beginning anywhere (Audio-MAE rolls its sounds in this way)."""
    longest: Annotated[float, Field(gt=0)] | None = None
    """Evaluation: seconds above which a sound is cut into equal pieces, whose results are averaged; null is
    ``seconds``, the duration trained on."""
    gain_db: Annotated[float, Field(ge=0)] = 0.0
    """Training: the sound is made louder or fainter by up to so many decibels."""
    spec_mask: SpecMask = SpecMask()

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_channel(cls, value: Any) -> Any:
        # YAML takes 1e-3, without a point, for a string.
        return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float]) -> tuple[float]:
        if value[0] <= 0:
            raise ValueError(f"must be greater than 0, but got {value[0]:g}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> "AudioSignal":
        filterbank(self)  # which says what is wrong with its settings
        if self.frames < 1:
            raise ValueError(f"seconds {self.seconds:g} is shorter than hop_ms {self.hop_ms:g}")
        if self.spec_mask.time >= self.frames or self.spec_mask.frequency >= self.mels:
            raise ValueError(
                f"spec_mask must leave something of {self.frames} frames and {self.mels} mel bins, but may hide "
                f"{self.spec_mask.time} and {self.spec_mask.frequency}"
            )
        return self

    @property
    def frames(self) -> int:
        """Frames of a training signal."""
        return filterbank(self).frames_in(self.seconds)


class AudioTokenizer(Piece):
    """How a spectrogram is cut into tokens."""

    name: Literal["spectrogram"] = "spectrogram"
    patch_size: tuple[int, int] = (16, 16)
    """Mel bins and frames of a patch; one number is a square. Must divide ``signal.mels`` and the frames of
    ``signal.seconds``."""
    positions: PositionKind = "sincos"
    """Fixed sine-cosine positions, or learned ones."""
    target: Literal["normalized", "raw"] = "normalized"
    """What a reconstruction predicts: patches normalised one by one (Audio-MAE, as MAE), or raw values."""

    @field_validator("patch_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("patch_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) <= 0:
            raise ValueError(f"both sides must be greater than 0, but got {list(value)}")
        return value


class WaveTokenizer(Piece):
    """How a waveform becomes tokens by itself: strided convolutions (CPC, arXiv:1807.03748, section 3.1)."""

    name: Literal["wave"] = "wave"
    kernels: tuple[Annotated[int, Field(gt=0)], ...] = (10, 8, 4, 4, 4)
    """Samples, then outputs of the layer before, that each layer looks at."""
    strides: tuple[Annotated[int, Field(gt=0)], ...] = (5, 4, 2, 2, 2)
    """Their product is the samples per token: 160, or 100 tokens a second at 16 kHz."""
    norm: Norm = "channel"
    """channel: over the channels of each moment by itself, which leaks nothing over time or the batch; or none."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.kernels) != len(self.strides) or not self.strides:
            raise ValueError(f"needs as many kernels as strides, but got {[*self.kernels]} and {[*self.strides]}")
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if kernel < stride:
                raise ValueError(
                    f"a kernel of {kernel} with stride {stride} leaves values out; take a kernel >= stride"
                )
        return self

    @property
    def hop(self) -> int:
        """Samples per token."""
        return math.prod(self.strides)


AnyTokenizer: TypeAlias = AudioTokenizer | WaveTokenizer


def log_mel_of(signal: AudioSignal) -> LogMel:
    """Return a filterbank of a signal's settings; raises ValueError for impossible ones."""
    band = signal.low_hz, signal.high_hz or 0.0
    return LogMel(signal.sample_rate, signal.mels, signal.window_ms, signal.hop_ms, *band)


@lru_cache(maxsize=8)
def filterbank(signal: AudioSignal) -> LogMel:
    """Return the filterbank of a signal's settings, on the CPU; raises ValueError for impossible ones."""
    with torch.device("cpu"):
        return log_mel_of(signal)


class Ruler(Protocol):
    """How a waveform is measured in frames."""

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        ...

    def frames(self, samples: int) -> int:
        """Return how many frames there are in so many samples."""
        ...

    def samples(self, frames: int) -> int:
        """Return how many samples so many frames need."""
        ...

    def frames_in(self, seconds: float) -> int:
        """Return how many frames a piece of so many seconds is taken for."""
        ...


@dataclass(frozen=True)
class Strides:
    """Frames of ``hop`` samples, one behind the other."""

    hop: int
    rate: int

    def frames(self, samples: int) -> int:
        """Return how many whole strides there are."""
        return samples // self.hop

    def samples(self, frames: int) -> int:
        """Return how many samples they span."""
        return frames * self.hop

    def frames_in(self, seconds: float) -> int:
        """Return how many there are in so many seconds."""
        return round(seconds * self.rate) // self.hop


def ruler_of(signal: AudioSignal, tokenizer: AnyTokenizer) -> Ruler:
    """Return what the tokens of a waveform are counted with: frames of a spectrogram, or strides."""
    return Strides(tokenizer.hop, signal.sample_rate) if isinstance(tokenizer, WaveTokenizer) else filterbank(signal)


def frames_per_token(tokenizer: AnyTokenizer) -> int:
    """Return the frames that a token spans."""
    return 1 if isinstance(tokenizer, WaveTokenizer) else tokenizer.patch_size[1]
