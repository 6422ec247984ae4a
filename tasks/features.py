"""Features of a frozen encoder: computed once per file, checked, and kept in the user's cache folder."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache as memoized
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmssl.data.dataset import prepare_worker, worker_count
from mmssl.data.fragment import file_of, overlapping
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import Listing
from mmssl.data.parts import container, stamp
from mmssl.distributed import world
from mmssl.errors import UnusableData, UserError
from mmssl.files import cache_folder, replacing_file, save_tensors
from mmssl.pulse import beat
from modalities.heads import BatchReader, Reader

CacheFolder = Path | Literal["auto"] | None
"""Where features are kept: a folder, ``default_cache()`` or nowhere."""

ReportProgress = Callable[[int, int], None]
"""Called with (files done, files in all) after every batch."""


class Extractor(BatchReader, Protocol):
    """What features are computed with: an Encoder, or anything that reads files and maps signals to vectors."""

    def features(self, signal: Tensor) -> Tensor:
        """Map signals [B, C, *size] to vectors [B, D], without gradients."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes whenever the vectors would."""
        ...


class Preprocessing(BatchReader, Protocol):
    """What ``RawPixels`` needs of an encoder."""

    @property
    def preprocess(self) -> dict[str, Any]:
        """The settings of decoding and transform."""
        ...


class RawPixels:
    """Stands in for an encoder with its preprocessed signals, flattened: the baseline in which nothing is learned."""

    def __init__(self, encoder: Preprocessing) -> None:
        self.decode, self.transform, self.batch_size = encoder.decode, encoder.transform, encoder.batch_size
        self._settings = json.dumps(encoder.preprocess, sort_keys=True, default=str)

    def features(self, signal: Tensor) -> Tensor:
        """Return [B, C, *size] as [B, C * size]."""
        return signal.flatten(1)

    def fingerprint(self) -> str:
        """Return a text that depends on the preprocessing alone."""
        return f"raw {self._settings}"


class DecodeOnly:
    """Stands in for an encoder where files are to be read and nothing is to be computed: vectors of no numbers."""

    def __init__(self, encoder: BatchReader) -> None:
        self.decode, self.transform, self.batch_size = encoder.decode, encoder.transform, encoder.batch_size

    def features(self, signal: Tensor) -> Tensor:
        """Return [B, 0]."""
        return torch.empty(len(signal), 0)

    def fingerprint(self) -> str:
        """Return a text, as ``Extractor`` asks for one; there is nothing to tell apart."""
        return "decode only"


@dataclass(frozen=True)
class Features:
    """Vectors float32 [n, dim] of the files at ``kept`` (indices of the listing); (name, reason) of the others."""

    vectors: Tensor
    kept: list[int]
    skipped: list[tuple[str, str]] = field(default_factory=list)


class NonFiniteFeatures(UnusableData):
    """Features are NaN or infinite: the encoder is at fault, or its training."""


class ExtractOptions(TypedDict, total=False):
    """The options of ``extract``, which every frozen evaluation passes on."""

    batch_size: int | None
    workers: int | Literal["auto"]
    skip_broken: bool
    cache: CacheFolder
    timeout: float
    progress: ReportProgress | None


def extract(
    encoder: Extractor,
    listing: Listing,
    batch_size: int | None = None,
    workers: int | Literal["auto"] = "auto",
    skip_broken: bool = False,
    cache: CacheFolder = "auto",
    timeout: float = 30.0,
    progress: ReportProgress | None = None,
) -> Features:
    """Return the features of every file, from the cache where nothing changed since they were computed.

    ``batch_size`` None is the encoder's own. ``workers`` processes decode (auto: one less than the cores, at most 8),
    each file in at most ``timeout`` seconds.
    Raises UnusableData for a broken file, unless ``skip_broken`` leaves it out and reports it, and for features that
    are NaN or infinite. Features with files left out are not cached: what timed out today may be whole tomorrow.
    """
    folder = default_cache() if cache == "auto" else cache
    file = None if folder is None else folder / f"{_key(encoder, listing)}.safetensors"
    vectors = None if file is None else _read(file, len(listing))
    if vectors is not None:
        return Features(vectors, list(range(len(listing))))
    features = compute(encoder, listing, batch_size, workers, skip_broken, timeout, progress)
    check_readable(features, listing)
    if file is not None and not features.skipped:
        _write(file, features.vectors)
    return features


def default_cache() -> Path:
    """Return ``$MMSSL_CACHE/features``, else ``$XDG_CACHE_HOME/mmssl/features``, else ``~/.cache/mmssl/features``."""
    return cache_folder("features")


class _Files(Dataset[tuple[int, Tensor | str]]):
    """Gives (index, signal), or (index, reason) for a file that is broken. Holds no weights: workers get a copy."""

    def __init__(self, reader: Reader, paths: Sequence[str], timeout: float) -> None:
        self.read, self.transform = reader.decode, reader.transform
        self.paths, self.timeout = paths, timeout

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, guarded(self._signal, self.paths[index], self.timeout)
        except BrokenFile as broken:
            return index, broken.reason

    def _signal(self, path: str) -> Tensor:
        return self.transform(self.read(path))


_Loaded = tuple[list[tuple[list[int], Tensor]], list[tuple[int, str]]]
"""Indices and signals of the whole files of a batch, by size; indices and reasons of the broken ones."""


def _collate(items: list[tuple[int, Tensor | str]]) -> _Loaded:
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for index, signal in items:
        if isinstance(signal, Tensor):
            groups.setdefault(signal.shape, []).append((index, signal))
    whole = [([i for i, _ in group], torch.stack([s for _, s in group])) for group in groups.values()]
    return whole, [(index, reason) for index, reason in items if isinstance(reason, str)]


def signals(
    reader: Reader,
    listing: Listing,
    batch_size: int,
    workers: int | Literal["auto"] = "auto",
    skip_broken: bool = False,
    timeout: float = 30.0,
) -> Iterator[_Loaded]:
    """Yield what data workers make of so many files at a time, in their order; arguments and errors as ``extract``.

    It is the indices and stacked signals [B, ...] of the files of each size, and (index, reason) of broken files.
    """
    # One batch gains nothing from processes that take longer to start than to decode it.
    few = workers == "auto" and len(listing) <= batch_size
    loader = DataLoader(
        _Files(reader, listing.paths, timeout),
        batch_size,
        num_workers=0 if few else worker_count(workers, world()),
        collate_fn=_collate,
        worker_init_fn=prepare_worker,
    )
    for whole, broken in loader:
        beat()
        for index, reason in [] if skip_broken else broken:
            raise UnusableData(f"{listing.paths[index]}: {reason}; evaluation never leaves a file out unasked")
        yield whole, broken


def compute(
    encoder: Extractor,
    listing: Listing,
    batch_size: int | None = None,
    workers: int | Literal["auto"] = "auto",
    skip_broken: bool = False,
    timeout: float = 30.0,
    progress: ReportProgress | None = None,
) -> Features:
    """Return what ``extract`` does, without a cache; none at all where every file is broken and ``skip_broken``."""
    vectors: dict[int, Tensor] = {}
    skipped: list[tuple[str, str]] = []
    size = encoder.batch_size if batch_size is None else batch_size
    for whole, broken in signals(encoder, listing, size, workers, skip_broken, timeout):
        skipped += [(listing.name(index), reason) for index, reason in broken]
        for indices, signal in whole:
            rows = finite(encoder.features(signal).detach().float().cpu(), [listing.paths[i] for i in indices])
            vectors.update(zip(indices, rows, strict=True))
        if progress is not None:
            progress(len(vectors) + len(skipped), len(listing))
    kept = sorted(vectors)
    return Features(torch.stack([vectors[i] for i in kept]) if kept else torch.empty(0), kept, skipped)


def check_readable(features: Features, listing: Listing) -> None:
    """Raise UnusableData where no file of ``listing`` could be read."""
    if not features.kept:
        name, reason = features.skipped[0]
        raise UnusableData(
            f"{listing.root}: none of the {len(listing)} files can be read; the first is {name}: {reason}"
        )


def finite(vectors: Tensor, paths: Sequence[str]) -> Tensor:
    """Return vectors [n, D] as they are; raises NonFiniteFeatures where they are not finite, naming the path."""
    bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteFeatures(f"{paths[bad[0]]}: its features are NaN or infinite")
    return vectors


def _key(encoder: Extractor, listing: Listing) -> str:
    digest = hashlib.sha256(encoder.fingerprint().encode())
    stamped = memoized(stamp)  # thousands of files are in one shard
    for path in listing.paths:
        digest.update(json.dumps([path, *stamped(container(file_of(path)))]).encode())
    return digest.hexdigest()


def _read(file: Path, count: int) -> Tensor | None:
    if not file.exists():
        return None
    try:
        vectors = load_file(file)["vectors"]
    except (OSError, SafetensorError, KeyError) as error:
        print(f"cached features {file} cannot be read ({error}); computing them again", file=sys.stderr)
        return None
    if vectors.ndim != 2 or len(vectors) != count or not vectors.isfinite().all():
        print(f"cached features {file} are damaged; computing them again", file=sys.stderr)
        return None
    return vectors


def _write(file: Path, vectors: Tensor) -> None:
    # The features are there; a full disk or a home that cannot be written costs only the next run's time.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as aside:
            save_tensors(aside, {"vectors": vectors})
    except (OSError, SafetensorError) as error:
        print(f"features could not be cached in {file.parent} ({error})", file=sys.stderr)


@dataclass(frozen=True)
class Labelled:
    """Vectors float32 [n, dim] with class indices int64 [n]."""

    vectors: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Samples:
    """What an evaluation was measured on."""

    train: int
    test: int
    classes: list[str]
    commonest: float
    """Share of the test samples in the commonest training class: what guessing blindly would score."""
    skipped: list[tuple[str, str]]
    """(name, reason) of broken files that were left out on request."""

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        facts = {"train": self.train, "test": self.test, "classes": self.classes}
        return {**facts, "commonest_class": self.commonest, "skipped": skipped}

    def __str__(self) -> str:
        text = (
            f"{self.train} training and {self.test} test samples, {len(self.classes)} classes; always guessing the "
            f"commonest one scores {100 * self.commonest:.1f}%"
        )
        return f"{text}; {len(self.skipped)} broken files left out" if self.skipped else text


def labelled_features(
    encoder: Extractor, train: Listing, test: Listing, label_column: str = "label", **options: Unpack[ExtractOptions]
) -> tuple[Labelled, Labelled, Samples]:
    """Return the training and test features with class indices; classes are the sorted training labels.

    Raises UserError for a test label that no training file has, before anything is decoded, and as ``extract``.
    """
    classes, train_targets, test_targets = class_targets(train, test, label_column)
    both, skipped = [], []
    for listing, targets in ((train, train_targets), (test, test_targets)):
        features = extract(encoder, listing, **options)
        both.append(Labelled(features.vectors, torch.tensor([targets[i] for i in features.kept])))
        skipped += features.skipped
    guess = commonest_share(train_targets, both[1].targets.tolist())
    return both[0], both[1], Samples(len(both[0].targets), len(both[1].targets), classes, guess, skipped)


def commonest_share(train_targets: Sequence[int], test_targets: Sequence[int]) -> float:
    """Return the share of the test targets that are the commonest training target; of equals, the mean share."""
    counts, tests = Counter(train_targets), Counter(test_targets)
    guesses = [target for target, count in counts.items() if count == max(counts.values())]
    return sum(tests[guess] for guess in guesses) / len(guesses) / len(test_targets)


def class_targets(train: Listing, test: Listing, label_column: str = "label") -> tuple[list[str], list[int], list[int]]:
    """Return the classes (the sorted training labels) and the class indices of the training and the test files.

    Raises UserError for fewer than two classes, for a test label that no training file has, and where a test file is a
    training file too: such a score would mean nothing.
    """
    train_labels, test_labels = train.labels(label_column), test.labels(label_column)
    classes = sorted(set(train_labels))
    if len(classes) < 2:
        raise UserError(f"{train.root}: classification needs at least two classes, but every label is '{classes[0]}'")
    unseen = sorted(set(test_labels) - set(classes))
    if unseen:
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        words = ", ".join(f"'{label}'" for label in unseen[:3]) + more
        raise UserError(f"{test.root}: no training sample in {train.root} has the test label {words}")
    check_apart(train, test)
    number = {label: i for i, label in enumerate(classes)}
    return classes, [number[label] for label in train_labels], [number[label] for label in test_labels]


def check_apart(train: Listing, test: Listing) -> None:
    """Raise UserError where a test file is a training file too, by whatever spelling of its path; say what to do."""
    check_disjoint(
        train,
        test,
        "both the training and the test set; give two folders, or a manifest with a split column "
        "(--train-split, --test-split)",
    )


def check_disjoint(a: Listing, b: Listing, what: str) -> None:
    """Raise UserError where a file, or a moment of it, is in both, by whatever spelling of its path."""
    shared = overlapping(a.paths, b.paths)
    if shared:
        raise UserError(f"{len(shared)} files, such as {min(shared)}, are in {what}")
