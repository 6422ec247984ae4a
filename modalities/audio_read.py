"""Reading sounds: wav, flac, ogg, opus, mp3, aiff, au, caf through libsndfile; channels are averaged.

Only what is asked for is decoded, and a piece of a resampled sound equals the piece of the resampled whole. Two limits:
a few codecs (GSM, G.72x) cannot seek and are decoded as a whole, and Opus at speech rates remembers what came
before the piece, so that a piece differs from the whole by up to 2e-3 (RFC 7845, section 4.6, allows for that).

What formats tell of their own length is compared with what is there: RIFF, AIFF, AU and W64 chunks, the last page of an
Ogg file, FLAC's and MP3's headers (where the end of the file is read; an MP3 file without a Xing header says nothing).
Everything that is wrong with a file raises BrokenFile, or what ``guarded`` makes one of.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import Resample

from mmssl.data import fragment
from mmssl.data.guard import BrokenFile

FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"})
"""What is decoded, by content: a wrong suffix is harmless."""
BLOCK = 2**18
"""Values decoded at a time: many channels of a long sound are never in memory together."""
MAX_SAMPLES = 2**29
"""Samples above which a sound is not read whole: three hours at 48 kHz, 2 GB."""
LOUDEST = 1e10
"""Values above which a sample is damage. Float files may hold integers as they are, up to 2e9; the squares of much
greater ones overflow in the spectrum."""
MAX_KERNEL = 2**22
"""Values of a resampling kernel above which it is worked out sample by sample; usual rates need less than a tenth."""
TAPS_AT_ONCE = 2**20
"""Values of the kernel that are worked out at a time where it is not kept."""
MAX_TABLE = 2**24
"""Values of that kernel up to which all places that samples can have are worked out once, where there are more of
those samples than places: a long sound is done in an eighth of the time."""
ZEROS, ROLLOFF = 32, 0.95
"""The resampling filter: zero crossings on each side, and its cut-off in terms of the Nyquist frequency.

Brought from 8 to 16 kHz, a tone of 3.6 kHz has an image 68 dB below it; with torchaudio's defaults (6, 0.99) 12 dB.
"""

Samples: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_LENGTH = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_RF64_LENGTH = re.compile(r"frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_UNKNOWN = (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000)
"""Lengths that writers put down who do not know them (into a pipe)."""
_SF_COUNT_MAX = 2**63 - 1
"""What libsndfile says where a FLAC header says 0 samples, for unknown."""
_OGG_PAGE = 65_307
"""The longest page of an Ogg file in bytes (RFC 3533, section 6)."""


@dataclass(frozen=True)
class Sound:
    """A decoded sound: ``waveform`` float32 [samples], channels averaged, at ``rate`` samples per second."""

    waveform: Tensor
    rate: int


class _Decoded:
    """A sound that cannot be sought in, decoded once; has what ``Source`` needs of a ``SoundFile``."""

    def __init__(self, file: Any) -> None:
        self.samplerate, self.channels = file.samplerate, file.channels
        self._samples: Samples = file.read(min(file.frames, MAX_SAMPLES), dtype="float32", always_2d=True)
        self._rest = self._samples

    def seek(self, start: int) -> None:
        self._rest = self._samples[start:]

    def read(self, count: int, **_: Any) -> Samples:
        block: Samples = self._rest[:count]
        self._rest = self._rest[count:]
        return block


class Source:
    """An opened sound file, or the piece of it that was asked for."""

    def __init__(self, file: Any, start: int, samples: int) -> None:
        self._file, self._start, self.samples = file, start, samples
        self.rate, self.channels = int(file.samplerate), int(file.channels)

    def blocks(self, start: int, stop: int) -> Iterator[Samples]:
        """Yield the samples from ``start`` to ``stop``, channels averaged, in blocks; raises BrokenFile for damage."""
        self._file.seek(self._start + start)
        left = stop - start
        while left > 0:
            block = self._file.read(min(left, max(1, BLOCK // self.channels)), dtype="float32", always_2d=True)
            if len(block) == 0:
                raise BrokenFile(f"truncated: {self._start + stop - left} of {self._start + stop} samples")
            _check_values(block)
            left -= len(block)
            yield block[:, 0] if self.channels == 1 else block.mean(1)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the samples from ``start`` to ``stop``, float32 [stop - start]."""
        out, done = torch.empty(stop - start), 0
        for block in self.blocks(start, stop):
            out[done : done + len(block)] = torch.from_numpy(block)
            done += len(block)
        return out


@contextmanager
def opened(path: str) -> Iterator[Source]:
    """Open a sound file, or the piece of it that ``path`` names (#t=START,END; a late END is the file's), unread.

    Raises BrokenFile for what is no sound, is shorter than its header says or has nothing in the piece.
    """
    span = fragment.split(path)
    with open(span.file, "rb", buffering=0) as raw, _muted():  # noqa: PTH123 (paths are strings here)
        _check_ogg(raw)
        try:
            file = soundfile.SoundFile(raw.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            raise BrokenFile("empty file" if not os.fstat(raw.fileno()).st_size else _not_a_sound(error)) from None
        with file:
            if file.format not in FORMATS:
                raise BrokenFile(f"not a sound that is read here: {file.format}")
            _check_length(file.extra_info)
            if file.frames == _SF_COUNT_MAX:  # libsndfile cannot read such a file to its end
                raise BrokenFile("its header does not say how long it is")
            start = min(round(span.start * file.samplerate), file.frames)
            stop = file.frames if span.end is None else min(round(span.end * file.samplerate), file.frames)
            if stop <= start:
                raise BrokenFile(_nothing(span, file.frames / file.samplerate))
            try:
                yield Source(file if file.seekable() else _Decoded(file), start, stop - start)
            except soundfile.LibsndfileError as error:
                raise BrokenFile(f"truncated or damaged: {_words(error)}") from None


def read(path: str) -> Sound:
    """Return a sound, whole or the piece that ``path`` names; raises BrokenFile."""
    with opened(path) as source:
        if source.samples > MAX_SAMPLES:
            raise BrokenFile(f"absurdly long: more than {MAX_SAMPLES // 10**6} million samples")
        return Sound(source.read(0, source.samples), source.rate)


def info(path: str) -> tuple[float, int, int]:
    """Decode all of a sound and return its seconds, rate in Hz and channels; raises BrokenFile."""
    with opened(path) as source:
        for _ in source.blocks(0, source.samples):
            pass
        return source.samples / source.rate, source.rate, source.channels


def resampled_length(samples: int, rate: int, target: int) -> int:
    """Return how many samples at the rate ``target`` so many at ``rate`` become."""
    return -(-samples * target // rate)


def resampled(waveform: Tensor, rate: int, target: int) -> Tensor:
    """Return a waveform [samples] at another rate."""
    if rate == target:
        return waveform
    resampler = _resampler(rate, target)
    if resampler is not None:
        return resampler(waveform)  # type: ignore[no-any-return]
    return _interpolated(waveform, 0, 0, resampled_length(len(waveform), rate, target), rate, target)


def piece(source: Source, start: int, count: int, target: int) -> Tensor:
    """Return ``count`` samples from ``start`` of the sound at the rate ``target``; no more is read than they need."""
    if source.rate == target:
        return source.read(start, start + count)
    orig, new, width = _steps(source.rate, target)
    if _resampler(source.rate, target) is None:
        first = max(0, start * orig // new - width)
        stop = min(source.samples, (start + count - 1) * orig // new + width + 2)
        return _interpolated(source.read(first, stop), first, start, count, source.rate, target)
    # The filter goes in steps: ``orig`` samples in, ``new`` samples out, from ``width`` before to ``width`` after.
    first = max(0, start // new - ceil(width / orig))
    stop = min(source.samples, ((start + count - 1) // new + 1) * orig + width)
    some = resampled(source.read(first * orig, stop), source.rate, target)
    return some[start - first * new :][:count]


@lru_cache(maxsize=8)
def _resampler(rate: int, target: int) -> Any:
    """Return torchaudio's resampler, or None where its kernel, [new, orig + 2 width], would be huge."""
    orig, new, width = _steps(rate, target)
    if new * (orig + 2 * width) > MAX_KERNEL:
        return None
    return Resample(rate, target, lowpass_filter_width=ZEROS, rolloff=ROLLOFF)


def _steps(rate: int, target: int) -> tuple[int, int, int]:
    """Return how many samples become how many, in lowest terms, and to how many on each side the filter reaches."""
    common = gcd(rate, target)
    orig, new = rate // common, target // common
    return orig, new, ceil(ZEROS * orig / (min(orig, new) * ROLLOFF))


def _interpolated(waveform: Tensor, first: int, start: int, count: int, rate: int, target: int) -> Tensor:
    """Return ``count`` samples from ``start`` at the rate ``target`` of a sound, of which ``waveform`` is a part.

    The part begins at the sound's sample ``first``. The filter is that of torchaudio's ``Resample``, worked out for
    every sample: where rates hardly have a common factor, each lies otherwise between those of the file.
    """
    orig, new, width = _steps(rate, target)
    around = F.pad(waveform, (width, width + 1)).unfold(0, 2 * width + 2, 1)
    taps = torch.arange(-width, width + 2, dtype=torch.float64)
    scale, at_once = min(orig, new) * ROLLOFF / orig, max(1, TAPS_AT_ONCE // len(taps))

    def kernel(phases: Tensor) -> Tensor:
        offset = (taps - (phases / new).unsqueeze(1)) * scale
        window = torch.cos(offset.clamp(-ZEROS, ZEROS) * (math.pi / 2 / ZEROS)).square()
        return (torch.sinc(offset) * window * scale).float()

    repeats = count > new and new * len(taps) <= MAX_TABLE
    table = torch.cat([kernel(some) for some in torch.arange(new).split(at_once)]) if repeats else None
    out = []
    for places in (torch.arange(start, start + count) * orig).split(at_once):
        phases = places % new
        kernels = kernel(phases) if table is None else table[phases]
        out.append((around[places // new - first] * kernels).sum(1))
    return torch.cat(out)


@contextmanager
def _muted() -> Iterator[None]:
    # The MP3 decoder writes to standard error what it thinks of a file; the ledger holds what really is wrong.
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _check_values(block: Samples) -> None:
    # The least and the greatest are NaN where anything is. Channels are looked at before they are averaged.
    loudest = max(float(block.max()), -float(block.min()))
    if not math.isfinite(loudest):
        raise BrokenFile("samples that are no numbers (NaN or Inf)")
    if loudest > LOUDEST:
        raise BrokenFile(f"samples far beyond full scale ({loudest:.0e})")


def _check_ogg(raw: BinaryIO) -> None:
    """Raise BrokenFile for an Ogg file whose last page is cut or is not said to be the last one (RFC 3533)."""
    if raw.read(4) == b"OggS":
        raw.seek(max(0, raw.seek(0, os.SEEK_END) - 2 * _OGG_PAGE))
        tail = raw.read()
        page = tail[max(0, tail.rfind(b"OggS")) :]
        segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not segments or not page[5] & 4 or len(page) < 27 + len(segments) + sum(segments):
            raise BrokenFile("truncated: the last page is missing")
    raw.seek(0)


def _check_length(log: str) -> None:
    """Raise BrokenFile where libsndfile, which goes on in silence, has noted that there is less than declared."""
    lengths = [match.groups() for match in _LENGTH.finditer(log)]
    lengths += [match.groups()[::-1] for match in _RF64_LENGTH.finditer(log)]
    for declared, found in lengths:
        if int(found) < int(declared) and int(declared) not in _UNKNOWN:
            raise BrokenFile(f"truncated: {100 * int(found) // int(declared)} % of the declared length")


def _nothing(span: fragment.Span, seconds: float) -> str:
    if span.start == 0 and span.end is None:
        return "no samples in it"
    end = "the end" if span.end is None else f"{span.end:g} s"
    return f"nothing between {span.start:g} s and {end}: it lasts {seconds:g} s"


def _not_a_sound(error: Any) -> str:
    words = _words(error)
    # libsndfile's words for what its MP3 reader has looked through in vain, and for headers that make no sense to it.
    vain = ("file does not exist", "format not", "internal error")
    return "not a sound" if words.startswith(vain) else f"not a sound: {words}"


def _words(error: Any) -> str:
    words = str(error.error_string).removeprefix("Error : ").strip().rstrip(".")
    return words[:1].lower() + words[1:]
