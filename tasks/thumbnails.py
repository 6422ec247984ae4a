"""Files as small pictures, by their modality alone: what people are shown of what was found."""

from collections.abc import Callable
from functools import partial

import numpy as np

from mmssl.data.isolate import isolated
from tasks.panels_page import fit
from tasks.report import Picture

INK, PAPER = (13, 115, 119), (255, 255, 255)
"""Colours of a sound's picture."""


def isolated_thumbnail(path: str, modality: str, side: int, timeout: float) -> Picture:
    """Return ``thumbnail``, made in a process of its own in at most so many seconds; raises BrokenFile."""
    return isolated(partial(thumbnail, modality=modality, side=side), path, timeout)


def thumbnail(path: str, modality: str, side: int) -> Picture:
    """Return a file as a picture, uint8 [h, w, 3], of which the longer side has at most ``side`` pixels.

    A picture is shown as it is; of a video the middle frame, of a sound its waveform, of a text its beginning. To be
    called as decoders are (``mmssl.data.guard``): raises what they raise.
    """
    picture = _PICTURES[modality](path, side)
    return picture if max(picture.shape[:2]) <= side else fit(picture, side, side)


def _still(path: str, side: int) -> Picture:
    from modalities.image_read import decode

    picture = decode(path)
    picture.thumbnail((2 * side, 2 * side))  # as an image, which takes less memory than an array
    return np.asarray(picture)


def _frame(path: str, side: int) -> Picture:
    from modalities.video_read import open_video

    with open_video(path) as video:
        frame: Picture = video.read([video.frames // 2])[0]
        return frame


def _wave(path: str, side: int) -> Picture:
    """Return a sound over time: in every column from its lowest to its highest sample, around the middle."""
    from modalities.audio_read import opened

    with opened(path) as source:
        total = source.samples
        wide, done = min(side, total), 0
        high, low = np.zeros(wide), np.zeros(wide)
        for block in source.blocks(0, total):
            # Sample i is in column i * wide // total.
            first, last = done * wide // total, (done + len(block) - 1) * wide // total
            columns = np.arange(first, last + 1)
            starts = np.maximum(-(-columns * total // wide) - done, 0)
            high[columns] = np.maximum(high[columns], np.maximum.reduceat(block, starts))
            low[columns] = np.minimum(low[columns], np.minimum.reduceat(block, starts))
            done += len(block)
    tall = side // 2
    scale = tall / 2 / max(1e-6, high.max(), -low.min())
    row = tall / 2 - np.arange(tall)[:, None]
    # A line where it is silent.
    inked = (row <= np.maximum(high * scale, 1)) & (row >= low * scale)
    return np.where(inked[..., None], np.array(INK, np.uint8), np.array(PAPER, np.uint8))


def _page(path: str, side: int) -> Picture:
    from modalities.text_read import read
    from tasks.panels_retrieval import written

    return written(read(path).text)


_PICTURES: dict[str, Callable[[str, int], Picture]] = {
    "image": _still,
    "video": _frame,
    "audio": _wave,
    "text": _page,
}
