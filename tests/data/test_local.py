import os
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
from sharding import member, read, write_tar

from mmssl.data import local as module
from mmssl.data.fragment import Span, overlapping, real
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.isolate import close, isolated
from mmssl.data.local import local, suffix_of
from mmssl.data.parts import block, container, stamp


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(module, "_LINKS", str(folder))
    return folder


@pytest.fixture
def path(tmp_path):
    """A member of a shard."""
    return str(member(write_tar(tmp_path / "a.tar", [("x/film.MP4", b"moving" * 1000)]), 0))


def both(function, path):
    """What a function of a file says in this process and in a child of it."""
    return guarded(function, path, None), isolated(function, path, None)


def look(path):
    file = Path(path)
    return file.suffix, file.stat().st_size, file.is_dir(), file.read_bytes()[:6]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_member_is_a_file_with_its_suffix_here_and_in_child_processes(path, temporary, monkeypatch, in_memory):
    monkeypatch.setattr(module, "_IN_MEMORY", in_memory)
    assert both(look, path) == ((".mp4", 6000, False, b"moving"),) * 2
    # What the outer one made, the child of the inner one opens.
    assert guarded(partial(isolated, look, timeout=None), path, None)[3] == b"moving"
    assert not any(temporary.iterdir())


def test_ordinary_files_and_texts_are_what_they_are(tmp_path):
    for path in (str(tmp_path / "a.png"), str(tmp_path / "a.wav#t=1,2"), "data:,a%20cat"):
        with local(path) as name:
            assert name is path


def test_a_piece_stays_a_piece(path):
    with local(f"{path}#t=1,2.5") as name:
        assert name.endswith(".mp4#t=1,2.5")
        assert read(name.removesuffix("#t=1,2.5"))[:6] == b"moving"


def refuse(path):
    raise ValueError(f"{path} is no good")


def vanish(path):
    raise FileNotFoundError(2, "No such file or directory", path)


def test_reasons_name_no_file_that_a_person_has_not_given(path):
    for function, words in ((refuse, "is no good"), (vanish, "cannot be read: No such file or directory")):
        with pytest.raises(BrokenFile) as caught:
            guarded(function, path, None)
        assert caught.value.reason.startswith(words)
        assert "mmssl-" not in caught.value.reason


def hang(path):
    while True:
        signal.pause()


def test_nothing_is_left_behind_by_a_decoder_that_hangs(path, temporary):
    with pytest.raises(BrokenFile, match="timed out"):
        guarded(hang, path, 0.1)
    assert not any(temporary.iterdir())
    assert not any(
        "memfd:mmssl" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed_leaves_no_bytes_behind(path, temporary):
    close()  # a child that was forked before knows another folder
    with pytest.raises(BrokenFile, match="crashes its decoder"):
        isolated(die, path, None)
    (left,) = temporary.iterdir()
    assert left.is_symlink()
    assert not left.exists()  # it leads to nothing: the memory went with the process


def test_cells_without_a_name_have_the_suffix_of_what_they_hold():
    begins = {b"\x89PNG\r\n": ".png", b"\xff\xd8\xff\xe0": ".jpg", b"RIFF....WAVEfmt": ".wav", b"fLaC": ".flac"}
    assert [suffix_of(data) for data in begins] == list(begins.values())
    assert suffix_of(b"RIFF....CDXA") == suffix_of(b"") == ""


def test_what_is_known_of_a_part_is_known_of_the_file_it_is_in(path, tmp_path):
    shard = str(tmp_path / "a.tar")
    assert (container(path), block(path)) == (shard, shard)
    assert stamp(path) == stamp(shard) == [Path(shard).stat().st_size, Path(shard).stat().st_mtime_ns]
    assert stamp(str(tmp_path / "gone.tar@1+2/x")) == [None, None]
    assert container("/a/b.png") == block("/a/b.png") == "/a/b.png"


def test_a_shard_by_another_name_holds_the_same_files(path, tmp_path):
    link = tmp_path / "link.tar"
    link.symlink_to("a.tar")
    other = path.replace("/a.tar@", "/link.tar@")
    assert real(other) == Span(path)
    assert overlapping([path], [f"{other}#t=1,2"]) == [f"{other}#t=1,2"]
