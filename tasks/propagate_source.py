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
from typing import Any, NamedTuple, TypeVar, Unpack

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from rich.console import Console

from mmssl.data import fragment
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from mmssl.engine.loop import stop_signals
from mmssl.errors import Stopped, UnusableData, UserError, sibling
from mmssl.files import replacing_file
from modalities.encoder import Encoder
from modalities.pixels import Frames, FrameSize
from modalities.video_read import ANIMATIONS, PICTURES, VIDEO_FILES, open_video
from tasks.films import FILM_QUALITY, overlay, palette, sheet, shrunk, spread
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
PIECE, MOST_IN_PIECE = 64 * 2**20, 16
"""Bytes of frames that are in memory at once, and how many frames these are at most."""
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
UNEVEN = 1.5
"""The rate is said to vary where a frame is shown so many times as long as another."""
BT709 = 1
"""What H.264 calls these colours, primaries and curves; players guess where it is not said."""


def propagate_source(
    encoder: Encoder,
    source: str | Path,
    first_mask: str | Path,
    out: str | Path = "runs/propagate",
    *,
    encoder_name: str = "",
    scratch: bool = False,
    seed: int = 0,
    **options: Unpack[FollowOptions],
) -> SourceResult:
    """Follow what ``first_mask`` marks in the first frame of a video through all of it.

    ``source`` is a video file, an animation or a folder of frames, of which "#t=START,END" takes a piece. Into the new
    folder ``out`` go a mask of every frame and ``overlay.mp4``, then a contact sheet and a report, which calls the
    encoder ``encoder_name``. What is stopped half-way leaves masks and film up to there. Raises UserError for a
    mistake, UnusableData for a broken file, Stopped where SIGINT or SIGTERM arrived.
    """
    settings, path = checked(encoder, options), str(source)
    film = _film(path)
    _refuse_frame(Path(first_mask), Path(path))
    mask, notes, colours = read_first_mask(Path(first_mask), film.size)
    if settings.short_side is None:
        settings = replace(settings, short_side=min(SHORT_SIDE, *film.size))
    out = new_folder(Path(out))
    notes = [*notes, *_timing(path, film)]
    for note in notes:
        say(note)
    follower = Follower(fresh(encoder, seed) if scratch else encoder, settings, film.size)
    began, seen, table = time.monotonic(), _Seen(film, object_numbers(mask)), palette(colours)
    (out / "masks").mkdir()
    with stop_signals() as stop, recording(out / "overlay.mp4", film.fps, film.size) as record:
        for index, (frame, found) in enumerate(followed(path, film, follower, mask)):
            write_mask(out / "masks" / f"{index:05d}.png", found)
            picture = overlay(frame, found, table)
            record(picture)
            seen.add(index, picture, found)
            if stop[0]:
                raise Stopped(f"stopped after {index + 1} of {film.frames} frames, which are in {out}", stop[0])
    seconds = time.monotonic() - began
    result = SourceResult(
        path, str(first_mask), encoder_name, film.frames, film.size, film.fps, seen.areas, table[seen.ids[1:]],
        settings, weights_words(scratch, seed, settings.layer), out, seconds, notes,
    )  # fmt: skip
    write_panel(out / "sheet.png", sheet(Path(path).name, result.subtitle(), seen.chosen, {"": seen.sheet}))
    animation = animate(seen.film, film.fps / seen.stride, "WEBP", FILM_QUALITY)
    result.write(Film(f"1 of {seen.stride} frames" if seen.stride > 1 else "all frames", seen.film[0], animation))
    return result


def write_first_frame(source: str | Path, file: str | Path) -> "FirstFrame":
    """Write the first frame of a video as a PNG, to draw a mask on it.

    Raises UserError for a name that is taken or no PNG's, UnusableData for a broken video.
    """
    path, file = str(source), Path(file)
    _film(path)
    if file.suffix.lower() != ".png":
        raise UserError(f"{file}: the first frame is written as a PNG, whose name ends in .png")
    if file.exists():
        raise UserError(f"{file} is there already; give another name")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder{sibling(file.parent)}")
    frame = Image.fromarray(_read(_Piece(0, 1), path)[0])
    with replacing_file(file) as aside:
        frame.save(aside, "PNG")
    return FirstFrame(file)


@dataclass(frozen=True)
class FirstFrame:
    """The first frame of a video, written to be drawn on."""

    file: Path

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {"task": "propagate", "first_frame": str(self.file)}

    def render(self, console: Console) -> None:
        """Say what to do with it."""
        console.print(f"{self.file}: draw on it what is to be followed, black elsewhere, and give it as --first-mask",
                      markup=False, soft_wrap=True)  # fmt: skip


class VideoFacts(NamedTuple):
    """What is known of a video before it is read."""

    frames: int
    fps: float
    size: FrameSize


def followed(path: str, film: VideoFacts, follower: Follower, mask: Ids) -> Iterator[tuple[Picture, Ids]]:
    """Yield every frame of a video, uint8 [h, w, 3], with its mask; the first one's is the given one.

    Raises UnusableData for a broken frame, after all that are before it.
    """
    ids = object_numbers(mask)
    for start, frames in _pieces(path, film):
        if start == 0:
            follower.start(frames[:1], area_labels(mask, ids, follower.grid))
            yield frames[0], mask
        new = frames if start else frames[1:]
        for frame, labels in zip(new, follower.follow(new), strict=True):
            yield frame, mask_of(labels, ids, follower.grid, film.size)


def _pieces(path: str, film: VideoFacts) -> Iterator[tuple[int, Frames]]:
    # Frames as many as there may be in memory, and the first one's place; single ones where something is broken.
    length = min(MOST_IN_PIECE, max(1, PIECE // (3 * film.size[0] * film.size[1])))
    for start in range(0, film.frames, length):
        stop = min(start + length, film.frames)
        try:
            yield start, _isolated(_Piece(start, stop), path)
        except BrokenFile:
            for index in range(start, stop):
                try:
                    frame = _isolated(_Piece(index, index + 1), path)
                except BrokenFile as error:
                    done = f"the {index} frames before are done" if index else "it is the first frame"
                    raise UnusableData(f"{path}: {error.reason} (frame {index} from 0; {done})") from None
                yield index, frame


@contextmanager
def recording(path: Path, fps: float, size: FrameSize) -> Iterator[Callable[[Picture], None]]:
    """Open an H.264 film and yield what adds a frame, uint8 [h, w, 3], to it.

    However that ends, the film is closed and renamed to ``path`` with the frames that it has. Without any, or where
    closing fails, as on a full disk, there is none. Odd sizes lose their last row or column: the format has one colour
    for 2 x 2 pixels.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rate, count, whole = max(SLOWEST, Fraction(fps).limit_denominator(1001)), 0, False
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
                container.close()
                whole = count > 0
    finally:
        if whole:
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
    if file.is_dir():
        suffixes = [entry.suffix.lower() for entry in file.iterdir()]
        videos = sum(suffix in VIDEO_FILES.suffixes for suffix in suffixes)
        if videos and not PICTURES & {*suffixes}:
            raise UserError(f"{file}: holds {videos} video{'' if videos == 1 else 's'}; give one")
    film = _read(_facts, path)
    if film.frames < 2:
        raise UserError(f"{path}: has one frame only, so there is nothing to follow")
    if min(film.size) < 2:
        raise UserError(f"{path}: has frames of {film.size[1]} x {film.size[0]} pixels, which are too small for a film")
    return film


def _refuse_frame(mask: Path, source: Path) -> None:
    folder = Path(fragment.file_of(str(source)))
    if folder.is_dir() and mask.is_file() and mask.resolve().parent == folder.resolve():
        raise UserError(f"{mask}: the mask is among the frames, as one of them; move it elsewhere")


def _timing(path: str, film: VideoFacts) -> list[str]:
    # The film is written at an even rate, whatever its source has.
    try:
        uneven = _isolated(_uneven, path)
    except BrokenFile:  # nobody's loss: this is for a note only
        uneven = False
    return [
        f"the frames of {path} follow each other unevenly; overlay.mp4 plays {film.fps:.4g} in every second"
    ] * uneven


def _uneven(path: str) -> bool:
    file = Path(fragment.file_of(path))
    if file.is_dir() or file.suffix.lower() in ANIMATIONS:
        return False
    with av.open(str(file)) as container:
        packets = container.demux(container.streams.video[0])
        steps = np.diff(sorted(packet.pts for packet in packets if packet.pts is not None))
    return len(steps) > 0 and bool(steps.max() > UNEVEN * steps.min() + 1)


def _read(function: Callable[[str], T], path: str) -> T:
    try:
        return _isolated(function, path)
    except BrokenFile as error:
        raise UnusableData(f"{path}: {error.reason}") from None


def _isolated(function: Callable[[str], T], path: str) -> T:
    # The child may have been forked where another folder was the working one.
    return isolated(function, str(Path(path).absolute()), TIMEOUT)
