"""Videos: a clip of frames is read, cropped alike in all of them, normalised and cut into tubes of space and time.

Shapes: a signal is float32 [3, t, h, w], normalised per channel. Files are read in a child process that can be killed,
from which only 8-bit frames [t, h, w, 3] come back. Training clips are ``video_views``'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from mmssl.contracts import Grid, Size, Views
from mmssl.data.isolate import isolated
from modalities.augment import Augment
from modalities.image import Image
from modalities.image_settings import ImageSignal
from modalities.looks import OneLook
from modalities.patches import PatchTokenizer, TargetKind
from modalities.pixels import Frames, FrameSize, normalised, resized
from modalities.synthetic import Noise
from modalities.video_read import FOLDER_FPS, VIDEO_FILES, Decoder, Reader, open_video
from modalities.video_sampling import dense_test, spacing, uniform

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]

IMAGE = Image()
MOMENT_FRAMES = 8
"""So many frames of a file, spread evenly, give its share of the mean and deviation of a data set."""


class VideoSignal(Piece):
    """How a video becomes a signal: which frames, and what is done to them (to all frames of a clip the same)."""

    frames: Count = 16
    """Frames of a clip."""
    size: tuple[Count, Count] = (224, 224)
    """Height and width in pixels; one number is a square."""
    stride: Count = 4
    """dense: a clip has every so many-th frame of the file (4 on Kinetics, 2 on Something-Something in VideoMAE)."""
    fps: Above0 | None = None
    """dense: frames per second of a clip, whatever the file's own are, instead of ``stride``."""
    sampling: Literal["dense", "uniform", "tsn"] = "dense"
    """dense: neighbours from a random start. uniform: the middles of equal parts of the file. tsn: a random frame of
    each part (arXiv:1608.00859)."""
    short: Literal["skip", "hold"] = "skip"
    """Training: a video shorter than a clip is broken, or stands still on its last frame. Evaluation always holds."""
    views: tuple[Count, Count] = (1, 1)
    """Evaluation: clips spread over the file x crops spread along a frame's longer side, whose results are averaged
    ([5, 3] in VideoMAE on Kinetics, [2, 3] on Something-Something)."""
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    """Training: least and greatest fraction of a frame's area in a crop."""
    crop_ratio: tuple[Above0, Above0] = (3 / 4, 4 / 3)
    """Training: least and greatest width / height of a crop over that of ``size`` (Inception, arXiv:1409.4842)."""
    flip: bool = True
    """Training: mirror every other clip left to right. Not where left and right mean something."""
    augment: Augment = Augment()
    """Training: what else is done to a crop."""
    draft: bool = True
    """Training: decode at 1/2, 1/4 or 1/8 where even the smallest crop has ``size`` pixels that way."""
    resize_ratio: Share = 1.0
    """Evaluation: the crop's share of the resized frame's shorter side; 1, as in VideoMAE, leaves no margin there."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, on a scale of 0 to 1 (ImageNet's)."""
    std: tuple[Above0, Above0, Above0] = (0.229, 0.224, 0.225)
    """Divided by per channel (ImageNet's)."""
    folder_fps: Above0 = FOLDER_FPS
    """Frames per second of a folder of pictures."""
    decoder: Decoder = "auto"
    """Who decodes containers; auto is PyAV."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"is [least, greatest], but got {list(value)}")
        return value


class VideoTokenizer(Piece):
    """How a clip is cut into tokens."""

    patch_size: tuple[Count, Count, Count] = (2, 16, 16)
    """Frames, height and width of a tube. They must divide ``signal.frames`` and ``signal.size``."""
    positions: PositionKind = "sincos"
    """Fixed sine-cosine positions, or learned ones. A larger frame interpolates them, a longer clip goes on."""
    target: TargetKind = "normalized_per_channel"
    """What a reconstruction predicts: tubes normalised one by one, each colour by itself (VideoMAE) or all together
    (MAE), or raw values."""


@dataclass(frozen=True)
class VideoFile:
    """A video to be looked at. Nothing has been read: only the transform knows which frames it needs."""

    path: str


class Video(OneLook):
    """The modality of moving pictures: video files, animated GIFs and folders of frames."""

    name = VIDEO_FILES.name
    suffixes = VIDEO_FILES.suffixes
    frame_suffixes = VIDEO_FILES.frame_suffixes
    timed = VIDEO_FILES.timed
    extent_words: tuple[str, ...] = ("frames", "height", "width")
    signal_type = VideoSignal
    tokenizer_types: tuple[type[Piece], ...] = (VideoTokenizer,)

    def decode(self, path: str) -> VideoFile:
        """Return a handle for ``eval_transform``, which then reads what it needs, or raises BrokenFile."""
        return VideoFile(path)

    def inspect(self, path: str) -> tuple[int, int, int]:
        """Decode all frames and return their count, height and width in pixels; raises BrokenFile."""
        return isolated(_extent, path, timeout=None)

    def moments(self, path: str, signal: VideoSignal) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return count, sum and sum of squares of the colours' values, on a scale of 0 to 1: [3, 3].

        They are those of ``MOMENT_FRAMES`` frames spread over the file. Raises BrokenFile.
        """
        return isolated(_Moments(signal), path, timeout=None)

    def sizes(self, signal: VideoSignal, tokenizer: Any) -> tuple[Size]:
        """Return the one size (frames, height, width)."""
        return ((signal.frames, *signal.size),)

    def bucket(self, path: str, signal: VideoSignal) -> int:
        """Return 0: all clips have one size."""
        return 0

    def views(self, signal: VideoSignal, tokenizer: VideoTokenizer | None = None) -> Views:
        """Return what reads a video once and makes random clips of it."""
        # Only training needs torchvision, whose import takes seconds; the data workers inherit it.
        from modalities.video_views import VideoViews

        return VideoViews(signal)

    def synthetic(self, signal: VideoSignal, tokenizer: VideoTokenizer | None = None) -> Views:
        """Return what makes clips of noise."""
        return Noise(self.inputs(signal), channels=3)

    def eval_transform(
        self, signal: VideoSignal, tokenizer: VideoTokenizer | None = None
    ) -> Callable[[VideoFile], Tensor]:
        """Return a picklable reader of centre clips: video -> float32 [3, t, h, w], or [V, 3, t, h, w] for V views.

        It raises BrokenFile.
        """
        return _EvalTransform(signal)

    def tokenizer(self, signal: VideoSignal, tokenizer: VideoTokenizer, dim: int) -> PatchTokenizer:
        """Return a tokenizer of ``dim`` channels; raises ValueError where tubes do not divide the signal's size."""
        size, positions, target = (signal.frames, *signal.size), tokenizer.positions, tokenizer.target
        # VideoMAE normalises values on a scale of 0 to 1, where its eps is 1e-6.
        eps = [1e-6 / std for std in signal.std] if target == "normalized_per_channel" else 1e-6
        return PatchTokenizer(size, tokenizer.patch_size, 3, dim, positions, target, eps, extend=(0,))

    def stills(self, frames: Frames, size: Size, signal: VideoSignal, tokenizer: VideoTokenizer) -> Tensor:
        """Return frames uint8 [n, H, W, 3] as clips that stand still for one tube: float32 [n, 3, tube, *size]."""
        clips = as_signals(resized(frames, (size[0], size[1]))[:, None], signal)
        return clips.expand(-1, -1, tokenizer.patch_size[0], -1, -1)

    def picture(self, x: Tensor, signal: VideoSignal) -> Frames:
        """Return a normalised signal [3, t, h, w] as a film strip of all its frames: uint8 [h, t * w, 3]."""
        return IMAGE.picture(x.transpose(1, 2).flatten(2), still(signal))

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange values of tokens [N, ...] on a grid (t, h, w) as a film strip: [h, t * w, ...]."""
        time, height, width = grid
        return values.reshape(*grid, *values.shape[1:]).swapaxes(0, 1).reshape(height, time * width, *values.shape[1:])

    def motion(self, x: Tensor, signal: VideoSignal) -> Frames:
        """Return a normalised signal [3, t, h, w] as frames to be played: uint8 [t, h, w, 3]."""
        time, width = x.shape[1], x.shape[3]
        return self.picture(x, signal).reshape(-1, time, width, 3).swapaxes(0, 1)

    def pace(self, path: str, signal: VideoSignal) -> float:
        """Return how many frames of an evaluation clip pass in a second of the video; raises BrokenFile."""
        return isolated(_Pace(signal), path, timeout=None)


@lru_cache(maxsize=8)
def still(signal: VideoSignal) -> ImageSignal:
    """Return what a video's settings say of a single frame."""
    return ImageSignal.model_validate({name: getattr(signal, name) for name in _OF_STILLS})


_OF_STILLS = VideoSignal.model_fields.keys() & ImageSignal.model_fields.keys()


def as_signals(frames: Frames | Tensor, signal: VideoSignal) -> Tensor:
    """Return 8-bit clips [..., t, h, w, 3] as signals, float32 [..., 3, t, h, w]."""
    return normalised(torch.as_tensor(frames).movedim(-1, -4), signal.mean, signal.std, axis=-4)


# Evaluation


@dataclass(frozen=True)
class _EvalTransform:
    signal: VideoSignal

    def __call__(self, video: VideoFile) -> Tensor:
        if not isinstance(video, VideoFile):
            raise TypeError(f"a path, an opened video or a float tensor is needed, but got {type(video).__name__}")
        views = as_signals(isolated(_EvalClips(self.signal), video.path, timeout=None), self.signal)
        return views[0] if self.signal.views == (1, 1) else views


@dataclass(frozen=True)
class _EvalClips:
    """Reads all views of a video, uint8 [V, t, h, w, 3]: the crops of the first clip, then those of the next."""

    signal: VideoSignal

    def __call__(self, path: str) -> Frames:
        clips, crops = self.signal.views
        with open_video(path, self.signal.folder_fps, self.signal.decoder) as video:
            whole = covering(video.size, self.signal.size, self.signal.resize_ratio)
            # One clip after the other: all at once might not fit into memory.
            read = [resized(video.read(indices), whole) for indices in self._indices(video, clips)]
        h, w = self.signal.size
        places = corners(whole, self.signal.size, crops)
        return np.stack([clip[:, top : top + h, left : left + w] for clip in read for top, left in places])

    def _indices(self, video: Reader, clips: int) -> list[list[int]]:
        signal = self.signal
        if signal.sampling == "dense":
            found = dense_test(video.frames, video.fps, signal.frames, signal.stride, signal.fps, clips, hold=True)
        else:
            # Each clip has one frame of every part: the middle, or with more clips the middles of its parts.
            found = uniform(video.frames, signal.frames * clips).reshape(-1, clips).T
        return [indices.tolist() for indices in found]


def covering(frame: FrameSize, size: FrameSize, resize_ratio: float) -> FrameSize:
    """Return the size of a frame resized, aspect kept, to cover ``size`` and its margin."""
    (height, width), (h, w) = frame, size
    scale = max(h / height, w / width) / resize_ratio
    return max(h, round(height * scale)), max(w, round(width * scale))


def corners(frame: FrameSize, size: FrameSize, crops: int) -> list[tuple[int, int]]:
    """Return top and left of crops spread from end to end where there is most room, and in the middle otherwise."""
    rooms = [whole - part for whole, part in zip(frame, size, strict=True)]
    shares = [0.5] if crops == 1 else [i / (crops - 1) for i in range(crops)]
    longer = rooms[1] >= rooms[0]
    return [
        (round(rooms[0] * (0.5 if longer else share)), round(rooms[1] * (share if longer else 0.5))) for share in shares
    ]


# Facts


@dataclass(frozen=True)
class _Pace:
    signal: VideoSignal

    def __call__(self, path: str) -> float:
        signal = self.signal
        with open_video(path, signal.folder_fps, signal.decoder) as video:
            if signal.sampling == "dense":
                return video.fps / spacing(video.fps, signal.stride, signal.fps)
            return signal.frames * video.fps / video.frames


def _extent(path: str) -> tuple[int, int, int]:
    with open_video(path) as video:
        # All frames at once, but each as a stamp: a film must neither fill the memory nor be decoded piece by piece.
        video.read(range(video.frames), (8, 8))
        return video.frames, *video.size


@dataclass(frozen=True)
class _Moments:
    signal: VideoSignal

    def __call__(self, path: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        with open_video(path, self.signal.folder_fps, self.signal.decoder) as video:
            # A frame of a short video counts once.
            frames = video.read(np.unique(uniform(video.frames, MOMENT_FRAMES)).tolist())
        # Counted, not converted: in float64 eight large frames would take gigabytes.
        counts = np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])
        scale = np.arange(256) / 255
        return np.stack([counts.sum(1), counts @ scale, counts @ scale**2], axis=1).astype(np.float64)
