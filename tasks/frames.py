"""Vectors of sounds over time: a whole file's, one for each step of the token grid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor

from mmssl.contracts import Streams, StreamsSignal
from mmssl.data.guard import BrokenFile
from mmssl.data.listing import Listing
from mmssl.errors import UserError
from modalities.abilities import Sounds
from modalities.encoder import Encoder
from modalities.heads import Reader
from tasks.features import finite, signals

WHOLE = 1e9
"""Seconds above which an encoder's transform would cut a sound into pieces: no sound is as long."""
CHUNK = 10.0
"""Seconds that go at once through an encoder that streams: 16 kHz and 512 channels take a few 100 MB."""
FEW = 16
"""As many files are read sooner than processes start to read them."""


class FrameExtractor(Reader, Protocol):
    """What frames are computed with: ``SoundFrames``, or anything that maps a file's signal to vectors over time.

    Frame i of a file spans the time from i to i + 1 times ``seconds_per_step``.
    """

    @property
    def seconds_per_step(self) -> float:
        """How many seconds pass from one frame to the next."""
        ...

    def frames(self, signal: Tensor) -> Tensor:
        """Map one signal, as ``transform`` makes it, to float32 [T, D] on the CPU, without gradients."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes whenever the vectors would."""
        ...


class FrameOptions(TypedDict, total=False):
    """The options of ``read_frames``, which every use of frames passes on."""

    workers: int | Literal["auto"]
    skip_broken: bool
    timeout: float


def read_frames(
    extractor: FrameExtractor,
    listing: Listing,
    workers: int | Literal["auto"] = "auto",
    skip_broken: bool = False,
    timeout: float = 30.0,
) -> Iterator[tuple[int, Tensor | str]]:
    """Yield every file's index and frames float32 [T, D], in order; with ``skip_broken`` why there are none.

    One file is in memory at a time, and those that ``workers`` have decoded ahead. Raises UnusableData for a broken
    file and for frames that are NaN or infinite.
    """
    if workers == "auto" and len(listing) <= FEW:
        workers = 0
    for whole, broken in signals(extractor, listing, 1, workers, skip_broken, timeout):
        yield from broken
        for (index,), signal in whole:
            frames = extractor.frames(signal[0])
            yield index, finite(frames, [listing.paths[index]] * len(frames))


class SoundFrames:
    """The frames of an encoder of sounds: of one that streams as if it heard the file in one go, of others in windows.

    Windows are as long as what it was trained on, one behind the other; the last one ends where the file does, and what
    it shares with the one before is taken from that. Tokens of one time (its frequencies) are averaged.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Raise UserError for an encoder of something else than sounds."""
        kind, settings, tokenizer = encoder.kind, encoder.config.signal, encoder.config.model.tokenizer
        if not isinstance(kind, Sounds):
            raise UserError(f"frames are of sounds, but this encoder is of modality {encoder.modality}")
        self.seconds_per_step = kind.seconds_per_step(settings, tokenizer)
        self.decode: Callable[[str], Any] = encoder.decode
        whole = settings.model_copy(update={"longest": WHOLE})
        self.rate: int = settings.sample_rate  # type: ignore[attr-defined]
        self.transform: Callable[[Any], Tensor] = _Whole(kind.eval_transform(whole, tokenizer), self.rate)
        self.streams = isinstance(encoder.tokenizer, StreamsSignal) and isinstance(encoder.backbone, Streams)
        self._encoder = encoder.eval()
        self._hop = round(self.seconds_per_step * self.rate)

    @torch.no_grad()
    def frames(self, signal: Tensor) -> Tensor:
        """Return float32 [T, dim] of a sound [1, samples]."""
        return self._streamed(signal) if self.streams else self._windowed(signal)

    def fingerprint(self) -> str:
        """Return a text that depends on the encoder, and is not the encoder's own."""
        return f"frames {self._encoder.fingerprint()}"

    def _streamed(self, signal: Tensor) -> Tensor:
        encoder, state, parts = self._encoder, None, []
        for chunk in signal.split(round(CHUNK / self.seconds_per_step) * self._hop, dim=1):
            vectors, state = encoder.step(chunk.unsqueeze(0).to(encoder.device, torch.float32), state)
            parts.append(vectors[0].float().cpu())
        return torch.cat(parts)

    def _windowed(self, signal: Tensor) -> Tensor:
        tokenizer = self._encoder.tokenizer
        (axis,), (longest,) = tokenizer.extend, tokenizer.size
        steps, most = tokenizer.grid_of(signal.shape[1:])[axis], tokenizer.grid[axis]
        if steps <= most:
            return self._over_time(signal.unsqueeze(0), axis)[0]
        starts = [*range(0, steps - most, most), steps - most]
        windows = [signal[:, start * self._hop :][:, :longest] for start in starts]
        frames = self._over_time(torch.stack(windows), axis)
        shared = starts[-2] + most - starts[-1]
        return torch.cat([frames[:-1].flatten(0, 1), frames[-1, shared:]])

    def _over_time(self, windows: Tensor, axis: int) -> Tensor:
        tokens, grid = self._encoder.tokens(windows)
        rows: Tensor = tokens.unflatten(1, grid).movedim(1 + axis, 1)
        return rows.reshape(len(rows), grid[axis], -1, tokens.shape[2]).mean(2)


@dataclass(frozen=True)
class _Whole:
    """Makes the signal of a decoded sound; raises BrokenFile for one shorter than a token, which would be filled up."""

    transform: Callable[[Any], Tensor]
    rate: int

    def __call__(self, sound: Any) -> Tensor:
        from modalities.audio_read import resampled_length

        signal = self.transform(sound)
        if signal.shape[1] > resampled_length(len(sound.waveform), sound.rate, self.rate):
            raise BrokenFile(
                f"{len(sound.waveform) / sound.rate:g} s are shorter than a token of {signal.shape[1] / self.rate:g} s"
            )
        return signal
