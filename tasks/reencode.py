"""One video made small and cheap to read at random: H.264 with a key frame at least every ``GOP`` frames.

Measured (1000 frames at 456 x 256, 16-frame clips at random places): a key frame every 250, 48, 24 or 12 frames takes
97, 65, 68 or 78 ms per clip in 1.8, 2.0, 2.1 or 2.3 MB; ``tune=fastdecode`` (no CABAC, no deblocking) takes a further
third to half off for a sixth more bytes, and makes 12 no faster than 24. ``preset=veryfast`` decodes as cheaply, is no
larger at this quality, and encodes faster than the slower presets.
"""

import errno
import shutil
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.format import VideoFormat
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL.Image import Resampling

from mmssl.data.guard import BrokenFile, guarded
from mmssl.files import replacing_file, replacing_folder
from modalities.image_read import decode, opened, pixels
from modalities.video_read import ANIMATIONS, FOLDER_FPS, UNSET_DURATION, open_video
from modalities.video_stream import AVI, other_size

GOP = 24
X264 = {"crf": "20", "preset": "veryfast", "tune": "fastdecode", "g": str(GOP)}
JPEG = (".jpg", ".jpeg")
JPEG_QUALITY = 90
STALLED = 60
"""Seconds after which a decoder that returns nothing is taken to hang."""
MILLISECOND = Fraction(1, 1000)
SILENCE = 8000
"""Samples per second of the silence that holds the place of what was before the first frame."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

How: TypeAlias = Literal["encoded", "copied"]


class DiskFull(NamedTuple):
    """The disk takes no more, which is not the file's fault; a value, as errors stay in their child process."""

    errno: int


class _Film(NamedTuple):
    """Frames in the order of display, and what their times mean."""

    frames: Iterator[av.VideoFrame]
    tick: Fraction
    """Seconds in a unit of time."""
    rate: Fraction
    """Frames per second, on average."""
    pixel: Fraction = Fraction(1)
    """A pixel's width over its height."""
    delay: int = 0
    """Units of time from the file's beginning to the first frame, where the sound begins earlier."""


def reencode(path: str, target: Path, short_side: int, threads: int, frame_suffixes: frozenset[str]) -> How | DiskFull:
    """Write a small copy of the video or folder of frames ``path`` as ``target``, whole or not at all.

    Its shorter side becomes ``short_side`` pixels (never more than it has), its frames and their times stay, its sound
    is left out. What is small and cheap to read already is copied as it is. Raises BrokenFile and whatever decoders
    raise. Call it in a process of its own: a decoder that hangs ends it.
    """
    try:
        if Path(path).is_dir():
            return _shrink_frames(Path(path), target, short_side, frame_suffixes)
        with replacing_file(target) as aside:
            if Path(path).suffix.lower() in ANIMATIONS:
                _encode(_Film(_animation(path), MILLISECOND, Fraction(FOLDER_FPS)), aside, short_side, threads)
                return "encoded"
            return _shrink_video(path, aside, short_side, threads)
    except OSError as error:
        if error.errno in FULL:
            return DiskFull(error.errno)
        raise
    finally:
        _expect_within(0)


def _shrink_video(path: str, out: Path, short_side: int, threads: int) -> How:
    _expect_within(STALLED)
    with open_video(path) as reader:  # which refuses what training would refuse
        count, fps = reader.frames, Fraction(reader.fps)
    with av.open(path, metadata_errors="replace") as source:
        track = next(t for t in source.streams.video if not t.disposition & Disposition.attached_pic)
        track.thread_type, track.codec_context.thread_count = "AUTO", threads
        frames = _frames(source, track, count)
        first = next(frames)
        if path.lower().endswith(".mp4") and _is_cheap(track, first, short_side):
            for _ in frames:  # whether they can all be decoded
                pass
            shutil.copyfile(path, out)
            return "copied"
        rate = track.average_rate or fps.limit_denominator(1001)
        tick = 1 / rate if source.format.name == AVI else track.time_base or MILLISECOND
        begin = Fraction(source.start_time or 0, av.time_base)
        delay = 0 if first.pts is None else max(0, round(first.pts - begin / tick))
        film = _Film(chain([first], frames), tick, rate, track.sample_aspect_ratio or Fraction(1), delay)
        _encode(film, out, short_side, threads)
        return "encoded"


def _is_cheap(track: VideoStream, first: av.VideoFrame, short_side: int) -> bool:
    keys = [i for i, entry in enumerate(track.index_entries) if entry.is_keyframe]
    gaps = np.diff([*keys, len(track.index_entries)])
    return (
        track.codec_context.name == "h264"
        and first.format.name == "yuv420p"
        and min(first.width, first.height) <= short_side
        and first.rotation % 360 == 0
        and (track.sample_aspect_ratio or 1) == 1
        and 0 < max(gaps, default=0) <= GOP
    )


def _frames(source: InputContainer, track: VideoStream, count: int) -> Iterator[av.VideoFrame]:
    decoded, size = 0, None
    try:
        for packet in source.demux(track):
            _expect_within(STALLED)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise BrokenFile(f"damaged: frame {decoded} cannot be decoded")
                size = size or (frame.height, frame.width)
                if size != (frame.height, frame.width):
                    raise other_size(size, 0, (frame.height, frame.width), decoded)
                if source.format.name == AVI:
                    frame.pts = None  # a guess, and a wrong one where frames are stored out of order
                decoded += 1
                yield frame
    except av.error.InvalidDataError:
        raise BrokenFile(f"damaged: frame {decoded} cannot be decoded") from None
    if decoded < count:
        raise BrokenFile(f"damaged: {decoded} of {count} frames can be decoded")


def _expect_within(seconds: int) -> None:
    # The kernel ends this process unless the next call comes in time: no handler of Python's runs while a decoder
    # hangs. Only in a child that does nothing else; where this runs in a thread of the program, it would end that.
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)


def _animation(path: str) -> Iterator[av.VideoFrame]:
    # FFmpeg reads no animated WebP, and a GIF's frames build on each other; Pillow does both.
    time = 0
    with opened(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            _expect_within(STALLED)
            image.seek(i)
            frame = av.VideoFrame.from_ndarray(np.asarray(pixels(image)), format="rgb24")
            frame.pts = time
            yield frame
            time += round(image.info.get("duration") or 1000 * UNSET_DURATION)


def _encode(film: _Film, out: Path, short_side: int, threads: int) -> None:
    first = next(film.frames)
    width, height = _size(first, film.pixel, short_side)
    lying = (height, width) if first.rotation % 180 else (width, height)
    scaler, turning = VideoReformatter(), _turning(first.rotation, *lying, film.tick)
    step = max(1, round(1 / (film.rate * film.tick)))
    last = film.delay - step
    with av.open(str(out), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=film.rate, options=X264)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        codec = video.codec_context
        codec.time_base, codec.thread_count = film.tick, threads
        codec.colorspace, codec.color_primaries, codec.color_trc = (
            first.colorspace,
            first.color_primaries,
            first.color_trc,
        )
        if film.delay:
            _add_silence(container)
        for frame in chain([first], film.frames):
            # Frames of old containers have no time, those of broken ones go back in it.
            since = last + step if frame.pts is None else frame.pts - (first.pts or 0) + film.delay
            last = max(last + 1, since)
            small = scaler.reformat(
                frame, *lying, "yuv420p", dst_color_range=ColorRange.MPEG, interpolation=Interpolation.BICUBIC
            )
            if turning is not None:
                turning.vpush(small)
                small = turning.vpull()
            small.pts, small.time_base, small.pict_type = last, film.tick, PictureType.NONE
            container.mux(video.encode(small))
        container.mux(video.encode())


def _add_silence(container: OutputContainer) -> None:
    # Files begin, for readers, where their first track does, so only another track can say that frames come later.
    track = container.add_stream("alac", rate=SILENCE, layout="mono")
    moment = av.AudioFrame.from_ndarray(np.zeros((1, SILENCE // 100), np.int16), format="s16p", layout="mono")
    moment.sample_rate, moment.pts = SILENCE, 0
    container.mux(track.encode(moment))
    container.mux(track.encode())


def _size(frame: av.VideoFrame, pixel: Fraction, short_side: int) -> tuple[int, int]:
    # Width and height as shown: pixels become square, and what lies on its side is turned upright.
    width, height = frame.width * pixel, Fraction(frame.height)
    if frame.rotation % 180:
        width, height = height, width
    scale = min(Fraction(1), short_side / min(width, height))
    return _even(width * scale), _even(height * scale)


def _even(side: Fraction) -> int:
    return max(2, 2 * round(side / 2))  # 4:2:0 has one colour per 2 x 2 pixels


def _turning(rotation: int, width: int, height: int, tick: Fraction) -> Graph | None:
    # What puts frames of this size upright; None where they are. Scaling is not left to it: it changes BT.709 colours.
    turns = {90: ["cclock"], 180: ["clock", "clock"], 270: ["clock"]}.get(rotation % 360)
    if turns is None:
        return None
    graph = Graph()
    lying = graph.add_buffer(width=width, height=height, format=VideoFormat("yuv420p"), time_base=tick)
    graph.link_nodes(lying, *(graph.add("transpose", turn) for turn in turns), graph.add("buffersink")).configure()
    return graph


def _shrink_frames(folder: Path, target: Path, short_side: int, suffixes: frozenset[str]) -> How:
    pictures = [picture for picture in sorted(folder.iterdir()) if picture.suffix.lower() in suffixes]
    if not pictures:
        raise BrokenFile("holds no frame")
    how: How = "copied"
    with replacing_folder(target) as aside:
        for picture in pictures:
            out = aside / f"{picture.stem}.jpg"
            if out.exists():
                raise BrokenFile(f"two frames are called {picture.stem}")
            if not _shrink_picture(picture, out, short_side):
                how = "encoded"
    return how


def _shrink_picture(picture: Path, out: Path, short_side: int) -> bool:
    # Returns whether the picture could stay as it is; it is decoded in any case, to know whether it is whole.
    _expect_within(STALLED)
    try:
        upright = guarded(decode, str(picture), None)
    except BrokenFile as error:
        raise BrokenFile(f"{picture.name}: {error.reason}") from None
    scale = min(1.0, short_side / min(upright.size))
    if scale == 1 and picture.suffix.lower() in JPEG:
        shutil.copyfile(picture, out)
        return True
    size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    upright.resize(size, Resampling.BICUBIC).save(out, quality=JPEG_QUALITY)
    return False
