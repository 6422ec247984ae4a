"""Tiny videos, frame folders, animations and sounds for tests, whose every frame says which one it is.

``numbered`` makes frames that carry their index in blocks along the top, which survive lossy coding and scaling;
``numbers`` reads them back. ``from media import ...`` works in every test (pytest puts this folder on the path).
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import soundfile

BITS = 8
MILLISECOND = Fraction(1, 1000)
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""The a, b, c, d of a track's display matrix that turns it clockwise."""


def numbered(count, height=48, width=64, first=0):
    """Return frames uint8 [count, height, width, 3]: a smooth moving colour wave, and the index in blocks on top."""
    rows, columns = np.mgrid[:height, :width]
    index = np.arange(first, first + count).reshape(-1, 1, 1, 1)
    wave = np.sin(rows[..., None] / 9 + columns[..., None] / 13 * np.array([1, 2, 0.5]) + index / 7)
    frames = (128 + 90 * wave).round().astype(np.uint8)
    bit = columns[0] * BITS // width
    frames[:, : max(2, height // 6)] = 255 * (index[..., 0] >> bit & 1)[..., None].astype(np.uint8)
    return frames


def numbers(frames):
    """Return the indices that frames [n, h, w, 3] carry."""
    frames = np.asarray(frames)
    _, height, width, _ = frames.shape
    top = frames[:, max(1, height // 12), :, :].mean(-1)
    middles = [round((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return [int(sum(1 << bit for bit, x in enumerate(middles) if row[x] > 127)) for row in top]


def write_video(path, frames, fps=25, codec=None, faststart=False, times=None, sound=False, **options):
    """Encode frames [n, h, w, 3]; the suffix chooses container and codec, ``options`` go to the codec (g="12", bf="2").

    ``times`` (in 1/1000 s, one per frame) makes the rate variable. ``sound`` adds a track as long as the pictures.
    """
    path = Path(path)
    movflags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec or CODECS[path.suffix.lower()], rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast"} | options if "264" in stream.codec.name else options
        if times is not None:
            stream.time_base = stream.codec_context.time_base = MILLISECOND
        voice = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            _tone(container, voice, len(frames) / fps)
    return path


def rotate(path, degrees):
    """Make an mp4 say that it is to be turned clockwise by 90, 180 or 270 degrees, as telephones do."""
    data = bytearray(Path(path).read_bytes())
    # The last 44 bytes of a version 0 track header (ISO 14496-12, 8.3.2): nine numbers of its matrix, width, height.
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (int(value * 65536).to_bytes(4, "big", signed=True) for value in MATRICES[degrees])
    data[at : at + 8], data[at + 12 : at + 20] = a + b, c + d
    Path(path).write_bytes(data)
    return path


def cut(path, fraction, to=None):
    """Leave the first ``fraction`` of a file's bytes, in place or as another file."""
    path = Path(path)
    data = path.read_bytes()
    target = path if to is None else Path(to)
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def write_frames(folder, frames, suffix=".png", start=0):
    """Write frames as numbered pictures without leading zeros (2 comes before 10)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(frames, start):
        PIL.Image.fromarray(pixels).save(folder / f"frame{i}{suffix}")
    return folder


def write_animation(path, frames, milliseconds=40):
    """Write frames as an animated GIF or WebP by suffix; ``milliseconds`` is the duration of each, or one per frame."""
    first, *rest = [PIL.Image.fromarray(pixels) for pixels in frames]
    lossless = {"lossless": True} if Path(path).suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, **lossless)
    return Path(path)


def tone(seconds, rate=16000, hertz=440.0, channels=1):
    """Return a sine, float32 [samples, channels], louder from channel to channel."""
    wave = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return (0.5 * wave[:, None] * (1 + np.arange(channels)) / channels).astype(np.float32)


def write_sound(path, samples, rate=16000, subtype=None):
    """Write float samples [n] or [n, channels] as wav, flac, ogg or mp3 by suffix; subtypes are soundfile's."""
    soundfile.write(str(path), samples, rate, subtype=subtype)
    return Path(path)


def _tone(container, stream, seconds):
    rate, block = 8000, 1024
    for start in range(0, round(seconds * rate), block):
        frame = av.AudioFrame.from_ndarray(tone(block / rate, rate).T.copy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
