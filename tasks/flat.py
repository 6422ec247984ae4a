"""Flat areas of a drawn picture, and the soft edges between them: what smooth brushes, scaling and JPEG leave.

Legend: [h, w] pixels, k flat values.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

Values = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_COLOURS = 16
"""So many colours may stand for an object each; more are those of a picture, or of soft edges."""
REACH = 2
"""An edge is at most so many pixels away from both of its areas, where there are few values."""
CORE = 1 / 3
"""The share of a value's pixels whose eight neighbours have it too, from which on it is an area, among many values."""
NEAR = 40
"""Colours that are less far apart than this are one, where there are many values."""
STRAIGHT = 20
"""How far a mixture of two colours may be off the line between them."""
LEAST_MIXED = 3
"""So many mixtures of two colours, where nothing is flat, are no objects but what softened a stroke."""
MOST_SOFT = 0.5
"""The share of the frame that may be soft edges; more is a picture."""


class NoFlatColours(ValueError):
    """There are too many colours, or none of them is flat."""


def flattened(values: Values, palette: Mapping[int, tuple[int, int, int]], ground: int) -> Values:
    """Return values, int64 [h, w], without those that only soft edges have: they become the next area's.

    A value is an area's if it fills a square of 3 x 3 pixels somewhere. With up to ``MOST_COLOURS`` besides the
    ``ground``, the others stay too, but for those which mix the colours of two areas and lie between them wherever they
    occur. With more, the picture was softened or compressed: all others are edges, and areas of nearly one colour are
    one. An edge's pixel goes to the area that is nearest in colour among those not much further away than the nearest.
    Raises NoFlatColours where none is left, or too many.
    """
    used, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(values.shape)
    cores = np.bincount(inverse[minimum_filter(inverse, 3) == maximum_filter(inverse, 3)], minlength=len(used))
    colours = np.array([palette[value] for value in used.tolist()], np.float64)
    own = np.arange(len(used))
    if np.count_nonzero(used != ground) <= MOST_COLOURS:
        if _is_stroke(cores > 0, colours):
            raise NoFlatColours(f"{len(used)} colours")
        soft = _between(inverse, cores > 0, colours)
    else:
        soft = cores <= CORE * counts
        own = _merged(np.flatnonzero(~soft), counts, colours)
        # JPEG leaves a background that is almost black.
        used[np.linalg.norm(colours - palette.get(ground, (0, 0, 0)), axis=-1) < NEAR] = ground
        areas = used[np.unique(own[~soft])]
        edges = np.count_nonzero(soft[inverse])
        if not 0 < np.count_nonzero(areas != ground) <= MOST_COLOURS or edges > MOST_SOFT * values.size:
            raise NoFlatColours(f"{len(used)} colours")
    settled = own[inverse]
    if soft.any():
        pixels = soft[inverse]
        settled[pixels] = _nearest(settled, pixels, colours)
    return used[settled]


def _between(inverse: Values, flat: Mask, colours: np.ndarray[Any, Any]) -> Mask:
    # Which values only mix two areas that are next to all of their pixels: bool [values].
    soft = np.zeros(len(flat), bool)
    if flat.all() or flat.sum() < 2:
        return soft
    close = {int(one): distance_transform_edt(inverse != one) <= REACH for one in np.flatnonzero(flat)}
    for value in np.flatnonzero(~flat):
        here = inverse == value
        sums = np.sum([near[here] for near in close.values()], axis=0)
        pairs = [one for one, near in close.items() if near[here].any()]
        mixes = any(_mixes(colours[value], colours[a], colours[b]) for a in pairs for b in pairs if a < b)
        soft[value] = bool((sums >= 2).all()) and mixes
    return soft


def _is_stroke(flat: Mask, colours: np.ndarray[Any, Any]) -> bool:
    # Whether all there is on a flat background is one thin stroke, softened: mixtures of two colours.
    if flat.sum() != 1 or len(flat) < LEAST_MIXED + 2:
        return False
    ground = colours[flat][0]
    far = int(np.linalg.norm(colours - ground, axis=-1).argmax())
    return all(_mixes(colour, ground, colours[far]) for colour in np.delete(colours, [int(flat.argmax()), far], 0))


def _mixes(colour: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    along = b - a
    share = float(((colour - a) @ along) / max(1e-9, along @ along))
    return 0 < share < 1 and float(np.linalg.norm(colour - a - share * along)) <= STRAIGHT


def _merged(flat: Values, counts: Values, colours: np.ndarray[Any, Any]) -> Values:
    # Every flat value becomes the largest one that has nearly its colour.
    own, kept = np.arange(len(counts)), list[int]()
    for value in sorted(flat.tolist(), key=lambda one: -counts[one]):
        alike = [one for one in kept if np.linalg.norm(colours[one] - colours[value]) < NEAR]
        own[value] = alike[0] if alike else value
        kept += [] if alike else [value]
    return own


def _nearest(settled: Values, soft: Mask, colours: np.ndarray[Any, Any]) -> Values:
    # The area of each soft pixel, [n].
    areas = np.unique(settled[~soft])
    away = np.stack([distance_transform_edt((settled != one) | soft)[soft] for one in areas])
    apart = np.linalg.norm(colours[settled[soft]] - colours[areas][:, None], axis=-1)
    apart[away > 2 * away.min(0) + REACH] = np.inf
    chosen: Values = areas[apart.argmin(0)]
    return chosen
