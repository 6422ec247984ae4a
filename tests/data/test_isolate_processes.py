"""Isolated decoding among signals, threads and processes."""

import atexit
import functools
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from isolating import LONG, asleep, ended, exiting, is_gone, pid, read, reason
from torch.utils.data import DataLoader, Dataset

from mmssl.data import isolate
from mmssl.data.isolate import close, isolated
from mmssl.data.local import shown

pytestmark = pytest.mark.skipif(not isolate._CAN_FORK, reason="children are forked")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_child():
    close()
    yield
    close()


@pytest.fixture
def some_file(tmp_path):
    path = tmp_path / "some.bin"
    path.write_bytes(b"content")
    return str(path)


def test_the_child_leaves_stopping_to_its_parent(some_file):
    child = isolated(pid, some_file, LONG)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    assert isolated(pid, some_file, LONG) == child


def test_an_interrupt_while_waiting_ends_the_child(some_file):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    child = isolated(pid, some_file, LONG)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            isolated(functools.partial(interrupting, os.getpid()), some_file, LONG)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert is_gone(child)
    assert isolated(read, some_file, LONG) == b"content"


def interrupting(process, path):
    os.kill(process, signal.SIGUSR1)
    time.sleep(LONG)


def test_each_thread_has_a_child_that_ends_with_it(some_file):
    children = [isolated(pid, some_file, LONG)]

    def work():
        children.extend(isolated(pid, some_file, LONG) for _ in range(2))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(set(children[-3:])) == 2
        assert is_gone(children[-1])
    assert isolated(pid, some_file, LONG) == children[0]


def resized(path):
    return torch.nn.functional.interpolate(torch.ones(1, 3, 64, 64), size=(256, 256), mode="bilinear") @ torch.eye(256)


def test_torch_works_in_the_child_after_many_threads_in_the_parent(some_file):
    torch.set_num_threads(2)
    assert (torch.ones(600, 600) @ torch.ones(600, 600)).max() == 600
    torch.testing.assert_close(isolated(resized, some_file, 20.0), torch.ones(1, 3, 256, 256))
    assert isolated(threads, some_file, LONG) == 1


def threads(path):
    return torch.get_num_threads()


class Files(Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i in (2, 3):
            assert reason(asleep, self.path, timeout=0.1) == "timed out after 0.1 s"
        return os.getpid(), isolated(pid, self.path, LONG)


def test_in_data_workers(some_file):
    mine = isolated(pid, some_file, LONG)  # which the workers inherit and must not use
    loader = DataLoader(Files(some_file), batch_size=None, num_workers=2)
    workers, children = zip(*loader, strict=True)
    assert len(set(workers)) == 2
    assert len(set(children)) == 4  # one each, and another each after the hanging file
    assert children[4:] == children[2:4]
    assert all(is_gone(process) for process in children)
    assert isolated(pid, some_file, LONG) == mine


def report(sink, path):
    sink.send(isolated(pid, path, LONG))
    signal.pause()


def report_at_work(path, sink):
    Path(sink).write_text(str(os.getpid()))
    asleep(path)


def hang(fifo, path):
    isolated(functools.partial(report_at_work, sink=fifo), path, None)


@pytest.mark.parametrize("signalled", [True, False])
def test_an_idle_child_dies_with_its_parent(some_file, monkeypatch, signalled):
    if not signalled:
        monkeypatch.setattr(isolate, "_PRCTL", None)
    source, sink = FORK.Pipe(duplex=False)
    parent = FORK.Process(target=report, args=(sink, some_file))
    parent.start()
    wait = ended(source.recv())
    parent.kill()
    assert wait()
    parent.join()


@pytest.mark.skipif(sys.platform != "linux", reason="takes prctl")
def test_a_child_at_work_dies_with_its_parent(some_file, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    parent = FORK.Process(target=hang, args=(fifo, some_file))
    parent.start()
    wait = ended(int(Path(fifo).read_text()))
    parent.kill()
    assert wait()
    parent.join()


def test_the_child_keeps_no_pipe_open(some_file):
    source, sink = os.pipe()
    isolated(pid, some_file, LONG)
    os.close(sink)
    assert select.select([source], [], [], LONG)[0]
    assert os.read(source, 1) == b""
    os.close(source)


def memory_files(path):
    found = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link).startswith("/memfd:") for link in found)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="takes files of memory")
def test_the_child_keeps_no_file_of_memory_of_other_threads(some_file):
    number = os.memfd_create("upload")
    try:
        assert isolated(memory_files, some_file, LONG) == 0
        links = Path(f"/proc/{isolated(pid, some_file, LONG)}/fd").iterdir()
        assert not any("memfd:" in str(link.readlink()) for link in links)
        with shown(b"content", ".bin") as name:  # which the parent has, and the child opens by its name
            assert isolated(read, name, LONG) == b"content"
    finally:
        os.close(number)


def test_the_child_leaves_exit_handlers_and_buffers_to_the_parent(some_file, tmp_path):
    log = tmp_path / "log"

    leave_a_trace = atexit.register(functools.partial(log.write_text, "exit handler"))
    try:
        with (tmp_path / "buffered").open("w") as stream:
            stream.write("once")
            assert reason(exiting, some_file) == "crashes its decoder"
            assert Path(stream.name).read_text() == ""
    finally:
        atexit.unregister(leave_a_trace)
    assert not log.exists()


def test_without_fork_this_is_guarded(some_file, monkeypatch):
    monkeypatch.setattr(isolate, "_CAN_FORK", False)
    assert isolated(pid, some_file, LONG) == os.getpid()
