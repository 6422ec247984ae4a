"""Reading one file in a child process that can be killed: a decoder may hang or crash, the program goes on.

Decoders of video and sound are C code, which no signal handler interrupts and whose crash takes its process along. So
each thread that reads keeps one child of its own: forked at the first call, reused for the next ones, replaced after a
file that hung or crashed it. It is a plain fork, as data workers are daemonic and may have no multiprocessing children,
and as nothing is then imported anew.
"""

import ctypes
import gc
import io
import os
import pickle
import signal
import socket
import stat
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmssl.data.guard import BrokenFile, as_a_whole, guarded

T = TypeVar("T")

# On macOS the system's own libraries do not survive a fork, which is why Python spawns there.
_CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"
CRASHES = "crashes its decoder"
"""The reason where a decoder has ended its process, or somebody else has."""
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")
_PR_SET_PDEATHSIG = 1
# Looked up before any fork: another thread may hold the dynamic loader's lock at the moment of one.
_PRCTL: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

_THREAD = threading.local()
"""Holds this thread's child. Not the process's: Linux ends a child together with the thread that forked it."""


def isolated(function: Callable[[str], T], path: str, timeout: float | None) -> T:
    """Return ``function(path)``, called in a child process; raises BrokenFile(reason) as ``guarded`` does.

    A call that takes longer than ``timeout`` seconds (None: no limit) is killed, wherever it hangs; one that ends its
    process "crashes its decoder". ``function`` and its result travel as pickles between the two processes, arrays and
    CPU tensors at the cost of two copies; they arrive writable and share no memory with anything. What else
    ``function`` changes (its own state, globals, generators of random numbers) is changed in the child alone, which is
    as this process was at the first call. Raises TypeError for what cannot be pickled. Where processes cannot be
    forked, this is ``guarded``.
    """
    if not _CAN_FORK:
        return guarded(function, path, timeout)
    request = _packed((function, path), f"{_name(function)} cannot be sent to a child process")
    child = _child()
    try:
        kind, value = child.call(request, timeout)
    except BaseException as error:
        # Interrupts and limits from outside too: the child is still at work, and its answer would meet the next call.
        close()
        reason = _fate(error, timeout)
        if reason is None:
            raise
        raise BrokenFile(reason) from None
    if kind == "broken":
        raise BrokenFile(value)
    if kind == "unsent":
        close()  # A fresh child may know what this one was forked too early to know.
        raise TypeError(value)
    result: T = value
    return result


def close() -> None:
    """End this thread's child, if there is one; the next call starts another. Ends of threads and programs do too."""
    child: _Child | None = _THREAD.__dict__.pop("child", None)
    if child is not None:
        child.end()


def _child() -> "_Child":
    child: _Child | None = getattr(_THREAD, "child", None)
    if child is None or not child.alive():
        close()
        child = _THREAD.child = _Child()
    return child


def _fate(error: BaseException, timeout: float | None) -> str | None:
    if isinstance(error, TimeoutError):
        return f"timed out after {timeout:g} s"
    if isinstance(error, EOFError | ConnectionError):
        return CRASHES
    return "too large to decode" if isinstance(error, MemoryError) else None


class _Child:
    """A forked process that answers one request at a time over a socket."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.socket, theirs = socket.socketpair()
        with warnings.catch_warnings(), as_a_whole():
            # Python 3.12 warns that a lock may be held by another thread: the child touches none that it can avoid,
            # and should it ever hang, it is killed like one that hangs in a decoder.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(theirs, self.parent)
            finally:
                os._exit(1)  # no exit handlers, no buffers flushed, no stack unwound: those are the parent's
        theirs.close()
        # This runs when the thread ends too, and at the exit of multiprocessing's children, where atexit does not; and
        # never in a process that merely inherited this object.
        self.end = Finalize(self, _end, (self.pid, self.socket), exitpriority=0)

    def alive(self) -> bool:
        """Whether the child is there, and is this process's own rather than inherited from the one that forked it."""
        if self.parent != os.getpid():
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def call(self, request: list[memoryview], timeout: float | None) -> Any:
        """Return the answer; raises TimeoutError, and EOFError or ConnectionError where the child is gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        _send(self.socket, request, deadline)
        return _unpacked(_receive(self.socket, deadline), "a decoder's result cannot be read from its child process")


def _end(pid: int, ours: socket.socket) -> None:
    ours.close()
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# The child's side.


def _serve(theirs: socket.socket, parent: int) -> None:
    _settle(theirs, parent)
    with suppress(EOFError, ConnectionError):  # the parent has closed its end, or is gone
        while True:
            _send(theirs, _answer(_receive(theirs, None)), None)


def _settle(theirs: socket.socket, parent: int) -> None:
    # Launchers signal every descendant, terminals the whole group: when to stop is the parent's decision ...
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # ... but a child never outlives it.
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # A crash is a line in the ledger: handlers that print tracebacks of the program would alarm people.
    for name in _CRASHES:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    _let_go(theirs.fileno())
    # Objects of the parent are not collected here: their finalizers would stop its workers, and touching them all
    # would copy the memory that both share.
    gc.freeze()
    # Threads do not survive a fork: torch would wait for its pool for ever. One core per worker is right anyway.
    torch.set_num_threads(1)


def _let_go(kept: int) -> None:
    # Whoever waits for the end of a pipe or socket waits for every process that has it open, and what is in a file of
    # memory is there for as long: other threads' files, of which this process never hears. They are pointed at nothing
    # rather than closed: the parent's objects still know the numbers, which would soon be those of other files.
    nothing = os.open(os.devnull, os.O_RDWR)
    with suppress(FileNotFoundError):  # no /proc
        for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
            with suppress(OSError):  # the listing's own
                mode = os.fstat(number).st_mode
                shared = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
                if number > 2 and number != kept and (shared or _in_memory(number)):
                    os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _in_memory(number: int) -> bool:
    return os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:")  # noqa: PTH115


def _answer(request: list[memoryview]) -> list[memoryview]:
    try:
        function, path = _unpacked(request, "a decoder cannot be read in its child process")
        result = guarded(function, path, None)
        return _packed(("result", result), f"what {_name(function)} returns cannot be sent from a child process")
    except BrokenFile as error:
        return _reply("broken", error.reason)
    except TypeError as error:
        return _reply("unsent", str(error))
    except MemoryError:
        return _reply("broken", "too large to decode")


def _reply(kind: Literal["broken", "unsent"], sentence: str) -> list[memoryview]:
    return _packed((kind, sentence), "")


# Messages: a pickle and, beside it, the memory of its arrays as it is. Nothing here touches a file.


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # Tensors by themselves are pickled through a copy in torch's file format.
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout is torch.strided and not obj.requires_grad:
            flat = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
            return _tensor, (flat, obj.dtype, tuple(obj.shape))
        return NotImplemented


def _tensor(flat: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def _packed(value: Any, problem: str) -> list[memoryview]:
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{problem}: {error}") from error
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _unpacked(parts: list[memoryview], problem: str) -> Any:
    try:
        return pickle.loads(parts[0], buffers=parts[1:])
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{problem}: {error}") from error


def _send(link: socket.socket, parts: list[memoryview], deadline: float | None) -> None:
    header = memoryview(struct.pack(f"!{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in [header, *parts]:
        link.settimeout(_left(deadline))
        link.sendall(part)


def _receive(link: socket.socket, deadline: float | None) -> list[memoryview]:
    (count,) = struct.unpack("!Q", _read(link, 8, deadline))
    return [_read(link, length, deadline) for length in struct.unpack(f"!{count}Q", _read(link, 8 * count, deadline))]


def _read(link: socket.socket, length: int, deadline: float | None) -> memoryview:
    whole = np.empty(length, np.uint8).data  # not filled with zeros first, as a bytearray is
    done = 0
    while done < length:
        link.settimeout(_left(deadline))
        received = link.recv_into(whole[done:])
        if received == 0:
            raise EOFError
        done += received
    return whole


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
