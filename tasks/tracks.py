"""What is followed through a sequence: masks, parts or keypoints, as labels of tokens, as files and as pictures."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmssl.files import write_json
from tasks.films import dots, overlay, resized_mask
from tasks.keypoints import from_heatmaps, scales, to_heatmaps, tracked
from tasks.point_files import Points
from tasks.report import Picture
from tasks.segments import VOID, Bools, Floats, Ids
from tasks.sequences import FrameSequence, read_mask, write_mask

SHOWN_ALPHA = 0.1
"""A keypoint that is further off than this share of its object's scale is drawn as missed."""


class Track(Protocol):
    """What was marked in a sequence's first frame, and where it was found in the frames after it."""

    def labels(self, grid: tuple[int, int]) -> Tensor:
        """Return the first frame's marks as soft labels of tokens, float32 [N, C]."""
        ...

    def take(self, labels: Tensor, grid: tuple[int, int]) -> None:
        """Add the next frame's marks, given as labels [N, C]."""
        ...

    def write(self, out: Path) -> None:
        """Write what was found, all frames of it, into folders of ``out``."""
        ...

    def drawn(self, index: int, frame: Picture) -> Picture:
        """Return a frame, uint8 [h, w, 3] of any size, with what was found in it."""
        ...

    def true(self, index: int, frame: Picture) -> Picture | None:
        """Return a frame with what is truly there; None where nobody knows."""
        ...


class MaskTrack:
    """Objects or parts: every frame's mask, uint8 [h, w], with the first one's numbers and no others."""

    def __init__(self, sequence: FrameSequence) -> None:
        first = sequence.masks[0]
        assert first is not None
        self.sequence, mask = sequence, read_mask(first)
        self.truth: dict[int, Ids] = {0: mask}
        self.found = [np.where(mask == VOID, 0, mask).astype(np.uint8)]
        self.ids = object_numbers(mask)

    def labels(self, grid: tuple[int, int]) -> Tensor:
        """Return each token's share of every object, background first, float32 [N, C]."""
        return area_labels(self.found[0], self.ids, grid)

    def take(self, labels: Tensor, grid: tuple[int, int]) -> None:
        """Add the next frame's mask; its annotation is read where there is one."""
        index, (height, width) = len(self.found), self.found[0].shape
        self.found.append(mask_of(labels, self.ids, grid, (height, width)))
        annotation = self.sequence.masks[index]
        if annotation is not None:
            self.truth[index] = read_mask(annotation)

    def annotated(self) -> tuple[Ids, Ids]:
        """Return truth and finding of the frames with an annotation, uint8 [t, h, w] each."""
        return np.stack([*self.truth.values()]), np.stack([self.found[index] for index in self.truth])

    def write(self, out: Path) -> None:
        """Write a palette PNG for every frame, under the frame's name."""
        folder = out / "masks" / self.sequence.name
        folder.mkdir(parents=True)
        for frame, mask in zip(self.sequence.frames, self.found, strict=True):
            write_mask(folder / f"{frame.stem}.png", mask)

    def drawn(self, index: int, frame: Picture) -> Picture:
        """Return the frame with each object in its colour."""
        return overlay(frame, resized_mask(self.found[index], frame))

    def true(self, index: int, frame: Picture) -> Picture | None:
        """Return the frame with its annotation, if it has one."""
        mask = self.truth.get(index)
        return None if mask is None else overlay(frame, resized_mask(mask, frame))


class PointTrack:
    """Keypoints: each frame's places in pixels, float64 [k, 2], NaN where a point was lost."""

    def __init__(self, sequence: FrameSequence) -> None:
        assert sequence.points is not None
        self.sequence, self.points, self.size = sequence, sequence.points, sequence.size
        given = self.points.visible[0, :, None]
        self.found = [np.where(given, self.points.truth[0], np.nan)]

    def labels(self, grid: tuple[int, int]) -> Tensor:
        """Return a heat map of each point, background first, float32 [N, k + 1]."""
        points = self.points
        return torch.from_numpy(to_heatmaps(points.truth[0], points.visible[0], grid, self.size))

    def take(self, labels: Tensor, grid: tuple[int, int]) -> None:
        """Add the next frame's points."""
        self.found.append(from_heatmaps(labels.cpu().numpy(), grid, self.size)[0])

    def places(self) -> Floats:
        """Return the points of all frames so far, float64 [t, k, 2]."""
        return np.stack(self.found)

    def scales(self) -> Floats:
        """Return the scale of each point in each frame, in pixels, [t, k]."""
        return scales(self.points.truth, self.points.visible, self.points.objects)

    def near(self) -> Bools:
        """Return which points were found within ``SHOWN_ALPHA``, bool [t, k]."""
        distance = np.hypot(*np.moveaxis(self.places() - self.points.truth[: len(self.found)], -1, 0))
        near: Bools = distance <= SHOWN_ALPHA * self.scales()[: len(self.found)]
        return near

    def write(self, out: Path) -> None:
        """Write one JSON file, laid out as annotations of keypoints are."""
        folder = out / "keypoints"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.sequence.name}.json", as_annotation(self.points, self.places(), self.sequence))

    def drawn(self, index: int, frame: Picture) -> Picture:
        """Return the frame with its points: filled where they are right, or where nobody knows, else hollow."""
        right = self.near()[index] | ~tracked(self.points.visible)[index]
        return self._dotted(frame, self.found[index], right)

    def true(self, index: int, frame: Picture) -> Picture | None:
        """Return the frame with its true points."""
        seen = tracked(self.points.visible)[index, :, None]
        return self._dotted(frame, np.where(seen, self.points.truth[index], np.nan), None)

    def _dotted(self, frame: Picture, places: Floats, filled: Bools | None) -> Picture:
        height, width = self.size
        scale = np.array([frame.shape[1] / width, frame.shape[0] / height])
        return dots(frame, (places + 0.5) * scale - 0.5, self.points.objects, filled)


def as_annotation(points: Points, places: Floats, sequence: FrameSequence) -> dict[str, object]:
    """Return points [t, k, 2] as the JSON that ``find_sequences`` reads: x, y, found by object, frame, point."""
    rows = np.dstack([places, np.isfinite(places).all(2)])
    objects = {str(one): {"keypoints": rows[:, points.objects == one].tolist()} for one in np.unique(points.objects)}
    kinds = [kind for kind, one in zip(points.kinds, points.objects, strict=True) if one == points.objects[0]]
    return {"frames": [path.name for path in sequence.frames], "points": kinds, "objects": objects}


def object_numbers(mask: Ids) -> Ids:
    """Return the numbers that a mask holds, ascending, 0 for the background first; ``VOID`` is none."""
    held = np.unique(mask)
    return np.concatenate([[0], held[(held != 0) & (held != VOID)]]).astype(np.uint8)


def area_labels(mask: Ids, ids: Ids, grid: tuple[int, int]) -> Tensor:
    """Return how much of each token's area has each number of ``ids``, float32 [N, C]: exact, whatever the sizes."""
    rows, columns = (_shares(n, pixels) for n, pixels in zip(grid, mask.shape, strict=True))
    planes = torch.from_numpy(mask == ids[:, None, None]).float()
    return (rows @ planes @ columns.T).flatten(1).T.contiguous()


def _shares(n: int, pixels: int) -> Tensor:
    # How much of each of n equal parts of a line lies in each of its pixels: [n, pixels], rows adding up to 1.
    edges = torch.linspace(0, pixels, n + 1, dtype=torch.float64)
    pixel = torch.arange(pixels, dtype=torch.float64)
    inside = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (inside.clamp(min=0) * n / pixels).float()


def mask_of(labels: Tensor, ids: Ids, grid: tuple[int, int], size: tuple[int, int]) -> Ids:
    """Return the mask, uint8 of ``size``, of soft labels [N, C]: enlarged bilinearly, the strongest label wins."""
    found = torch.zeros(size, dtype=torch.uint8, device=labels.device)
    highest = torch.full(size, -torch.inf, device=labels.device)
    # One label after the other: all of them at once, at the size of a film, would take gigabytes.
    for number, plane in zip(ids.tolist(), labels.T.reshape(-1, 1, 1, *grid), strict=True):
        value = interpolate(plane, size, mode="bilinear")[0, 0]
        found[value > highest] = number
        highest = torch.maximum(highest, value)
    return found.cpu().numpy()
