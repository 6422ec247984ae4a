"""A rank that stops, is killed or waits for ever ends the run of all, with a sentence that names it.

Planted bugs that fail here: blaming whoever is not oneself (the rank that reads for ever would not name itself), a
watch that looks at its own rank alone (long work on rank 0 would end the run), an error of gloo that is let through.
"""

import json
import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from mmssl.distributed import Council, world
from mmssl.engine.deepspeed_setup import connect
from mmssl.engine.loop import Hooks, ignore, stop_signals
from mmssl.engine.watch import Watch
from mmssl.errors import MmsslError
from mmssl.launch import Ranks
from mmssl.pulse import beat

HANG = 0.02  # minutes


def steps(folder, rank, misfortune):
    """Take steps together; in the fourth, something happens to one of them."""
    me = world()
    connect(me, "cpu")
    council = Council(me.size)

    def report(sentence):
        (folder / "status.json").write_text(json.dumps([me.rank, sentence]))

    watch = Watch(me, council, HANG, report)
    hooks = watch.hooks(Hooks(ignore, ignore, lambda index, reason: 0, str), 0)
    with watch.watching():
        try:
            for step in range(6):
                hooks.phase("reading data")
                if step == 3 and me.rank == rank:
                    told(watch)
                    misfortune()
                hooks.phase("computing")
                dist.all_reduce(torch.ones(1))
                hooks.after(step + 1, [])
        except MmsslError as error:
            raise AssertionError("it is raised outside") from error
    assert not any(thread.is_alive() for thread in watch._threads)
    return "done"


def told(watch):
    """Wait until the others can know where this rank is."""
    while json.loads(watch._store.get(f"watch/{watch.me.rank}"))["step"] != watch.step:
        threading.Event().wait(watch.every / 4)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wait():
    threading.Event().wait()


def work_long():
    for _ in range(30):
        threading.Event().wait(HANG * 60 / 10)
        beat()


def outcome(tmp_path, rank, misfortune, size=2):
    with Ranks(steps, (tmp_path, rank, misfortune), size, logs=tmp_path) as ranks:
        codes = ranks.wait(60, grace=20 if misfortune is die else 2)
        said = [ranks.said(rank) for rank in range(size)]
        pid = ranks.pids[rank]
    status = tmp_path / "status.json"
    return codes, said, json.loads(status.read_text()) if status.exists() else None, pid


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 3)])
def test_a_stopped_rank_is_named_by_the_lowest_that_is_left(tmp_path, rank, size):
    codes, said, (who, sentence), pid = outcome(tmp_path, rank, stop, size)
    speaker = 1 if rank == 0 else 0
    assert who == speaker
    assert codes[rank] == -signal.SIGKILL
    assert {code for other, code in enumerate(codes) if other != rank} == {1}
    assert sentence.startswith(f"rank {rank} (process {pid} on ")
    assert (
        f"gave no sign of life, and nothing went on for {HANG} minutes (train.hang_minutes); add --resume" in sentence
    )
    if rank != 0:
        assert "last seen reading data after step 3, " in sentence  # of rank 0 itself there are no notes to be had
    assert said[speaker].strip() == f"mmssl: {sentence}"
    assert [text for other, text in enumerate(said) if other != speaker] == [""] * (size - 1)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_ever_by_itself_is_the_one_that_is_waited_for(tmp_path, rank):
    codes, said, (who, sentence), pid = outcome(tmp_path, rank, wait)
    assert codes == [1, 1]
    assert who == 0
    assert sentence.startswith(f"the other ranks wait for rank {rank} (process {pid} on ")
    assert "which is reading data after step 3, and" in sentence
    assert said == [f"mmssl: {sentence}\n", ""]


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_at_once(tmp_path, rank):
    codes, said, (who, sentence), pid = outcome(tmp_path, rank, die)
    left = 1 - rank
    assert codes[rank] == -signal.SIGKILL
    assert codes[left] == 1
    assert who == left
    assert sentence.startswith(f"rank {rank} (process {pid} on ")
    assert "has gone" in sentence
    assert "add --resume" in sentence
    assert f"MmsslError: {sentence}" in said[left]


def ended_by_a_launcher(folder, rank):
    """One rank is killed; the launcher ends the other at once: before it tells who left, and while it does."""
    me = world()
    connect(me, "cpu")

    def report(sentence):
        os.kill(os.getpid(), signal.SIGTERM)
        (folder / "status.json").write_text(json.dumps([me.rank, sentence]))

    watch = Watch(me, Council(me.size), HANG, report)
    try:
        with watch.watching():
            try:
                with stop_signals():
                    if me.rank == rank:
                        die()
                    dist.all_reduce(torch.ones(1))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_left_tells_who_has_gone_before_it_heeds_the_launcher(tmp_path, rank):
    with Ranks(ended_by_a_launcher, (tmp_path, rank), 2, logs=tmp_path) as ranks:
        codes = ranks.wait(60, grace=20)
        said = ranks.said(1 - rank)
    assert codes[1 - rank] == 1, said
    who, sentence = json.loads((tmp_path / "status.json").read_text())
    assert who == 1 - rank
    assert sentence.startswith(f"rank {rank} (process ")
    assert f"MmsslError: {sentence}" in said


@pytest.mark.distributed
def test_long_work_on_one_rank_that_gets_on_is_left_alone(tmp_path):
    codes, said, status, _ = outcome(tmp_path, 0, work_long)
    assert codes == [0, 0]
    assert said == ["", ""]
    assert status is None


def test_a_process_alone_is_not_watched():
    before = threading.active_count()
    watch = Watch(world(), Council(1), HANG, pytest.fail)
    with pytest.raises(RuntimeError, match="unrelated"), watch.watching():
        raise RuntimeError("unrelated")
    assert threading.active_count() == before
