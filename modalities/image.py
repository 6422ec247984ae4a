"""Pictures: decode to upright 8-bit RGB, crop, normalise, cut into square or oblong patches.

Shapes: a signal is float32 [3, h, w], normalised per channel; sizes in a recipe are [h, w] as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from PIL.ImageFile import ImageFile
from pydantic import ValidationInfo, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from mmssl.contracts import Grid, Media, Size, Views
from mmssl.data.guard import guarded
from modalities.augment import Augment
from modalities.image_read import decode, opened, pixels, to_rgb, upright_size
from modalities.looks import CropPair, Frame, FramePair, Look, OneLook
from modalities.patches import PatchTokenizer, TargetKind
from modalities.pixels import Frames, normalised, resized
from modalities.video_read import VIDEO_FILES


def _pair(value: Any) -> Any:
    # A YAML 224 means a square: [224, 224].
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class ImageSignal(Piece):
    """How a decoded picture becomes a signal."""

    size: tuple[int, int] = (224, 224)
    """Height and width in pixels; one number is a square."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Training: least and greatest fraction of the picture's area in a crop (MAE, arXiv:2111.06377, table 8)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training: least and greatest width / height of a crop over that of ``size`` (Inception, arXiv:1409.4842)."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Further sizes [height, width]. Each picture is cropped to the one, ``size`` included, whose aspect ratio is
    nearest to its own, and a batch holds pictures of one size."""
    flip: bool = True
    """Training: mirror every other picture left to right."""
    augment: Augment = Augment()
    """Training: what else is done to a crop."""
    look: Look | None = None
    """Training: what a sample is if not a crop of a picture. kind frame: of a frame of a video, and videos are what is
    trained on. For objectives that predict one look from another (siam_mae), kind frames: of two frames of a video,
    kind crops: two crops of a picture."""
    draft: bool = True
    """Training: decode a JPEG file at 1/2, 1/4 or 1/8 where even its smallest crop has ``size`` pixels that way.
    Far faster for large photographs; the pixels differ slightly from a full decoding, which evaluation always does."""
    resize_ratio: float = 0.875
    """Evaluation: the centre crop's share of the resized picture's side; MAE's is 224 / 256, 1 leaves no margin."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, on a scale of 0 to 1 (ImageNet's)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel (ImageNet's)."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return _pair(value)

    @field_validator("buckets", mode="before")
    @classmethod
    def _squares(cls, value: Any) -> Any:
        return [_pair(size) for size in value] if isinstance(value, list | tuple) else value

    @field_validator("buckets")
    @classmethod
    def _positive_sizes(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if any(side <= 0 for size in value for side in size):
            raise ValueError(f"every side must be greater than 0, but got {[list(size) for size in value]}")
        return value

    @field_validator("size", "std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"every number must be greater than 0, but got {list(value)}")
        return value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high:
            raise ValueError(f"is [least, greatest], both greater than 0, but got {list(value)}")
        if info.field_name == "crop_scale" and high > 1:
            raise ValueError(f"is a fraction of the picture's area, at most 1, but got {list(value)}")
        return value

    @field_validator("resize_ratio")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"is the share of a side that is kept, above 0 and at most 1, but got {value}")
        return value

    @model_validator(mode="after")
    def _no_buckets_of_videos(self) -> "ImageSignal":
        if self.buckets and isinstance(self.look, Frame | FramePair):
            raise ValueError("buckets are for pictures, not for the frames of videos (signal.look)")
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes that signals may have, the encoder's own first."""
        return self.size, *self.buckets


class ImageTokenizer(Piece):
    """How a picture is cut into tokens."""

    patch_size: tuple[int, int] = (16, 16)
    """Height and width of a patch in pixels; one number is a square. Both must divide ``signal.size``."""
    positions: PositionKind = "sincos"
    """Fixed sine-cosine positions, or learned ones."""
    target: TargetKind = "normalized"
    """What a reconstruction predicts: patches normalised one by one (MAE, section 4.1), or raw values."""

    @field_validator("patch_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return _pair(value)

    @field_validator("patch_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) <= 0:
            raise ValueError(f"both sides must be greater than 0, but got {list(value)}")
        return value


class Image(OneLook):
    """The modality of still pictures."""

    name = "image"
    frame_suffixes = frozenset[str]()
    timed = False
    extent_words: tuple[str, ...] = ("height", "width")
    suffixes = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
    signal_type = ImageSignal
    tokenizer_types: tuple[type[Piece], ...] = (ImageTokenizer,)

    def decode(self, path: str) -> PIL.Image.Image:
        """Return the file's (first) picture: upright by its EXIF, 8-bit RGB, alpha laid over white.

        Raises BrokenFile with the reason for anything that is not a whole picture.
        """
        return guarded(decode, path, timeout=None)

    def inspect(self, path: str) -> tuple[int, int]:
        """Decode a file and return height and width in pixels; raises BrokenFile."""
        picture = self.decode(path)
        return picture.height, picture.width

    def moments(self, path: str, signal: ImageSignal) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return count, sum and sum of squares of the red, green and blue values, on a scale of 0 to 1: [3, 3]."""
        if isinstance(signal.look, Frame | FramePair):
            from modalities.frames import moments

            return moments(path, signal, signal.look)
        values = np.asarray(self.decode(path), np.float64).reshape(-1, 3) / 255
        return np.stack([np.full(3, len(values)), values.sum(0), np.square(values).sum(0)], axis=1)

    def sizes(self, signal: ImageSignal, tokenizer: Any) -> tuple[tuple[int, int], ...]:
        """Return ``size`` and the buckets' sizes."""
        return signal.sizes

    def bucket(self, path: str, signal: ImageSignal) -> int:
        """Return which of ``sizes`` suits a file, from its header; 0 where that cannot be read."""
        try:
            with opened(path) as image:
                width, height = upright_size(image)
                return nearest_size(height, width, signal)
        except Exception:  # reading it for training will find out what is wrong with it
            return 0

    def source(self, signal: ImageSignal) -> Media:
        """Return pictures, or videos where their frames are trained on."""
        return VIDEO_FILES if isinstance(signal.look, Frame | FramePair) else self

    def inputs(self, signal: ImageSignal) -> tuple[str, ...]:
        """Return ``signal``, and of a pair ``past`` too."""
        return ("signal", "past") if isinstance(signal.look, FramePair | CropPair) else ("signal",)

    def alone(self, signal: ImageSignal) -> ImageSignal:
        """Return the settings of one picture."""
        return signal.model_copy(update={"look": None})

    def views(self, signal: ImageSignal) -> Views:
        """Return what reads a picture, or a video, and makes random resized crops and flips of it."""
        # Only training needs torchvision, whose import takes seconds; the data workers inherit it.
        if isinstance(signal.look, Frame | FramePair):
            from modalities.frames import FrameViews

            return FrameViews(signal, signal.look)
        from modalities.image_views import ImageViews

        return ImageViews(signal)

    def example(self, path: str, signal: ImageSignal, tokenizer: ImageTokenizer) -> dict[str, Tensor]:
        """Return a picture's centre crop, or that of a video's middle frame or frames; of two crops the middle of one.

        Raises BrokenFile.
        """
        if isinstance(signal.look, Frame | FramePair):
            from modalities.frames import middle

            return middle(path, signal, signal.look)
        found = super().example(path, signal, tokenizer)
        return found if signal.look is None else found | {"past": found["signal"], "signal": _inner(found["signal"])}

    def eval_transform(
        self, signal: ImageSignal, tokenizer: ImageTokenizer | None = None
    ) -> Callable[[PIL.Image.Image], Tensor]:
        """Return a picklable centre crop: RGB picture -> float32 [3, h, w]."""
        return _EvalTransform(signal)

    def tokenizer(self, signal: ImageSignal, tokenizer: ImageTokenizer, dim: int) -> PatchTokenizer:
        """Return a tokenizer of ``dim`` channels; raises ValueError where patches do not divide a size."""
        made = PatchTokenizer(signal.size, tokenizer.patch_size, 3, dim, tokenizer.positions, tokenizer.target)
        for size in signal.buckets:
            made.grid_of(size)
        return made

    def stills(self, frames: Frames, size: Size, signal: ImageSignal, tokenizer: ImageTokenizer) -> Tensor:
        """Return frames uint8 [n, H, W, 3] as signals of ``size``: float32 [n, 3, h, w]."""
        small = torch.from_numpy(resized(frames, (size[0], size[1])))
        return normalised(small.movedim(-1, -3), signal.mean, signal.std, axis=-3)

    def picture(self, x: Tensor, signal: ImageSignal) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a normalised signal [3, h, w] as something to look at: uint8 [h, w, 3]."""
        mean, std = _statistics(signal)
        bytes_ = (x.detach().float().cpu() * std + mean) * 255
        return bytes_.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

    def lattice(self, values: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
        """Arrange values of tokens [N, ...] as the picture's rows and columns: [h, w, ...]."""
        return values.reshape(*grid, *values.shape[1:])


@dataclass(frozen=True)
class _EvalTransform:
    signal: ImageSignal

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        if not isinstance(image, PIL.Image.Image):
            raise TypeError(f"a path, a PIL picture or a float tensor is needed, but got {type(image).__name__}")
        if isinstance(image, ImageFile):
            image = pixels(image)  # opened by a person, and perhaps not upright
        size = self.signal.sizes[nearest_size(image.height, image.width, self.signal)]
        box = centre_box(image.height, image.width, size, self.signal.resize_ratio)
        return _normalised(_resized(image, size, box), self.signal)


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the decoded picture, as Pillow orders them."""


def nearest_size(height: int, width: int, signal: ImageSignal) -> int:
    """Return the index in ``Image.sizes`` of the size whose aspect ratio is nearest; of equals the first."""
    sizes, ratio = signal.sizes, math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - ratio))


def centre_box(height: int, width: int, size: tuple[int, int], resize_ratio: float) -> Box:
    """Return what a centre crop of ``size`` shows of a picture resized, aspect kept, to cover it and its margin.

    The resized size and the crop's place are whole numbers, as if both were done one after the other.
    """
    h, w = size
    least_h, least_w = round(h / resize_ratio), round(w / resize_ratio)
    if least_h * width >= least_w * height:
        resized_h, resized_w = least_h, least_h * width // height
    else:
        resized_h, resized_w = least_w * height // width, least_w
    left, top = round((resized_w - w) / 2), round((resized_h - h) / 2)
    x, y = width / resized_w, height / resized_h
    return left * x, top * y, min((left + w) * x, width), min((top + h) * y, height)


def _resized(image: PIL.Image.Image, size: tuple[int, int], box: Box) -> PIL.Image.Image:
    # What the decoder returns is RGB; a picture that a person opened may be anything.
    if image.mode != "RGB":
        image = to_rgb(image)
    # Pillow's bicubic filter widens with the reduction, so this is antialiased; the box spares a copy of the crop.
    return image.resize((size[1], size[0]), Resampling.BICUBIC, box=box)


def _normalised(image: PIL.Image.Image, signal: ImageSignal) -> Tensor:
    mean, std = _statistics(signal)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def _inner(signal: Tensor) -> Tensor:
    # What a crop of half its sides shows of [3, h, w], of the same size.
    h, w = signal.shape[1:]
    part = signal[:, h // 4 : h - h // 4, w // 4 : w - w // 4]
    return interpolate(part[None], (h, w), mode="bicubic", antialias=True)[0]


@lru_cache(maxsize=8)
def _statistics(signal: ImageSignal) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(signal.mean), torch.tensor(signal.std)
    return mean.view(3, 1, 1), std.view(3, 1, 1)
