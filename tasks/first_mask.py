"""The mask that a person draws on the first frame of a video, in whatever way a PNG can hold one.

Palettes, greys and colours all become values, of which ``tasks.flat`` says what is an area and what is a soft edge.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError, sibling
from modalities.image_read import opened
from modalities.pixels import FrameSize
from tasks.flat import MOST_COLOURS, NoFlatColours, flattened
from tasks.segments import VOID, Ids

Pixels = np.ndarray[Any, Any]
Colour = tuple[int, int, int]

HALF = 128
BLACK = 0, 0, 0
LEAST_BLACK = 0.5
"""The share of black that tells a thin soft stroke, which has no flat area, from a grey picture."""
MOST_MARKED = 0.5
"""Who marks more of the frame than this may have taken the background for the object."""


class FirstMask(NamedTuple):
    """What is to be followed: the objects' numbers, uint8 [h, w], and what had to be decided about them."""

    ids: Ids
    notes: list[str]
    colours: dict[int, Colour]
    """The colours that a person gave to objects; none in greys."""


class _Marks(NamedTuple):
    """A mask as it was read."""

    values: Pixels
    """int64 [h, w]: greys, indices of a palette, or colours as 24 bits."""
    ground: int
    """The value of the background."""
    palette: dict[int, Colour]
    """The colour of each value that occurs."""
    kind: str
    """grey, index or colour."""
    notes: list[str]


def read_first_mask(path: Path, frame: FrameSize) -> FirstMask:
    """Return the objects marked in a PNG, in the size of the first frame.

    A palette's indices and different greys are numbers of objects, white alone on black is one, and so is every colour
    of a coloured picture whose background is black or transparent. Soft edges between areas go to the area that is
    next in colour. Of another size with the same proportions it is scaled by nearest pixels. Raises UserError for what
    cannot be told apart, UnusableData for a broken file.
    """
    if not path.is_file():
        way = sibling(path) or "; draw it on the first frame, which --first-frame FILE.png writes"
        raise UserError(f"{path}: no such mask{way}")
    try:
        image = guarded(_loaded, str(path), None)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None
    if image.format != "PNG":
        raise UserError(f"{path}: a mask should be a PNG, which keeps flat colours, but it is a {image.format}")
    marks = _marks(path, image)
    values, notes = _flat(path, marks)
    used, inverse = np.unique(values, return_inverse=True)
    numbers, more = _numbers(path, marks, [value for value in used.tolist() if value != marks.ground])
    drawn = np.array([numbers.get(value, 0) for value in used.tolist()], np.uint8)[inverse].reshape(values.shape)
    ids, scaling = _scaled(path, drawn, frame)
    if not ids.any():
        raise UserError(f"{path}: marks nothing: all of it is background (black, 0 or transparent)")
    colours = {number: marks.palette[value] for value, number in numbers.items()} if marks.kind != "grey" else {}
    names = {number: _name(marks, value) for value, number in numbers.items()}
    return FirstMask(ids, [*marks.notes, *notes, *more, *scaling, *_shares(path, ids, names)], colours)


def _loaded(path: str) -> Image.Image:
    with opened(path) as image:
        image.load()
        plain = image.copy()
        plain.format = image.format
        return plain


def _marks(path: Path, image: Image.Image) -> _Marks:
    if image.mode == "P" and len(np.unique(np.asarray(image))) <= MOST_COLOURS + 1:
        return _of_palette(path, image)
    if image.has_transparency_data or image.mode in ("P", "CMYK"):
        image = image.convert("RGBA")
    pixels = np.array(image)
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        pixels = np.where(pixels[..., -1:] >= HALF, pixels[..., :-1], 0)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        values = pixels.astype(np.int64) @ [1 << 16, 1 << 8, 1]
        palette = {code: (code >> 16, code >> 8 & 255, code & 255) for code in np.unique(values).tolist()}
        return _Marks(values, 0, palette, "colour", [])
    if pixels.max() > VOID:  # 16 bits; smaller numbers are those of objects there too
        pixels = (pixels.astype(np.int64) + HALF) // 257
    values = pixels.astype(np.int64)
    return _Marks(values, 0, {grey: (grey, grey, grey) for grey in np.unique(values).tolist()}, "grey", [])


def _of_palette(path: Path, image: Image.Image) -> _Marks:
    values = np.array(image).astype(np.int64)
    image.apply_transparency()
    table = np.reshape(image.getpalette("RGBA") or [], (-1, 4)).tolist()
    used = np.unique(values).tolist()
    palette = {index: _colour(table[index][:3]) if index < len(table) else BLACK for index in used}
    clear = [index for index in used if index < len(table) and table[index][3] < HALF]
    black = [index for index in used if palette[index] == BLACK and index not in clear]
    ground = 0 if 0 in black or 0 in clear else [*clear, *black, 0][0]
    notes = []
    if ground:
        notes = [f"{path}: background is index {ground}, which is {'transparent' if ground in clear else 'black'}"]
    elif 0 in used and not clear and not black:
        notes = [f"{path}: no colour is black, so background is index 0, which is {palette[0]}"]
    values[np.isin(values, clear)] = ground
    return _Marks(values, ground, {ground: BLACK, **palette}, "index", notes)


def _colour(entries: list[int]) -> Colour:
    red, green, blue = entries
    return red, green, blue


def _flat(path: Path, marks: _Marks) -> tuple[Pixels, list[str]]:
    # The values without those of soft edges, and how many pixels had such.
    values = marks.values
    if marks.kind == "grey" and values.max() <= MOST_COLOURS:
        return values, []
    try:
        flat = flattened(values, marks.palette, marks.ground)
    except NoFlatColours as error:
        if marks.kind == "grey" and values.max() >= HALF and np.mean(values == 0) >= LEAST_BLACK:
            note = f"{path} has {len(marks.palette)} greys, none of them flat: taken as one white object, cut at {HALF}"
            return np.where(values >= HALF, VOID, 0), [note]
        raise UserError(
            f"{path}: has {error}, which are not flat: paint each object in one colour on black; at most "
            f"{MOST_COLOURS} are taken"
        ) from None
    soft = np.count_nonzero(flat != values) / values.size
    notes = [f"{path}: soft edges, {soft:.1%} of the frame, were given to the areas beside them"] if soft else []
    return flat, notes


def _numbers(path: Path, marks: _Marks, values: list[int]) -> tuple[dict[int, int], list[str]]:
    # The number of each value that is an object's, and what has to be said about that.
    if marks.kind == "colour":
        return {value: number for number, value in enumerate(values, start=1)}, []
    if len(values) == 1 and (marks.kind == "grey" or values[0] == VOID):
        return {values[0]: 1}, []
    numbers = [value for value in values if value != VOID]
    if VOID in values and marks.kind == "grey" and numbers[-1] > MOST_COLOURS:
        return {value: number for number, value in enumerate(values, start=1)}, []
    free = next(number for number in range(1, VOID) if number not in numbers)
    notes = [f"{path}: {VOID} means that nobody knows, which is taken as background"] if VOID in values else []
    return {value: value or free for value in numbers}, notes


def _name(marks: _Marks, value: int) -> str:
    if marks.kind == "grey":
        return f"grey {value}"
    return f"{'index ' + str(value) + ', ' if marks.kind == 'index' else ''}colour {marks.palette[value]}"


def _scaled(path: Path, ids: Ids, frame: FrameSize) -> tuple[Ids, list[str]]:
    height, width = ids.shape
    if (height, width) == frame:
        return ids, []
    if abs(round(width * frame[0] / height) - frame[1]) > 1 and abs(round(height * frame[1] / width) - frame[0]) > 1:
        raise UserError(
            f"{path}: has {width} x {height} pixels, but the first frame has {frame[1]} x {frame[0]}, which are other "
            "proportions: draw the mask on that frame"
        )
    scaled = np.asarray(Image.fromarray(ids).resize(frame[::-1], Image.Resampling.NEAREST))
    return scaled, [f"{path} was scaled from {width} x {height} to {frame[1]} x {frame[0]} pixels"]


def _shares(path: Path, ids: Ids, names: dict[int, str]) -> list[str]:
    shares = np.bincount(ids.ravel(), minlength=VOID + 1) / ids.size
    listed = "; ".join(
        f"{number} ({name}, {shares[number]:.2%} of the frame)" for number, name in sorted(names.items())
    )
    notes = [f"objects of {path}: {listed}"]
    if shares[0] < 1 - MOST_MARKED:
        notes.append(f"{path} marks {1 - shares[0]:.0%} of the frame; is it inverted?")
    return notes
