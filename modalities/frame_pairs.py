"""Pairs of frames of a video: what siamese objectives are trained on, and what is shown of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmssl.contracts import Size
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from modalities.image import ImageSignal
from modalities.looks import FramePair
from modalities.pixels import Frames, resized
from modalities.video import VideoSignal, as_signals, corners, covering
from modalities.video_read import Reader, open_video
from modalities.video_sampling import Indices, TooShort, pair
from modalities.video_views import VideoViews


def as_video(signal: ImageSignal, chosen: FramePair) -> VideoSignal:
    """Return the settings of pictures as those of clips of two frames."""
    shared = VideoSignal.model_fields.keys() & ImageSignal.model_fields.keys()
    settings = {name: getattr(signal, name) for name in shared}
    return VideoSignal.model_validate({**settings, "frames": 2, "folder_fps": chosen.folder_fps})


@dataclass(frozen=True)
class PairMoments:
    """Two frames, as far apart as asked for."""

    chosen: FramePair

    def __call__(self, video: Reader, count: int, rng: np.random.Generator | None) -> Indices:
        """Return the earlier and the later frame, int64 [2]; without generator from the middle. Raises TooShort."""
        return pair(video.frames, *self.chosen.frames(video.fps), rng)


@dataclass(frozen=True)
class FramePairViews:
    """Reads a video once and makes of it one pair per generator: ``past`` and ``signal``, float32 [3, h, w] each.

    Raises BrokenFile, for a video without two frames so far apart too.
    """

    signal: ImageSignal
    chosen: FramePair

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the pairs, of ``size`` (h, w)."""
        views = VideoViews(as_video(self.signal, self.chosen), PairMoments(self.chosen))
        return [_split(view["signal"]) for view in views(path, rngs, (2, *size))]


def middle_pair(path: str, signal: ImageSignal, chosen: FramePair) -> dict[str, Tensor]:
    """Return ``past`` and ``signal`` from a video's middle, centre crops float32 [3, h, w]; raises BrokenFile."""
    video = as_video(signal, chosen)
    return _split(as_signals(isolated(_MiddlePair(video, chosen), path, timeout=None), video))


def _split(clip: Tensor) -> dict[str, Tensor]:
    return {"past": clip[:, 0], "signal": clip[:, 1]}


@dataclass(frozen=True)
class _MiddlePair:
    """Reads the two frames, uint8 [2, h, w, 3]."""

    signal: VideoSignal
    chosen: FramePair

    def __call__(self, path: str) -> Frames:
        size = self.signal.size
        with open_video(path, self.signal.folder_fps, self.signal.decoder) as video:
            try:
                frames = video.read(PairMoments(self.chosen)(video, 2, None).tolist())
            except TooShort as error:
                raise BrokenFile(str(error)) from None
            whole = covering(video.size, size, self.signal.resize_ratio)
        ((top, left),) = corners(whole, size, 1)
        return resized(frames, whole)[:, top : top + size[0], left : left + size[1]]
