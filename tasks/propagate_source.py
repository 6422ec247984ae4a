"""Label propagation through a person's own video: what a mask marks in its first frame, found in all others.

The film is read in pieces, by a child process that may die of it, and results are written frame by frame.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar, Unpack

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mmssl.data import fragment
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from mmssl.errors import UnusableData, UserError, sibling
from modalities.encoder import Encoder
from modalities.pixels import Frames, FrameSize
from modalities.video_read import open_video
from tasks.films import overlay, sheet, shrunk, spread
from tasks.first_mask import read_first_mask
from tasks.following import Follower, FollowOptions, checked, fresh
from tasks.panels_media import animate
from tasks.panels_page import write_panel
from tasks.propagate import new_folder, weights_words
from tasks.propagate_report import Film, SourceResult
from tasks.report import Picture
from tasks.segments import Ids
from tasks.sequences import write_mask
from tasks.tracks import area_labels, mask_of, object_numbers
from tasks.writer import say

T = TypeVar("T")

SHORT_SIDE = 480
"""Pixels of the shorter side as the encoder sees it, where nobody says: what DAVIS is evaluated at."""
PIECE = 64 * 2**20
"""Bytes of frames that are in memory at once."""
TIMEOUT = 300.0
"""Seconds that reading a piece may take."""
FILM_FRAMES = 96
"""The film in the report has at most so many frames; of a longer video it has every so many-th."""
FILM_SIDE = 640
"""Longer side of that film in pixels, at most."""
SPEAK_EVERY = 10.0
"""Seconds between two words on how far it is."""
X264 = {"crf": "20", "preset": "veryfast"}
SLOWEST = Fraction(1, 1000)
"""Frames per second."""
BT709 = 1
"""What H.264 calls these colours, primaries and curves; players guess where it is not said."""


def propagate_source(
    encoder: Encoder,
    source: str | Path,
    first_mask: str | Path,
    out: str | Path = "runs/propagate",
    *,
    scratch: bool = False,
    seed: int = 0,
    **options: Unpack[FollowOptions],
) -> SourceResult:
    """Follow what ``first_mask`` marks in the first frame of a video through all of it.

    ``source`` is a video file, an animation or a folder of frames, of which "#t=START,END" takes a piece. Into the new
    folder ``out`` go a mask of every frame and ``overlay.mp4``, then a contact sheet and a report. What is stopped
    half-way leaves both up to there. Raises UserError for a mistake, UnusableData for a broken file.
    """
    settings, path = checked(encoder, options), str(source)
    film = _film(path)
    mask, notes = read_first_mask(Path(first_mask), film.size)
    if settings.short_side is None:
        settings = replace(settings, short_side=min(SHORT_SIDE, *film.size))
    out = new_folder(Path(out))
    for note in notes:
        say(note)
    follower = Follower(fresh(encoder, seed) if scratch else encoder, settings, film.size)
    began, seen = time.monotonic(), _Seen(film, object_numbers(mask))
    (out / "masks").mkdir()
    with recording(out / "overlay.mp4", film.fps, film.size) as record:
        for index, (frame, found) in enumerate(followed(path, film, follower, mask)):
            write_mask(out / "masks" / f"{index:05d}.png", found)
            picture = overlay(frame, found)
            record(picture)
            seen.add(index, picture, found)
    seconds = time.monotonic() - began
    weights = weights_words(scratch, seed)
    result = SourceResult(
        path, str(first_mask), film.frames, film.size, film.fps, seen.areas, settings, weights, out, seconds, notes
    )
    write_panel(out / "sheet.png", sheet(Path(path).name, result.subtitle(), seen.chosen, {"": seen.sheet}))
    result.write(Film(Path(path).name, seen.film[0], animate(seen.film, film.fps / seen.stride, "WEBP")))
    return result


class VideoFacts(NamedTuple):
    """What is known of a video before it is read."""

    frames: int
    fps: float
    size: FrameSize


def followed(path: str, film: VideoFacts, follower: Follower, mask: Ids) -> Iterator[tuple[Picture, Ids]]:
    """Yield every frame of a video, uint8 [h, w, 3], with its mask; the first one's is the given one."""
    ids = object_numbers(mask)
    length = max(1, PIECE // (3 * film.size[0] * film.size[1]))
    for start in range(0, film.frames, length):
        frames = _read(_Piece(start, min(start + length, film.frames)), path)
        if start == 0:
            follower.start(frames[:1], area_labels(mask, ids, follower.grid))
            yield frames[0], mask
        new = frames if start else frames[1:]
        for frame, labels in zip(new, follower.follow(new), strict=True):
            yield frame, mask_of(labels, ids, follower.grid, film.size)


@contextmanager
def recording(path: Path, fps: float, size: FrameSize) -> Iterator[Callable[[Picture], None]]:
    """Open an H.264 film and yield what adds a frame, uint8 [h, w, 3], to it.

    However that ends, the film is closed and renamed to ``path`` with the frames that it has; without any there is
    none. Odd sizes lose their last row or column: the format has one colour for 2 x 2 pixels.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rate, count = max(SLOWEST, Fraction(fps).limit_denominator(1001)), 0
    height, width = (side - side % 2 for side in size)

    def add(picture: Picture) -> None:
        nonlocal count
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        frame.pts, frame.time_base = count, 1 / rate
        container.mux(track.encode(frame))
        count += 1

    try:
        with av.open(str(aside), "w", format="mp4", options={"movflags": "faststart"}) as container:
            track = container.add_stream("libx264", rate=rate, options=X264)
            track.width, track.height, track.pix_fmt = width, height, "yuv420p"
            codec = track.codec_context
            codec.colorspace, codec.color_primaries, codec.color_trc = BT709, BT709, BT709
            try:
                yield add
            finally:
                container.mux(track.encode())
    finally:
        if count:
            aside.replace(path)
        aside.unlink(missing_ok=True)


@dataclass
class _Seen:
    """What the sheet, the report and the result need of a film that is too long to be kept."""

    video: VideoFacts
    ids: Ids
    areas: dict[str, list[float]] = field(default_factory=dict)
    sheet: list[Picture] = field(default_factory=list)
    film: list[Picture] = field(default_factory=list)
    spoken: float = field(default_factory=time.monotonic)

    @property
    def chosen(self) -> list[int]:
        return spread(self.video.frames)

    @property
    def stride(self) -> int:
        return -(-self.video.frames // FILM_FRAMES)

    def add(self, index: int, picture: Picture, found: Ids) -> None:
        shares = np.bincount(found.ravel(), minlength=256) / found.size
        for number in self.ids[1:].tolist():
            self.areas.setdefault(str(number), []).append(float(shares[number]))
        if index in self.chosen:
            self.sheet.append(shrunk(picture))
        if index % self.stride == 0:
            self.film.append(shrunk(picture, FILM_SIDE))
        if time.monotonic() - self.spoken > SPEAK_EVERY:
            self.spoken = time.monotonic()
            say(f"{index + 1} of {self.video.frames} frames")


@dataclass(frozen=True)
class _Piece:
    """Reads the frames from one to before another."""

    first: int
    last: int

    def __call__(self, path: str) -> Frames:
        with open_video(path) as video:
            return video.read(range(self.first, self.last))


def _facts(path: str) -> VideoFacts:
    with open_video(path) as video:
        return VideoFacts(video.frames, video.fps, video.size)


def _film(path: str) -> VideoFacts:
    file = Path(fragment.file_of(path))
    if not file.exists():
        raise UserError(f"{file}: no such video{sibling(file)}")
    film = _read(_facts, path)
    if film.frames < 2:
        raise UserError(f"{path}: has one frame only, so there is nothing to follow")
    return film


def _read(function: Callable[[str], T], path: str) -> T:
    try:
        # The child may have been forked where another folder was the working one.
        return isolated(function, str(Path(path).absolute()), TIMEOUT)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None
