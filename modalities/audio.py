"""Sounds: decode to one channel, cut pieces, log-mel spectrograms, pictures and sound of them.

Shapes: a signal is a waveform float32 [1, samples] at ``signal.sample_rate``. The spectrogram, [1, mels, frames], is
made by the tokenizer (``modalities/spectrogram.py``), so waveforms are what is mixed and what travels in batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from mmssl.contracts import Grid, Views
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.fbank import LogMel
from modalities.looks import OneLook
from modalities.spectrogram import SpectrogramTokenizer

# libsndfile, the resampler and the colours are loaded by those who need them: pictures do without.
if TYPE_CHECKING:
    from modalities.audio_read import Sound

FAINT, LOUD = -12.0, 6.0
"""Log-mel energies that are drawn black and white: 78 dB between them, whatever the recipe normalises."""
DAY, SECOND_MS = 86400.0, 1000.0
"""The longest training piece in seconds, and the longest window and hop in milliseconds, that are taken seriously."""
GREY = 128
"""What hidden parts, exactly 0, look like: none of the colours of a sound."""


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


class Axes(NamedTuple):
    """Where ticks belong on a spectrogram's picture: (pixel from the left or the top, label)."""

    seconds: list[tuple[float, str]]
    hertz: list[tuple[float, str]]


class Audio(OneLook):
    """The modality of sound."""

    name = "audio"
    frame_suffixes = frozenset[str]()
    timed = True
    extent_words: tuple[str, ...] = ("seconds", "rate", "channels")
    suffixes = frozenset(
        {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64"}
    )
    signal_type = AudioSignal
    tokenizer_type = AudioTokenizer

    def decode(self, path: str) -> "Sound":
        """Return a sound, whole or the piece that ``path`` names: one channel, at the file's own rate.

        Decoding runs in a child process, which is killed with the call. Raises BrokenFile.
        """
        from modalities.audio_read import read

        return isolated(read, path, timeout=None)

    def inspect(self, path: str) -> tuple[float, int, int]:
        """Decode a file and return its seconds, rate in Hz and channels; raises BrokenFile."""
        from modalities.audio_read import info

        return isolated(info, path, timeout=None)

    def moments(self, path: str, signal: AudioSignal) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return count, sum and sum of squares of a file's log-mel energies: [1, 3].

        Raises BrokenFile, also for a sound shorter than one window.
        """
        waveform, log_mel = _at_rate(self.decode(path), signal), filterbank(signal)
        if len(waveform) < log_mel.window:
            raise BrokenFile(f"shorter than one window of {signal.window_ms:g} ms")
        values = log_mel(waveform.unsqueeze(0)).double()
        return np.array([[values.numel(), float(values.sum()), float(values.square().sum())]])

    def sizes(self, signal: AudioSignal) -> tuple[tuple[int]]:
        """Return the one size of training signals, in samples."""
        return ((filterbank(signal).samples(signal.frames),),)

    def bucket(self, path: str, signal: AudioSignal) -> int:
        """Return 0: there is one size."""
        return 0

    def views(self, signal: AudioSignal) -> Views:
        """Return what reads a file and makes random pieces of it."""
        from modalities.audio_views import AudioViews

        return AudioViews(signal)

    def eval_transform(self, signal: AudioSignal, tokenizer: AudioTokenizer) -> Callable[["Sound"], Tensor]:
        """Return what makes a decoded sound [1, samples], or of one longer than ``longest`` pieces [V, 1, samples].

        It is cut to a multiple of the patch's frames, and one shorter than a patch is filled up with zeros.
        """
        return _EvalTransform(signal, tokenizer.patch_size[1])

    def tokenizer(self, signal: AudioSignal, tokenizer: AudioTokenizer, dim: int) -> SpectrogramTokenizer:
        """Return a tokenizer of ``dim`` channels; raises ValueError where patches do not divide the spectrogram."""
        (mean,), (std,) = signal.mean, signal.std
        positions, target = tokenizer.positions, tokenizer.target
        return SpectrogramTokenizer(
            _log_mel(signal), signal.frames, tokenizer.patch_size, dim, mean, std, positions, target
        )

    def picture(self, x: Tensor, signal: AudioSignal) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Draw a normalised spectrogram [1, mels, frames], low frequencies at the bottom: uint8 [mels, frames, 3].

        Values of exactly 0, as hidden parts have, are grey.
        """
        from matplotlib import colormaps

        values = x[0].detach().float().cpu().flip(0)
        (mean,), (std,) = signal.mean, signal.std
        share = (values * std + mean - FAINT) / (LOUD - FAINT)
        colours = colormaps["magma"](share.clamp(0, 1).numpy(), bytes=True)[..., :3]
        return np.where((values == 0).numpy()[..., None], np.uint8(GREY), colours)

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange values of tokens [N, ...] as the picture is, low frequencies below: [frequency, time, ...]."""
        return values.reshape(*grid, *values.shape[1:])[::-1]

    def sound(self, x: Tensor, signal: AudioSignal) -> tuple[Tensor, int]:
        """Make a normalised spectrogram [1, mels, frames] audible: float32 [samples], and the rate.

        Phases are guessed (Griffin-Lim), so even an untouched spectrogram sounds somewhat different.
        """
        from modalities.griffin_lim import invert

        (mean,), (std,) = signal.mean, signal.std
        return invert(x[0].detach().float().cpu() * std + mean, filterbank(signal)), signal.sample_rate

    def axes(self, x: Tensor, signal: AudioSignal) -> Axes:
        """Return where times and frequencies lie on ``picture`` of a spectrogram [1, mels, frames]."""
        log_mel, frames = filterbank(signal), x.shape[2]
        per_second = signal.sample_rate / log_mel.hop
        step = _step(frames / per_second)
        times = [(i * step * per_second, f"{i * step:g}") for i in range(int(frames / per_second / step) + 1)]
        centres = log_mel.centres_hz
        octaves = [125 * 2**i for i in range(8) if centres[0] <= 125 * 2**i <= centres[-1]]
        rows = np.interp(octaves, centres, np.arange(signal.mels)).tolist()
        return Axes(times, [(signal.mels - row - 0.5, str(hz)) for hz, row in zip(octaves, rows, strict=True)])


@dataclass(frozen=True)
class _EvalTransform:
    signal: AudioSignal
    patch: int
    """Frames of a patch."""

    def __call__(self, sound: "Sound") -> Tensor:
        waveform, log_mel = _at_rate(sound, self.signal), filterbank(self.signal)
        frames = log_mel.frames(len(waveform))
        if frames < self.patch:
            return F.pad(waveform, (0, log_mel.samples(self.patch) - len(waveform))).unsqueeze(0)
        longest = self.signal.longest or self.signal.seconds
        most = max(1, log_mel.frames_in(longest) // self.patch) * self.patch
        views = -(-frames // most)
        if views == 1:
            return waveform[: log_mel.samples(frames // self.patch * self.patch)].unsqueeze(0)
        # Rounded up to whole patches, they overlap a little: nothing of the sound is left out.
        each = -(-frames // (views * self.patch)) * self.patch
        starts = np.linspace(0, frames - each, views).round().astype(int) * log_mel.hop
        length = log_mel.samples(each)
        return torch.stack([waveform[start : start + length] for start in starts]).unsqueeze(1)


def _at_rate(sound: "Sound", signal: AudioSignal) -> Tensor:
    from modalities.audio_read import Sound, resampled

    if not isinstance(sound, Sound):
        raise TypeError(f"a path, a decoded sound or a float tensor is needed, but got {type(sound).__name__}")
    return resampled(sound.waveform, sound.rate, signal.sample_rate)


def _log_mel(signal: AudioSignal) -> LogMel:
    band = signal.low_hz, signal.high_hz or 0.0
    return LogMel(signal.sample_rate, signal.mels, signal.window_ms, signal.hop_ms, *band)


@lru_cache(maxsize=8)
def filterbank(signal: AudioSignal) -> LogMel:
    """Return the filterbank of a signal's settings, on the CPU; raises ValueError for impossible ones."""
    with torch.device("cpu"):
        return _log_mel(signal)


def _step(seconds: float) -> float:
    # Five to ten ticks: 1, 2 or 5 times a power of ten.
    power = 10.0 ** np.floor(np.log10(seconds / 5))
    return float(power * max(n for n in (1, 2, 5) if n * power <= seconds / 5 * 1.0001))
