"""Training pictures: random crops of one file, decoded once and no finer than they need.

Where the time goes, for a JPEG file of 500 x 375 pixels: reading its bits first of all, then resampling, then turning
bytes into numbers. Hence torchvision's decoder, whose pixels are Pillow's own without Pillow's detours; torch's bicubic
on bytes, which rounds one value in a few hundred other than Pillow's; one multiplication and addition per value; and
for large files a reduced decoding (``benchmarks/image_pipeline.py``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from mmssl.contracts import Size
from modalities.augment import Augment, augment_picture, augment_signal
from modalities.image import Box
from modalities.image_read import QUARTER_TURN, opened, orientation, pixels, upright_size
from modalities.image_settings import ImageSignal
from modalities.looks import CropPair
from modalities.pixels import normalised

SCALES = (8, 4, 2)
"""The reductions at which a JPEG file can be decoded."""
NO_AUGMENT = Augment()


@dataclass(frozen=True)
class ImageViews:
    """Reads a picture once and makes of it one random resized crop per generator, float32 [3, h, w], or a pair of them.

    Raises BrokenFile, or what ``guarded`` makes one of.
    """

    signal: ImageSignal

    @property
    def names(self) -> tuple[str, ...]:
        """What the crops of a sample are called, in the order in which they are drawn."""
        return ("signal",) if self.signal.look is None else ("past", "signal")

    def __call__(self, path: str, rngs: Sequence[np.random.Generator], size: Size) -> list[dict[str, Tensor]]:
        """Return the crops; each generator gives its crops' boxes, then a flip and an augmentation for each of them."""
        with opened(path) as image:
            # The four colours of print (CMYK) are rare and left to Pillow, as evaluation has them.
            jpeg = image if isinstance(image, JpegImageFile) and image.mode in ("RGB", "L") else None
            picture, turn = (pixels(image), 1) if jpeg is None else (image, orientation(image))
            width, height = picture.size if jpeg is None else upright_size(jpeg)
            boxes = [box for rng in rngs for box in self._boxes(height, width, rng, size[1] / size[0])]
            # The small crops are turned upright, not the large picture.
            boxes = [stored_box(box, turn, picture.size) for box in boxes]
            stored = size if turn < QUARTER_TURN else size[::-1]
            scale = draft_scale(height, width, self.signal, size, self._least) if jpeg is not None else 1
            decoded = picture if jpeg is None else _decode_jpeg(jpeg, path, scale)
            crops = [resampled(decoded, tuple(side / scale for side in box), stored) for box in boxes]
        count, finish = len(self.names), self._finish
        looks = [finish(upright(crop, turn), rngs[i // count]) for i, crop in enumerate(crops)]
        return [dict(zip(self.names, looks[i : i + count], strict=True)) for i in range(0, len(looks), count)]

    def _boxes(self, height: int, width: int, rng: np.random.Generator, aspect: float) -> list[Box]:
        box, look = crop_box(height, width, self.signal, rng, aspect), self.signal.look
        if not isinstance(look, CropPair):
            return [box]
        if not look.nested:
            return [box, crop_box(height, width, self.signal, rng, aspect)]
        left, top, right, bottom = box
        inner = self.signal.model_copy(update={"crop_scale": look.inner_scale})
        x0, y0, x1, y1 = crop_box(round(bottom - top), round(right - left), inner, rng, aspect)
        return [box, (left + x0, top + y0, left + x1, top + y1)]

    @property
    def _least(self) -> float:
        look = self.signal.look
        return look.inner_scale[0] if isinstance(look, CropPair) and look.nested else 1.0

    def _finish(self, crop: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() < 0.5 and self.signal.flip:
            crop = crop.flip(-1)
        augment = self.signal.augment
        if augment != NO_AUGMENT:
            picture = PIL.Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            crop = _tensor(augment_picture(picture, augment, rng))
        return augment_signal(normalised(crop, self.signal.mean, self.signal.std, axis=-3), augment, rng)


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


def stored_box(box: Box, turn: int, stored: tuple[int, int]) -> Box:
    """Return where a box of the upright picture lies in the stored one of (width, height), by its EXIF orientation."""
    width, height = stored
    left, top, right, bottom = box
    if turn >= QUARTER_TURN:
        left, top, right, bottom = top, left, bottom, right
    if turn in _MIRRORED_X:
        left, right = width - right, width - left
    if turn in _MIRRORED_Y:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def upright(stored: Tensor, turn: int) -> Tensor:
    """Turn stored pixels [C, h, w] upright by their EXIF orientation."""
    axes = [axis for axis, turns in ((-1, _MIRRORED_X), (-2, _MIRRORED_Y)) if turn in turns]
    flipped = stored.flip(axes) if axes else stored
    return flipped.mT if turn >= QUARTER_TURN else flipped


# The EXIF orientations (2.32, tag 0x0112) whose stored rows or columns run backwards.
_MIRRORED_X, _MIRRORED_Y = (2, 3, 7, 8), (3, 4, 6, 7)


def draft_scale(height: int, width: int, signal: ImageSignal, size: Size, inner: float = 1.0) -> int:
    """Return the greatest reduction (1, 2, 4, 8) that leaves any crop at least ``size`` pixels in both directions.

    It goes by the smallest crop that the settings allow, not by the one drawn: a sample must not depend on which other
    samples of its file happen to be decoded with it, which changes with the number of ranks. ``inner`` is the least
    share of a crop that a crop within it has.
    """
    if not signal.draft:
        return 1
    low, high = (size[1] / size[0] * ratio for ratio in signal.crop_ratio)
    area = inner * signal.crop_scale[0] * height * width
    # The second and third terms are the centre crop's, which is taken where no other fits.
    least_w = min(math.sqrt(area * low) - 0.5, width, height * low - 0.5)
    least_h = min(math.sqrt(area / high) - 0.5, height, width / high - 0.5)
    return next((scale for scale in SCALES if scale <= min(least_h / size[0], least_w / size[1])), 1)


def resampled(picture: PIL.Image.Image | Tensor, box: tuple[float, ...], size: Size) -> Tensor:
    """Crop an RGB picture, or its pixels uint8 [3, H, W], and resize it by an antialiased bicubic: uint8 [3, h, w].

    Nothing outside of the box is looked at, but for the rest of a pixel where the box ends within one.
    """
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if isinstance(picture, Tensor):
        crop = picture[:, top:bottom, left:right]
    else:
        part = picture.crop((left, top, right, bottom))
        if box != (left, top, right, bottom):
            # Only Pillow can begin within a pixel.
            inner = box[0] - left, box[1] - top, box[2] - left, box[3] - top
            return _tensor(part.resize((size[1], size[0]), Resampling.BICUBIC, box=inner))
        crop = _tensor(part)
    # In this layout torch has a vectorised kernel that takes bytes as they are.
    whole = crop.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return interpolate(whole, size, mode="bicubic", antialias=True).squeeze(0)


def _decode_jpeg(image: JpegImageFile, path: str, scale: int) -> PIL.Image.Image | Tensor:
    if scale == 1:
        try:
            decoded: Tensor = decode_jpeg(read_file(path), ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # Pillow has the last word on what is broken, so that training and evaluation give the same reasons
    else:
        image.draft("RGB", (image.width // scale, image.height // scale))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _tensor(picture: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
