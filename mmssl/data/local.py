"""Whatever a path names as a file of this machine: a member of a shard, a cell of a table, a URL, or a file as it is.

Decoders take file names, and some go by the suffix. So bytes that are no file are put into anonymous memory
(``memfd_create``), which the kernel frees whatever becomes of the process, under a link with the right suffix; child
processes can open it too.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmssl.data import fragment, inline, paths
from mmssl.data.parts import part

_LONGEST_SUFFIX = 16
_IN_MEMORY = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")  # noqa: PTH112
_LINKS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
"""Where links are: in memory too, if there is such a folder."""
_BEGINNINGS = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
    b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3",
}  # fmt: skip
_RIFF = {b"WEBP": ".webp", b"WAVE": ".wav", b"AVI ": ".avi"}


def fetcher(file: str) -> Callable[[], bytes] | None:
    """Return what gets the bytes of a path that is no file of this machine; it raises BrokenFile. None for one."""
    if file.startswith(inline.PREFIX):
        return None
    found = part(file)
    if found is not None:
        return found.read
    return None if paths.url(file) is None else lambda: paths.fetch(file)


@contextmanager
def local(path: str) -> Iterator[str]:
    """Yield a path of this machine for ``path``, with the piece that it names: itself where it is one already.

    Raises BrokenFile for what cannot be got. What is yielded is gone afterwards.
    """
    file = fragment.file_of(path)
    get = fetcher(file)
    if get is None:
        yield path
        return
    data = get()
    with shown(data, paths.suffix(file) or suffix_of(data)) as name:
        yield name + path[len(file) :]


def suffix_of(data: bytes) -> str:
    """Return the suffix that a file without one should have, by how it begins; none for what is not known."""
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], "")
    return next((suffix for begins, suffix in _BEGINNINGS.items() if data.startswith(begins)), "")


@contextmanager
def shown(data: bytes, suffix: str) -> Iterator[str]:
    """Yield the path of a file that holds ``data``, in memory where the system can; it is gone afterwards."""
    suffix = suffix if len(suffix) <= _LONGEST_SUFFIX else ""
    if not _IN_MEMORY:
        with tempfile.NamedTemporaryFile(prefix="mmssl-", suffix=suffix) as file:
            file.write(data)
            file.flush()
            yield file.name
        return
    number, process = os.memfd_create("mmssl"), os.getpid()
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(number, left) :]
        # The process's number and not "self": who decodes may be its child.
        link = f"{_LINKS}/mmssl-{process}-{number}-{secrets.token_hex(4)}{suffix}"
        os.symlink(f"/proc/{process}/fd/{number}", link)  # noqa: PTH211
        try:
            yield link
        finally:
            os.unlink(link)  # noqa: PTH108
    finally:
        os.close(number)
