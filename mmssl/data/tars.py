"""Files inside tar shards, and what the shards of others hold (WebDataset).

A member is a path: ``/shards/000003.tar@1536+20480/cats/012.jpg`` is the file ``cats/012.jpg`` whose 20480 bytes begin
at byte 1536 of that tar. So one read gets it, wherever in the shard it lies, and its header, which stands in the 512
bytes before, is read along: a manifest of another pack is noticed and never decoded as something else.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO, NamedTuple, Self

from mmssl.contracts import Media
from mmssl.data import paths
from mmssl.data.broken import BrokenFile
from mmssl.errors import UnusableData
from mmssl.files import cache_folder, replacing_file, to_json

BLOCK = tarfile.BLOCKSIZE
HANDLES = 64
"""Shards that a process keeps open."""
MOST_TEXT = 2**16
"""Bytes of a label, a caption or a row of columns in a shard; more is no such thing."""
_CHUNK = 2**20
TEXTS = ("cls", "txt", "json")
"""Extensions of members that say something of a sample: its class, its caption, its columns."""

_MEMBER = re.compile(r"(.+?\.tar)@(\d+)\+(\d+)/(.+)", re.DOTALL | re.IGNORECASE)
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarMember(NamedTuple):
    """A file in a tar: the tar, where its bytes begin, how many there are, and what it is called."""

    shard: str
    offset: int
    size: int
    name: str

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """Return the member that a path is, None for any other path."""
        match = _MEMBER.fullmatch(path) if ".tar@" in path.lower() else None
        return None if match is None else cls(match[1], int(match[2]), int(match[3]), match[4])

    def __str__(self) -> str:
        return f"{self.shard}@{self.offset}+{self.size}/{self.name}"

    @property
    def container(self) -> str:
        """The file of which it is a part."""
        return self.shard

    def read(self) -> bytes:
        """Return its bytes; raises BrokenFile."""
        if self.offset < BLOCK:
            raise BrokenFile(f"byte {self.offset} of its shard cannot be where a file begins")
        if self.size == 0:
            raise BrokenFile("empty file")
        data = _bytes(self.shard, self.offset - BLOCK, BLOCK + self.size)
        if len(data) <= BLOCK:
            raise BrokenFile("truncated: its shard ends before it")
        if not _is_header_of(data[:BLOCK], self):
            raise BrokenFile("its shard holds something else at this place: is the manifest of other shards?")
        if len(data) < BLOCK + self.size:
            raise BrokenFile(f"truncated: its shard ends after {len(data) - BLOCK} of its {self.size} bytes")
        return data[BLOCK:]


def _is_header_of(header: bytes, member: TarMember) -> bool:
    """Return whether 512 bytes stand before a member: by its size and name (POSIX.1-1988, section 10.1.1)."""
    # tarfile's own reader checks more, and takes longer than reading the file.
    digits = header[124:136]
    try:
        size = int.from_bytes(digits[1:]) if digits[0] & 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    # Long names, and those in other letters, stand in a header of their own.
    plain = member.name.isascii() and len(member.name) < tarfile.LENGTH_NAME
    name = header[: tarfile.LENGTH_NAME].partition(b"\0")[0].removeprefix(b"./")
    return size == member.size and (not plain or name == member.name.encode())


class _Handle:
    """A file that stays open until nobody needs it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=HANDLES)
def _handle(path: str, _state: tuple[int, ...]) -> _Handle:
    return _Handle(path)


def _bytes(shard: str, start: int, count: int) -> bytes:
    if paths.url(shard) is not None:
        try:
            return paths.fetch(shard, start, start + count)
        except BrokenFile as error:
            raise BrokenFile(f"its shard: {error.reason}") from error
    try:
        status = os.stat(shard)  # noqa: PTH116 (paths are strings here)
        # A shard that is written anew is another file.
        handle = _handle(shard, (status.st_dev, status.st_ino, status.st_mtime_ns))
        found = b""
        while len(found) < count and (more := os.pread(handle.number, count - len(found), start + len(found))):
            found = found + more if found else more
        return found
    except OSError as error:
        words = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        raise BrokenFile(f"its shard: {words}") from None


class Entry(NamedTuple):
    """What a shard's headers say of a member, and what is in it where it is a text that says something of a sample."""

    name: str
    offset: int
    size: int
    text: str | None = None


def entries(shard: str) -> list[Entry]:
    """Return the files in a tar, in order, from the user's cache folder where it has not changed.

    Raises UnusableData where it is no tar, or cut off.
    """
    state = paths.stamp(shard)
    key = hashlib.sha256(json.dumps([shard, *state]).encode()).hexdigest()
    file = cache_folder("shards") / f"{key}.json"
    try:
        return [Entry(*entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        found = scan(shard)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as aside:
            aside.write_text(to_json(found), encoding="utf-8")
    except OSError:
        pass  # a home that cannot be written costs only the next run's time
    return found


def scan(shard: str) -> list[Entry]:
    """Return the files in a tar, in order, going from header to header; raises UnusableData."""
    try:
        with paths.opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found = [_entry(info, file) for info in tar if info.isreg()]
            file.seek(tar.offset)
            whole = file.read(BLOCK) == bytes(BLOCK)
            behind = any(chunk.count(0) < len(chunk) for chunk in iter(lambda: file.read(_CHUNK), b""))
    except (tarfile.TarError, EOFError) as error:
        raise UnusableData(f"{shard} is no whole tar file: {error}") from None
    except OSError as error:
        raise UnusableData(f"{shard} cannot be read: {error.strerror or error}") from None
    if not whole:
        raise UnusableData(f"{shard} is truncated: it ends after {len(found)} files, without the mark of an end")
    if behind:
        raise UnusableData(
            f"{shard} goes on behind the mark of its end, as tars put behind each other do; unpack them and pack anew"
        )
    name, times = Counter(entry.name for entry in found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise UnusableData(f"{shard} holds {times} files called {name}; which of them is meant?")
    return found


def _entry(info: tarfile.TarInfo, file: BinaryIO) -> Entry:
    name, text = info.name.removeprefix("./"), None
    if name.lower().endswith(TEXTS) and info.size <= MOST_TEXT:
        file.seek(info.offset_data)
        text = file.read(info.size).decode("utf-8", "replace").strip()
    return Entry(name, info.offset_data, info.size, text)


def sample_key(name: str) -> tuple[str, str] | None:
    """Return which sample a member belongs to, and its extension: WebDataset parts names at the base name's first dot.

    None for names that WebDataset passes over.
    """
    match = _SAMPLE.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def rows(shard: str, kinds: Sequence[Media]) -> list[dict[str, str]]:
    """Return what each sample of a shard gives, by column.

    The path of its medium is under ``path``, or of several kinds under ``KIND_path``; ``.json`` gives columns where it
    is an object of plain values, ``.cls`` the label and ``.txt`` the caption where that does not.
    """
    samples: dict[str, dict[str, Entry]] = {}
    for entry in entries(shard):
        parted = sample_key(entry.name)
        if parted is not None:
            samples.setdefault(parted[0], {})[parted[1]] = entry
    return [_row(shard, sample, kinds) for sample in samples.values()]


def _row(shard: str, sample: dict[str, Entry], kinds: Sequence[Media]) -> dict[str, str]:
    media = {}
    for kind in kinds:
        # "seg.png" is a picture too, where there is no plain "png".
        found = sorted((ext.count("."), ext) for ext in sample if paths.suffix(f"x.{ext}") in kind.suffixes)
        if found:
            entry = sample[found[0][1]]
            name = "path" if len(kinds) == 1 else f"{kind.name}_path"
            media[name] = str(TarMember(shard, entry.offset, entry.size, entry.name))
    taken = {kind.name for kind in kinds if ".txt" in kind.suffixes}
    said = {"label": "cls"} if taken else {"label": "cls", "caption": "txt"}
    texts = {name: sample[ext].text for name, ext in said.items() if ext in sample}
    plain = _columns(sample["json"].text) if "json" in sample else {}
    return {name: text for name, text in texts.items() if text} | plain | media


def _columns(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    plain = {key: value for key, value in found.items() if isinstance(value, str | int | float) and value != ""}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in plain.items()
        if key != "path" and not key.endswith("_path")
    }
