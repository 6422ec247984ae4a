"""Training clips: a video is opened once for all of them, and only the frames that they have are decoded.

Which moments, which crop, whether mirrored and how augmented is drawn from the clip's own generator alone, and is the
same for all frames of a clip.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import PIL.Image
from torch import Tensor

import modalities.video_stream  # noqa: F401 (FFmpeg: loaded before the data workers are forked, they share it)
from mmssl.contracts import Size
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.augment import Augment, augment_picture, augment_signal
from modalities.image import Box
from modalities.image_views import NO_AUGMENT, crop_box, draft_scale
from modalities.pixels import Frames, FrameSize, resized
from modalities.video import VideoSignal, as_signals, still
from modalities.video_read import Reader, open_video
from modalities.video_sampling import Indices, TooShort, dense, tsn, uniform


class Moments(Protocol):
    """Chooses the frames of a clip; picklable."""

    def __call__(self, video: Reader, count: int, rng: np.random.Generator) -> Indices:
        """Return ``count`` frames, int64 [count]; raises TooShort where the video has not enough."""
        ...


@dataclass(frozen=True)
class SignalMoments:
    """The frames that a video's settings ask for."""

    signal: VideoSignal

    def __call__(self, video: Reader, count: int, rng: np.random.Generator) -> Indices:
        """Return the frames of one clip [count]."""
        signal = self.signal
        if signal.sampling == "uniform":
            return uniform(video.frames, count)
        if signal.sampling == "tsn":
            return tsn(video.frames, count, rng)
        return dense(video.frames, video.fps, count, signal.stride, signal.fps, rng, hold=signal.short == "hold")


@dataclass(frozen=True)
class VideoViews:
    """Reads a video once and makes of it one random clip per generator, float32 [3, t, h, w].

    Raises BrokenFile, for a video shorter than a clip too unless ``signal.short`` is "hold".
    """

    signal: VideoSignal
    moments: Moments | None = None
    """Which frames a clip has, if not those that ``signal`` asks for."""
    jitter: bool = False
    """Crop every frame of a clip by itself."""

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the clips of ``size`` (t, h, w)."""
        # The child process draws moments and boxes, and generators do not come back from it.
        seeds = [int(rng.integers(2**63)) for rng in rngs]
        # No limit here: whoever has set one interrupts the wait, and with that the child is ended.
        clip_of = _Clips(self.signal, seeds, size, self.moments or SignalMoments(self.signal), self.jitter)
        clips = isolated(clip_of, path, timeout=None)
        return [{"signal": self._finish(clip, rng)} for clip, rng in zip(clips, rngs, strict=True)]

    def _finish(self, clip: Frames, rng: np.random.Generator) -> Tensor:
        if rng.random() < 0.5 and self.signal.flip:
            clip = clip[:, :, ::-1]
        augment = self.signal.augment
        if augment != NO_AUGMENT:
            clip, rng = _augmented(clip, augment, rng)
        x = as_signals(np.ascontiguousarray(clip), self.signal)
        return augment_signal(x.flatten(0, 1), augment, rng).view_as(x)


def _augmented(clip: Frames, augment: Augment, rng: np.random.Generator) -> tuple[Frames, np.random.Generator]:
    # Every frame has a generator in the same state, and so the same draws.
    turns = [deepcopy(rng) for _ in clip]
    pictures = [
        augment_picture(PIL.Image.fromarray(np.ascontiguousarray(frame)), augment, turn)
        for frame, turn in zip(clip, turns, strict=True)
    ]
    return np.stack([np.asarray(picture) for picture in pictures]), turns[-1]


@dataclass(frozen=True)
class _Clips:
    """Reads one clip per seed, cropped and resized: uint8 [t, h, w, 3] each."""

    signal: VideoSignal
    seeds: Sequence[int]
    size: Size
    moments: Moments
    jitter: bool

    def __call__(self, path: str) -> list[Frames]:
        count, h, w = self.size
        with open_video(path, self.signal.folder_fps, self.signal.decoder) as video:
            rngs = [np.random.default_rng(seed) for seed in self.seeds]
            indices = np.concatenate([self._indices(video, count, rng) for rng in rngs]).tolist()
            height, width = video.size
            parts = count if self.jitter else 1  # of a clip, each with a box of its own
            boxes = [crop_box(height, width, still(self.signal), rng, w / h) for rng in rngs for _ in range(parts)]
            scale = draft_scale(height, width, still(self.signal), (h, w))
            reduced = None if scale == 1 else (round(height / scale), round(width / scale))
            shape = len(boxes), count // parts, *(reduced or (height, width)), 3
            frames = video.read(indices, reduced).reshape(shape)
        cropped = [_cropped(part, box, scale, (h, w)) for part, box in zip(frames, boxes, strict=True)]
        return [np.concatenate(cropped[i : i + parts]) for i in range(0, len(cropped), parts)]

    def _indices(self, video: Reader, count: int, rng: np.random.Generator) -> Indices:
        try:
            return self.moments(video, count, rng)
        except TooShort as error:
            raise BrokenFile(str(error)) from None


def _cropped(clip: Frames, box: Box, scale: int, size: FrameSize) -> Frames:
    left, top, right, bottom = (round(side / scale) for side in box)
    return resized(clip[:, top:bottom, left:right], size)
