"""Label propagation over annotated sequences: the first frame's masks, keypoints or parts through all others."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Unpack, cast, get_args

import numpy as np

from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import MmsslError, UnusableData, UserError, nearest
from mmssl.files import replacing_file
from modalities.encoder import DECODE_TIMEOUT, Encoder
from modalities.image_read import decode
from modalities.pixels import Frames
from tasks.films import CROSSES, FILM_QUALITY, sheet, shrunk, spread
from tasks.following import AT_ONCE, Follower, FollowOptions, Layer, Settings, checked, fitting, fresh
from tasks.panels_media import animate
from tasks.panels_page import write_panel
from tasks.propagate_report import Film, Moment, PropagateResult
from tasks.propagate_rows import Row
from tasks.propagate_scores import BOARDS, Board, counted
from tasks.report import Picture
from tasks.sequences import FrameSequence, Kind, find_sequences
from tasks.tracks import MaskTrack, PointTrack, Track
from tasks.writer import say

FILM_RATE = 12.0
"""Frames per second of the films: slow enough to see what goes wrong. Folders of frames tell none of their own."""
MOMENTS = 4
"""So many frames of the best and of the worst sequence are in the report, besides its film."""
SPEAK_EVERY = 10.0
"""Seconds between two words on how far it is in a sequence."""


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
    encoder_name: str = "",
    **options: Unpack[FollowOptions],
) -> PropagateResult:
    """Follow what is marked in the first frame of every sequence in ``data``, and score it where there is truth.

    ``kind`` is masks (J and F), keypoints (PCK) or parts (mIoU); the layouts are those of ``find_sequences``. Into the
    new folder ``out`` go masks or keypoints of every frame, the scores, a report and, with ``films``, animations and
    contact sheets; scores are written after every sequence. ``scratch`` takes random weights, the baseline. The encoder
    is used on the device where it is, and called ``encoder_name`` in the results, such as its path.

    Raises UserError for a mistake, before anything is computed, and UnusableData for a broken file and for an encoder
    whose features are NaN.
    """
    began = time.monotonic()
    chosen = _kind(kind)
    settings = checked(encoder, options)
    sequences = find_sequences(Path(data), chosen, split, resolution)
    for sequence in sequences:
        fitting(sequence.size, settings.short_side, (1, 1))  # a mistake should be seen before anything is computed
    out = new_folder(Path(out))
    if scratch:
        encoder = fresh(encoder, seed)
    weights = weights_words(scratch, seed, settings.layer)
    result = PropagateResult(
        chosen, encoder_name, str(data), sequences[0].split, len(sequences), settings, weights, out
    )
    board, shown = BOARDS[chosen](), list[Film]()
    for number, sequence in enumerate(sequences, start=1):
        try:
            followed = follow(encoder, settings, sequence, films)
        except MmsslError as error:
            raise _kept(error, result) from None
        followed.track.write(out)
        row = Row(sequence.name, len(sequence.frames), followed.seconds, board.add(followed.track))
        result = _scored(result, board, row, seed, time.monotonic() - began)
        result.write_scores()
        if films:
            shown = _best_and_worst([*shown, _pictures(out, row, followed)], result.sequences)
        say(f"{number} of {len(sequences)}: {row.name}, {row}")
    result = replace(result, seconds=time.monotonic() - began)
    result.write(board.measure, shown)
    return result


def _scored(result: PropagateResult, board: Board, row: Row, seed: int, seconds: float) -> PropagateResult:
    """Return the result with one sequence more."""
    rows = [*result.sequences, row]
    return replace(
        result, sequences=rows, scores=board.overall(seed), over=board.over(), classes=board.classes(), seconds=seconds
    )


def _best_and_worst(films: Sequence[Film], rows: Sequence[Row]) -> list[Film]:
    """Return the films, with moments only where their sequence has the highest or the lowest score."""
    scored = [row for row in rows if row.scored is not None]
    ends = {row.name for row in (max(scored, key=_value), min(scored, key=_value))} if scored else set()
    return [film if film.name in ends else film._replace(moments=()) for film in films]


def _value(row: Row) -> float:
    return row.value


def _kept(error: MmsslError, result: PropagateResult) -> MmsslError:
    """Return the error, with what is left of the sequences before it."""
    if not result.sequences:
        return error
    done = counted(len(result.sequences), "sequence")
    return type(error)(f"{error}; the scores and files of the {done} before it are in {result.out}")


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
    spoken, count = began, len(sequence.frames)

    def kept(frames: Frames) -> Frames:
        small.extend(shrunk(frame) for frame in frames if keep)
        return frames

    track: Track = MaskTrack(sequence) if sequence.points is None else PointTrack(sequence)
    follower = Follower(encoder, settings, sequence.size)
    follower.start(kept(_frames(sequence.frames[:1])), track.labels(follower.grid))
    for start in range(1, count, AT_ONCE):
        frames = kept(_frames(sequence.frames[start : start + AT_ONCE]))
        for index, labels in enumerate(follower.follow(frames), start=start + 1):
            track.take(labels, follower.grid)
            if time.monotonic() - spoken > SPEAK_EVERY:
                spoken = time.monotonic()
                say(f"{sequence.name}: {index} of {count} frames")
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
    animation = animate(drawn, FILM_RATE, "WEBP", FILM_QUALITY)
    for name in ("films", "sheets"):
        (out / name).mkdir(exist_ok=True)
    with replacing_file(out / "films" / f"{row.name}.webp") as aside:
        aside.write_bytes(animation)
    chosen = spread(len(frames))
    rows: dict[str, Sequence[Picture | None]] = {"found": [drawn[index] for index in chosen]}
    truth = [track.true(index, frames[index]) for index in chosen]
    if sum(picture is not None for picture in truth) > 1:
        rows["truth"] = truth
    note = f"{row}.{CROSSES if isinstance(track, PointTrack) else ''}"
    write_panel(out / "sheets" / f"{row.name}.png", sheet(row.name, note, chosen, rows))
    # The first frame, which was given, says nothing.
    told = spread(len(frames), 1 + MOMENTS)[1:]
    moments = [Moment(index, drawn[index], track.true(index, frames[index])) for index in told]
    return Film(row.name, drawn[0], animation, moments)


def new_folder(out: Path) -> Path:
    """Make the folder for the results; UserError where something is in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def weights_words(scratch: bool, seed: int, layer: Layer | None = None) -> str:
    """Return whose weights were used."""
    if layer == "patches":
        return "no weights: the pixels of the patches"
    return f"random weights, seed {seed}" if scratch else "the encoder's weights"


def _kind(word: str) -> Kind:
    if word not in get_args(Kind):
        raise UserError(f"--kind '{word}'{nearest(word, get_args(Kind))}")
    return cast(Kind, word)
