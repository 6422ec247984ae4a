"""Pictures of what was followed: masks laid over frames, dots on keypoints, contact sheets and animations."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tasks.panels import Block, Line, Panel, Shot
from tasks.report import Picture
from tasks.segments import VOID, Bools, Counts, Floats, Ids

RINGS = " Rings are keypoints further off than a tenth of their object's scale (PCK@0.1)."
STRENGTH = 0.45
"""How much of a pixel's colour is its object's."""
COLOURS = np.array(
    [
        (255, 59, 48), (0, 170, 255), (255, 204, 0), (52, 211, 90), (214, 80, 255), (255, 132, 0),
        (0, 230, 210), (255, 100, 170), (150, 220, 0), (110, 110, 255), (200, 140, 90), (160, 205, 255),
    ],
    np.uint8,
)  # fmt: skip
"""Colours of the objects 1, 2 ...: bright, since the palette of DAVIS begins with dark ones. They come again."""
LARGE = 360
"""From this shorter side on, in pixels, outlines are two pixels wide."""
GREY = 128
"""Of what is void."""
SHEET_FRAMES = 8
PER_LINE = 4
SIDE = 320
"""Longer side in pixels of a frame in a film or on a sheet, at most."""


def colours(ids: Ids | Counts) -> Picture:
    """Return the colour of every object's number, uint8 [..., 3]."""
    table = np.concatenate([np.zeros((1, 3), np.uint8), np.resize(COLOURS, (255, 3))])
    table[VOID] = GREY
    return table[ids]


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


def overlay(frame: Picture, mask: Ids) -> Picture:
    """Return a frame, uint8 [h, w, 3], with the objects of its mask [h, w] in their colours, and their outlines."""
    hue = colours(mask)
    tinted = np.where((mask != 0)[..., None], (1 - STRENGTH) * frame + STRENGTH * hue, frame)
    return np.where(outline(mask)[..., None], hue, tinted.round()).astype(np.uint8)


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

    Those that are not ``filled`` [k] are rings.
    """
    drawn = frame.astype(np.float64)
    radius = max(2.5, min(frame.shape[:2]) / 60)
    rows, columns = np.ogrid[: frame.shape[0], : frame.shape[1]]
    whole = np.ones(len(places), bool) if filled is None else filled
    for place, hue, full in zip(places, colours(objects), whole, strict=True):
        if not np.isfinite(place).all():
            continue
        top, left = (int(max(0, at - radius - 3)) for at in place[::-1])
        below, right = (int(max(0, at + radius + 4)) for at in place[::-1])
        part = drawn[top:below, left:right]
        distance = np.hypot(rows[top:below] - place[1], columns[:, left:right] - place[0])[..., None]
        _blend(part, 255.0, radius + 1.25 - distance)
        if full:
            _blend(part, hue, radius - distance)
        else:
            _blend(part, hue, radius + 0.5 - distance)
            _blend(part, 255.0, radius - 1 - distance)
    return drawn.round().astype(np.uint8)


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
