"""Keypoints of a sequence from their files: the JSON of DAVIS's layout, and JHMDB's joint positions."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from mmssl.data.guard import BrokenFile
from tasks.segments import Bools, Counts, Floats

JOINTS = (
    *("neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow"),
    *("left elbow", "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle"),
)
"""JHMDB's points in their order."""
MOST_OBJECTS = 255


@dataclass(frozen=True)
class Points:
    """Where k points truly are in t frames."""

    truth: Floats
    """(x, y) in pixels, their centres at whole numbers: float64 [t, k, 2]."""
    visible: Bools
    """Which can be seen, bool [t, k]."""
    kinds: tuple[str, ...]
    """What each point is: the same word for the points that are counted together."""
    objects: Counts
    """Whose point each is, int64 [k], from 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """Each point's own name: its kind, with its object before it where there are several."""
        if len(np.unique(self.objects)) == 1:
            return self.kinds
        return tuple(f"{one}.{kind}" for one, kind in zip(self.objects, self.kinds, strict=True))


def json_points(path: Path, size: tuple[int, int]) -> Points:
    """Return the points of a JSON file of a sequence whose frames have that height and width.

    It maps "points" to their names, and "objects" to numbers from 1, each with "keypoints", [x, y, visible] by frame
    and point. Raises BrokenFile for anything else, and for a visible point that is nowhere.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    names, objects = (content.get(key) if isinstance(content, dict) else None for key in ("points", "objects"))
    if not isinstance(names, list) or not isinstance(objects, dict) or not objects:
        raise BrokenFile('there should be a list "points" of names, and "objects" with at least one of them')
    for number in objects:
        if not number.isdecimal() or str(int(number)) != number or not 1 <= int(number) <= MOST_OBJECTS:
            raise BrokenFile(f"objects have the numbers 1 to {MOST_OBJECTS}, but one is '{number}'")
    rows = {int(number): _rows(number, one, names) for number, one in objects.items()}
    lengths = {number: len(one) for number, one in rows.items()}
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{length} of object {number}" for number, length in lengths.items())
        raise BrokenFile(f"all objects should have equally many frames, but there are {words}")
    table = np.concatenate([*rows.values()], axis=1)
    kinds = tuple(str(name) for one in rows.values() for name in names[: one.shape[1]])
    owners = np.repeat(list(rows), [one.shape[1] for one in rows.values()])
    points = Points(table[..., :2], table[..., 2] > 0, kinds, owners)
    _check_places(points)
    return replace(points, visible=_begun(points.truth, points.visible, size))


def _rows(number: str, one: Any, names: list[Any]) -> Floats:
    # [x, y, visible] of an object, float64 [t, k, 3].
    wrong = BrokenFile(f"object {number}: keypoints should be [x, y, visible] for every frame and point")
    if not isinstance(one, dict) or "keypoints" not in one:
        raise wrong
    try:
        rows = np.array(one["keypoints"], np.float64)
    except (ValueError, TypeError):
        raise wrong from None
    if rows.ndim != 3 or rows.shape[2] != 3 or not rows.size:
        raise wrong
    if rows.shape[1] > len(names):
        raise BrokenFile(f'object {number} has {rows.shape[1]} points, but "points" names {len(names)}')
    return rows


def _check_places(points: Points) -> None:
    nowhere = np.argwhere(points.visible & ~np.isfinite(points.truth).all(2))
    if len(nowhere):
        frame, point = nowhere[0]
        x, y = points.truth[frame, point]
        raise BrokenFile(
            f"object {points.objects[point]}: '{points.kinds[point]}' is visible in frame {frame}, but at ({x}, {y})"
        )


def mat_points(path: Path, size: tuple[int, int]) -> Points:
    """Return the points of JHMDB's joint positions for frames of that height and width; raises BrokenFile."""
    content = loadmat(path)
    shape = np.shape(content.get("pos_img", ()))
    if len(shape) != 3 or shape[:2] != (2, len(JOINTS)):
        raise BrokenFile(f"pos_img should be [2, {len(JOINTS)}, frames], but is {[*shape]}")
    truth = np.asarray(content["pos_img"], np.float64).transpose(2, 1, 0) - 1  # Matlab counts from 1
    visible: Bools = np.array(np.isfinite(truth).all(2))
    return Points(truth, _begun(truth, visible, size), JOINTS, np.ones(len(JOINTS), np.int64))


def _begun(truth: Floats, visible: Bools, size: tuple[int, int]) -> Bools:
    # Points may be known outside the picture too, but one that begins there has no token to be followed from.
    height, width = size
    outside = (truth[0] < -0.5) | (truth[0] >= [width - 0.5, height - 0.5])
    return np.concatenate([visible[:1] & ~outside.any(1), visible[1:]])
