"""How a signal is shown, whatever its modality: as a picture, a strip of frames, with axes, in motion and by ear."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from torch import Tensor

from mmssl.contracts import Grid, Modality
from modalities.abilities import Moves, Sounds
from modalities.encoder import Encoder
from modalities.views import one_view
from tasks.report import CRISP_BELOW, Axes, Medium, Picture, Shown

MOST_FRAMES = 8
"""Frames in a strip; of more, so many at most are shown, evenly spaced from the first."""
PAPER = 255
"""Grey of what lies between frames."""


def still(kind: Modality, x: Tensor, signal: Any) -> Shown:
    """Return what the tokenizer cuts, [C, *size], as it stands on a page: a picture, a strip of frames, with axes."""
    if isinstance(kind, Moves):
        return strip(kind.motion(x, signal))
    return _with_axes(kind, kind.picture(x, signal), x, signal)


def strip(frames: Picture) -> Picture:
    """Lay frames uint8 [t, h, w, 3] side by side, at most ``MOST_FRAMES`` of them: uint8 [h, n * w + gaps, 3]."""
    chosen = frames[:: -(-len(frames) // MOST_FRAMES)]
    gap = max(1, frames.shape[2] // 32)
    framed = np.pad(chosen, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=PAPER)
    return np.concatenate(list(framed), axis=1)[:, :-gap]


def beside(pictures: Sequence[Picture]) -> Picture:
    """Join pictures of one size, uint8 [h, w, 3], or as many frames of each [t, h, w, 3], with gaps between them."""
    gap = max(1, pictures[0].shape[-2] // 16)
    margin = [(0, 0)] * (pictures[0].ndim - 2) + [(0, gap), (0, 0)]
    return np.concatenate([np.pad(p, margin, constant_values=PAPER) for p in pictures], axis=-2)[..., :-gap, :]


def _with_axes(kind: Modality, picture: Picture, x: Tensor, signal: Any) -> Shown:
    if not isinstance(kind, Sounds):
        return picture
    seconds, hertz = kind.axes(x, signal)
    across, down = ([(at, f"{word} {unit}") for at, word in ticks] for ticks, unit in ((seconds, "s"), (hertz, "Hz")))
    return Medium(picture, Axes(across, down))


@dataclass(frozen=True)
class View:
    """One signal as an encoder cuts it, ``x`` [C, *size], on whose pictures something is drawn per token."""

    kind: Modality
    signal: Any
    """The settings of the encoder's signals."""
    x: Tensor
    grid: Grid

    @cached_property
    def picture(self) -> Picture:
        """Its pixels, arranged as the modality arranges its tokens: of a moving picture a frame per step of time."""
        if isinstance(self.kind, Moves):
            frames = self.kind.motion(self.x, self.signal)
            return np.concatenate(list(frames[:: len(frames) // self.grid[0]]), axis=1)
        return self.kind.picture(self.x, self.signal)

    def spread(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Spread one value (or row of values) per token, [N, ...], over the pixels of ``picture``: [h, w, ...]."""
        lattice = self.kind.lattice(values, self.grid)
        places = zip(self.picture.shape[:2], lattice.shape[:2], strict=True)
        rows, columns = (np.arange(pixels) * n // pixels for pixels, n in places)
        return np.asarray(lattice[rows[:, None], columns[None, :]])

    def shown(self, pixels: Picture | None = None) -> Shown:
        """Return ``picture``, or other pixels in its arrangement, as it stands on a page."""
        pixels = self.picture if pixels is None else pixels
        if isinstance(self.kind, Moves):
            return strip(np.stack(np.split(pixels, self.grid[0], axis=1)))
        return _with_axes(self.kind, pixels, self.x, self.signal)


def view_of(encoder: Encoder, signal: Tensor) -> View:
    """Return what an encoder sees of a signal [C, *size], or of several views of one the middle one."""
    tokenizer = encoder.tokenizer
    signal = one_view(signal, encoder.axes)
    grid = tokenizer.grid_of(signal.shape[1:])
    cut = tokenizer.patches({"signal": signal.unsqueeze(0).to(encoder.device)})
    return View(encoder.kind, encoder.config.signal, tokenizer.unpatch(cut, grid)[0].cpu(), grid)


# Motion


def animate(frames: Sequence[Picture], rate: float, form: str, quality: int = 90) -> bytes:
    """Return frames uint8 [h, w, 3], ``rate`` per second, as an endless animation of the form "WEBP" or "GIF".

    ``quality``, from 0 to 100, is that of a WebP; small frames keep all of theirs.
    """
    # Rounded moments, not rounded durations: the whole lasts as long as it should.
    unit = 10 if form == "GIF" else 1
    moments = np.rint(np.arange(len(frames) + 1) * 1000 / rate / unit).astype(int) * unit
    coding = {} if form == "GIF" else {"lossless": min(frames[0].shape[:2]) < CRISP_BELOW, "quality": quality}
    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, form, save_all=True, append_images=others, duration=np.diff(moments).tolist(), loop=0, **coding)
    return file.getvalue()


# Sound


def record(waveforms: Sequence[Tensor], rate: int, form: str) -> list[bytes]:
    """Return waveforms float32 [samples] as 16-bit files of the form "FLAC" or "WAV".

    If any is louder than a file can be, all are made fainter alike.
    """
    loudest = max(1.0, *(float(waveform.abs().max()) for waveform in waveforms))
    files = []
    for waveform in waveforms:
        file = io.BytesIO()
        soundfile.write(file, (waveform / loudest).numpy(), rate, subtype="PCM_16", format=form)
        files.append(file.getvalue())
    return files
