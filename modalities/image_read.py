"""Reading picture files: what is decoded, how large it may be, how pixels of every kind become upright 8-bit RGB."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Transpose

from mmssl.data.guard import BrokenFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, by content: a wrong suffix is harmless, and formats that run programs (EPS) are never tried."""
MAX_PIXELS = 178_956_970
"""Height x width above which a picture is refused unread. It is where Pillow's own refusal stands by default."""
QUARTER_TURN = 5
"""The EXIF orientations from this one on turn the picture by a quarter: its header has height and width exchanged."""

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


@contextmanager
def opened(path: str) -> Iterator[PIL.Image.Image]:
    """Open a picture and read its header, no pixel yet; Pillow's warnings are off until it is closed.

    Raises BrokenFile for what is no picture and for more than ``MAX_PIXELS``; other errors are left to ``guarded``.
    """
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
            yield image


def pixels(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decode an opened picture: 8-bit RGB, alpha laid over white, upright by its EXIF."""
    image.load()
    # Only now: some formats keep their metadata behind the pixels, and Pillow turns a TIFF by itself.
    upright = _UPRIGHT.get(orientation(image))
    rgb = to_rgb(image)
    return rgb if upright is None else rgb.transpose(upright)


def decode(path: str) -> PIL.Image.Image:
    """Return the file's first picture as ``pixels`` does; raises BrokenFile or what ``guarded`` makes one of."""
    with opened(path) as image:
        return pixels(image)


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation as far as the file has been read; 1 (upright) where there is none."""
    try:
        # Not the PNG reader's own method, which decodes the picture to look for metadata behind it.
        value = int(PIL.Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # a camera's broken metadata does not break its picture
        return 1
    return value if value in _UPRIGHT else 1


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Return width and height that an opened picture will have when it is upright, from its header alone."""
    # Pillow exchanges those of a TIFF by itself.
    turned = orientation(image) >= QUARTER_TURN and image.format != "TIFF"
    return (image.height, image.width) if turned else image.size


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a loaded picture of any mode as 8-bit RGB; raises BrokenFile where the pixels' range is unknown."""
    if image.mode == "I" or image.mode.startswith("I;"):
        return PIL.Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise BrokenFile("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # A plain copy, not a subclass that keeps hold of the file.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _too_large() -> str:
    return f"absurdly large: more than {MAX_PIXELS // 10**6} million pixels"


def _eight_bits(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    # Pillow's own conversion clips 16-bit grey at 255, so that most of the picture turns white.
    if grey.min() < 0 or grey.max() > 65535:
        raise BrokenFile("integer pixels of more than 16 bits, whose range is unknown")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
