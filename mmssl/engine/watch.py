"""Who the others wait for: a run of several ranks that does not get on ends with a sentence that names a rank.

Every rank notes in the store through which the ranks found each other what it does, and that it is alive. Where nothing
goes on anywhere for ``train.hang_minutes``, the notes tell who is behind. One long piece of work on one rank is no such
case as long as its ``pulse`` beats. The threads here only look and tell: nothing of the training waits for them.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
from torch.distributed import distributed_c10d

from mmssl.distributed import Council, World, lost
from mmssl.engine.loop import Hooks
from mmssl.errors import MmsslError
from mmssl.pulse import beat, beats

RESUME = "add --resume to go on from the last checkpoint"
SEARCH = 5.0
"""Seconds in which a rank that lost its connection looks for whoever has gone."""


class Peer(NamedTuple):
    """Where a rank runs."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def gone(self, here: str) -> bool:
        """Whether its process has ended, as far as that can be seen from the host ``here``."""
        if self.host != here:
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


class Notes:
    """What was last heard of the other ranks, and when it last changed by this rank's clock."""

    def __init__(self, size: int) -> None:
        now = time.monotonic()
        self.last: list[Mapping[str, Any]] = [{}] * size
        self.moved, self.alive, self.read = [now] * size, [now] * size, 0

    def update(self, found: list[Mapping[str, Any]]) -> None:
        """Take what was read."""
        now = time.monotonic()
        for rank, (before, note) in enumerate(zip(self.last, found, strict=True)):
            self.moved[rank] = now if before.get("beats") != note["beats"] else self.moved[rank]
            self.alive[rank] = now if before.get("alive") != note["alive"] else self.alive[rank]
        self.last, self.read = found, self.read + 1

    def silent(self, rank: int, seconds: float) -> bool:
        """Whether a rank gave no sign of life for so long."""
        return time.monotonic() - self.alive[rank] > seconds

    def doing(self, rank: int) -> str:
        """Return what a rank does: "computing after step 5"."""
        note = self.last[rank]
        return f"{note['word']} after step {note['step']}"

    def last_seen(self, rank: int) -> str:
        """Return what a rank did when it was last heard of, as an addition to its name; nothing where it never was."""
        return f", last seen {self.doing(rank)}," if self.last[rank] else ""


class Watch:
    """Watches over the ranks of a run; alone it does nothing. ``report`` writes down a sentence that ends the run."""

    def __init__(self, me: World, council: Council, minutes: float, report: Callable[[str], None]) -> None:
        """Begin. A collective."""
        self.me, self.minutes, self.report = me, minutes, report
        self.patience, self.every = 60 * minutes, min(5.0, max(0.05, 3 * minutes))
        self.word, self.step, self.phases = "beginning", 0, 0
        self.here, self.verdict = socket.gethostname(), ""
        self.peers = [Peer(rank, *where) for rank, where in enumerate(council.gather((self.here, os.getpid())))]
        self.notes = Notes(me.size)
        self._search, self._end = threading.Event(), threading.Event()
        self._beats, self._moved = beats(), time.monotonic()
        self._threads: list[threading.Thread] = []
        if me.size == 1:
            return
        patient(minutes)
        # A store of its own: one that waits for an answer keeps others from asking.
        self._store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._tell(0)
        council.gather(None)  # so that there is a note of everybody
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def hooks(self, hooks: Hooks, step: int) -> Hooks:
        """Return the hooks of a loop that begins after ``step`` steps, with what the watch has to know."""
        self.step = step

        def phase(word: str) -> None:
            self.word, self.phases = word, self.phases + 1
            beat()
            hooks.phase(word)

        def after(step: int, micros: Any) -> None:
            self.step = step
            hooks.after(step, micros)

        return replace(hooks, phase=phase, after=after)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn what is raised where the others are gone into a sentence; when left, nothing is watched any more."""
        heeded = signal.getsignal(signal.SIGTERM)
        try:
            yield
        except RuntimeError as error:
            if not lost(error):
                raise
            handle(signal.SIG_IGN)  # the launcher ends the others of a rank that has gone, but they have to tell first
            if self.verdict:  # the others have left for a reason that is being told
                threading.Event().wait()
            left, sentence = self._who_left(error)
            if self.me.rank == next(peer.rank for peer in self.peers if peer not in left):
                self.report(sentence)
            raise MmsslError(sentence) from None
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join(1)  # or longer, where the store does not answer, but nobody waits for that
            handle(heeded)

    def _tell(self, alive: int) -> None:
        note = {"alive": alive, "beats": beats(), "phases": self.phases, "word": self.word, "step": self.step}
        self._store.set(f"watch/{self.me.rank}", json.dumps(note))

    def _talk(self) -> None:
        # Tells, and where nothing moves here asks. If the process that holds the store has stopped, it waits for ever.
        alive, keys = 0, [f"watch/{rank}" for rank in range(self.me.size)]
        try:
            while not self._end.wait(self.every):
                alive += 1
                self._tell(alive)
                if self._search.is_set() or self._idle() > self.patience / 2:
                    self.notes.update([json.loads(note) for note in self._store.multi_get(keys)])
        except RuntimeError:
            return  # the store has gone, and so has its process

    def _idle(self) -> float:
        if self._beats != beats():
            self._beats, self._moved = beats(), time.monotonic()
        return time.monotonic() - self._moved

    def _judge(self) -> None:
        while not self._end.wait(self.every):
            still = min(time.monotonic() - moved for moved in self.notes.moved)
            if self._idle() >= self.patience and still >= self.patience / 2:
                break
        else:
            return
        silent = [rank for rank in range(self.me.size) if rank != self.me.rank and self._is_silent(rank)]
        self.verdict = self._blame(silent)
        first = next(rank for rank in range(self.me.size) if rank not in silent)
        if self.me.rank == first:
            print(f"mmssl: {self.verdict}", file=sys.stderr, flush=True)
            with suppress(OSError):  # a full disk, perhaps the reason for all of it
                self.report(self.verdict)
        # All come to the same end about now; who has spoken leaves last, or it would be missed and complained of.
        time.sleep((4 if self.me.rank == first else 2) * (self.every + 0.2))
        os._exit(1)

    def _is_silent(self, rank: int) -> bool:
        # Where the store does not answer, rank 0, which holds it, has stopped; of the others nothing is known.
        return self.notes.silent(rank, self.patience / 4) and (self.notes.read > 1 or rank == 0)

    def _blame(self, silent: list[int]) -> str:
        long = f"nothing went on for {self.minutes:g} minutes (train.hang_minutes)"
        if silent:
            who = " and ".join(f"{self.peers[rank]}{self.notes.last_seen(rank)}" for rank in silent)
            return f"{who} gave no sign of life, and {long}; {RESUME}"
        counts = [note["phases"] for note in self.notes.last]
        behind = [rank for rank, count in enumerate(counts) if count == min(counts)]
        who = " and ".join(f"{self.peers[rank]}, which is {self.notes.doing(rank)}" for rank in behind)
        if len(behind) < self.me.size:
            return f"the other ranks wait for {who}, and {long}; {RESUME}"
        return f"no rank gets on: all are {self.notes.doing(0)}, and {long}; {RESUME}"

    def _who_left(self, error: RuntimeError) -> tuple[list[Peer], str]:
        self._search.set()
        deadline = time.monotonic() + SEARCH
        left: list[Peer] = []
        while not left and time.monotonic() < deadline:
            left = [peer for peer in self.peers if peer.gone(self.here)]
            time.sleep(0 if left else min(0.1, self.every / 4))
        first = str(error).strip().splitlines()[0]
        if not left:
            return left, f"the connection between the ranks was lost ({first}); {RESUME}"
        who = " and ".join(f"{peer}{self.notes.last_seen(peer.rank)}" for peer in left)
        return left, f"{who} has gone; what it said is above, if it could; {RESUME}"


def handle(handler: Any) -> None:
    """Answer SIGTERM so from now on, where that is ours to say: in the main thread."""
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def patient(minutes: float) -> None:
    """Let collectives wait until the watch has long spoken: for twice its time, and no less than they do by default."""
    longest = max(2 * minutes, 30.0, float(os.environ.get("DEEPSPEED_TIMEOUT", 0)))
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(minutes=longest), group)
