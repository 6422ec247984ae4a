"""What is done to a training picture besides crop and flip, all of it off by default.

Colours and shapes are changed on the cropped 8-bit RGB picture (``augment_picture``), erasing is done on the normalised
signal, float32 [C, h, w] (``augment_signal``). Both draw from the sample's own generator only, and draw nothing for
what is off: a recipe without augmentation sees the same bits as if this file did not exist.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from PIL import ImageEnhance, ImageFilter, ImageOps
from PIL.Image import Image, Resampling, Transform, merge
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from mmssl.config import Piece

Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Byte: TypeAlias = Annotated[int, Field(ge=0, le=255)]
Color: TypeAlias = tuple[Byte, Byte, Byte]
"""Red, green and blue."""
Strength: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Range: TypeAlias = tuple[float, float]
"""Least and greatest value of something drawn."""


def _ordered(value: Range) -> Range:
    low, high = value
    if not 0 < low <= high:
        raise ValueError(f"is [least, greatest], both greater than 0, but got {list(value)}")
    return value


class RandAugment(Piece):
    """Random operations of one shared strength (arXiv:1909.13719), in timm's "increasing" form that fine-tuning uses.

    Each of ``ops`` operations, drawn with replacement, is carried out with probability 0.5. The defaults are those of
    MAE's fine-tuning (arXiv:2111.06377, table 9): 9, 0.5.
    """

    ops: Annotated[int, Field(ge=1)] = 2
    """Operations drawn per picture."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Mean strength of an operation, 0 to 10."""
    magnitude_std: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the strength, which is clipped to 0 to 10."""
    fill: Color = (124, 116, 104)
    """What a turn, shear or shift uncovers: the mean colour of ImageNet, as in MAE's fine-tuning."""


class ColorJitter(Piece):
    """Random brightness, contrast, saturation and hue in random order; the defaults are BYOL's (arXiv:2006.07733)."""

    probability: Probability = 0.8
    brightness: Strength = 0.4
    """The factor is uniform in 1 - this to 1 + this; so for contrast and saturation. 0 leaves it out."""
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The shift is uniform in - this to + this, as a fraction of the colour circle."""


class Blur(Piece):
    """Gaussian blur (SimCLR, arXiv:2002.05709, appendix A), in Pillow's fast approximation, as DINO's."""

    probability: Probability = 0.5
    sigma: Range = (0.1, 2.0)
    """Least and greatest standard deviation in pixels."""

    _order = field_validator("sigma")(_ordered)


class Solarize(Piece):
    """Inversion of bright values (BYOL, arXiv:2006.07733, appendix B)."""

    probability: Probability = 0.2
    threshold: Annotated[int, Field(ge=0, le=256)] = 128
    """Values from here on are inverted; 256 inverts none."""


class Erase(Piece):
    """Random erasing of one rectangle of the normalised signal (arXiv:1708.04896), as timm does it."""

    probability: Probability = 0.25
    area: Range = (0.02, 1 / 3)
    """Least and greatest fraction of the area."""
    ratio: Range = (0.3, 3.3)
    """Least and greatest height / width, drawn log-uniformly."""
    mode: Literal["pixel", "zero"] = "pixel"
    """What is put there: a standard normal number per value, or zero (the mean colour)."""

    @field_validator("area", "ratio")
    @classmethod
    def _order(cls, value: Range, info: ValidationInfo) -> Range:
        if info.field_name == "area" and value[1] > 1:
            raise ValueError(f"is a fraction of the signal's area, at most 1, but got {list(value)}")
        return _ordered(value)


class Augment(Piece):
    """What is done to a training picture besides crop and flip, in this order. Left out or null is off."""

    randaugment: RandAugment | None = None
    """Fine-tuning: random operations on colours and shape."""
    jitter: ColorJitter | None = None
    """Random brightness, contrast, saturation and hue."""
    grey: Probability = 0.0
    """Probability that the picture loses its colours (0.2 in SimCLR, BYOL and DINO)."""
    blur: Blur | None = None
    solarize: Solarize | None = None
    erase: Erase | None = None
    """Fine-tuning: overwrite a random rectangle of the normalised signal."""


def augment_picture(image: Image, settings: Augment, rng: np.random.Generator) -> Image:
    """Return an RGB picture of the same size, changed as drawn; the very same picture where nothing is."""
    if settings.randaugment is not None:
        image = _randaugment(image, settings.randaugment, rng)
    if settings.jitter is not None and _happens(settings.jitter.probability, rng):
        image = _jitter(image, settings.jitter, rng)
    if _happens(settings.grey, rng):
        image = image.convert("L").convert("RGB")
    if settings.blur is not None and _happens(settings.blur.probability, rng):
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*settings.blur.sigma)))
    if settings.solarize is not None and _happens(settings.solarize.probability, rng):
        image = ImageOps.solarize(image, settings.solarize.threshold)
    return image


def augment_signal(x: Tensor, settings: Augment, rng: np.random.Generator) -> Tensor:
    """Return a normalised signal [C, h, w] with a rectangle erased as drawn; the very same tensor where none is."""
    erase = settings.erase
    if erase is None or not _happens(erase.probability, rng):
        return x
    channels, height, width = x.shape
    low, high = erase.ratio
    for _ in range(10):
        area = height * width * rng.uniform(*erase.area)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            x = x.clone()
            hole = x[:, top : top + h, left : left + w]
            if erase.mode == "zero":
                hole.zero_()
            else:
                hole.copy_(torch.from_numpy(rng.standard_normal((channels, h, w), dtype=np.float32)))
            break
    return x


def _happens(probability: float, rng: np.random.Generator) -> bool:
    # What never happens draws nothing.
    return probability > 0 and rng.random() < probability


def _randaugment(image: Image, settings: RandAugment, rng: np.random.Generator) -> Image:
    # The same count of draws whatever comes out, so that later draws do not depend on which operations these were.
    names, count = list(OPS), settings.ops
    chosen = rng.integers(len(names), size=count)
    done = rng.random(count) < 0.5
    levels = rng.normal(settings.magnitude, settings.magnitude_std, count).clip(0, 10) * rng.choice((-1, 1), count)
    for index, level in zip(chosen[done].tolist(), levels[done].tolist(), strict=True):
        image = OPS[names[index]](image, level, settings.fill)
    return image


# Operations of RandAugment: a picture, a signed level of -10 to 10 (the sign is a direction, where there are two) and
# the colour of what is uncovered. The ranges that a level stands for are timm's.


def _affine(image: Image, matrix: tuple[float, ...], fill: Color) -> Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image, level: float, fill: Color) -> Image:
    # Level 10 keeps no bit, as in timm: a black picture. Pillow's own function refuses that from some version on.
    kept = 4 - int(abs(level) / 10 * 4)
    return image.point([i >> 8 - kept << 8 - kept for i in range(256)] * 3)


def _solarize_add(image: Image, level: float, fill: Color) -> Image:
    more = int(abs(level) / 10 * 110)
    return image.point([min(255, i + more) if i < 128 else i for i in range(256)] * 3)


def _factor(level: float) -> float:
    # 1 is no change; the further away, the stronger.
    return 1 + level / 10 * 0.9


Operation: TypeAlias = Callable[[Image, float, Color], Image]

OPS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, fill: ImageOps.equalize(image),
    "Invert": lambda image, level, fill: ImageOps.invert(image),
    "Rotate": lambda image, level, fill: image.rotate(level / 10 * 30, Resampling.BICUBIC, fillcolor=fill),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda image, level, fill: ImageOps.solarize(image, 256 - int(abs(level) / 10 * 256)),
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda image, level, fill: ImageEnhance.Color(image).enhance(_factor(level)),
    "ContrastIncreasing": lambda image, level, fill: ImageEnhance.Contrast(image).enhance(_factor(level)),
    "BrightnessIncreasing": lambda image, level, fill: ImageEnhance.Brightness(image).enhance(_factor(level)),
    "SharpnessIncreasing": lambda image, level, fill: ImageEnhance.Sharpness(image).enhance(_factor(level)),
    "ShearX": lambda image, level, fill: _affine(image, (1, level / 10 * 0.3, 0, 0, 1, 0), fill),
    "ShearY": lambda image, level, fill: _affine(image, (1, 0, 0, level / 10 * 0.3, 1, 0), fill),
    "TranslateXRel": lambda image, level, fill: _affine(image, (1, 0, level / 10 * 0.45 * image.width, 0, 1, 0), fill),
    "TranslateYRel": lambda image, level, fill: _affine(image, (1, 0, 0, 0, 1, level / 10 * 0.45 * image.height), fill),
}
"""RandAugment's operations by the names that timm gives them."""


def _jitter(image: Image, settings: ColorJitter, rng: np.random.Generator) -> Image:
    strengths = {name: getattr(settings, name) for name in JITTER if getattr(settings, name) > 0}
    for name in rng.permutation(list(strengths)).tolist():
        change, neutral = JITTER[name]
        image = change(image, neutral + strengths[name] * rng.uniform(-1, 1))
    return image


def _hue(image: Image, shift: float) -> Image:
    # The table wraps around, as the colour circle does.
    h, s, v = image.convert("HSV").split()
    h = h.point([(i + int(shift * 255)) % 256 for i in range(256)])
    return merge("HSV", (h, s, v)).convert("RGB")


JITTER: dict[str, tuple[Callable[[Image, float], Image], float]] = {
    "brightness": (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), 1.0),
    "contrast": (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), 1.0),
    "saturation": (lambda image, factor: ImageEnhance.Color(image).enhance(factor), 1.0),
    "hue": (_hue, 0.0),
}
"""The changes of colour jitter by setting, each with the value that changes nothing."""
