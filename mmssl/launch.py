"""Ranks on this machine: one function in several processes at once, as a launcher would start a program.

For what starts ranks by itself and looks at how they end: ``verify``, ``drill`` and the tests. People's runs are
started by ``deepspeed``, ``torchrun`` or ``srun``. A server process has imported what takes long (torch, DeepSpeed);
the ranks are its forks, so that they start in a fraction of a second.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from mmssl.errors import MmsslError, UserError

PRELOADED = "mmssl.preload"
GRACE = 5.0
"""Seconds that the others have to end by themselves when a rank has failed, before they are killed."""


class Ranks:
    """A function running as ``size`` ranks, with the environment that a launcher would set."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
        size: int = 2,
        *,
        logs: Path | None = None,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        """Start ``function(*arguments)``, which modules can import by name, on every rank.

        What ranks print goes to ``logs``/rank-N.txt, or where this process prints. ``threads`` is each rank's number
        of threads in torch. The environment is this process's, with ``environment`` on top.
        """
        context = _context(function)
        self.size, self.logs, self._results = size, logs, {}  # type: tuple[int, Path | None, dict[int, Any]]
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.processes, self._pipes = [], []  # type: tuple[list[Any], list[Connection]]
        for rank in range(size):
            mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{k: str(v) for k, v in mine.items()}}
            whole = {**os.environ, **(environment or {}), **launched}
            log = None if logs is None else str(logs / f"rank-{rank}.txt")
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(function, tuple(arguments), whole, log, threads, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        """The ranks' process numbers."""
        return [process.pid for process in self.processes]

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], signum)

    def kill(self) -> None:
        """Kill what still runs, and wait for its end."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float, grace: float = GRACE) -> list[int]:
        """Wait for the ranks and return their exit codes, the negative number of the signal that ended one.

        As under a launcher, ranks that outlive one that failed are killed, after ``grace`` seconds; and so are all when
        ``timeout`` seconds are over.
        """
        deadline = time.monotonic() + timeout
        pending = {process.sentinel: process for process in self.processes}
        pipes = dict(zip(self._pipes, range(self.size), strict=True))
        while pending and time.monotonic() < deadline:
            for one in wait([*pending, *pipes], max(0.0, deadline - time.monotonic())):
                if isinstance(one, int):
                    process = pending.pop(one)
                    process.join()
                    if process.exitcode:
                        deadline = min(deadline, time.monotonic() + grace)
                elif isinstance(one, Connection):
                    self._receive(one, pipes.pop(one))
        self.kill()
        for one, rank in pipes.items():
            self._receive(one, rank)
        return [process.exitcode for process in self.processes]

    def _receive(self, pipe: Connection, rank: int) -> None:
        try:
            if pipe.poll():
                self._results[rank] = pipe.recv()
        except (EOFError, OSError):
            pass  # it ended without a word

    def results(self, timeout: float) -> list[Any]:
        """Wait, and return what the function returned on each rank.

        Raises MmsslError where one failed, with its last words.
        """
        codes = self.wait(timeout)
        bad = [rank for rank, code in enumerate(codes) if code != 0]
        if bad:
            # The others may have been killed for its sake, or have noticed that it had gone.
            rank = next((r for r in bad if r in self._results), bad[0])
            said = self._results.get(rank) or self.said(rank) or "it said nothing"
            if isinstance(said, UserError):  # the user's mistake, whichever process found it
                raise said
            raise MmsslError(f"rank {rank} of {self.size} ended with code {codes[rank]} (all: {codes}): {said}")
        return [self._results[rank] for rank in range(self.size)]

    def said(self, rank: int) -> str:
        """Return what a rank printed, if that was kept."""
        file = None if self.logs is None else self.logs / f"rank-{rank}.txt"
        return file.read_text(encoding="utf-8", errors="replace") if file is not None and file.exists() else ""


def _context(function: Callable[..., Any]) -> Any:
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")  # a fork cannot use a GPU of which its parent knows
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED, function.__module__])
    # The server would look for them on the path of a fresh Python, and pass over in silence what is not there.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def run(
    function: Callable[..., Any], arguments: Sequence[Any] = (), size: int = 2, timeout: float = 120.0
) -> list[Any]:
    """Return what ``function(*arguments)`` returns on each of ``size`` ranks; see ``Ranks``."""
    with Ranks(function, arguments, size) as ranks:
        return ranks.results(timeout)


def free_port() -> int:
    """Return a port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: str | None,
    threads: int, pipe: Connection,
) -> None:  # fmt: skip
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if log is not None:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        # The server's own may belong to a test runner, or be closed.
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(2), "w", buffering=1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # As in a process that a launcher started: data workers are forks of the rank, and leave when it is killed.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    gc.freeze()  # what was imported stays, and would be looked at again in each of DeepSpeed's many collections
    code = 0
    try:
        pipe.send(function(*arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:  # whatever it is, the parent is told and raises
        traceback.print_exc()
        words = "".join(traceback.format_exception_only(error)).strip()
        pipe.send(error if isinstance(error, UserError) else words)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of gloo or of a data loader that never end would keep a finished rank.
    os._exit(code)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
