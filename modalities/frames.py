"""Frames of videos as pictures: one by one, or in pairs for siamese objectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mmssl.contracts import Size
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.image_settings import ImageSignal
from modalities.looks import Frame, FramePair
from modalities.pixels import Frames, resized
from modalities.video import Video, VideoSignal, as_signals, corners, covering
from modalities.video_read import Reader, open_video
from modalities.video_sampling import Indices, TooShort, pair, tsn
from modalities.video_views import VideoViews


@dataclass(frozen=True)
class Moments:
    """The frame that a sample has, or the two, as far apart as asked for."""

    look: Frame | FramePair

    @property
    def count(self) -> int:
        """How many frames a sample has."""
        return 2 if isinstance(self.look, FramePair) else 1

    def __call__(self, video: Reader, count: int, rng: np.random.Generator | None) -> Indices:
        """Return the frames, int64 [count], the earlier first; without generator from the middle. Raises TooShort."""
        if isinstance(self.look, Frame):
            return tsn(video.frames, 1, rng)
        return pair(video.frames, *self.look.frames(video.fps), rng)


@dataclass(frozen=True)
class FrameViews:
    """Reads a video once and makes of it one sample per generator: ``signal``, and of a pair ``past``, [3, h, w] each.

    Raises BrokenFile, for a video without two frames so far apart too.
    """

    signal: ImageSignal
    look: Frame | FramePair

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the samples, of ``size`` (h, w)."""
        moments = Moments(self.look)
        jitter = isinstance(self.look, FramePair) and self.look.jitter
        views = VideoViews(_as_video(self.signal, self.look), moments, jitter)
        return [_split(view["signal"]) for view in views(path, rngs, (moments.count, *size))]


def middle(path: str, signal: ImageSignal, look: Frame | FramePair) -> dict[str, Tensor]:
    """Return a sample from a video's middle, its centre crops float32 [3, h, w]; raises BrokenFile."""
    video = _as_video(signal, look)
    return _split(as_signals(isolated(_Middle(video, Moments(look)), path, timeout=None), video))


def moments(path: str, signal: ImageSignal, look: Frame | FramePair) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what ``Video.moments`` does; raises BrokenFile."""
    return Video().moments(path, _as_video(signal, look))


def _as_video(signal: ImageSignal, look: Frame | FramePair) -> VideoSignal:
    """Return the settings of pictures as those of clips."""
    shared = VideoSignal.model_fields.keys() & ImageSignal.model_fields.keys()
    settings = {name: getattr(signal, name) for name in shared}
    return VideoSignal.model_validate({**settings, "folder_fps": look.folder_fps})


def _split(clip: Tensor) -> dict[str, Tensor]:
    return {name: clip[:, i] for i, name in enumerate(["past", "signal"][-clip.shape[1] :])}


@dataclass(frozen=True)
class _Middle:
    """Reads the frames of a sample, uint8 [n, h, w, 3]."""

    signal: VideoSignal
    moments: Moments

    def __call__(self, path: str) -> Frames:
        size = self.signal.size
        with open_video(path, self.signal.folder_fps, self.signal.decoder) as video:
            try:
                frames = video.read(self.moments(video, self.moments.count, None).tolist())
            except TooShort as error:
                raise BrokenFile(str(error)) from None
            whole = covering(video.size, size, self.signal.resize_ratio)
        ((top, left),) = corners(whole, size, 1)
        return resized(frames, whole)[:, top : top + size[0], left : left + size[1]]
