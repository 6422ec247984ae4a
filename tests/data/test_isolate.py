import ctypes
import faulthandler
import functools
import multiprocessing
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from isolating import LONG, asleep, ended, exiting, is_gone, pid, read, reason

from mmssl.data import isolate
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.isolate import close, isolated

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


# Results.


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, path):
        return np.full((2, 3), self.factor)

    def method(self, path):
        return self.factor, path


def many(path, size):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(size, 3))
    tensor = torch.from_numpy(array)
    return {
        "array": array,
        "fortran": np.asfortranarray(array),
        "strided": array[::2],
        "empty": array[:0],
        "scalar": np.float32(3),
        "tensor": tensor,
        "half": tensor.to(torch.bfloat16),
        "bool": tensor > 0,
        "transposed": tensor.T,
        "expanded": tensor[:1].expand(5, 3),
        "none": torch.empty(0, 4),
        "0-d": torch.tensor(7),
        "complex": tensor.to(torch.complex64),
        "graph": torch.zeros(2, requires_grad=True),
        "text": [path, b"bytes", None],
    }


@pytest.mark.parametrize("size", [4, 300_000])
def test_results_are_those_of_guarded(some_file, size):
    function = functools.partial(many, size=size)
    ours, expected = isolated(function, some_file, LONG), guarded(function, some_file, LONG)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert type(ours[name]) is type(value)
        if isinstance(value, torch.Tensor):
            assert ours[name].requires_grad == value.requires_grad
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(ours[name], value, strict=True)
        else:
            assert ours[name] == value


def total(array, path):
    return array.sum()


def test_callables_of_all_kinds_travel(some_file):
    assert (isolated(Scaled(2.0), some_file, LONG) == 2).all()
    assert isolated(Scaled(2.0).method, some_file, None) == (2.0, some_file)
    assert isolated(functools.partial(total, np.ones(1_000_000)), some_file, LONG) == 1_000_000


def test_a_result_owns_its_memory(some_file):
    first = isolated(Scaled(1.0), some_file, LONG)
    second = isolated(Scaled(2.0), some_file, LONG)
    assert (first == 1).all()
    second += 1
    assert (first == 1).all()
    assert (isolated(Scaled(2.0), some_file, LONG) == 2).all()


def test_the_child_is_reused_and_closed(some_file):
    child = isolated(pid, some_file, LONG)
    assert child != os.getpid()
    assert isolated(pid, some_file, LONG) == child
    close()
    assert is_gone(child)
    close()
    assert isolated(pid, some_file, LONG) not in (child, os.getpid())


# Failures.


@dataclass(frozen=True)
class Failing:
    error: Exception

    def __call__(self, path):
        raise self.error


class Unpicklable(ValueError):
    def __reduce__(self):
        raise RuntimeError("stays where it is")


def unpicklable_error(path):
    raise Unpicklable("bad header")


def test_reasons_are_those_of_guarded(tmp_path, some_file):
    (tmp_path / "empty").touch()
    errors = [
        OSError("image file is truncated"),
        EOFError(),
        TimeoutError("of the network"),
        ConnectionResetError("of the network"),
        MemoryError(),
        PermissionError(13, "Permission denied"),
        BrokenFile("too short"),
        KeyError(),
        TypeError("a frame is no array"),
    ]
    cases = [(Failing(error), some_file) for error in errors]
    cases += [(read, tmp_path / "gone"), (read, tmp_path), (unpicklable_error, some_file)]
    cases += [(Failing(ValueError("no magic number")), tmp_path / "empty")]
    child = isolated(pid, some_file, LONG)
    for function, path in cases:
        assert reason(function, path) == reason(function, path, call=guarded)
    assert isolated(pid, some_file, LONG) == child


def asleep_with_the_lock(path):
    ctypes.PyDLL(None).sleep(int(LONG))


def matching(path):
    return re.match(r"(a*)*b", "a" * 60)


@pytest.mark.parametrize("function", [asleep, asleep_with_the_lock, matching])
def test_a_hanging_decoder_is_killed(some_file, function):
    child = isolated(pid, some_file, LONG)
    assert reason(function, some_file, timeout=0.1) == "timed out after 0.1 s"
    assert is_gone(child)
    assert isolated(pid, some_file, LONG) != child


def test_a_limit_from_outside_kills_too(some_file):
    child = isolated(pid, some_file, LONG)
    expected = "timed out after 0.1 s"
    assert reason(lambda path: isolated(asleep, path, None), some_file, timeout=0.1, call=guarded) == expected
    assert is_gone(child)
    assert isolated(read, some_file, LONG) == b"content"


def aborting(path):
    os.abort()


def dangling(path):
    return ctypes.string_at(0)


def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("function", [aborting, dangling, exiting, killed])
def test_a_crashing_decoder_is_replaced(some_file, function):
    child = isolated(pid, some_file, LONG)
    assert reason(function, some_file) == "crashes its decoder"
    assert is_gone(child)
    assert isolated(read, some_file, LONG) == b"content"


def crash_with_handlers(log, path):
    with Path(log).open("w") as stream:
        faulthandler.enable(stream)
        assert reason(dangling, path) == "crashes its decoder"


def test_a_crash_prints_no_traceback_of_the_program(some_file, tmp_path):
    log = tmp_path / "log"
    # In a process of its own: pytest has such handlers too, and keeps them.
    process = FORK.Process(target=crash_with_handlers, args=(log, some_file))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert log.read_text() == ""


def test_a_file_is_not_blamed_for_a_child_that_was_gone_before(some_file):
    child = isolated(pid, some_file, LONG)
    wait = ended(child)
    os.kill(child, signal.SIGKILL)
    assert wait()
    assert isolated(pid, some_file, LONG) != child
    assert is_gone(child)


def test_a_result_that_does_not_fit_here_is_too_large(some_file, monkeypatch):
    def too_large(link, deadline):
        raise MemoryError

    child = isolated(pid, some_file, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(isolate, "_receive", too_large)
        assert reason(read, some_file) == "too large to decode"
    assert is_gone(child)
    assert isolated(read, some_file, LONG) == b"content"


def lock(path):
    return threading.Lock()


class OneWay:
    def __reduce__(self):
        return int, ("not a number",)


def one_way(path):
    return OneWay()


def test_what_cannot_be_pickled_is_named(some_file):
    with pytest.raises(TypeError, match=r"^test_what\S*<lambda> cannot be sent to a child process: "):
        isolated(lambda path: path, some_file, LONG)
    with pytest.raises(TypeError, match=r"^what lock returns cannot be sent from a child process: .*lock"):
        isolated(lock, some_file, LONG)
    with pytest.raises(TypeError, match=r"^a decoder's result cannot be read from its child process: invalid literal"):
        isolated(one_way, some_file, LONG)
    assert isolated(read, some_file, LONG) == b"content"


def test_what_is_newer_than_the_child_is_known_to_the_next(some_file, monkeypatch):
    isolated(pid, some_file, LONG)

    def newer(path):
        return "new"

    newer.__qualname__ = "newer"
    monkeypatch.setitem(globals(), "newer", newer)
    with pytest.raises(TypeError, match=r"^a decoder cannot be read in its child process: .*newer"):
        isolated(newer, some_file, LONG)
    assert isolated(newer, some_file, LONG) == "new"
