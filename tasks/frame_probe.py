"""Linear probe of frames: which phone is spoken, say, from the vector of every 10 ms by itself.

Protocol ``logistic`` of ``tasks.linear_probe``, on frames of all training files. Frames of one file are alike, so it is
whole files that are held out to choose the regularisation, and whole files that the intervals draw.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from tasks.features import Features, Samples, check_apart, check_readable, commonest_share
from tasks.frames import FrameExtractor, FrameOptions, read_frames
from tasks.labels import rows_of_files
from tasks.linear_probe import GRID, MAX_ITER, TOLERANCE, LogisticProbe, ProbeResult, choose, fit_chosen
from tasks.metrics import Score, rank_scores, score_table, target_rank
from tasks.segment_labels import SegmentLabels

MAX_FRAMES = 50_000
"""Training frames that are fitted, where nobody says how many: of 256 values, with 41 classes, in a minute or two."""
CHOOSE_ON = 10_000
"""Training frames, of those, on which the regularisation is chosen; the whole grid on all of them takes an hour."""
FEWEST = 3
NAMED = 8
"""So many classes are named in a sentence."""
PATIENCE = 2
"""Strengths in a row that may be worse than the best before nothing weaker is tried; the weakest take the longest."""


@dataclass(frozen=True)
class FrameProbeResult:
    """Scores of single frames, and what they were measured on."""

    probe: ProbeResult
    """Its samples are frames."""
    column: str
    """What the labels are called: phone."""
    seconds_per_frame: float
    available: int
    """Labelled training frames, of which ``probe.samples.train`` were drawn and fitted."""
    chosen_on: int
    """Training frames of those on which the regularisation was chosen."""
    train_files: int
    test_files: int
    unlabelled: tuple[int, int]
    """Training and test frames in no segment, which are left out."""
    left_out: dict[str, int]
    """Test frames of each label that no training frame has, which are left out."""
    not_drawn: list[str]
    """Labels of training frames of which none was drawn: test frames of them cannot be found."""

    @property
    def scores(self) -> dict[str, Score]:
        """Scores of the test frames, with intervals over the test files."""
        return self.probe.scores

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions, train and test are numbers of frames."""
        facts = self.probe.as_dict()
        frames = {
            "label_column": self.column,
            "seconds_per_frame": self.seconds_per_frame,
            "train_available": self.available,
            "train_files": self.train_files,
            "test_files": self.test_files,
            "train_unlabelled": self.unlabelled[0],
            "test_unlabelled": self.unlabelled[1],
            "test_without_training": self.left_out,
            "classes_not_drawn": self.not_drawn,
        }
        protocol = {**facts.pop("protocol"), "hold_out_by": "file", "chosen_on": self.chosen_on}
        return {**facts, "protocol": {**protocol, "patience": PATIENCE}, "frames": frames}

    def render(self, console: Console) -> None:
        """Print one table and what a reader must know."""
        rows = {f"C = {self.probe.choice.c:g}": self.scores}
        console.print(score_table("Linear probe of frames, protocol logistic", rows, "test files"))
        for line in [self._samples(), self._protocol(), *self.probe.notes]:
            console.print(line, markup=False, highlight=False)

    def _samples(self) -> str:
        samples = self.probe.samples
        which = f"{samples.train}" if samples.train == self.available else f"{samples.train} of {self.available}"
        text = (
            f"{which} training frames of {self.train_files} files and {'' if self.left_out else 'all '}{samples.test} "
            f"test frames of {self.test_files}, {1000 * self.seconds_per_frame:g} ms each; {len(samples.classes)} "
            f"classes of {self.column}; always guessing the commonest one scores {100 * samples.commonest:.1f}%; "
            f"{self.unlabelled[0]} training and {self.unlabelled[1]} test frames in no segment left out"
        )
        return f"{text}; {len(samples.skipped)} broken files left out" if samples.skipped else text

    def _protocol(self) -> str:
        return (
            f"protocol logistic: L-BFGS on standardised features, C chosen from {GRID[0]:g} ... {GRID[-1]:g} on "
            f"{self.probe.choice.hold_out} frames of held-out training files (a fifth of those of {self.chosen_on} "
            f"frames), at most {MAX_ITER} iterations to a gradient of {TOLERANCE:g}, seed {self.probe.seed}"
        )


def frame_probe(
    extractor: FrameExtractor,
    train: Listing,
    test: Listing,
    labels: SegmentLabels,
    max_frames: int = MAX_FRAMES,
    seed: int = 0,
    **options: Unpack[FrameOptions],
) -> FrameProbeResult:
    """Fit a linear classifier on the labelled frames of the training files and score it on all those of the test files.

    Of more than ``max_frames`` training frames so many are drawn by lot. ``seed`` is that of this draw, of the hold-out
    and of the intervals. Test frames of a label that no training frame has are left out, and counted. Raises
    UserError for a file without a segment and where every test label is such, before anything is decoded, and for too
    few training frames; UnusableData as ``read_frames``.
    """
    if max_frames < FEWEST:
        raise UserError(f"--max-frames {max_frames}: a linear probe needs at least {FEWEST} training frames")
    classes = labels.classes(train)
    strange = [label for label in labels.classes(test) if label not in classes]
    if strange == labels.classes(test):
        raise _nothing_known(labels, test)
    check_apart(train, test)
    draw, known = _Draw(max_frames, seed), _Reading(train, labels, classes)
    for index, frames, targets in known.labelled(extractor, **options):
        draw.add(index, frames, targets, known.groups[index])
    fitted, some = draw.take(max_frames), draw.take(min(CHOOSE_ON, max_frames))
    if len(fitted.targets) < FEWEST or len(fitted.targets.unique()) < 2:
        raise UserError(f"{train.root}: a linear probe needs at least {FEWEST} labelled training frames and 2 classes")
    asked = _Reading(test, labels, [*classes, *strange], known.found)
    choice = choose(some.vectors, some.targets, seed, some.groups, PATIENCE)
    probe = fit_chosen(fitted.vectors, fitted.targets, choice)
    ranks, truth, groups = _ranked(probe, asked, extractor, len(classes), **options)
    guess = commonest_share(fitted.targets.tolist(), truth.tolist())
    samples = Samples(len(fitted.targets), len(truth), classes, guess, known.skipped + asked.skipped)
    scores = rank_scores(ranks, truth, len(classes), groups, seed)
    not_drawn = [classes[c] for c in sorted(known.found - {*fitted.targets.tolist()})]
    notes = _notes(asked.left_out, not_drawn, len(classes))
    if not probe.converged:
        notes.append(f"the solver had not converged after {probe.iterations} iterations")
    return FrameProbeResult(
        ProbeResult(scores, choice, seed, probe.converged, probe.iterations, samples, notes),
        labels.column, extractor.seconds_per_step, draw.total, len(some.targets), len(known.read), len(asked.read),
        (known.unlabelled, asked.unlabelled), dict(asked.left_out), not_drawn,
    )  # fmt: skip


def _nothing_known(labels: SegmentLabels, test: Listing) -> UserError:
    return UserError(f"{labels.source}: no training frame has a label that a frame of {test.root} has")


def _notes(left_out: Mapping[str, int], not_drawn: Sequence[str], classes: int) -> list[str]:
    """Return what must be said of classes that cannot be found because nothing of them was fitted."""
    notes = []
    if left_out:
        kinds = "1 class" if len(left_out) == 1 else f"{len(left_out)} classes"
        count = sum(left_out.values())
        notes.append(
            f"{count} test frame{'' if count == 1 else 's'} of {kinds} without training frames left out: "
            f"{_first(sorted(left_out))}"
        )
    if not_drawn:
        notes.append(
            f"{len(not_drawn)} of {classes} classes have training frames of which none was drawn, so that their test "
            f"frames are misses (raise --max-frames): {_first(not_drawn)}"
        )
    return notes


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@dataclass
class _Reading:
    """Reads the labelled frames of a listing once, and keeps count of what it meets."""

    listing: Listing
    labels: SegmentLabels
    classes: list[str]
    fitted: set[int] | None = None
    """Classes that can be found; frames of others are left out. None: all can."""
    read: set[int] = field(default_factory=set)
    """Numbers of the files that were read."""
    found: set[int] = field(default_factory=set)
    """Classes of the frames that were given."""
    unlabelled: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Frames of each class that cannot be found."""
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def groups(self) -> list[int]:
        """Return the number of the file that each path of the listing is, or is a piece of."""
        rows = rows_of_files(self.listing.paths)
        number = {row: group for group, some in enumerate(rows) for row in some}
        return [number[row] for row in range(len(self.listing))]

    def labelled(
        self, extractor: FrameExtractor, **options: Unpack[FrameOptions]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index of every path, its frames in segments [n, D] and their classes int64 [n]."""
        kept = []
        for index, frames in read_frames(extractor, self.listing, **options):
            if isinstance(frames, str):
                self.skipped.append((self.listing.name(index), frames))
                continue
            path, seconds = self.listing.paths[index], extractor.seconds_per_step
            targets = torch.from_numpy(self.labels.of_frames(path, len(frames), seconds, self.classes))
            inside = targets >= 0
            self.read.add(self.groups[index])
            self.unlabelled += int((~inside).sum())
            if self.fitted is not None:
                strange = inside & ~torch.isin(targets, torch.tensor([*self.fitted]))
                self.left_out.update(self.classes[c] for c in targets[strange].tolist())
                inside &= ~strange
            self.found.update(targets[inside].tolist())
            kept.append(index)
            yield index, frames[inside], targets[inside]
        check_readable(Features(torch.empty(0), kept, self.skipped), self.listing)
        if self.left_out and not self.found:
            raise _nothing_known(self.labels, self.listing)
        if not self.found:
            raise UserError(f"{self.labels.source}: no frame of {self.listing.root} lies in any of its segments")


class _Frames(NamedTuple):
    """Frames float32 [n, D], their classes and the numbers of their files, int64 [n], and their lots, float64 [n]."""

    vectors: Tensor
    targets: Tensor
    groups: Tensor
    lots: Tensor


@dataclass
class _Draw:
    """Keeps the ``most`` frames whose random lots are the least, of all that are added: a draw in bounded memory."""

    most: int
    seed: int
    total: int = 0
    """Frames that were added."""
    _parts: list[_Frames] = field(default_factory=list)
    _held: int = 0

    def add(self, index: int, vectors: Tensor, targets: Tensor, group: int) -> None:
        """Add frames [n, D] of path ``index`` with their classes int64 [n] and the number of their file."""
        lots = torch.from_numpy(np.random.default_rng([self.seed, index]).random(len(targets)))
        self._parts.append(_Frames(vectors, targets, torch.full_like(targets, group), lots))
        self.total += len(targets)
        self._held += len(targets)
        if self._held > 2 * self.most:
            self._parts = [self.take(self.most)]
            self._held = self.most

    def take(self, count: int) -> _Frames:
        """Return at most so many frames, no more than ``most``, in the order in which they were added."""
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        chosen = columns[-1].argsort()[:count].sort().values
        return _Frames(*(column[chosen] for column in columns))


def _ranked(
    probe: LogisticProbe, reading: _Reading, extractor: FrameExtractor, classes: int, **options: Unpack[FrameOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return of all labelled frames the rank of the true class, this class and the number of the file, int64 [n]."""
    rows = []
    for index, frames, targets in reading.labelled(extractor, **options):
        if len(targets):
            rank = target_rank(probe.scores(frames, classes), targets)
            rows.append(torch.stack([rank, targets, torch.full_like(targets, reading.groups[index])]))
    ranks, truth, groups = torch.cat(rows, dim=1)
    return ranks, truth, groups
