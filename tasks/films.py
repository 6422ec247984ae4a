"""Pictures of what was followed: masks laid over frames, dots on keypoints, contact sheets and animations."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

from tasks.panels import Block, Line, Panel, Shot
from tasks.report import Picture
from tasks.segments import VOID, Bools, Counts, Floats, Ids

CROSSES = " Crosses are keypoints further off than a tenth of their object's scale (PCK@0.1)."
STRENGTH = 0.35
"""How much of a pixel's colour is its object's."""
COLOURS = np.array(
    [
        (255, 59, 48), (0, 170, 255), (255, 204, 0), (52, 211, 90), (214, 80, 255), (255, 132, 0),
        (0, 230, 210), (255, 100, 170), (150, 220, 0), (110, 110, 255), (200, 140, 90), (160, 205, 255),
    ],
    np.uint8,
)  # fmt: skip
"""Colours of the objects 1, 2 ...: bright, since the palette of DAVIS begins with dark ones. They come again."""
CROSS, STROKE = 1.6, 0.35
"""How long and how thick half a stroke of a cross is, in radii of a dot."""
LARGE = 360
"""From this shorter side on, in pixels, outlines are two pixels wide."""
GREY = 128
"""Of what is void."""
RIM = 16
"""The grey around an outline, which makes it seen on a ground of its own colour."""
DIM, LIT = 150, 220
"""A person's colour whose brightest channel is below the first is made brighter, up to the second."""
ALIKE = 60
"""Colours that are less far apart than this are hard to tell apart."""
FILM_QUALITY = 70
"""Of animations in reports, from 0 to 100."""
SHEET_FRAMES = 8
PER_LINE = 4
SIDE = 320
"""Longer side in pixels of a frame in a film or on a sheet, at most."""


def palette(own: Mapping[int, tuple[int, int, int]] | None = None) -> Picture:
    """Return the colour of every number, uint8 [256, 3]: ``COLOURS``, or for those in ``own`` a person's choice.

    Dark ones of these are made brighter; where they are then hard to tell apart, none of them is taken.
    """
    table = np.concatenate([np.zeros((1, 3), np.uint8), np.resize(COLOURS, (255, 3))])
    table[VOID] = GREY
    chosen = {number: _lit(np.array(colour)) for number, colour in (own or {}).items()}
    apart = [np.linalg.norm(a - b) for a, b in combinations(chosen.values(), 2)]
    if all(colour.any() for colour in chosen.values()) and min(apart, default=ALIKE) >= ALIKE:
        for number, colour in chosen.items():
            table[number] = colour.round()
    return table


def _lit(colour: Counts) -> Floats:
    brightest = int(colour.max())
    return np.asarray(colour * (LIT / brightest if 0 < brightest < DIM else 1.0), np.float64)


PALETTE = palette()


def shrunk(frame: Picture, side: int = SIDE) -> Picture:
    """Return a frame, uint8 [h, w, 3], whose longer side is at most ``side`` pixels."""
    height, width = frame.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) if scale < 1 else frame


def resized_mask(mask: Ids, frame: Picture) -> Ids:
    """Return a mask in the size of a frame, by nearest pixels."""
    if mask.shape == frame.shape[:2]:
        return mask
    return np.asarray(Image.fromarray(mask).resize(frame.shape[1::-1], Image.Resampling.NEAREST))


def overlay(frame: Picture, mask: Ids, table: Picture = PALETTE) -> Picture:
    """Return a frame, uint8 [h, w, 3], with the objects of its mask [h, w] in their colours of ``table`` [256, 3].

    Each has an outline inside, in its full colour, and a dark rim outside.
    """
    hue, inside = table[mask], mask != 0
    drawn = np.where(inside[..., None], (1 - STRENGTH) * frame + STRENGTH * hue, frame).round().astype(np.uint8)
    drawn[binary_dilation(inside) & ~inside] = RIM
    return np.where(outline(mask)[..., None], hue, drawn)


def outline(mask: Ids) -> Bools:
    """Return which pixels of objects are at most one away from another number, on large frames two: bool [h, w]."""
    edge: Bools = np.zeros(mask.shape, bool)
    for reach in (1, 2) if min(mask.shape) >= LARGE else (1,):
        padded = np.pad(mask, reach, mode="edge")
        height, width = mask.shape
        for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
            edge |= mask != padded[reach * down :, reach * right :][:height, :width]
    edge &= mask != 0
    return edge


def dots(frame: Picture, places: Floats, objects: Counts, filled: Bools | None = None) -> Picture:
    """Return a frame with a dot in its object's colour and a white rim at every place [k, 2]; NaN is none.

    Those that are not ``filled`` [k] are crosses.
    """
    drawn = frame.astype(np.float64)
    radius = max(2.5, min(frame.shape[:2]) / 60)
    rows, columns = np.ogrid[: frame.shape[0], : frame.shape[1]]
    whole = np.ones(len(places), bool) if filled is None else filled
    for place, hue, full in zip(places, PALETTE[objects], whole, strict=True):
        if not np.isfinite(place).all():
            continue
        reach = radius * (1 if full else CROSS) + 3
        top, left = (int(max(0, at - reach)) for at in place[::-1])
        below, right = (int(max(0, at + reach + 1)) for at in place[::-1])
        part = drawn[top:below, left:right]
        down, across = rows[top:below] - place[1], columns[:, left:right] - place[0]
        outside = _off_disk(down, across, radius) if full else _off_cross(down, across, radius)
        _blend(part, 255.0, 1.25 - outside)
        _blend(part, hue, -outside)
    return drawn.round().astype(np.uint8)


def _off_disk(down: Floats, across: Floats, radius: float) -> Floats:
    # How far outside of a disk a pixel is, [h, w, 1]; negative inside.
    off: Floats = (np.hypot(down, across) - radius)[..., None]
    return off


def _off_cross(down: Floats, across: Floats, radius: float) -> Floats:
    # The same of a cross of two diagonal strokes.
    one, other = np.abs(down + across) / np.sqrt(2), np.abs(down - across) / np.sqrt(2)
    thick, long = radius * STROKE, radius * CROSS
    strokes = np.minimum(np.maximum(one - thick, other - long), np.maximum(other - thick, one - long))
    off: Floats = strokes[..., None]
    return off


def _blend(part: Floats, colour: Picture | float, inside: Floats) -> None:
    # Edges are smooth: a pixel is covered as far as its middle is inside.
    cover = (inside + 0.5).clip(0, 1)
    part += cover * (colour - part)


def spread(count: int, most: int = SHEET_FRAMES) -> list[int]:
    """Return at most so many frames of ``count``, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()  # type: ignore[no-any-return]


def sheet(title: str, note: str, indices: Sequence[int], rows: dict[str, Sequence[Picture | None]]) -> Panel:
    """Return a contact sheet: the frames at ``indices``, and for each named row a picture of every one of them."""
    blocks = []
    for first in range(0, len(indices), PER_LINE):
        part = slice(first, first + PER_LINE)
        lines = [
            Line(name, [
                None if picture is None else Shot(f"frame {index}", picture)
                for index, picture in zip(indices[part], pictures[part], strict=True)
            ])
            for name, pictures in rows.items()
        ]  # fmt: skip
        blocks.append(Block("", lines))
    return Panel(title, note, blocks, side=SIDE)
