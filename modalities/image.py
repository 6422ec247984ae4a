"""Pictures: decode to upright 8-bit RGB, crop, normalise, cut into square or oblong patches.

Shapes: a signal is float32 [3, h, w], normalised per channel; sizes in a recipe are [h, w] as well.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling, Transpose
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from mmssl.backbones.positions import PositionKind
from mmssl.config import Piece
from mmssl.contracts import Size, Views
from mmssl.data.guard import BrokenFile, guarded
from modalities.patches import PatchTokenizer, TargetKind

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, by content: a wrong suffix is harmless, and formats that run programs (EPS) are never tried."""
MAX_PIXELS = 178_956_970
"""Height x width above which a picture is refused unread. It is where Pillow's own refusal stands by default."""

_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


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


class Image:
    """The modality of still pictures."""

    name = "image"
    suffixes = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
    signal_type = ImageSignal
    tokenizer_type = ImageTokenizer

    def decode(self, path: str) -> PIL.Image.Image:
        """Return the file's (first) picture: upright by its EXIF, 8-bit RGB, alpha laid over white.

        Raises BrokenFile with the reason for anything that is not a whole picture.
        """
        return guarded(_decode, path, timeout=None)

    def extent(self, decoded: PIL.Image.Image) -> tuple[int, int]:
        """Return height and width in pixels."""
        return decoded.height, decoded.width

    def sizes(self, signal: ImageSignal) -> tuple[tuple[int, int], ...]:
        """Return ``size`` and the buckets' sizes."""
        return signal.sizes

    def bucket(self, path: str, signal: ImageSignal) -> int:
        """Return which of ``sizes`` suits a file, from its header; 0 where that cannot be read."""
        try:
            with PIL.Image.open(path, formats=FORMATS) as image:
                height, width = image.height, image.width
                # The EXIF orientations from 5 on turn the picture by a quarter.
                return (
                    nearest_size(width, height, signal)
                    if _orientation(image) > 4
                    else nearest_size(height, width, signal)
                )
        except Exception:  # reading it for training will find out what is wrong with it
            return 0

    def views(self, signal: ImageSignal) -> Views:
        """Return what reads a picture and makes random resized crops and flips of it."""
        return _Views(signal)

    def eval_transform(self, signal: ImageSignal) -> Callable[[PIL.Image.Image], Tensor]:
        """Return a picklable centre crop: RGB picture -> float32 [3, h, w]."""
        return _EvalTransform(signal)

    def tokenizer(self, signal: ImageSignal, tokenizer: ImageTokenizer, dim: int) -> PatchTokenizer:
        """Return a tokenizer of ``dim`` channels; raises ValueError where patches do not divide a size."""
        made = PatchTokenizer(signal.size, tokenizer.patch_size, 3, dim, tokenizer.positions, tokenizer.target)
        for size in signal.buckets:
            made.grid_of(size)
        return made

    def picture(self, x: Tensor, signal: ImageSignal) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a normalised signal [3, h, w] as something to look at: uint8 [h, w, 3]."""
        mean, std = _statistics(signal)
        pixels = (x.detach().float().cpu() * std + mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _decode(path: str) -> PIL.Image.Image:
    # Pillow warns of large sizes and of harmless flaws in metadata; the ledger holds what really is wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = PIL.Image.open(path, formats=FORMATS)
        except PIL.Image.DecompressionBombError:
            raise BrokenFile(_too_large()) from None
        except PIL.UnidentifiedImageError:
            if os.path.getsize(path) == 0:  # noqa: PTH202 (the guard names it)
                raise
            raise BrokenFile("not an image: cannot identify image file") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenFile(_too_large())
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
    return rgb if upright is None else rgb.transpose(upright)


def _too_large() -> str:
    return f"absurdly large: more than {MAX_PIXELS // 10**6} million pixels"


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a camera's broken metadata does not break its picture
        return 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "I" or image.mode.startswith("I;"):
        return PIL.Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise BrokenFile("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # A plain copy, not a subclass that keeps hold of the file.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _eight_bits(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # Pillow's own conversion clips 16-bit grey at 255, so that most of the picture turns white.
    if grey.min() < 0 or grey.max() > 65535:
        raise BrokenFile("integer pixels of more than 16 bits, whose range is unknown")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


@dataclass(frozen=True)
class _Views:
    signal: ImageSignal

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[Tensor]:
        image = _decode(path)
        return [self.view(image, rng, size) for rng in rngs]

    def view(self, image: PIL.Image.Image, rng: np.random.Generator, size: Size) -> Tensor:
        height, width = size
        box = crop_box(image.height, image.width, self.signal, rng, width / height)
        pixels = _resized(image, (height, width), box)
        if rng.random() < 0.5 and self.signal.flip:
            pixels = pixels.transpose(Transpose.FLIP_LEFT_RIGHT)
        return _normalised(pixels, self.signal)


@dataclass(frozen=True)
class _EvalTransform:
    signal: ImageSignal

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        size = self.signal.sizes[nearest_size(image.height, image.width, self.signal)]
        box = centre_box(image.height, image.width, size, self.signal.resize_ratio)
        return _normalised(_resized(image, size, box), self.signal)


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the decoded picture, as Pillow orders them."""


def nearest_size(height: int, width: int, signal: ImageSignal) -> int:
    """Return the index in ``Image.sizes`` of the size whose aspect ratio is nearest; of equals the first."""
    sizes, ratio = signal.sizes, math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - ratio))


def crop_box(height: int, width: int, signal: ImageSignal, rng: np.random.Generator, aspect: float = 1.0) -> Box:
    """Draw a crop as the field does: an area, a log-uniform aspect ratio, a place; ten tries until it fits.

    If none fits (a picture far longer than wide), the largest centre crop within ``crop_ratio`` is taken. ``aspect`` is
    the width / height that the crop is resized to, and ``crop_ratio`` a distortion of that. (Szegedy et al.,
    arXiv:1409.4842, section 6; the fallback is torchvision's.)
    """
    low, high = (aspect * ratio for ratio in signal.crop_ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*signal.crop_scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, low), high)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


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
        image = _to_rgb(image)
    # Pillow's bicubic filter widens with the reduction, so this is antialiased; the box spares a copy of the crop.
    return image.resize((size[1], size[0]), Resampling.BICUBIC, box=box)


def _normalised(image: PIL.Image.Image, signal: ImageSignal) -> Tensor:
    mean, std = _statistics(signal)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _statistics(signal: ImageSignal) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(signal.mean), torch.tensor(signal.std)
    return mean.view(3, 1, 1), std.view(3, 1, 1)
