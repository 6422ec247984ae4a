"""Which frames of a video a clip is made of: pure arithmetic on frame counts and rates.

All functions return indices int64, ascending. A clip's spacing is ``stride`` source frames, or, with a ``rate`` in
frames per second, ``fps / rate`` source frames: then sources of 24 and of 60 frames per second give the same moments.
"""

import math
from typing import Any, TypeAlias

import numpy as np

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


class TooShort(ValueError):
    """A video has fewer frames than a clip spans."""


def spacing(fps: float, stride: float, rate: float | None) -> float:
    """Return the source frames from one frame of a clip to the next."""
    return stride if rate is None else fps / rate


def span(fps: float, count: int, stride: float, rate: float | None) -> int:
    """Return the source frames that a clip of ``count`` frames reaches over, its first and last included."""
    return math.floor((count - 1) * spacing(fps, stride, rate) + 0.5) + 1


def dense(
    frames: int,
    fps: float,
    count: int,
    stride: float,
    rate: float | None,
    rng: np.random.Generator,
    hold: bool = False,
) -> Indices:
    """Return a clip [count] from a random start, every start that fits being as likely.

    Where the video is too short, raises TooShort, or with ``hold`` begins at the first frame and repeats the last one.
    The generator gives one number whatever the video's length.
    """
    share = rng.random()
    room = _room(frames, span(fps, count, stride, rate), hold)
    return _clip(frames, min(int(share * (room + 1)), room), count, spacing(fps, stride, rate))


def dense_test(
    frames: int, fps: float, count: int, stride: float, rate: float | None, clips: int, hold: bool = False
) -> Indices:
    """Return clips [clips, count] whose starts are spread evenly from the first possible to the last; one: the middle.

    Too short a video is treated as ``dense`` does.
    """
    room = _room(frames, span(fps, count, stride, rate), hold)
    places = np.linspace(0, room, clips) if clips > 1 else [room / 2]
    return np.stack([_clip(frames, int(place), count, spacing(fps, stride, rate)) for place in places])


def pair(frames: int, least: int, most: int, rng: np.random.Generator | None = None) -> Indices:
    """Return two frames [2] from ``least`` to ``most`` apart, the earlier first.

    A gap that a short video does not have is never drawn. Without generator it is the middle one, and the later frame
    lies at two thirds of the video, the same one for every gap that allows it. Raises TooShort where there is no gap.
    """
    if frames <= least:
        raise TooShort(f"too short: {frames} of the {least + 1} frames that the closest pair spans (signal.look.gap)")
    most = min(most, frames - 1)
    gap = (least + most) // 2 if rng is None else int(rng.integers(least, most + 1))
    first = max(0, 2 * (frames - 1) // 3 - gap) if rng is None else int(rng.integers(frames - gap))
    return np.array([first, first + gap], dtype=np.int64)


def uniform(frames: int, count: int) -> Indices:
    """Return the centres of ``count`` equal segments of the whole video [count]; repeats where frames are fewer."""
    centres: Indices = (2 * np.arange(count, dtype=np.int64) + 1) * frames // (2 * count)
    return centres


def tsn(frames: int, count: int, rng: np.random.Generator | None = None) -> Indices:
    """Return one frame of each of ``count`` equal segments [count]: a random one, or the middle one without generator.

    (Temporal segment networks, arXiv:1608.00859, section 3.1.) Repeats where frames are fewer.
    """
    if rng is None:
        return uniform(frames, count)
    places = (np.arange(count) + rng.random(count)) * frames / count
    chosen: Indices = np.minimum(places.astype(np.int64), frames - 1)
    return chosen


def _room(frames: int, needed: int, hold: bool) -> int:
    """Return the last possible start."""
    if frames < needed and not hold:
        raise TooShort(f"too short: {frames} of the {needed} frames that a clip spans")
    return max(frames - needed, 0)


def _clip(frames: int, start: int, count: int, step: float) -> Indices:
    # Half up, not half to even: then a step of 2.5 goes 0, 3, 5, 8 and not 0, 2, 5, 8, 10, 12.
    places = np.floor(np.arange(count) * step + 0.5).astype(np.int64)
    clip: Indices = np.minimum(start + places, frames - 1)
    return clip
