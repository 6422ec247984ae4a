import contextlib
import signal
import threading
from pathlib import Path

import pytest

from mmssl.data.guard import BrokenFile, as_a_whole, guarded


@pytest.fixture
def some_file(tmp_path):
    path = tmp_path / "some.bin"
    path.write_bytes(b"content")
    return str(path)


def failing(error):
    def decode(path):
        raise error

    return decode


def reason(decode, path, timeout=30.0):
    with pytest.raises(BrokenFile) as caught:
        guarded(decode, str(path), timeout)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


def read(path):
    return Path(path).read_bytes()


def test_a_good_file_passes_through(some_file):
    assert guarded(read, some_file, 30.0) == b"content"


def test_reasons_of_the_file_system(tmp_path, some_file):
    (tmp_path / "empty").touch()

    def unreadable(path):
        raise ValueError("no magic number")

    assert reason(read, tmp_path / "gone") == "no such file"
    assert reason(read, tmp_path) == "is a folder"
    assert reason(unreadable, tmp_path / "empty") == "empty file"
    assert reason(failing(PermissionError(13, "Permission denied")), some_file) == "permission denied"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("image file is truncated (12 bytes not processed)"), "truncated"),
        (RuntimeError("Premature end of JPEG file"), "truncated"),
        (EOFError(), "truncated"),
        (MemoryError(), "too large to decode"),
        (BrokenFile("too short"), "too short"),
        (ValueError("bad header\nand more"), "bad header"),
        (SyntaxError("broken PNG file"), "broken PNG file"),
        (FileNotFoundError(2, "No such file or directory", "/srv/x"), "cannot be read: No such file or directory"),
        (OSError(24, "Too many open files"), "cannot be read: Too many open files"),
        (KeyError(), "KeyError"),
        (KeyError("dim"), "KeyError: 'dim'"),
    ],
)
def test_reasons_of_decoders(some_file, error, expected):
    assert reason(failing(error), some_file) == expected


def test_a_reason_is_short_and_does_not_repeat_the_path(some_file):
    assert reason(failing(OSError(f"cannot open {some_file!r}")), some_file) == "cannot open"
    assert len(reason(failing(OSError("x" * 10_000)), some_file)) < 200


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_program_passes(some_file, error):
    with pytest.raises(error):
        guarded(failing(error()), some_file, 30.0)


def hang(path):
    # Decoders swallow all kinds of exceptions on their way; the limit must come through.
    with contextlib.suppress(Exception):
        while True:
            signal.pause()
    return b""


def test_a_hanging_decoder_is_interrupted(some_file):
    assert reason(hang, some_file, timeout=0.05) == "timed out after 0.05 s"


def test_the_alarm_of_others_is_put_back(some_file):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    timer = signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        guarded(read, some_file, 30.0)
        reason(hang, some_file, timeout=0.05)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 50 < left < 100
        signal.raise_signal(signal.SIGALRM)
        assert rang == [True]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_no_alarm_is_left_behind(some_file):
    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        guarded(read, some_file, 30.0)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_other_threads_decode_without_a_limit(some_file):
    results = []
    thread = threading.Thread(target=lambda: results.append(guarded(read, some_file, 0.01)))
    thread.start()
    thread.join()
    assert results == [b"content"]


def test_what_is_done_as_a_whole_is_interrupted_afterwards(some_file):
    done = []

    def decode(_path):
        with as_a_whole():
            signal.raise_signal(signal.SIGALRM)
            done.append(True)
        hang(_path)

    assert reason(decode, some_file, timeout=30.0) == "timed out after 30 s"
    assert done == [True]
