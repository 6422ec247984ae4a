"""Label propagation over annotated sequences: the first frame's masks, keypoints or parts through all others."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Unpack, cast, get_args

import numpy as np

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError, nearest
from mmssl.files import replacing_file
from modalities.encoder import DECODE_TIMEOUT, Encoder
from modalities.image_read import decode
from modalities.pixels import Frames
from tasks.films import RINGS, sheet, shrunk, spread
from tasks.following import AT_ONCE, Follower, FollowOptions, Settings, checked, fresh
from tasks.panels_media import animate
from tasks.panels_page import write_panel
from tasks.propagate_report import Film, PropagateResult, Row
from tasks.propagate_scores import BOARDS
from tasks.report import Picture
from tasks.sequences import FrameSequence, Kind, find_sequences
from tasks.tracks import MaskTrack, PointTrack, Track
from tasks.writer import say

FILM_RATE = 12.0
"""Frames per second of the films: slow enough to see what goes wrong. Folders of frames tell none of their own."""


def propagate(
    encoder: Encoder,
    data: str | Path,
    kind: str = "masks",
    out: str | Path = "runs/propagate",
    *,
    split: str | None = None,
    resolution: str | None = None,
    scratch: bool = False,
    seed: int = 0,
    films: bool = True,
    **options: Unpack[FollowOptions],
) -> PropagateResult:
    """Follow what is marked in the first frame of every sequence in ``data``, and score it where there is truth.

    ``kind`` is masks (J and F), keypoints (PCK) or parts (mIoU); the layouts are those of ``find_sequences``. Into the
    new folder ``out`` go masks or keypoints of every frame, the scores, a report and, with ``films``, animations and
    contact sheets. ``scratch`` takes random weights, the baseline. The encoder is used on the device where it is.

    Raises UserError for a mistake, before anything is computed, and UnusableData for a broken file.
    """
    began = time.monotonic()
    chosen = _kind(kind)
    settings = checked(encoder, options)
    sequences = find_sequences(Path(data), chosen, split, resolution)
    out = new_folder(Path(out))
    if scratch:
        encoder = fresh(encoder, seed)
    board, rows, shown = BOARDS[chosen](), list[Row](), list[Film]()
    for number, sequence in enumerate(sequences, start=1):
        followed = follow(encoder, settings, sequence, films)
        followed.track.write(out)
        row = Row(sequence.name, len(sequence.frames), followed.seconds, board.add(followed.track))
        rows.append(row)
        if films:
            shown.append(_pictures(out, row, followed))
        say(f"{number} of {len(sequences)}: {row.name}, {row}")
    seconds, weights = time.monotonic() - began, weights_words(scratch, seed)
    result = PropagateResult(chosen, board.overall(seed), board.classes(), rows, settings, weights, out, seconds)
    result.write(board.measure, shown)
    return result


class Followed(NamedTuple):
    """A sequence that was followed to its end."""

    track: Track
    frames: list[Picture]
    """All frames, small; none where nobody wants to see them."""
    seconds: float
    """For reading the frames, their features and their labels."""


def follow(encoder: Encoder, settings: Settings, sequence: FrameSequence, keep: bool) -> Followed:
    """Follow a sequence's first annotation through all its frames; with ``keep``, keep small pictures of them."""
    began, small = time.monotonic(), list[Picture]()

    def kept(frames: Frames) -> Frames:
        small.extend(shrunk(frame) for frame in frames if keep)
        return frames

    first = kept(_frames(sequence.frames[:1]))
    size = first.shape[1], first.shape[2]
    track: Track = MaskTrack(sequence) if sequence.points is None else PointTrack(sequence, size)
    follower = Follower(encoder, settings, size)
    follower.start(first, track.labels(follower.grid))
    for start in range(1, len(sequence.frames), AT_ONCE):
        for labels in follower.follow(kept(_frames(sequence.frames[start : start + AT_ONCE]))):
            track.take(labels, follower.grid)
    return Followed(track, small, time.monotonic() - began)


def _frames(paths: Sequence[Path]) -> Frames:
    # Raises UnusableData, which names the first frame that is broken.
    frames = []
    for path in paths:
        try:
            frames.append(guarded(decode, str(path), DECODE_TIMEOUT))
        except BrokenFile as error:
            raise UnusableData(f"{path}: {error.reason}") from None
    return np.stack([np.asarray(frame) for frame in frames])


def _pictures(out: Path, row: Row, followed: Followed) -> Film:
    """Write the animation and the contact sheet of a sequence, and return what the report shows."""
    track, frames = followed.track, followed.frames
    drawn = [track.drawn(index, frame) for index, frame in enumerate(frames)]
    animation = animate(drawn, FILM_RATE, "WEBP")
    for name in ("films", "sheets"):
        (out / name).mkdir(exist_ok=True)
    with replacing_file(out / "films" / f"{row.name}.webp") as aside:
        aside.write_bytes(animation)
    chosen = spread(len(frames))
    rows: dict[str, Sequence[Picture | None]] = {"found": [drawn[index] for index in chosen]}
    truth = [track.true(index, frames[index]) for index in chosen]
    if sum(picture is not None for picture in truth) > 1:
        rows["truth"] = truth
    note = f"{row}.{RINGS if isinstance(track, PointTrack) else ''}"
    write_panel(out / "sheets" / f"{row.name}.png", sheet(row.name, note, chosen, rows))
    return Film(row.name, drawn[0], animation)


def new_folder(out: Path) -> Path:
    """Make the folder for the results; UserError where something is in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def weights_words(scratch: bool, seed: int) -> str:
    """Return whose weights were used."""
    return f"random weights, seed {seed}" if scratch else "the encoder's weights"


def _kind(word: str) -> Kind:
    if word not in get_args(Kind):
        raise UserError(f"--kind '{word}'{nearest(word, get_args(Kind))}")
    return cast(Kind, word)
