"""Frames of video containers (MP4, Matroska, WebM, AVI, MPEG and what else FFmpeg reads), by PyAV or by decord.

A frame is known by its time stamp: the packets of a file are listed once, undecoded, and decoding begins at the key
frame before a wanted frame. Where that fails (a stream that refreshes without key frames, times that cannot be sought)
it begins at the file's first key frame, which is by definition what every frame should look like.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mmssl.data.fragment import Span
from mmssl.data.guard import BrokenFile
from modalities.image_read import MAX_PIXELS
from modalities.pixels import Frames, FrameSize
from modalities.video_read import Reader, checked, piece

Moments = np.ndarray[Any, np.dtype[np.float64]]

MOV = "mov,mp4,m4a,3gp,3g2,mj2"
"""The containers with a table of where in the file each frame lies, by which a missing end shows."""
TIMED = frozenset({"matroska,webm", "flv"})
"""Containers that tell their length in seconds in front, by which a missing end shows."""
AVI = "avi"
"""It tells its count of frames in front, but no frame's time of display, and FFmpeg's guess is wrong for B-frames."""
EBML, SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
"""The tags of a Matroska file's header and of all the rest of it (RFC 9559, section 5.1)."""
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""The names of a Windows Media file's header and of the object in it that holds the file's size (ASF, section 3.2)."""
ASF_HEADER = 65536
"""Bytes in front of a Windows Media file among which that object is looked for."""
FORMATS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc,m4v,gif,dv,mxf,nut,ivf,rm,wav,mp3,flac,aac"
"""What is opened, by content: files that hold their frames, or sounds, themselves. Lists of other files (HLS, DASH,
concat, VobSub) and descriptions of streams (SDP) would have FFmpeg open what they name, whatever that is."""
LISTS = (b"#", b"<", b"ffconcat", b"v=")
"""How such lists begin."""
BRIEF = 0.1
"""Seconds that may be missing at the end beside two frames: a last one may have no duration, and times are rounded."""


FALLBACK_FPS = 25.0
"""Frames per second of a video that gives none."""


class Packets(NamedTuple):
    """What listing its packets tells of a file, or of a piece and what that depends on; in the order of display."""

    numbers: list[int]
    """Each frame's time stamp, or its place where time stamps are missing."""
    keys: list[tuple[int, int]]
    """Number of each key frame, and the time stamp that leads to it; none where time stamps are missing."""
    moments: Moments
    """Seconds from the file's beginning at which each frame is shown."""
    end: float | None
    """Seconds at which the last packet ends; None where the listing stopped before the file's end."""


class File(NamedTuple):
    """An opened container and the track that is read."""

    path: str
    container: InputContainer
    track: VideoStream


def other_size(first: FrameSize, at: int, other: FrameSize, place: int) -> BrokenFile:
    """Return what to raise where the frame at ``place`` is not of the size of the one at ``at``."""
    shapes = f"{other[0]} x {other[1]} in frame {place}, {first[0]} x {first[1]} in frame {at}"
    return BrokenFile(f"its frames differ in size: {shapes}")


class _Trouble(Exception):
    """A wanted frame did not come out, or came out damaged."""


@contextmanager
def open_stream(span: Span, decoder: Literal["pyav", "decord"]) -> Iterator[Reader]:
    """Open a container, or the piece of it that ``span`` names; raises BrokenFile as ``open_video`` does."""
    with _opened(span.file) as file:
        try:
            # decord counts from the file's beginning.
            packets = _listed(file, span if decoder == "pyav" else Span(span.file))
        except av.FFmpegError as error:
            raise BrokenFile(f"damaged: {_words(error)}") from None
        _refuse_truncated(file, packets)
        part = piece(packets.moments, span)
        fps = _fps(file.track, packets.moments[part])
        yield PyAV(file, packets, part, fps) if decoder == "pyav" else Decord(file, packets, part, fps)


class PyAV:
    """Decoded by FFmpeg on one thread: exact, and damage is noticed where FFmpeg's decoder notices it."""

    def __init__(self, file: File, packets: Packets, part: slice, fps: float) -> None:
        self._file, self._packets, self._part = file, packets, part
        self._scaler = VideoReformatter()
        self._size: FrameSize | None = None
        self._first: tuple[FrameSize, int] | None = None
        self.frames, self.fps = part.stop - part.start, fps

    @property
    def size(self) -> FrameSize:
        """Height and width of the first frame, which is decoded for it."""
        if self._size is None:
            _, height, width, _ = self.read([0]).shape
            self._size = height, width
        return self._size

    def read(self, indices: Sequence[int], size: FrameSize | None = None) -> Frames:
        """Return frames as ``Reader.read`` says."""
        own = self._packets.numbers[self._part]
        wanted = [own[index] for index in checked(indices, self.frames)]
        found = self._sought(set(wanted), size) or self._decoded_from_the_first(set(wanted), size)
        return np.stack([found[number] for number in wanted])

    def _sought(self, wanted: set[int], size: FrameSize | None) -> dict[int, Frames]:
        """Return the wanted frames, each decoded from the key frame before it; nothing where that fails."""
        keys, found = self._packets.keys, dict[int, Frames]()
        groups: dict[int, set[int]] = {}
        for number in wanted:
            groups.setdefault(bisect_right(keys, number, key=_number) - 1, set()).add(number)
        try:
            for group, members in sorted(groups.items()):
                if group < 0:
                    return {}
                key, stamp = keys[group]
                self._file.container.seek(stamp, stream=self._file.track)
                found |= self._kept(_decoded(self._file, key), members, size)
        except (_Trouble, av.FFmpegError):
            return {}
        return found

    def _decoded_from_the_first(self, wanted: set[int], size: FrameSize | None) -> dict[int, Frames]:
        with _opened(self._file.path) as fresh:
            first = self._packets.keys[0][0] if self._packets.keys else None
            try:
                return self._kept(_decoded(fresh, first), wanted, size)
            except (_Trouble, av.FFmpegError) as error:
                raise BrokenFile(f"damaged: {_words(error)}") from None

    def _kept(
        self, decoded: Iterator[tuple[int, VideoFrame]], wanted: set[int], size: FrameSize | None
    ) -> dict[int, Frames]:
        found = dict[int, Frames]()
        for number, frame in decoded:
            if frame.is_corrupt:
                break
            if number in wanted:
                self._refuse_other_size(frame, self._packets.numbers.index(number))
                found[number] = self._pixels(frame, size)
                if len(found) == len(wanted):
                    return found
        missing = self._packets.numbers.index(min(wanted - found.keys()))
        raise _Trouble(f"frame {missing} of {len(self._packets.numbers)} cannot be decoded")

    def _refuse_other_size(self, frame: VideoFrame, index: int) -> None:
        shape = frame.height, frame.width
        self._first = self._first or (shape, index)
        if shape != self._first[0]:
            raise other_size(*self._first, shape, index)

    def _pixels(self, frame: VideoFrame, size: FrameSize | None) -> Frames:
        turns = round(frame.rotation / 90)
        height, width = (frame.height, frame.width) if size is None else size[:: -1 if turns % 2 else 1]
        # One scaler for all frames: making its tables takes longer than using them.
        scaled = self._scaler.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        return np.rot90(scaled.to_ndarray(), turns)


class Decord:
    """Decoded by decord on one thread: other frames than the wanted ones where groups of pictures are open and in AVI
    files with B-frames, and silent about damage.
    """

    def __init__(self, file: File, packets: Packets, part: slice, fps: float) -> None:
        self._path, self._listed, self._first = file.path, len(packets.numbers), part.start
        self.frames, self.fps = part.stop - part.start, fps

    @property
    def size(self) -> FrameSize:
        """Height and width of the first frame, which is decoded for it."""
        _, height, width, _ = self.read([0]).shape
        return height, width

    def read(self, indices: Sequence[int], size: FrameSize | None = None) -> Frames:
        """Return frames as ``Reader.read`` says."""
        import decord  # large, and to be loaded after torch

        wanted = [self._first + index for index in checked(indices, self.frames)]
        height, width = (-1, -1) if size is None else size
        # What FFmpeg may open cannot be said to decord's own copy of it, which might take a file for another kind.
        with Path(self._path).open("rb") as stream:
            if stream.read(64).lstrip().startswith(LISTS):
                raise BrokenFile("not a video")
        reader = decord.VideoReader(self._path, width=width, height=height, num_threads=1)
        if len(reader) != self._listed:
            raise BrokenFile(f"decord finds {len(reader)} of {self._listed} frames")
        if reader.next().shape[-1] == 3:
            frames: Frames = reader.get_batch(wanted).asnumpy()
            return frames
        # FFmpeg pads the rows of narrow frames, by how much depends on the processor. Where a padded row has a whole
        # number of widths, decord takes the padding for more channels, and cannot put such frames into a batch.
        found = [reader[index].asnumpy() for index in wanted]
        return np.stack(
            [each.reshape(len(each), -1)[:, : 3 * each.shape[1]].reshape(*each.shape[:2], 3) for each in found]
        )


@contextmanager
def _opened(path: str) -> Iterator[File]:
    try:
        container = av.open(path, options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except (FileNotFoundError, PermissionError):
        raise
    except av.FFmpegError:
        raise BrokenFile(_why_not(path)) from None
    with container:
        tracks = [track for track in container.streams.video if not track.disposition & Disposition.attached_pic]
        if not tracks:
            raise BrokenFile("no video track")
        track = tracks[0]
        if track.codec_context is None:
            raise BrokenFile("no decoder for its kind of video")
        if track.codec_context.width * track.codec_context.height > MAX_PIXELS:
            raise BrokenFile(f"absurdly large: more than {MAX_PIXELS // 10**6} million pixels")
        track.codec_context.thread_count = 1
        yield File(path, container, track)


def _why_not(path: str) -> str:
    with Path(path).open("rb") as stream:
        begins = stream.read(8)
    return "truncated: the table of its frames is missing" if begins[4:] == b"ftyp" else "not a video"


def _listed(file: File, span: Span) -> Packets:
    """List the file's packets; where the container leads to a piece, only what that depends on."""
    if span.start and file.container.format.name != AVI:
        file.container.seek(int(span.start * av.time_base) + _origin(file.container))
        packets = _listing(file, span.end)
        if packets.keys and packets.moments[0] <= span.start:
            return packets
        with _opened(span.file) as fresh:
            return _listing(fresh, span.end)
    return _listing(file, span.end)


def _listing(file: File, until: float | None) -> Packets:
    container, track, seconds = file.container, file.track, float(file.track.time_base or 1)
    origin, name = _origin(container) / av.time_base, container.format.name
    stamps: list[int | None] = []
    keys: list[tuple[int, int]] = []
    end: float | None = 0.0
    for packet in container.demux():
        mine = packet.stream_index == track.index
        at = packet.dts if packet.pts is None else packet.pts
        if at is not None and end is not None and (mine or name in TIMED):
            end = max(end, float((at + (packet.duration or 0)) * packet.time_base) - origin)
        if not (mine and packet.size):
            continue
        if until is not None and packet.dts is not None and packet.dts * seconds - origin >= until:
            end = None
            break
        if not packet.is_discard:
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    return _in_order(stamps, sorted(keys), file, end)


def _in_order(stamps: list[int | None], keys: list[tuple[int, int]], file: File, end: float | None) -> Packets:
    known = [stamp for stamp in stamps if stamp is not None]
    if file.container.format.name == AVI or not keys or len(set(known)) < len(stamps):
        moments = np.arange(len(stamps)) / float(file.track.average_rate or FALLBACK_FPS)
        return Packets(list(range(len(stamps))), [], moments, end)
    # What is shown before the first key frame depends on what is not there.
    numbers = sorted(stamp for stamp in known if stamp >= keys[0][0])
    moments = np.array(numbers) * float(file.track.time_base or 1) - _origin(file.container) / av.time_base
    return Packets(numbers, keys, moments, end)


def _refuse_truncated(file: File, packets: Packets) -> None:
    """Compare what is there with what the container says there should be; raises BrokenFile for less."""
    container, track, name = file.container, file.track, file.container.format.name
    if name == MOV:
        size = Path(file.path).stat().st_size
        complete = sum(entry.pos + entry.size <= size for entry in track.index_entries)
        if complete < len(track.index_entries):
            raise BrokenFile(f"truncated: {complete} of {len(track.index_entries)} frames")
    elif packets.end is not None:
        slack = 2 / float(track.average_rate or FALLBACK_FPS)
        if name == AVI and packets.end + slack < track.frames * float(track.time_base or 0):
            raise BrokenFile(f"truncated: {len(packets.numbers)} of {track.frames} frames")
        declared = (container.duration or 0) / av.time_base
        if name in TIMED and packets.end + slack + BRIEF < declared:
            raise BrokenFile(f"truncated: {packets.end:.2f} of {declared:.2f} s")
    # What is too little for those to tell may still be the end that other frames depend on.
    present, announced = Path(file.path).stat().st_size, _announced_bytes(file.path)
    if present < announced:
        raise BrokenFile(f"truncated: {present} of {announced} bytes")


def _announced_bytes(path: str) -> int:
    """Return the size that an AVI, Matroska or ASF file gives itself; 0 where it gives none, as live streams."""
    with Path(path).open("rb") as stream:
        size, tag = 0, stream.read(4)
        while tag == b"RIFF":  # large files are several
            size = int.from_bytes(stream.read(4), "little") + stream.tell()
            stream.seek(size + size % 2)
            tag = stream.read(4)
        if tag == EBML:
            stream.seek(_ebml_length(stream) or 0, os.SEEK_CUR)
            length = _ebml_length(stream) if stream.read(4) == SEGMENT else None
            size = 0 if length is None else stream.tell() + length
        elif tag == ASF[:4]:
            stream.seek(0)
            size = _asf_bytes(stream.read(ASF_HEADER))
    return size


def _asf_bytes(header: bytes) -> int:
    at = header.find(ASF_PROPERTIES)
    properties = header[at + 40 : at + 92]
    # The last bit of the flags says that the file was written as it went, and its size is not known.
    known = header.startswith(ASF) and at > 0 and len(properties) == 52 and not properties[48] & 1
    return int.from_bytes(properties[:8], "little") if known else 0


def _ebml_length(stream: BinaryIO) -> int | None:
    """Read a number of 1 to 8 bytes, as many as the first has leading zeros and one more; all ones mean unknown."""
    first = stream.read(1)
    width = 9 - first[0].bit_length() if first else 9
    if width > 8:
        return None
    value = int.from_bytes(first + stream.read(width - 1)) - (1 << 7 * width)
    return None if value == (1 << 7 * width) - 1 else value


def _fps(track: VideoStream, moments: Moments) -> float:
    said = float(track.average_rate or 0)
    counted = (len(moments) - 1) / float(moments[-1] - moments[0]) if len(moments) > 1 else said
    # Times in milliseconds make of 24 frames per second 24.003; where the header is plainly wrong, count.
    return said if said and abs(counted - said) < 0.01 * said else counted or FALLBACK_FPS


def _origin(container: InputContainer) -> int:
    return container.start_time or 0


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _number(key: tuple[int, int]) -> int:
    return key[0]


def _decoded(file: File, key: int | None) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from a key frame on, or all that comes where it is None; nothing where the container is past the key."""
    context, met, count = file.track.codec_context, False, 0
    for packet in file.container.demux(file.track):
        met = met or key is None or packet.pts == key
        # Not decoded: what comes before the key frame, or is shown before it, which may depend on what came before.
        if not met or (key is not None and packet.pts is not None and packet.pts < key):
            continue
        for frame in context.decode(packet):
            number = count if key is None else frame.pts
            if number is not None:
                yield number, frame
            count += 1
