"""Sounds: decode to one channel, cut pieces, log-mel spectrograms, pictures and sound of them.

Shapes: a signal is a waveform float32 [1, samples] at ``signal.sample_rate``. The spectrogram, [1, mels, frames], is
made by the tokenizer (``modalities/spectrogram.py``), so waveforms are what is mixed and what travels in batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.config import Piece
from mmssl.contracts import Grid, Size, Views
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.audio_settings import (
    AnyTokenizer,
    AudioSignal,
    AudioTokenizer,
    WaveTokenizer,
    filterbank,
    frames_per_token,
    log_mel_of,
    ruler_of,
)
from modalities.looks import OneLook
from modalities.spectrogram import SpectrogramTokenizer
from modalities.synthetic import Noise
from modalities.waves import Waves

# libsndfile, the resampler and the colours are loaded by those who need them: pictures do without.
if TYPE_CHECKING:
    from modalities.audio_read import Sound

FAINT, LOUD = -12.0, 6.0
"""Log-mel energies that are drawn black and white: 78 dB between them, whatever the recipe normalises."""
GREY = 128
"""What hidden parts, exactly 0, look like: none of the colours of a sound."""


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
    tokenizer_types: tuple[type[Piece], ...] = (AudioTokenizer, WaveTokenizer)

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

    def sizes(self, signal: AudioSignal, tokenizer: AnyTokenizer) -> tuple[tuple[int]]:
        """Return the one size of training signals, in samples."""
        ruler = ruler_of(signal, tokenizer)
        return ((ruler.samples(ruler.frames_in(signal.seconds)),),)

    def bucket(self, path: str, signal: AudioSignal) -> int:
        """Return 0: there is one size."""
        return 0

    def views(self, signal: AudioSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return what reads a file and makes random pieces of it."""
        from modalities.audio_views import AudioViews

        return AudioViews(signal)

    def synthetic(self, signal: AudioSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return what makes sounds of noise, half of whole length or more where short ones are padded."""
        return _NoiseSounds(signal)

    def eval_transform(self, signal: AudioSignal, tokenizer: AnyTokenizer) -> Callable[["Sound"], Tensor]:
        """Return what makes a decoded sound [1, samples], or of one longer than ``longest`` pieces [V, 1, samples].

        It is cut to whole tokens, and one shorter than a token is filled up with zeros.
        """
        return _EvalTransform(signal, tokenizer)

    def seconds_per_step(self, signal: AudioSignal, tokenizer: AnyTokenizer) -> float:
        """Return the seconds from one token, or column of tokens, to the next."""
        ruler, frames = ruler_of(signal, tokenizer), frames_per_token(tokenizer)
        return (ruler.samples(2 * frames) - ruler.samples(frames)) / signal.sample_rate

    def tokenizer(self, signal: AudioSignal, tokenizer: AnyTokenizer, dim: int) -> "SpectrogramTokenizer | Waves":
        """Return a tokenizer of ``dim`` channels; raises ValueError where patches do not divide the spectrogram."""
        if isinstance(tokenizer, WaveTokenizer):
            if signal.spec_mask.active:
                raise ValueError(
                    "signal.spec_mask hides parts of spectrograms, of which model.tokenizer 'wave' has none"
                )
            ((samples,),) = self.sizes(signal, tokenizer)
            if not samples:
                raise ValueError(
                    f"signal.seconds {signal.seconds:g} is shorter than a token of {tokenizer.hop} samples"
                )
            return Waves(samples, dim, tokenizer.kernels, tokenizer.strides, tokenizer.norm)
        (mean,), (std,) = signal.mean, signal.std
        positions, target = tokenizer.positions, tokenizer.target
        return SpectrogramTokenizer(
            log_mel_of(signal), signal.frames, tokenizer.patch_size, dim, mean, std, positions, target
        )

    def picture(self, x: Tensor, signal: AudioSignal) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Draw a normalised spectrogram [1, mels, frames], low frequencies at the bottom: uint8 [mels, frames, 3].

        Values of exactly 0, as hidden parts have, are grey. Of a waveform [1, samples] it is the spectrogram.
        """
        from matplotlib import colormaps

        values = _spectrogram(x, signal)[0].detach().float().cpu().flip(0)
        (mean,), (std,) = signal.mean, signal.std
        share = (values * std + mean - FAINT) / (LOUD - FAINT)
        colours = colormaps["magma"](share.clamp(0, 1).numpy(), bytes=True)[..., :3]
        return np.where((values == 0).numpy()[..., None], np.uint8(GREY), colours)

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange values of tokens [N, ...] as the picture is, low frequencies below: [frequency, time, ...].

        Tokens of a waveform span all frequencies.
        """
        rows = grid if len(grid) == 2 else (1, *grid)
        return values.reshape(*rows, *values.shape[1:])[::-1]

    def sound(self, x: Tensor, signal: AudioSignal) -> tuple[Tensor, int]:
        """Make a normalised spectrogram [1, mels, frames] audible: float32 [samples], and the rate.

        Phases are guessed (Griffin-Lim), so even an untouched spectrogram sounds somewhat different. A waveform
        [1, samples] is there already.
        """
        from modalities.griffin_lim import invert

        if x.ndim == 2:
            return x[0].detach().float().cpu(), signal.sample_rate
        (mean,), (std,) = signal.mean, signal.std
        return invert(x[0].detach().float().cpu() * std + mean, filterbank(signal)), signal.sample_rate

    def axes(self, x: Tensor, signal: AudioSignal) -> Axes:
        """Return where times and frequencies lie on ``picture`` of a spectrogram [1, mels, frames]."""
        log_mel, frames = filterbank(signal), _spectrogram(x, signal).shape[2]
        per_second = signal.sample_rate / log_mel.hop
        step = _step(frames / per_second)
        times = [(i * step * per_second, f"{i * step:g}") for i in range(int(frames / per_second / step) + 1)]
        centres = log_mel.centres_hz
        octaves = [125 * 2**i for i in range(8) if centres[0] <= 125 * 2**i <= centres[-1]]
        rows = np.interp(octaves, centres, np.arange(signal.mels)).tolist()
        return Axes(times, [(signal.mels - row - 0.5, str(hz)) for hz, row in zip(octaves, rows, strict=True)])


@dataclass(frozen=True)
class _NoiseSounds:
    """Makes of any path one sample per generator, with what ``AudioViews`` gives."""

    signal: AudioSignal

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        samples = Noise(("signal",), channels=1)(path, rngs, size)
        for sample, rng in zip(samples, rngs, strict=True):
            if self.signal.fill == "pad":
                length = int(rng.integers(size[0] // 2, size[0] + 1))
                sample["signal"][:, length:] = 0
                sample["length"] = torch.tensor(length)
            if self.signal.spec_mask.active:
                sample["spec_mask"] = self.signal.spec_mask.draw(rng, self.signal.frames, self.signal.mels)
        return samples


@dataclass(frozen=True)
class _EvalTransform:
    signal: AudioSignal
    tokenizer: AnyTokenizer

    def __call__(self, sound: "Sound") -> Tensor:
        ruler, patch = ruler_of(self.signal, self.tokenizer), frames_per_token(self.tokenizer)
        waveform = _at_rate(sound, self.signal)
        frames = ruler.frames(len(waveform))
        if frames < patch:
            return F.pad(waveform, (0, ruler.samples(patch) - len(waveform))).unsqueeze(0)
        longest = self.signal.longest or self.signal.seconds
        most = max(1, ruler.frames_in(longest) // patch) * patch
        views = -(-frames // most)
        if views == 1:
            return waveform[: ruler.samples(frames // patch * patch)].unsqueeze(0)
        # Rounded up to whole patches, they overlap a little: nothing of the sound is left out.
        each = -(-frames // (views * patch)) * patch
        starts = np.linspace(0, frames - each, views).round().astype(int) * ruler.hop
        length = ruler.samples(each)
        return torch.stack([waveform[start : start + length] for start in starts]).unsqueeze(1)


def _spectrogram(x: Tensor, signal: AudioSignal) -> Tensor:
    # What the tokenizer cuts is a spectrogram, or the waveform itself, perhaps shorter than a window.
    if x.ndim == 3:
        return x
    log_mel, ((mean,), (std,)) = filterbank(signal), (signal.mean, signal.std)
    wave = F.pad(x.detach().float().cpu(), (0, max(0, log_mel.window - x.shape[1])))
    return (log_mel(wave) - mean) / std  # type: ignore[no-any-return]


def _at_rate(sound: "Sound", signal: AudioSignal) -> Tensor:
    from modalities.audio_read import Sound, resampled

    if not isinstance(sound, Sound):
        raise TypeError(f"a path, a decoded sound or a float tensor is needed, but got {type(sound).__name__}")
    return resampled(sound.waveform, sound.rate, signal.sample_rate)


def _step(seconds: float) -> float:
    # Five to ten ticks: 1, 2 or 5 times a power of ten.
    power = 10.0 ** np.floor(np.log10(seconds / 5))
    return float(power * max(n for n in (1, 2, 5) if n * power <= seconds / 5 * 1.0001))
