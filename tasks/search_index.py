"""An index of files by what an encoder sees in them, kept on the disk: what search is done in."""

import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import PIL.Image
import torch
from torch import Tensor

from mmssl.data import inline
from mmssl.data.fragment import file_of
from mmssl.data.listing import Listing, list_files
from mmssl.data.parts import container
from mmssl.errors import MmsslError, UnusableData, UserError, sibling
from mmssl.objectives.clip import unit
from modalities.encoder import MODALITIES, Encoder
from modalities.joint import JointEncoder, Tower, check_together, towers
from tasks.features import ReportProgress, signals
from tasks.predict import no_url
from tasks.search_file import NOWHERE, Entry, Facts, OtherFormat, State, StoredIndex, held, states_of, write_index
from tasks.search_place import checked, default_file, modality_of
from tasks.search_rank import nearest as nearest_rows
from tasks.zero_shot_classifier import TEXT

FIRST_COMMIT, COMMIT_SECONDS = 5.0, 40.0
"""Work that has been done is on the disk after so many seconds, at first and later, and the time that a batch takes."""
PASSING = ("permission denied", "timed out", "too large to decode", "cannot be read", "cannot be fetched")
"""How reasons begin that can go away without a trace in a file's size and times."""

UNIT = 1.001
"""Length of a vector that is of length 1 but for rounding."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR)


class Hit(TypedDict):
    """A file that was found."""

    path: str
    score: float
    """Cosine similarity."""


@dataclass(frozen=True)
class Refreshed:
    """What a refresh has done."""

    embedded: int
    """New and changed files."""
    kept: int
    """Files that are as they were, broken ones among them."""
    dropped: int
    """Files that are no longer there."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of all that cannot be read, found now or before."""


class SearchIndex:
    """Finds files of a folder by words or by example; any thread may search, also while one refreshes."""

    def __init__(
        self,
        encoder: str | Path | Tower | Mapping[str, Tower],
        folder: str | Path,
        index: str | Path | None = None,
        *,
        modality: str | None = None,
        split: str | None = None,
    ) -> None:
        """Open the index of ``folder`` if there is one; ``refresh`` makes it or brings it up to date.

        ``encoder`` is a run folder or an encoder folder, what ``load`` or ``JointEncoder`` gave, or the towers that
        ``joint_encoders`` returns. ``folder`` is what ``list_files`` takes, with the files of ``modality``: needed
        where several towers could read some. ``index`` is the file of the index; by default it is in the user's cache
        folder. Raises UserError for a mistake and for the index of another encoder or folder, UnusableData for an
        ``index`` that is damaged; a damaged one in the cache folder is made anew.
        """
        self._where = str(encoder) if isinstance(encoder, str | Path) else "the encoder"
        self.towers = _towers(encoder)
        self.folder, self.split = Path(folder), split
        no_url(folder)
        self.modality = modality_of(self.towers, self.folder, modality, self._where)
        self.encoder = self.towers[self.modality]
        self.facts = Facts(
            fingerprint=self.encoder.fingerprint(),
            modality=self.modality,
            folder=os.path.abspath(folder),  # noqa: PTH100 - links stay as they are, as in a listing
            split=split,
            dim=self.encoder.dim,
        )
        self._own = index is None
        self.file = default_file(self.facts) if index is None else checked(Path(index))
        self._stored = self._opened(tell=True)

    def to(self, device: torch.device) -> "SearchIndex":
        """Move its towers to a device."""
        for tower in self.towers.values():
            tower.to(device)
        return self

    def __len__(self) -> int:
        """How many files can be found."""
        return 0 if self._stored is None else len(self._stored)

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(path, reason) of the files that cannot be read."""
        return [] if self._stored is None else self._stored.broken()

    # Refreshing

    def refresh(
        self,
        batch_size: int | None = None,
        workers: int | Literal["auto"] = "auto",
        timeout: float = 30.0,
        progress: ReportProgress | None = None,
        anew: bool = False,
    ) -> Refreshed:
        """Embed new and changed files and drop those that are gone; the options are those of ``extract``.

        A file has changed when its size or time has; ``anew`` takes all for changed. Broken files are remembered, and
        tried again when they change. Where another process is at it, it is waited for. What is interrupted goes on
        where it was less than a minute before. Raises UserError where the index cannot be written, OSError naming it
        for a full disk.
        """
        with ExitStack() as held_for:
            with self._writing():
                if self._own:
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                held_for.enter_context(held(self.file, self._say_waiting))
            return self._refresh(batch_size, workers, timeout, progress, anew)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the index where it cannot be written, not what is beside it for a moment."""
        try:
            yield
        except OSError as error:  # Arrow's, too
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in UNWRITABLE:
                words = f"{self.file} cannot be written ({reason}); name another file by --index"
                raise UserError(words) from None
            raise OSError(error.errno, f"cannot be written ({reason})", str(self.file)) from None

    def _refresh(
        self,
        batch_size: int | None,
        workers: int | Literal["auto"],
        timeout: float,
        progress: ReportProgress | None,
        anew: bool,
    ) -> Refreshed:
        listing = list_files(self.folder, self._kind, self.split)
        self._stored = self._opened(tell=self._stored is not None)
        known = self._known()
        # Asked before they are read: a file that changes meanwhile is seen to have changed the next time.
        states = states_of(listing.paths)
        todo = Listing(listing.root, [path for path, now in states.items() if anew or _changed(known.get(path), now)])
        dropped = sum(path not in states for path in known)
        fresh: dict[str, Entry] = {}
        embedded, done, last, patience = 0, 0, time.monotonic(), FIRST_COMMIT
        waiting = bool(dropped)
        size = self.encoder.batch_size if batch_size is None else batch_size
        try:
            for entries in self._entries(todo, states, size, workers, timeout):
                fresh |= entries
                embedded += sum(entry.reason is None for entry in entries.values())
                done, waiting = done + len(entries), True
                if progress is not None:
                    progress(done, len(todo))
                if time.monotonic() - last >= patience:
                    self._commit(fresh, states)
                    last, waiting, patience = time.monotonic(), False, min(2 * patience, COMMIT_SECONDS)
            waiting = waiting or self._stored is None
        finally:
            # Also what was done until an interruption.
            if waiting:
                self._commit(fresh, states)
        return Refreshed(embedded, len(states) - len(todo), dropped, self.broken)

    def _entries(
        self, todo: Listing, states: Mapping[str, State], size: int, workers: int | Literal["auto"], timeout: float
    ) -> Iterator[dict[str, Entry]]:
        """Yield what is found out about so many files at a time, by path."""
        for whole, broken in signals(self.encoder, todo, size, workers, skip_broken=True, timeout=timeout):
            found = {todo.paths[i]: _broken(states[todo.paths[i]], reason) for i, reason in broken}
            for places, signal in whole:
                paths = [todo.paths[i] for i in places]
                vectors = unit(self.encoder.features(signal)).cpu()
                found |= {path: _entry(states[path], one) for path, one in zip(paths, vectors, strict=True)}
            yield found

    def _commit(self, fresh: dict[str, Entry], states: Mapping[str, State]) -> None:
        with self._writing():
            write_index(self.file, self.facts, self._stored, fresh, states)
        self._stored = StoredIndex(self.file)
        fresh.clear()

    def _known(self) -> dict[str, tuple[int, State, str | None]]:
        """Return what the index says of files; nothing where it is damaged and ours."""
        if self._stored is None:
            return {}
        try:
            self._stored.check_vectors()  # what has rotted must not get a fresh checksum
            return self._stored.states()
        except UnusableData as error:
            self._damaged(error, tell=True)
            self._stored = None
            return {}

    def _opened(self, tell: bool) -> StoredIndex | None:
        """Return the index on the disk, None where there is none or, if it is ours alone, a damaged one; ``tell`` so.

        Raises UserError where it is of something else, UnusableData where a person's own is damaged.
        """
        try:
            stored = StoredIndex(self.file)
        except FileNotFoundError:
            return None
        except (UnusableData, UserError) as error:
            self._damaged(error, tell)
            return None
        if self._own and stored.facts != self.facts:  # by its name it can be of nothing else
            self._damaged(UnusableData(f"{self.file} is damaged: it says that it is of something else"), tell)
            return None
        for key, other in (("fingerprint", "encoder"), ("folder", "folder"), ("split", "split")):
            its, own = getattr(stored.facts, key), getattr(self.facts, key)
            if its != own:
                words = "" if key == "fingerprint" else f", {its}"
                raise UserError(
                    f"{self.file} is the index of another {other}{words}; give another --index or remove it"
                )
        return stored

    def _damaged(self, error: MmsslError, tell: bool) -> None:
        """Say that our own index is made anew; raises what is wrong with a person's own."""
        if self._own:
            if tell:
                print(f"{error}; a refresh makes it anew", file=sys.stderr)
        elif isinstance(error, UnusableData | OtherFormat):
            raise type(error)(f"{error}; remove it, or give another --index") from None
        else:  # a person's own file
            raise UserError(f"{error}; give another --index") from None

    def _say_waiting(self) -> None:
        print(f"another process is refreshing {self.file}; waiting for it", file=sys.stderr, flush=True)

    @property
    def _kind(self) -> Any:
        return MODALITIES[self.modality]

    # Searching

    def __call__(self, query: str | None = None, top: int = 20, *, like: Any = None) -> list[Hit]:
        """As ``search``."""
        return self.search(query, top, like=like)

    def search(self, query: str | None = None, top: int = 20, *, like: Any = None) -> list[Hit]:
        """Return [{"path", "score"}, ...], best first, equal ones by path; arguments as ``vector`` and ``nearest``."""
        check_top(top)
        return self.nearest(self.vector(query, like), top)

    def vector(self, query: str | None = None, like: Any = None) -> Tensor:
        """Return what is searched by, float32 [d] of length 1: that of words, or of what files are to be like.

        ``like`` is the path of a file of any modality that a tower reads, a PIL picture, or what the files' encoder
        embeds. Raises UserError for a mistake, UnusableData for a file that is broken.
        """
        check_asked(query, like)
        if query is not None:
            if TEXT not in self.towers:
                raise UserError(f"{self._where} {self._wordless()} give a file that others are to be like by --like")
            found = self.towers[TEXT].embed([inline.join(query)])
        elif isinstance(like, str | Path):
            found = self.reader(str(like)).embed([str(like)])
        else:
            name = "image" if isinstance(like, PIL.Image.Image) and "image" in self.towers else self.modality
            found = self.towers[name].embed([like])
        if not (found.isfinite().all() and found.any()):
            raise UnusableData(f"{like if query is None else repr(query)}: its vector is NaN, infinite or zero")
        return unit(found)[0]

    def nearest(self, vector: Tensor, top: int = 20) -> list[Hit]:
        """Return [{"path", "score"}, ...] of the ``top`` files nearest to a vector float32 [d] of length 1.

        ``path`` is absolute, or a text that is its own path (``mmssl.data.inline``); ``name`` says it shorter. The
        score is the cosine similarity. Raises UserError where there is no index yet, UnusableData where no file of it
        can be read.
        """
        check_top(top)
        if vector.shape != (self.facts.dim,) or not float(vector.norm()) <= UNIT:
            raise ValueError(f"a vector [{self.facts.dim}] of length 1 is needed, but got {list(vector.shape)}")
        stored = self._stored
        if stored is None:
            raise UserError(f"there is no index of {self.folder} yet; refresh it first")
        if not len(stored):
            broken = stored.broken()
            if not broken:
                raise UnusableData(f"{self.folder}: no file of it has been embedded yet; refresh its index")
            first = f"; the first is {self.name(broken[0][0])}: {broken[0][1]}" if broken else ""
            raise UnusableData(f"{self.folder}: none of the {len(broken)} files can be read{first}")
        try:
            scores, rows = nearest_rows(stored.blocks, vector, top)
        except UnusableData as error:
            raise UnusableData(f"{stored.file} is damaged: {error}; remove it") from None
        # Vectors in float16 are of length 1 to their last digit; a zero has no sign.
        found = zip((scores.clip(-1, 1) + 0.0).tolist(), rows.tolist(), strict=True)
        return [{"path": stored.path(row), "score": score} for score, row in found]

    def name(self, path: str) -> str:
        """Return what a file is called: its path, relative to the folder if it is in it; of a text what it says."""
        return Listing(self.folder, [path], rows=[1]).name(0)

    def _wordless(self) -> str:
        if isinstance(self.encoder, JointEncoder) and TEXT in self.encoder.facts.towers:
            return "is one of several towers, and words are for another; name the run that they are in, or"
        return "has no tower of texts, so that it knows no words;"

    def reader(self, path: str) -> Tower:
        """Return the tower that reads an example; raises UserError where there is none, or no such file."""
        no_url(path)
        if inline.text(path) is not None and TEXT in self.towers:
            return self.towers[TEXT]
        file = Path(file_of(path))
        if not os.path.exists(there := container(str(file))):  # noqa: PTH110 - False where it may not be asked about
            raise UserError(f"--like {path} does not exist{sibling(file)}")
        if not os.path.isfile(there) and not os.path.isdir(there):  # noqa: PTH112, PTH113
            raise UserError(f"--like {path} is no regular file")
        suffix = file.suffix.lower()
        # Some suffixes are of two modalities: an animation is a picture and a video.
        names = [name for name in sorted(self.towers, key=self.modality.__ne__) if suffix in MODALITIES[name].suffixes]
        if not names and file.is_dir():
            names = [name for name in self.towers if MODALITIES[name].frame_suffixes]
        if not names:
            kinds = " or ".join(self.towers)
            this = "folder" if file.is_dir() else f"{suffix or 'nameless'} file"
            raise UserError(f"--like {path}: {self._where} reads {kinds}, and this is a {this}")
        return self.towers[names[0]]


def check_asked(query: str | None, like: Any) -> None:
    """Raise UserError where there are not words or an example to search by, or both."""
    if (query is None) == (like is None):
        raise UserError("search needs words or --like, a file" + ("; they exclude each other" if query else ""))
    if query is not None and not query.strip():
        raise UserError("the query is blank; say what to look for")


def check_top(top: int) -> None:
    """Raise UserError for a number of results that is none."""
    if top < 1:
        raise UserError(f"--top {top}: give a number from 1")


def _entry(state: State, vector: Tensor) -> Entry:
    """Return what to remember of a file with this unit vector, float32 [d] on the CPU."""
    if not vector.isfinite().all():
        return _broken(state, "its vector is NaN or infinite")
    if not vector.any():
        return _broken(state, "its vector is zero")
    return Entry(state, vector.half().numpy())


def _broken(state: State, reason: str) -> Entry:
    legible = reason.encode("utf-8", "backslashreplace").decode("utf-8")
    return Entry(NOWHERE if reason.startswith((*PASSING, "no such file")) else state, None, legible)


def _changed(known: tuple[int, State, str | None] | None, now: State) -> bool:
    """Whether a file is to be read, by what is known of it and its state now; what nobody can see may have changed."""
    if known is None or known[1] != now:
        return True
    return now == NOWHERE and (known[2] is None or known[2].startswith(PASSING))


def _towers(encoder: str | Path | Tower | Mapping[str, Tower]) -> dict[str, Tower]:
    """Return what reads files and queries, by modality: the towers of a run, or one encoder."""
    if isinstance(encoder, Mapping):
        joint = {name: tower for name, tower in encoder.items() if isinstance(tower, JointEncoder)}
        if len(encoder) > 1 and len(joint) < len(encoder):
            raise UserError("encoders that were trained alone do not compare; give one, or the towers of one run")
        if joint:
            check_together(joint, "the encoder")
        return dict(encoder)
    if isinstance(encoder, Encoder | JointEncoder):
        return {encoder.modality: encoder}
    return towers(encoder)
