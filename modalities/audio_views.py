"""Training sounds: random pieces of a file, of which no more is decoded than they need."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.contracts import Size
from mmssl.data.isolate import isolated
from modalities.audio_read import Source, opened, piece, resampled_length
from modalities.audio_settings import AudioSignal


@dataclass(frozen=True)
class AudioViews:
    """Opens a sound once and makes of it one random piece per generator, float32 [1, samples].

    Decoding runs in a child process, which is killed with the call. Raises BrokenFile.
    """

    signal: AudioSignal

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the pieces; each generator gives a piece's start, its gain and what SpecAugment hides, in this order.

        With the fill "pad" a piece has its ``length``, int64 []; with SpecAugment ``spec_mask``, int64 [4].
        """
        return isolated(partial(_pieces, signal=self.signal, rngs=list(rngs), count=size[0]), path, timeout=None)


def _pieces(path: str, signal: AudioSignal, rngs: Sequence[np.random.Generator], count: int) -> list[dict[str, Tensor]]:
    with opened(path) as source:
        return [_piece(source, signal, rng, count) for rng in rngs]


def _piece(source: Source, signal: AudioSignal, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
    total = resampled_length(source.samples, source.rate, signal.sample_rate)
    length = min(count, total)
    # A sound that goes round may begin anywhere; one that is padded has one place.
    places = total if length < count and signal.fill == "repeat" else total - length + 1
    start = int(rng.integers(places))
    if length == count:
        x = piece(source, start, count, signal.sample_rate)
    else:
        whole = piece(source, 0, total, signal.sample_rate)
        x = _around(whole, start, count) if signal.fill == "repeat" else F.pad(whole, (0, count - total))
    if signal.gain_db > 0:
        x = x * 10 ** (rng.uniform(-signal.gain_db, signal.gain_db) / 20)
    sample = {"signal": x.unsqueeze(0)}
    if signal.fill == "pad":
        sample["length"] = torch.tensor(length)
    if signal.spec_mask.active:
        sample["spec_mask"] = signal.spec_mask.draw(rng, signal.frames, signal.mels)
    return sample


def _around(whole: Tensor, start: int, count: int) -> Tensor:
    return whole[(torch.arange(count) + start) % len(whole)]
