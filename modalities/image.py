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
from torch import Tensor
from torch.nn.functional import interpolate

from mmssl.backbones.resnet import ResNet
from mmssl.config import Piece
from mmssl.contracts import Grid, Media, Size, Views
from mmssl.data.guard import BrokenFile, guarded
from modalities.crops import Crops
from modalities.image_read import decode, opened, pixels, to_rgb, upright_size
from modalities.image_settings import AnyTokenizer, CropTokenizer, ImageSignal, ImageTokenizer
from modalities.looks import CropPair, Frame, FramePair, OneLook
from modalities.patch_augment import PatchAugment, PatchViews
from modalities.patches import PatchTokenizer
from modalities.pixels import Frames, normalised, resized
from modalities.synthetic import Noise
from modalities.video_read import VIDEO_FILES


class Image(OneLook):
    """The modality of still pictures."""

    name = "image"
    frame_suffixes = frozenset[str]()
    timed = False
    extent_words: tuple[str, ...] = ("height", "width")
    suffixes = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
    signal_type = ImageSignal
    tokenizer_types: tuple[type[Piece], ...] = (ImageTokenizer, CropTokenizer)

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
            width, height = guarded(_upright_size, path, timeout=None)
        except BrokenFile:  # reading it for training will find out what is wrong with it
            return 0
        return nearest_size(height, width, signal)

    def source(self, signal: ImageSignal) -> Media:
        """Return pictures, or videos where their frames are trained on."""
        return VIDEO_FILES if isinstance(signal.look, Frame | FramePair) else self

    def inputs(self, signal: ImageSignal) -> tuple[str, ...]:
        """Return ``signal``, and of a pair ``past`` too."""
        return ("signal", "past") if isinstance(signal.look, FramePair | CropPair) else ("signal",)

    def alone(self, signal: ImageSignal) -> ImageSignal:
        """Return the settings of one picture, whole: what is done to patches is for pre-training."""
        return signal.model_copy(update={"look": None, "patch_augment": PatchAugment()})

    def views(self, signal: ImageSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return what reads a picture, or a video, and makes random resized crops and flips of it."""
        if signal.patch_augment.active:
            plain = signal.model_copy(update={"patch_augment": PatchAugment()})
            return PatchViews(self.views(plain), signal.patch_augment)
        # Only training needs torchvision, whose import takes seconds; the data workers inherit it.
        if isinstance(signal.look, Frame | FramePair):
            from modalities.frames import FrameViews

            return FrameViews(signal, signal.look)
        from modalities.image_views import ImageViews

        return ImageViews(signal)

    def synthetic(self, signal: ImageSignal, tokenizer: AnyTokenizer | None = None) -> Views:
        """Return what makes pictures of noise, or pairs of them."""
        noise = Noise(self.inputs(signal), channels=3)
        return PatchViews(noise, signal.patch_augment) if signal.patch_augment.active else noise

    def example(self, path: str, signal: ImageSignal, tokenizer: AnyTokenizer) -> dict[str, Tensor]:
        """Return a picture's centre crop, or that of a video's middle frame or frames; of two crops the middle of one.

        Raises BrokenFile.
        """
        if isinstance(signal.look, Frame | FramePair):
            from modalities.frames import middle

            return middle(path, signal, signal.look)
        found = super().example(path, signal, tokenizer)
        return found if signal.look is None else found | {"past": found["signal"], "signal": _inner(found["signal"])}

    def eval_transform(
        self, signal: ImageSignal, tokenizer: AnyTokenizer | None = None
    ) -> Callable[[PIL.Image.Image], Tensor]:
        """Return a picklable centre crop: RGB picture -> float32 [3, h, w]."""
        return _EvalTransform(signal)

    def tokenizer(self, signal: ImageSignal, tokenizer: AnyTokenizer, dim: int) -> PatchTokenizer | Crops:
        """Return a tokenizer of ``dim`` channels; raises ValueError where patches do not divide a size."""
        made: PatchTokenizer | Crops
        if isinstance(tokenizer, CropTokenizer):
            network = ResNet(3, dim, tokenizer.blocks, tokenizer.channels, tokenizer.bottlenecks, tokenizer.norm)
            made = Crops(signal.size, tokenizer.patch_size, tokenizer.stride, network, signal.mean, signal.std)
        elif signal.patch_augment.active:
            raise ValueError(
                f"signal.patch_augment changes patches that overlap, which model.tokenizer '{tokenizer.name}' has none "
                "of; take model.tokenizer.name=crops, or signal.augment for whole pictures"
            )
        else:
            made = PatchTokenizer(signal.size, tokenizer.patch_size, 3, dim, tokenizer.positions, tokenizer.target)
        for size in signal.buckets:
            made.grid_of(size)
        return made

    def stills(self, frames: Frames, size: Size, signal: ImageSignal, tokenizer: AnyTokenizer) -> Tensor:
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


def _upright_size(path: str) -> tuple[int, int]:
    with opened(path) as image:
        return upright_size(image)


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
