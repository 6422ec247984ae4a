"""The mask that a person draws on the first frame of a video, in whatever way a PNG can hold one."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError, sibling
from modalities.image_read import opened
from modalities.pixels import FrameSize
from tasks.segments import VOID, Ids

Pixels = np.ndarray[Any, Any]

MOST_COLOURS = 16
"""So many colours may stand for an object each; more are those of a picture, or of soft edges."""
HALF = 128


class FirstMask(NamedTuple):
    """What is to be followed: the objects' numbers, uint8 [h, w], and what had to be decided about them."""

    ids: Ids
    notes: list[str]


def read_first_mask(path: Path, frame: FrameSize) -> FirstMask:
    """Return the objects marked in a PNG, in the size of the first frame.

    A palette's indices and different greys are numbers of objects, white alone on black is one, and so is every colour
    of a coloured picture whose background is black or transparent. Of another size with the same proportions it is
    scaled by nearest pixels. Raises UserError for what cannot be told apart, UnusableData for a broken file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such mask{sibling(path)}")
    try:
        image = guarded(_loaded, str(path), None)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None
    if image.format != "PNG":
        raise UserError(f"{path}: a mask should be a PNG, which keeps flat colours, but it is a {image.format}")
    pixels = _visible(image)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        ids, notes = _by_colour(path, pixels)
    elif image.mode == "P":
        ids, notes = _by_index(pixels)
    else:
        ids, notes = _by_grey(path, pixels)
    ids, more = _scaled(path, ids, frame)
    if not ids.any():
        raise UserError(f"{path}: marks nothing: all of it is background (black, 0 or transparent)")
    return FirstMask(ids, [*notes, *more])


def _loaded(path: str) -> Image.Image:
    with opened(path) as image:
        image.load()
        plain = image.copy()
        plain.format = image.format
        return plain


def _visible(image: Image.Image) -> Pixels:
    # [h, w] or [h, w, 3], 0 where alpha says that nothing is there.
    if image.mode not in ("RGBA", "LA"):
        return np.array(image)
    pixels = np.array(image)
    shown = np.where(pixels[..., -1:] >= HALF, pixels[..., :-1], 0)
    return shown if image.mode == "RGBA" else shown[..., 0]


def _by_index(pixels: Pixels) -> FirstMask:
    if set(np.unique(pixels).tolist()) <= {0, VOID}:
        return FirstMask((pixels == VOID).astype(np.uint8), [])
    return FirstMask(np.where(pixels == VOID, 0, pixels).astype(np.uint8), [])


def _by_grey(path: Path, pixels: Pixels) -> FirstMask:
    greys = np.unique(pixels[pixels != 0])
    if len(greys) <= 1:
        return FirstMask((pixels != 0).astype(np.uint8), [])
    if len(greys) > MOST_COLOURS and greys[-1] == VOID:
        return FirstMask(
            (pixels >= HALF).astype(np.uint8),
            [f"{path} has {len(greys)} greys: taken as the soft edges of one white object, cut at {HALF}"],
        )
    if greys[-1] < VOID:
        return FirstMask(pixels.astype(np.uint8), [])
    if len(greys) > MOST_COLOURS:
        raise UserError(f"{path}: has {len(greys)} values up to {greys[-1]}: give each object one number below {VOID}")
    words = ", ".join(f"{number} (grey {grey})" for number, grey in enumerate(greys.tolist(), start=1))
    return FirstMask(_numbered(pixels, greys), [f"objects of {path}: {words}"])


def _by_colour(path: Path, pixels: Pixels) -> FirstMask:
    codes = pixels.astype(np.int64) @ [1 << 16, 1 << 8, 1]
    colours = np.unique(codes[codes != 0])
    if len(colours) > MOST_COLOURS:
        raise UserError(
            f"{path}: has {len(colours)} colours: paint each object in one flat colour on black, without soft edges; "
            f"at most {MOST_COLOURS} are taken"
        )
    named = [
        f"{number} ({code >> 16}, {code >> 8 & 255}, {code & 255})" for number, code in enumerate(colours, start=1)
    ]
    return FirstMask(_numbered(codes, colours), [f"objects of {path}: {', '.join(named)}"])


def _numbered(values: Pixels, known: Pixels) -> Ids:
    # 1, 2 ... for the known values in their order, 0 for zeros.
    return np.where(values == 0, 0, np.searchsorted(known, values) + 1).astype(np.uint8)


def _scaled(path: Path, ids: Ids, frame: FrameSize) -> FirstMask:
    height, width = ids.shape
    if (height, width) == frame:
        return FirstMask(ids, [])
    if abs(round(width * frame[0] / height) - frame[1]) > 1 and abs(round(height * frame[1] / width) - frame[0]) > 1:
        raise UserError(
            f"{path}: has {width} x {height} pixels, but the first frame has {frame[1]} x {frame[0]}, which are other "
            "proportions: draw the mask on that frame"
        )
    scaled = np.asarray(Image.fromarray(ids).resize(frame[::-1], Image.Resampling.NEAREST))
    return FirstMask(scaled, [f"{path} was scaled from {width} x {height} to {frame[1]} x {frame[0]} pixels"])
