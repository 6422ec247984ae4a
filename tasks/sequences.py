"""Annotated sequences of frames as DAVIS-2017, VIP and JHMDB lay them out, and masks as palette PNGs."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import PIL.Image

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError, nearest, sibling
from mmssl.files import replacing_file
from modalities.image_read import opened, upright_size
from modalities.pixels import FrameSize
from modalities.video_read import PICTURES, by_numbers
from tasks.point_files import Points, json_points, mat_points
from tasks.segments import VOID, Ids, object_ids

T = TypeVar("T")
Kind: TypeAlias = Literal["masks", "keypoints", "parts"]


@dataclass(frozen=True)
class FrameSequence:
    """A film as pictures of one size, and what is known of them."""

    name: str
    """Its folder's name, in JHMDB its action's before it; no two of a data set have the same."""
    frames: tuple[Path, ...]
    """In the order of the numbers in their names, no two of which differ in their suffix alone; at least 2."""
    size: FrameSize
    """Height and width of each."""
    masks: tuple[Path | None, ...] = ()
    """Each frame's annotation, None where there is none (never the first); () for keypoints."""
    points: Points | None = None
    """Only for keypoints."""
    split: str = ""
    """The list that names it; "" where everything is taken."""


def find_sequences(
    data: Path, kind: Kind, split: str | None = None, resolution: str | None = None
) -> list[FrameSequence]:
    """Return the annotated sequences of a data set's folder, or of the only data set in a folder.

    ``split`` is the name of one of its lists, a sequence's name on each line; by default "val" if there is one,
    otherwise everything is taken. For JHMDB it is a text file with a clip, or its action/clip at the end of a path, on
    each line, or in the first of its columns. ``resolution`` is a folder in JPEGImages; by default "480p" if there,
    otherwise the only one.
    Raises UserError for what is not there or does not fit, UnusableData for a broken file.
    """
    if not data.is_dir():
        raise UserError(f"{data}: " + ("is not a folder" if data.exists() else f"no such folder{sibling(data)}"))
    for roots in ([data], _folders(data)):
        found = [(root, one) for root in roots for one in _LAYOUTS[kind] if one.fits(root)]
        if len(found) > 1:
            words = ", ".join(f"{one.words} in {root.name}" for root, one in found)
            raise UserError(f"{data}: holds several data sets ({words}), so give the folder of one alone")
        if found:
            root, layout = found[0]
            return _read_all(root, layout, split, resolution)
    wanted = " or ".join(f"{one.words} ({', '.join(one.parts)})" for one in _LAYOUTS[kind])
    raise UserError(f"{data}: no {kind} found: the folder should be laid out as {wanted}")


def _read_all(root: Path, layout: "_Layout", split: str | None, resolution: str | None) -> list[FrameSequence]:
    if split is None and "val" in layout.lists(root):
        split = "val"
    sequences = layout.read(root, split, resolution)
    if not sequences:
        raise UserError(f"{root}: no folder of frames is there")
    twin = _twin(one.name for one in sequences)
    if twin is not None:
        raise UserError(f"{root}: two of its sequences would have the name '{twin}', so rename one of them")
    return [replace(one, split=split or "") for one in sequences]


def _twin(names: Iterable[str]) -> str | None:
    # The first name that is there more than once.
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _davis_lists(root: Path) -> dict[str, Path]:
    lists = [path for folder in ("ImageSets", "ImageSets/2017") for path in (root / folder).glob("*.txt")]
    return {path.stem: path for path in lists}


def _davis_masks(root: Path, split: str | None, resolution: str | None) -> list[FrameSequence]:
    frames = _resolution(root / "JPEGImages", resolution)
    masks = root / "Annotations" / frames.name
    return [_masked(folder, masks / folder.name) for folder in _chosen(root, _folders(frames), _davis_lists, split)]


def _davis_points(root: Path, split: str | None, resolution: str | None) -> list[FrameSequence]:
    frames = _resolution(root / "JPEGImages", resolution)
    chosen = _chosen(root, _folders(frames), _davis_lists, split)
    return [
        _pointed(folder.name, folder, root / "Keypoints" / folder.name / "keypoints.json", json_points)
        for folder in chosen
    ]


def _vip_lists(root: Path) -> dict[str, Path]:
    return {path.stem.removesuffix("_videos"): path for path in (root / "lists").glob("*_videos.txt")}


def _vip(root: Path, split: str | None, resolution: str | None) -> list[FrameSequence]:
    _no_resolution(root, resolution)
    masks = root / "Annotations" / "Category_ids"
    chosen = _chosen(root, _folders(root / "Images"), _vip_lists, split)
    return [_masked(folder, masks / folder.name) for folder in chosen]


def _jhmdb(root: Path, split: str | None, resolution: str | None) -> list[FrameSequence]:
    _no_resolution(root, resolution)
    videos = [video for action in _folders(root / "Rename_Images") for video in _folders(action)]
    if split is not None:
        path = next((path for path in (Path(split), root / split) if path.is_file()), None)
        if path is None:
            there = [str(one.relative_to(root)) for one in root.rglob("*.txt")]
            raise UserError(f"{root}: no text file '{split}' that lists videos{nearest(split, there)}")
        videos = _named(path, [_clip(path, line, videos) for line in _lines(path)])
    positions = root / "joint_positions"
    # Clips of two actions may have the same name.
    return [
        _pointed(
            f"{video.parent.name}-{video.name}",
            video,
            positions / video.parent.name / video.name / "joint_positions.mat",
            mat_points,
        )
        for video in videos
    ]


class _Layout(NamedTuple):
    words: str
    parts: tuple[str, ...]
    """Folders that it has."""
    read: Callable[[Path, str | None, str | None], list[FrameSequence]]
    lists: Callable[[Path], dict[str, Path]]

    def fits(self, root: Path) -> bool:
        return all((root / part).is_dir() for part in self.parts)


_DAVIS = _Layout("DAVIS-2017", ("JPEGImages", "Annotations"), _davis_masks, _davis_lists)
_LAYOUTS: dict[Kind, tuple[_Layout, ...]] = {
    "masks": (_DAVIS,),
    "parts": (_DAVIS, _Layout("VIP", ("Images", "Annotations/Category_ids"), _vip, _vip_lists)),
    "keypoints": (
        _Layout("DAVIS-2017 with keypoints", ("JPEGImages", "Keypoints"), _davis_points, _davis_lists),
        _Layout("JHMDB", ("Rename_Images", "joint_positions"), _jhmdb, lambda root: {}),
    ),
}


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _resolution(path: Path, wanted: str | None) -> Path:
    found = {folder.name: folder for folder in _folders(path)}
    if wanted is not None and wanted not in found:
        raise UserError(f"{path}: no resolution '{wanted}'{nearest(wanted, found)}")
    if wanted is None:
        wanted = "480p" if "480p" in found or len(found) != 1 else next(iter(found))
    if wanted not in found:
        raise UserError(f"{path}: --resolution must name one of the folders there: {', '.join(found) or 'none'}")
    return found[wanted]


def _no_resolution(root: Path, resolution: str | None) -> None:
    if resolution is not None:
        raise UserError(f"{root}: there is no choice of resolution '{resolution}' in a data set laid out like this")


def _chosen(root: Path, folders: list[Path], lists: Callable[[Path], dict[str, Path]], split: str | None) -> list[Path]:
    if split is None:
        return folders
    there, by_name = lists(root), {folder.name: folder for folder in folders}
    if split not in there:
        raise UserError(f"{root}: no split '{split}'{nearest(split, there) or ': there are no lists of splits'}")
    path = there[split]
    found = []
    for name in _lines(path):
        if name not in by_name:
            raise UserError(f"{path}: lists '{name}', but no such folder of frames is there{nearest(name, by_name)}")
        found.append(by_name[name])
    return _named(path, found)


def _lines(path: Path) -> list[str]:
    lines = _read(lambda name: Path(name).read_text(encoding="utf-8").splitlines(), path)
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{path}: lists no sequence")
    return names


def _named(path: Path, folders: list[Path]) -> list[Path]:
    twin = _twin(str(folder) for folder in folders)
    if twin is not None:
        raise UserError(f"{path}: lists '{Path(twin).name}' more than once")
    return folders


def _clip(path: Path, line: str, videos: Sequence[Path]) -> Path:
    # A line is a name, which may hold spaces, or has more columns after one that does not.
    for text in (line, line.split()[0]):
        parts = PurePosixPath(text).parts[-2:]
        found = [video for video in videos if video.parts[-len(parts) :] == parts]
        if len(found) > 1:
            words = ", ".join(f"{video.parent.name}/{video.name}" for video in found)
            raise UserError(f"{path}: lists '{text}', which several actions have, so give one of {words}")
        if found:
            return found[0]
    valid = [video.name if len(parts) == 1 else f"{video.parent.name}/{video.name}" for video in videos]
    name = "/".join(parts)
    raise UserError(f"{path}: lists '{text}', but no such folder of frames is there{nearest(name, valid)}")


def _masked(folder: Path, annotations: Path) -> FrameSequence:
    frames, (height, width) = _frames(folder)
    there = {path.stem: path for path in sorted(annotations.glob("*.png")) if not path.name.startswith(".")}
    masks = tuple(there.get(frame.stem) for frame in frames)
    first = masks[0]
    if first is None:
        raise UserError(f"{annotations}: has no annotation {frames[0].stem}.png of the first frame, {frames[0]}")
    strays = [path.name for stem, path in there.items() if stem not in {frame.stem for frame in frames}]
    if strays:
        raise UserError(f"{annotations}: {len(strays)} of its files are of no frame in {folder}, first {strays[0]}")
    for path in masks:
        if path is not None and _size(path) != (height, width):
            h, w = _size(path)
            raise UserError(f"{path}: has {w} x {h} pixels, but its frame has {width} x {height}")
    mask = read_mask(first)
    if not object_ids(mask):
        held = " and ".join(map(str, np.unique(mask)))
        raise UserError(f"{first}: the first mask holds no object, only {held} (0 is background, {VOID} is void)")
    return FrameSequence(folder.name, frames, (height, width), masks)


def _pointed(name: str, folder: Path, annotation: Path, read: Callable[[Path, FrameSize], Points]) -> FrameSequence:
    frames, size = _frames(folder)
    if not annotation.is_file():
        raise UserError(f"{annotation}: no such file, so the frames in {folder} have no keypoints{sibling(annotation)}")
    points = _read(lambda path: read(Path(path), size), annotation)
    if len(points.truth) != len(frames):
        raise UserError(f"{annotation}: has keypoints of {len(points.truth)} frames, but {folder} has {len(frames)}")
    if not points.visible[0].any():
        raise UserError(f"{annotation}: no keypoint is visible in the first frame, so there is nothing to follow")
    return FrameSequence(name, frames, size, points=points)


def _frames(folder: Path) -> tuple[tuple[Path, ...], FrameSize]:
    # Height and width come from the headers: what does not fit is said before anything is computed.
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    if len(found) < 2:
        raise UserError(f"{folder}: at least 2 frames are needed, but {len(found)} found")
    frames = tuple(sorted(found, key=by_numbers))
    twin = _twin(frame.stem for frame in frames)
    if twin is not None:
        words = ", ".join(frame.name for frame in frames if frame.stem == twin)
        raise UserError(f"{folder}: {words} would be the same frame; keep one of them")
    height, width = _size(frames[0])
    for frame in frames[1:]:
        if _size(frame) != (height, width):
            h, w = _size(frame)
            raise UserError(f"{frame}: has {w} x {h} pixels, but {frames[0].name} has {width} x {height}")
    return frames, (height, width)


def _size(path: Path) -> FrameSize:
    def header(name: str) -> FrameSize:
        with opened(name) as image:
            width, height = upright_size(image)
        return height, width

    return _read(header, path)


def _read(function: Callable[[str], T], path: Path) -> T:
    try:
        return guarded(function, str(path), None)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None


def _davis_palette() -> Ids:
    # PASCAL VOC's: an index's bits go to red, green and blue in turn, the lowest to the highest bits of the colours.
    bits = np.arange(256)[:, None] >> np.arange(9) & 1
    palette: Ids = (bits.reshape(256, 3, 3) << np.array([7, 6, 5])[:, None]).sum(1).astype(np.uint8)
    return palette


PALETTE = _davis_palette()
"""The colour of every index in DAVIS's masks, uint8 [256, 3]."""


def read_mask(path: Path) -> Ids:
    """Return a mask, uint8 [h, w]: the indices of a palette PNG, the values of a grey one.

    A coloured PNG gives the indices that ``PALETTE`` has for its colours. Raises UserError for a colour that is none of
    these, for larger values than 255 and for other formats; UnusableData for a broken file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such mask{sibling(path)}")
    kind, pixels = _read(_decoded, path)
    if kind != "PNG":
        raise UserError(f"{path}: a mask should be a PNG, which keeps the numbers of objects, but it is a {kind}")
    if pixels.ndim == 3:
        return _indices(pixels, path)
    if pixels.max(initial=0) > 255:
        raise UserError(f"{path}: holds the number {pixels.max()}, but numbers of objects go up to 254")
    return pixels.astype(np.uint8)


def _decoded(path: str) -> tuple[str | None, np.ndarray[Any, Any]]:
    with opened(path) as image:
        image.load()
        # Alpha says nothing about whose a pixel is.
        plain = image.convert({"RGBA": "RGB", "LA": "L"}[image.mode]) if image.mode in ("RGBA", "LA") else image
        return image.format, np.array(plain)


def _indices(pixels: np.ndarray[Any, Any], path: Path) -> Ids:
    weights = np.array([1 << 16, 1 << 8, 1])
    codes, order = PALETTE @ weights, np.argsort(PALETTE @ weights)
    wanted = pixels @ weights
    found = order[np.searchsorted(codes[order], wanted).clip(max=255)]
    wrong = codes[found] != wanted
    if wrong.any():
        colour = ", ".join(map(str, pixels[wrong][0]))
        raise UserError(
            f"{path}: its colour ({colour}) stands for no object: save the mask as a palette or grey PNG, in which a"
            " pixel's number is its object's"
        )
    indices: Ids = found.astype(np.uint8)
    return indices


def write_mask(path: Path, mask: Ids) -> None:
    """Write a mask, uint8 [h, w], as DAVIS has them: a palette PNG whose indices are the numbers of objects."""
    image = PIL.Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    with replacing_file(path) as aside:
        image.save(aside, format="PNG")
