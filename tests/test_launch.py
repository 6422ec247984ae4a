"""Ranks on this machine: what they return, how they end, and that none outlives what it was started for."""

import os
import signal
import sys
from contextlib import suppress
from multiprocessing import Pipe, forkserver

import psutil
import pytest
import torch
import torch.distributed as dist

from mmssl.distributed import world
from mmssl.errors import MmsslError
from mmssl.launch import Ranks, free_port, run


def facts(word):
    """What a rank knows of itself."""
    return word, world(), torch.get_num_threads(), os.environ.get("SAID"), os.getpid()


def add_up():
    """The sum over the ranks of their numbers."""
    dist.init_process_group("gloo")
    number = torch.tensor(float(world().rank + 1))
    dist.all_reduce(number)
    return number.item()


def leave(code, whom):
    """End with a code, if it is this rank."""
    print(f"rank {world().rank} was here")
    print("and complained", file=sys.stderr)
    if world().rank == whom:
        sys.exit(code)


def fail_alone():
    """Fail on rank 1 while the other waits."""
    if world().rank == 1:
        raise ValueError("this is what was wrong")
    signal.pause()


def wait_for_ever(pipe=None):
    """Do nothing until the end."""
    if pipe is not None:
        pipe.send(os.getpid())
    signal.pause()


def test_ranks_know_their_place_and_return_in_its_order(monkeypatch):
    with Ranks(facts, ("hello",), 3, environment={"SAID": "yes"}, threads=2) as ranks:
        pids = ranks.pids
        found = ranks.results(60)
    assert [(word, threads, said, pid) for word, _, threads, said, pid in found] == [
        ("hello", 2, "yes", pid) for pid in pids
    ]
    assert [(me.rank, me.size, me.local_rank, me.local_size) for _, me, *_ in found] == [(r, 3, r, 3) for r in range(3)]


def test_ranks_find_each_other():
    assert run(add_up, size=2, timeout=60) == [3.0, 3.0]


def test_exit_codes_and_logs_are_kept(tmp_path):
    with Ranks(leave, (7, 1), 2, logs=tmp_path / "logs") as ranks:
        assert ranks.wait(60) == [0, 7]
        assert ranks.said(0) == "rank 0 was here\nand complained\n"
        assert (tmp_path / "logs" / "rank-1.txt").read_text().startswith("rank 1 was here")
    assert Ranks(leave, (7, 1), 1).said(0) == ""


def test_a_rank_that_fails_ends_the_others_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks.wait, "__defaults__", (0.0,))  # nobody is given time to end by himself
    with (
        Ranks(fail_alone, (), 2, logs=tmp_path) as ranks,
        pytest.raises(MmsslError, match=r"rank 1 of 2 ended with code 1 .*ValueError: this is what was wrong"),
    ):
        ranks.results(60)
    with Ranks(fail_alone, (), 2, logs=tmp_path) as ranks:
        assert ranks.wait(60) == [-signal.SIGKILL, 1]


def test_a_signal_ends_a_rank_with_its_number():
    with Ranks(wait_for_ever, (), 2) as ranks:
        ranks.signal(0, signal.SIGTERM)
        assert ranks.wait(60, grace=0.0)[0] == -signal.SIGTERM


def test_when_the_time_is_over_all_are_killed():
    with Ranks(wait_for_ever, (), 2) as ranks:
        assert ranks.wait(0.0) == [-signal.SIGKILL] * 2


def test_leaving_the_block_kills_what_runs():
    with Ranks(wait_for_ever, (), 2) as ranks:
        pids = ranks.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ranks_do_not_outlive_who_started_them():
    ours, theirs = Pipe()
    run(world, size=1, timeout=60)  # the server is there
    starter = os.fork()
    if not starter:
        with suppress(BaseException):
            # It is there, and no child of this process.
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
            keep = Ranks(wait_for_ever, (theirs,), 1)
            signal.pause()
            keep.kill()
        os._exit(1)
    assert ours.poll(60)
    orphan = psutil.Process(ours.recv())
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    gone, alive = psutil.wait_procs([orphan], timeout=30)
    assert gone
    assert not alive


def test_ports_are_free():
    assert 1024 < free_port() < 65536
