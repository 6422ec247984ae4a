"""Reading videos: files of every container, folders of frames, GIF and animated WebP, all behind one ``Reader``.

A frame's index is its place in the order of display, and only what the wanted frames depend on is decoded. Everything
that is wrong with a file raises BrokenFile, or what ``guarded`` makes one of. Containers are ``video_stream``'s.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from mmssl.data import fragment
from mmssl.data.fragment import Span
from mmssl.data.guard import BrokenFile
from modalities import image_read
from modalities.pixels import Frames, FrameSize

Decoder: TypeAlias = Literal["auto", "pyav", "decord"]

DEFAULT_DECODER: Literal["pyav", "decord"] = "pyav"
"""What "auto" means for containers: PyAV returns to the bit what decoding the whole file would, wherever it begins, and
notices damage; decord does neither and takes far more memory (``benchmarks/video_pipeline.py``)."""
FOLDER_FPS = 25.0
"""Frames per second of a folder of frames where nothing else is known."""
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""What counts as a frame in a folder."""


class VideoFiles(NamedTuple):
    """Which files are videos (``mmssl.contracts.Media``)."""

    name: str = "video"
    suffixes: frozenset[str] = frozenset(
        {
            ".mp4",
            ".mkv",
            ".webm",
            ".avi",
            ".mov",
            ".m4v",
            ".mpg",
            ".mpeg",
            ".ts",
            ".wmv",
            ".flv",
            ".ogv",
            ".3gp",
            ".gif",
        }
    )
    frame_suffixes: frozenset[str] = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
    timed: bool = True


VIDEO_FILES = VideoFiles()
ANIMATIONS = frozenset({".gif", ".webp"})
UNSET_DURATION = 0.1
"""Seconds that a frame of an animation stands which gives no duration, as browsers have it."""


class Reader(Protocol):
    """An opened video, or a piece of one; good until the ``with`` that opened it ends."""

    @property
    def frames(self) -> int:
        """How many frames there are to read, at least 1."""

    @property
    def fps(self) -> float:
        """Frames per second, on average."""

    @property
    def size(self) -> FrameSize:
        """Height and width of a frame, upright; asking may cost one frame's decoding."""

    def read(self, indices: Sequence[int], size: FrameSize | None = None) -> Frames:
        """Return the frames at ``indices``, in any order and repeated at will, upright, scaled to ``size`` if given.

        Raises BrokenFile for damage on the way to them.
        """


@contextmanager
def open_video(path: str, folder_fps: float = FOLDER_FPS, decoder: Decoder = "auto") -> Iterator[Reader]:
    """Open a video file, an animation or a folder of frames, or the piece of it that ``path`` names (#t=START,END).

    Raises BrokenFile for what is no video, is truncated or has no frame in the piece; what the file system says is left
    to ``guarded``.
    """
    span = fragment.split(path)
    file = Path(span.file)
    if file.is_dir():
        yield _Folder(file, span, folder_fps)
    elif file.stat().st_size == 0:
        raise BrokenFile("empty file")
    elif file.suffix.lower() in ANIMATIONS:
        with image_read.opened(span.file) as image:
            yield _Animation(image, file, span)
    else:
        # FFmpeg is loaded where a video is, not by everybody who imports the modalities.
        from modalities.video_stream import open_stream

        with open_stream(span, DEFAULT_DECODER if decoder == "auto" else decoder) as stream:
            yield stream


def piece(times: Sequence[float] | np.ndarray[Any, Any], span: Span) -> slice:
    """Return which frames, shown from ``times`` on (in seconds, ascending), begin within the span.

    Raises BrokenFile where none does.
    """
    # Paths give times in microseconds, rounded.
    first = int(np.searchsorted(times, span.start - 1e-6))
    last = len(times) if span.end is None else int(np.searchsorted(times, span.end - 1e-6))
    if last <= first:
        end = "its end" if span.end is None else f"{span.end:g} s"
        raise BrokenFile(f"no frame from {span.start:g} s to {end}" if span.start or span.end else "no frames")
    return slice(first, last)


def checked(indices: Sequence[int], frames: int) -> list[int]:
    """Return the indices as integers; raises IndexError where one is not of a frame."""
    wanted = [int(index) for index in indices]
    if wanted and not 0 <= min(wanted) <= max(wanted) < frames:
        raise IndexError(f"frames 0 to {frames - 1} can be read, but {min(wanted)} to {max(wanted)} were asked for")
    return wanted


class _Folder:
    """Pictures in the order of the numbers in their names, 2 before 10."""

    def __init__(self, folder: Path, span: Span, fps: float) -> None:
        found = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
        if not any(letter.isdigit() for path in found for letter in path.name):  # a lone cover is no film
            raise BrokenFile("a folder without frames")
        self._paths = sorted(found, key=by_numbers)[piece(np.arange(len(found)) / fps, span)]
        self.frames, self.fps = len(self._paths), fps

    @property
    def size(self) -> FrameSize:
        with _naming(self._paths[0]), image_read.opened(str(self._paths[0])) as image:
            width, height = image_read.upright_size(image)
        return height, width

    def read(self, indices: Sequence[int], size: FrameSize | None = None) -> Frames:
        wanted = checked(indices, self.frames)
        own = self.size
        found = {index: self._frame(self._paths[index], own, size) for index in set(wanted)}
        return np.stack([found[index] for index in wanted])

    def _frame(self, path: Path, own: FrameSize, size: FrameSize | None) -> Frames:
        with _naming(path):
            picture = image_read.decode(str(path))
        if picture.size != own[::-1]:
            shapes = f"{picture.height} x {picture.width} in {path.name}, {own[0]} x {own[1]} in {self._paths[0].name}"
            raise BrokenFile(f"its frames differ in size: {shapes}")
        return _scaled(picture, size)


class _Animation:
    """GIF and WebP: each frame laid over those before it and over white."""

    def __init__(self, image: PIL.Image.Image, file: Path, span: Span) -> None:
        if image.format == "GIF":
            with file.open("rb") as stream:
                if not _has_trailer(stream):
                    raise BrokenFile("truncated: its trailer is missing")
        self._image, seconds = image, []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()  # WebP's durations are only known then
            seconds.append(image.info.get("duration", 0) / 1000 or UNSET_DURATION)
        begins = np.cumsum([0.0, *seconds])
        part = piece(begins[:-1], span)
        self._first, self.frames = part.start, part.stop - part.start
        self.fps = self.frames / float(begins[part.stop] - begins[part.start])

    @property
    def size(self) -> FrameSize:
        return self._image.height, self._image.width

    def read(self, indices: Sequence[int], size: FrameSize | None = None) -> Frames:
        wanted = checked(indices, self.frames)
        found = {index: self._frame(index, size) for index in sorted(set(wanted))}
        return np.stack([found[index] for index in wanted])

    def _frame(self, index: int, size: FrameSize | None) -> Frames:
        self._image.seek(self._first + index)
        self._image.load()
        return _scaled(image_read.to_rgb(self._image), size)


@contextmanager
def _naming(picture: Path) -> Iterator[None]:
    """Name the frame of a folder that turns out to be broken."""
    try:
        yield
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        raise BrokenFile(f"frame {picture.name} cannot be decoded: {error}") from error
    except BrokenFile as error:
        raise BrokenFile(f"frame {picture.name}: {error.reason}") from None


def _has_trailer(gif: BinaryIO) -> bool:
    """Return whether a GIF's blocks lead to its trailer, behind which other bytes may follow (GIF89a, appendix A)."""
    _skip_colours(gif, gif.read(13)[10])
    while block := gif.read(1):
        if block == b";":
            return True
        if block == b"!":
            gif.seek(1, os.SEEK_CUR)
            _skip_parts(gif)
        elif block == b",":
            _skip_colours(gif, int.from_bytes(gif.read(9)[8:]))
            gif.seek(1, os.SEEK_CUR)
            _skip_parts(gif)
    return False


def _skip_colours(gif: BinaryIO, flags: int) -> None:
    gif.seek(3 * (2 << (flags & 7)) if flags & 128 else 0, os.SEEK_CUR)


def _skip_parts(gif: BinaryIO) -> None:
    while length := int.from_bytes(gif.read(1)):
        gif.seek(length, os.SEEK_CUR)


def by_numbers(path: Path) -> list[tuple[int, str]]:
    """Return what sorts files by the numbers in their names, 2 before 10."""
    # Digits and the rest take turns, so that like is compared with like.
    return [(int(part), part) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _scaled(picture: PIL.Image.Image, size: FrameSize | None) -> Frames:
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Resampling.BICUBIC)
    return np.asarray(picture)
