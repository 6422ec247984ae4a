"""Uploads: bytes from anybody become signals, in processes that can be killed, without a trace on the disk."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mmssl.data import isolate
from mmssl.data.guard import BrokenFile
from mmssl.data.local import shown
from modalities.heads import Reader
from tasks.serve_limits import Limits

T = TypeVar("T")

CALLS = 2000
"""Uploads after which a decoder's process is replaced, so that what decoders leak does not add up."""


class Reads(Reader, Protocol):
    """What makes signals of files."""

    @property
    def modality(self) -> str:
        """Of which modality they are."""
        ...


@dataclass(frozen=True)
class ReadSignal:
    """Decodes and transforms one file within limits. Picklable; to be called in a process of its own."""

    modality: str
    decode: Callable[[str], Any]
    transform: Callable[[Any], Tensor]
    limits: Limits

    def __call__(self, path: str) -> Tensor:
        """Return the file's signal; raises BrokenFile, its reason with ``LARGE`` in front for what is too large."""
        restrict(self.limits.decode_memory)
        check_extent(path, self.modality, self.limits)
        return self.transform(self.decode(path))


LARGE = "too large: "
"""What the reason for a refusal begins with: a reason is all that comes out of a decoder's process."""


def check_extent(path: str, modality: str, limits: Limits) -> None:
    """Raise BrokenFile for a file that is larger or longer than the limits, from its header."""
    pixels, seconds = 0, 0.0
    if modality == "image":
        from modalities import image_read

        with image_read.opened(path) as image:
            pixels = image.width * image.height
    elif modality == "video":
        from modalities.video_read import open_video

        with open_video(path) as video:
            pixels, seconds = video.size[0] * video.size[1], video.frames / video.fps
    elif modality == "audio":
        from modalities import audio_read

        with audio_read.opened(path) as sound:
            seconds = sound.samples / sound.rate
    if pixels > limits.pixels:
        raise BrokenFile(f"{LARGE}{pixels / 1e6:.1f} million pixels, and {limits.pixels / 1e6:.1f} million are allowed")
    if seconds > limits.seconds:
        raise BrokenFile(f"{LARGE}{seconds:.0f} s long, and {limits.seconds:g} s are allowed")


_restricted = 0


def restrict(memory: int) -> None:
    """Let this process allocate so many bytes more than it has, and leave no core behind; once per process."""
    global _restricted
    if _restricted == os.getpid():
        return
    import resource

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _restricted = os.getpid()


class Decoders:
    """Threads with a decoding process each (see ``mmssl.data.isolate``), and the uploads that they read."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decoder")
        self._used = threading.local()

    def warm(self) -> None:
        """Start the processes, before there are other threads at the moment of a fork."""
        together = threading.Barrier(self.limits.decoders)

        def start() -> None:
            with suppress(threading.BrokenBarrierError):
                together.wait(timeout=10)
            isolate.isolated(_nothing, "", 10.0)

        for waiting in [self._pool.submit(start) for _ in range(self.limits.decoders)]:
            waiting.result()

    async def signal(self, reader: Reads, data: bytes, suffix: str) -> Tensor:
        """Return the signal of an uploaded file; raises BrokenFile, of which the reason names nothing of the server."""
        read = ReadSignal(reader.modality, reader.decode, reader.transform, self.limits)
        return await self._run(partial(self._upload, read, data, suffix))

    async def made(self, function: Callable[[str], T], path: str) -> T:
        """Return ``function`` of one of the server's own files, picklable as ``isolated`` has it; raises BrokenFile."""
        return await self._run(partial(self._isolated, function, path))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _upload(self, read: ReadSignal, data: bytes, suffix: str) -> Tensor:
        with shown(data, suffix) as path:
            try:
                return self._isolated(read, path)
            except BrokenFile as error:
                raise BrokenFile(self._told(error.reason, path)) from None

    def _isolated(self, function: Callable[[str], T], path: str) -> T:
        used = getattr(self._used, "calls", 0) + 1
        self._used.calls = used % CALLS
        if used == CALLS:
            isolate.close()
        try:
            return self._asked(function, path)
        except BrokenFile as error:
            if "too large to decode" in error.reason:
                isolate.close()  # what it has allocated before may be what was lacking
            raise

    def _asked(self, function: Callable[[str], T], path: str) -> T:
        try:
            return isolate.isolated(function, path, self.limits.decode_seconds)
        except BrokenFile as error:
            if error.reason != isolate.CRASHES:
                raise
        # The system may have ended it for lack of memory, or a person, and no file is to blame for that.
        return isolate.isolated(function, path, self.limits.decode_seconds)

    def _told(self, reason: str, path: str) -> str:
        """Return a decoder's words without the server's names in them."""
        link = [str(Path(path).readlink())] if Path(path).is_symlink() else []
        for name in (path, *link, os.path.realpath(path), str(Path(path).parent), Path(path).name):
            reason = reason.replace(name, "")
        return " ".join(reason.replace("''", "").split()).rstrip(": ") or "it cannot be read"

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _nothing(path: str) -> None:
    """Do nothing."""
