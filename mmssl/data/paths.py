"""Paths of this machine and URLs alike: ``s3://``, ``gs://``, ``memory://`` and what else fsspec knows.

A URL is a path like any other: in listings, manifests, ledgers and on the command line. What reads it is made in the
process that asks, so that nothing is shared across a fork, and only the bytes that are asked for are fetched.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mmssl.data.broken import BrokenFile
from mmssl.errors import MmsslError, UserError, nearest

_URL = re.compile(r"((?:[\w-]+::)*[A-Za-z][\w+.-]+):(/+)(.*)", re.DOTALL)
_EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Which extra of this package brings what a protocol needs."""
_HERE = ("file:/", "local:/")
"""How a path of this machine begins that is written as a URL, one slash lost to ``Path``."""
_AHEAD = 2**16
"""Bytes that are fetched at once where a file is read from one header to the next."""


def url(path: str | Path) -> str | None:
    """Return the URL that a path is, or None for a path of this machine. A slash that a ``Path`` loses is put back.

    ``file://`` and ``local://`` are no URLs behind ``given``, ``absolute`` and ``join``, through which all paths come.
    """
    match = _URL.fullmatch(str(path))
    if match is None:
        return None
    protocol, slashes, rest = match.groups()
    if len(slashes) == 1:
        slashes = "///" if protocol.endswith(("file", "local")) else "//"
    return f"{protocol}:{slashes}{rest}"


def given(path: str | Path) -> str | Path:
    """Return what a person gave as it is to be shown and opened: a URL, or a path of this machine."""
    return url(plain := _plain(path)) or Path(plain)


def absolute(path: str | Path) -> str:
    """Return a URL, or the absolute path; unlike ``Path.resolve``, that leaves links alone."""
    return (url(plain := _plain(path)) or os.path.abspath(plain)).rstrip("/") or "/"  # noqa: PTH100


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder; an absolute name, or a URL, stays as it is."""
    name = _plain(name)
    return name if url(name) else os.path.join(folder, name)  # noqa: PTH118


def _plain(path: str | Path) -> str:
    """Return a path of this machine that is written as a URL as it is else written."""
    path = str(path)
    return f"/{path.partition(':')[2].lstrip('/')}" if path.startswith(_HERE) else path


def suffix(name: str) -> str:
    """Return what a name ends in from its last dot on, in lower case."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (strings: there may be a million)


def exists(path: str) -> bool:
    """Whether there is anything under a path; False, and no exception, for what may not be asked about."""
    if url(path) is None:
        return os.path.exists(path)  # noqa: PTH110
    with _reached(path) as (files, name):
        return bool(files.exists(name))


def is_folder(path: str) -> bool:
    """Whether a path is a folder."""
    if url(path) is None:
        return os.path.isdir(path)  # noqa: PTH112
    with _reached(path) as (files, name):
        return bool(files.isdir(name))


def is_file(path: str) -> bool:
    """Whether a path is a file."""
    if url(path) is None:
        return os.path.isfile(path)  # noqa: PTH113
    with _reached(path) as (files, name):
        return bool(files.isfile(name))


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file to be read, of a remote one no more than is read; raises what the file system says."""
    if url(path) is None:
        with open(path, "rb") as file:  # noqa: PTH123 (paths are strings here)
            yield file
    else:
        files, name = filesystem(path)
        with files.open(name, "rb", block_size=_AHEAD, cache_type="readahead") as file:
            yield file


def fetch(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes of a URL from ``start`` to before ``end``; raises BrokenFile."""
    files, name = filesystem(path)
    try:
        data: bytes = files.cat_file(name, start=start or None, end=end)
    except FileNotFoundError:
        raise BrokenFile("no such file") from None
    except PermissionError:
        raise BrokenFile("permission denied") from None
    except Exception as error:  # every store has errors of its own
        raise BrokenFile(f"cannot be fetched: {_words(error)}") from error
    return data


def stamp(path: str) -> list[Any]:
    """Return what changes with a file: its size and when it was written, or [None, None] for what cannot be asked."""
    try:
        if url(path) is None:
            status = os.stat(path)  # noqa: PTH116 - a Path per file is slow for a million files
            return [status.st_size, status.st_mtime_ns]
        files, name = filesystem(path)
        facts = files.info(name)
    except Exception:  # every store has errors of its own
        return [None, None]
    written = next((facts[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if key in facts), None)
    return [facts.get("size"), None if written is None else str(written)]


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder and the names of the files in it, hidden ones left out; raises UserError."""
    if url(folder) is None:
        yield from _walk(folder)
        return
    with _reached(folder) as (files, name):
        found = files.find(name)
    top, folders = len(name.rstrip("/")), dict[str, list[str]]()
    for path in found:
        parts = path[top:].strip("/").split("/")
        if not any(part.startswith(".") for part in parts):
            folders.setdefault("/".join([folder, *parts[:-1]]), []).append(parts[-1])
    yield from folders.items()


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    # A link that goes in circles ends where it meets a folder that it is inside of. A link to nothing counts as a file,
    # so that it is reported as broken instead of vanishing.
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(folder)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            raise UserError(f"{folder} cannot be read: permission denied") from None
        names = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    pending.append((entry.path, (*above, here)))
                    continue
                counts = entry.is_file() or entry.is_symlink()
            except OSError:  # a link to itself
                counts = entry.is_symlink()
            if counts:
                names.append(entry.name)
        yield folder, names


def filesystem(path: str) -> tuple[Any, str]:
    """Return what fsspec has for a URL, one per process, and what the file is called there; raises UserError."""
    # Loaded where it is used: most data is on this machine.
    import fsspec.core
    from fsspec.registry import available_protocols, known_implementations

    protocol = path.partition("://")[0].rpartition("::")[2]
    try:
        files, name = fsspec.core.url_to_fs(path)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        needs = f"pip install 'mmssl[{extra}]'" if extra else known_implementations[protocol].get("err", "see fsspec")
        raise UserError(f"{path}: what reads {protocol}:// is not installed: {needs}") from None
    except ValueError as error:
        if protocol in available_protocols():
            raise UserError(f"{path} cannot be read: {_words(error)}") from None
        raise UserError(f"{path}: {protocol}:// is not a protocol{nearest(protocol, available_protocols())}") from None
    return files, str(name)


@contextmanager
def _reached(path: str) -> Iterator[tuple[Any, str]]:
    """Yield what reads a URL; what goes wrong with it is one sentence."""
    try:
        yield filesystem(path)
    except MmsslError:
        raise
    except Exception as error:  # every store has errors of its own: no credentials, no network ...
        raise UserError(f"{path} cannot be read: {_words(error)}") from error


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
