"""Writing so that a reader sees the old content or the new, never half of it."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mmssl.pulse import beat

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The types of tensors by safetensors' words for them."""
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write; on success it replaces ``path``, on failure it is removed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill; on success it replaces ``path``, on failure it is removed."""
    aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        commit_folder(aside, path, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def commit_folder(aside: Path, path: Path, old: Path | None = None) -> None:
    """Sync a finished folder and rename it to ``path``, moving what is there to ``old`` first."""
    for file in [*aside.iterdir(), aside]:
        sync(file)
    if old is not None and path.exists():
        path.rename(old)
    aside.rename(path)
    sync(path.parent)


def cache_folder(name: str) -> Path:
    """Return ``$MMSSL_CACHE/name``, else ``$XDG_CACHE_HOME/mmssl/name``, else ``~/.cache/mmssl/name``."""
    own, shared = os.environ.get("MMSSL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "mmssl") / name


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    with replacing_file(path) as aside:
        aside.write_text(to_json(data, indent=2) + "\n", encoding="utf-8")


def legible(text: str) -> str:
    """Return a file's name as something that can be drawn: bytes that are no text, and control characters, escaped."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in whole)


def to_json(data: Any, indent: int | None = None) -> str:
    """Return data as JSON that every reader takes: null for NaN and infinities, which JSON does not know."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


class Shape(NamedTuple):
    """What a tensor is without its values: the type as safetensors calls it ("F32"), and the extents."""

    dtype: str
    extents: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Shape":
        """Return that of a tensor."""
        return cls(DTYPE_WORDS[tensor.dtype], tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.extents) * DTYPES[self.dtype].itemsize


class TensorFile:
    """A safetensors file that is written one tensor at a time, in any order: no second copy of all is ever held."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        """Begin a file of tensors of these names and shapes."""
        # As the format has it, the widest types come first, so that each lies at a multiple of its width.
        order = sorted(shapes, key=lambda name: (-DTYPES[shapes[name].dtype].itemsize, name))
        ends = list(accumulate((shapes[name].bytes for name in order), initial=0))
        header = {
            name: {"dtype": shapes[name].dtype, "shape": shapes[name].extents, "data_offsets": [start, end]}
            for name, start, end in zip(order, ends, ends[1:], strict=False)
        }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._starts = {name: 8 + len(text) + start for name, start in zip(order, ends, strict=False)}
        self._shapes, self._file = shapes, path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + ends[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())  # here, for another host's sync would not reach it

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the values of a tensor."""
        assert Shape.of(tensor) == self._shapes[name], name
        self._file.seek(self._starts[name])
        self._file.write(raw(tensor))
        beat()


class LazyTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files by name, each read when it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        """Take for each name the opened file and what the tensor is called in there."""
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        file, inside = self._places[name]
        beat()
        return file.get_tensor(inside)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> Shape:
        """Return what a tensor is, without reading its values."""
        file, inside = self._places[name]
        part = file.get_slice(inside)
        return Shape(part.get_dtype(), tuple(part.get_shape()))

    def renamed(self, names: Mapping[str, str]) -> "LazyTensors":
        """Return those that ``names`` has as values, under its keys."""
        return LazyTensors({new: self._places[old] for new, old in names.items()})


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return the tensors that ``names`` has as values, under its keys; lazy ones stay so."""
    if isinstance(tensors, LazyTensors):
        return tensors.renamed(names)
    return {new: tensors[old] for new, old in names.items()}


def open_tensors(path: Path) -> LazyTensors:
    """Open a safetensors file; raises OSError or SafetensorError where it is none."""
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    return LazyTensors({name: (file, name) for name in file.keys()})  # noqa: SIM118 (it is no mapping)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, one after the other: of ``LazyTensors`` there is one at a time."""
    lazy = tensors if isinstance(tensors, LazyTensors) else None
    shapes = {name: Shape.of(tensors[name]) if lazy is None else lazy.shape(name) for name in tensors}
    with TensorFile(path, shapes) as file:
        for name in tensors:
            file.write(name, tensors[name])


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values; those of a contiguous one on the CPU are not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """Return a SHA-256, in hexadecimal digits, over ``more`` and the names and values of tensors, by name."""
    found = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(raw(tensors[name]))
    return found.hexdigest()
