"""The index of a search: what a refresh reads again, files that go and break, other processes, kills.

Planted bugs that fail here: changed files by name alone, vectors of dropped files given to their neighbours, a commit
that forgets what the old index had, no lock, the half-written file left behind, another encoder's vectors compared.
"""

# Fixtures of another module are imported by the names by which tests ask for them.
# ruff: noqa: F811

import multiprocessing
import os
import shutil
import signal
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from searching import folder, repaint, run, towers  # noqa: F401
from towers import untrained, write_rows

import mmssl.files
from mmssl import SearchIndex
from mmssl.data import inline
from mmssl.errors import UnusableData
from tasks import search_index
from tasks.cli import main
from tasks.files_bar import FilesBar
from tasks.search_file import states_of

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def seen(towers, monkeypatch):
    """How many files the image tower has embedded since it was last asked."""
    count, features = [0], towers["image"].features

    def counted(signal):
        count[0] += len(signal)
        return features(signal)

    monkeypatch.setattr(towers["image"], "features", counted)

    def ask():
        found, count[0] = count[0], 0
        return found

    return ask


def names(index, top=100):
    return sorted(index.name(hit["path"]) for hit in index.search("red", top))


def brute_force(index, towers, query):
    """Return scores by name, of embedding every file anew."""
    text = towers["text"].embed([inline.join(query)])[0].double()
    paths = [path for path in index.encoder.encoder.files(index.folder).paths if path not in dict(index.broken)]
    vectors = towers["image"].embed(paths).half().double()
    return {index.name(path): float(vector @ text) for path, vector in zip(paths, vectors, strict=True)}


def test_scores_and_order_are_those_of_embedding_everything(towers, folder):
    index = SearchIndex(towers, folder)
    index.refresh()
    found = index.search("two dogs", 10)
    expected = brute_force(index, towers, "two dogs")
    best = sorted(expected, key=expected.__getitem__, reverse=True)
    assert [index.name(hit["path"]) for hit in found] == best
    for hit in found:
        assert set(hit) == {"path", "score"}
        assert hit["score"] == pytest.approx(expected[index.name(hit["path"])], abs=1e-5)
    assert index("two dogs", 3) == found[:3]


def test_a_second_refresh_reads_nothing_and_a_third_what_changed(towers, folder, seen):
    index = SearchIndex(towers, folder)
    assert index.refresh() == search_index.Refreshed(10, 0, 0, [])
    assert seen() == 10
    written = index.file.stat()
    assert SearchIndex(towers, folder).refresh() == search_index.Refreshed(0, 10, 0, [])
    assert seen() == 0
    assert index.file.stat().st_ino == written.st_ino  # nothing to do is nothing written

    repaint(folder / "0.png")  # another size
    past = (folder / "2.png").stat()
    os.utime(folder / "2.png", ns=(past.st_atime_ns, past.st_mtime_ns + 1))
    (folder / "4.png").rename(folder / "renamed.png")
    (folder / "deeper" / "1.png").unlink()
    shutil.copy2(folder / "6.png", folder / "again.png")
    # A size that stays and a name that stays are not enough to be the same.
    done = index.refresh()
    assert seen() == 4
    assert (done.embedded, done.kept, done.dropped) == (4, 6, 2)
    assert names(index) == sorted(brute_force(index, towers, "red"))
    assert {hit["path"]: hit["score"] for hit in index.search("red", 100)} == pytest.approx(
        {str(folder / name): score for name, score in brute_force(index, towers, "red").items()}, abs=1e-5
    )


def test_equal_pictures_are_in_the_order_of_paths(towers, folder):
    for name in ("b", "a", "deeper/c", "0a"):
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    index = SearchIndex(towers, folder)
    index.refresh(batch_size=3)
    found = [index.name(hit["path"]) for hit in index.search(like=folder / "0.png", top=5)]
    assert found == ["0.png", "0a.png", "a.png", "b.png", "deeper/c.png"]


def test_broken_files_are_remembered_and_tried_again_when_they_change(towers, folder, seen):
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "locked.png").write_bytes(b"")
    index = SearchIndex(towers, folder)
    done = index.refresh()
    assert (done.embedded, done.kept, len(index)) == (10, 0, 10)
    reasons = {index.name(path): reason for path, reason in done.broken}
    assert set(reasons) == {"bad.png", "gone.png", "locked.png"}
    assert reasons["gone.png"] == "no such file"
    assert reasons["locked.png"] == "empty file"

    tried = []
    decode = type(index.encoder.encoder.kind).decode
    try:
        type(index.encoder.encoder.kind).decode = lambda self, path: tried.append(path) or decode(self, path)
        again = SearchIndex(towers, folder)
        assert again.refresh().broken == done.broken
        assert tried == []
        repaint(folder / "bad.png")
        assert again.refresh().embedded == 1
    finally:
        type(index.encoder.encoder.kind).decode = decode
    assert tried == [str(folder / "bad.png")]
    assert "bad.png" in names(again)
    assert len(names(again)) == 11


def test_where_permission_was_denied_it_is_asked_for_again(towers, folder, monkeypatch):
    index = SearchIndex(towers, folder)
    kind = type(index.encoder.encoder.kind)
    with monkeypatch.context() as patched:
        patched.setattr(kind, "decode", lambda self, path: (_ for _ in ()).throw(PermissionError(13, "no", path)))
        index.refresh()
    with pytest.raises(UnusableData, match=r"none of the 10 files can be read; the first is 0.png: permission denied"):
        index.search("red")
    assert index.refresh().embedded == 10


def test_vectors_that_are_no_numbers_do_not_get_in(towers, folder, monkeypatch):
    features = towers["image"].features

    def spoilt(signal):
        found = features(signal)
        found[0], found[1, 0], found[2] = float("nan"), float("inf"), 0
        return found

    with monkeypatch.context() as patched:
        patched.setattr(towers["image"], "features", spoilt)
        index = SearchIndex(towers, folder)
        done = index.refresh()
    assert done.embedded == len(index) == 7
    assert sorted(reason for _, reason in done.broken) == ["its vector is NaN or infinite"] * 2 + ["its vector is zero"]
    assert all(np.isfinite(block.numpy()).all() for block in index._stored.blocks)


def test_pieces_captions_and_rows_that_repeat(run, towers, folder, sounds, tmp_path):
    rows = [{"path": folder / "0.png", "caption": "a cat"}, {"path": folder / "2.png", "caption": "snow"}] * 2
    manifest = write_rows(tmp_path / "rows.csv", rows)
    texts = SearchIndex(run, manifest, modality="text")
    assert texts.refresh().embedded == 2
    assert [texts.name(hit["path"]) for hit in texts.search("snow")] == ["snow", "a cat"]
    assert texts.refresh().embedded == 0
    assert len(texts.search(like=folder / "0.png")) == 2

    heard = untrained(tmp_path / "heard", "audio", "image")
    sound = next(sounds.rglob("*.wav"))
    pieces = [{"path": sound, "start": 0, "end": 0.1}, {"path": sound, "start": 0.1, "end": ""}]
    index = SearchIndex(heard, write_rows(tmp_path / "pieces.csv", pieces), modality="audio")
    assert index.refresh().embedded == 2
    best = index.search(like=f"{sound}#t=0.1")[0]
    assert best["path"] == f"{sound}#t=0.1"
    assert best["score"] == pytest.approx(1, abs=2e-3)
    os.utime(sound, ns=(0, 1))
    assert index.refresh().embedded == 2


def test_a_folder_of_frames_changes_with_any_of_them(tmp_path):
    for i in range(3):
        repaint(tmp_path / f"{i}.png", shade=i)
    path = str(tmp_path)
    before = states_of([path])
    assert states_of([path]) == before
    stat = (tmp_path / "1.png").stat()
    os.utime(tmp_path / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert states_of([path]) != before


def test_a_file_in_a_shard_is_found_by_example_and_changes_with_the_shard(towers, tmp_path):
    shard = tmp_path / "shards" / "a.tar"
    shard.parent.mkdir()
    for i in range(3):
        repaint(tmp_path / f"{i}.png", shade=90 * i)
    with tarfile.open(shard, "w") as tar:
        for i in range(3):
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
    index = SearchIndex(towers, shard.parent, tmp_path / "i.arrow")
    assert index.refresh().embedded == 3
    assert index.refresh().embedded == 0
    member = index.search(like=str(tmp_path / "1.png"), top=1)[0]["path"]
    assert member.endswith("/1.png")
    assert index.search(like=member, top=1)[0]["path"] == member
    os.utime(shard, ns=(0, 1))
    assert index.refresh().embedded == 3


def test_files_are_embedded_anew_on_request(towers, folder, seen):
    index = SearchIndex(towers, folder)
    index.refresh()
    one, other = folder / "0.png", folder / "2.png"
    for path in (one, other):
        PIL.Image.new("RGB", (8, 8), "red" if path == one else "blue").save(path, "BMP")
        os.utime(path, ns=(0, 0))
    index.refresh()
    seen()
    swapped = folder / "swapped"
    one.rename(swapped), other.rename(one), swapped.rename(other)
    assert index.refresh().embedded == seen() == 0  # equal sizes and times: nobody can see it without reading
    assert index.refresh(anew=True).embedded == seen() == 10
    assert [hit["path"] for hit in index.search(like=str(one), top=1)] == [str(one)]


def test_what_may_pass_is_tried_again(towers, folder):
    index = SearchIndex(towers, folder)
    assert len(index.refresh(workers=0, timeout=1e-5).broken) == 10
    assert index.refresh(workers=0).embedded == 10


def test_a_link_to_itself_is_a_broken_file(towers, folder):
    (folder / "self.png").symlink_to("self.png")
    index = SearchIndex(towers, folder)
    ((path, reason),) = index.refresh().broken
    assert index.name(path) == "self.png"
    assert "symbolic links" in reason
    assert len(index) == 10


# Interruptions and other processes


def _forked(function, *arguments):
    child = FORK.Process(target=function, args=arguments)
    child.start()
    return child


def _ended(child):
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def _refresh_and_die(towers, folder, after):
    torch.set_num_threads(1)
    search_index.FIRST_COMMIT = search_index.COMMIT_SECONDS = 0.0

    def progress(done, total):
        if done >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    SearchIndex(towers, folder).refresh(batch_size=2, workers=0, progress=progress)


def test_killed_in_mid_refresh_the_old_index_answers_and_work_is_kept(towers, folder, seen):
    index = SearchIndex(towers, folder)
    index.refresh()
    before = index.search("snow", 100)
    seen()
    for path in folder.rglob("*.png"):
        repaint(path, shade=int(path.stem))
    assert _ended(_forked(_refresh_and_die, towers, folder, 6)) == -signal.SIGKILL
    after = SearchIndex(towers, folder)
    assert {hit["path"] for hit in after.search("snow", 100)} == {hit["path"] for hit in before}
    # Four were on the disk when the process died with six done.
    assert after.refresh().embedded == seen() == 6
    assert names(after) == sorted(brute_force(after, towers, "red"))


def _terminated(run, folder):
    torch.set_num_threads(1)
    extract_in_process = search_index.signals
    search_index.signals = lambda encoder, todo, size, workers, **more: extract_in_process(encoder, todo, 2, 0, **more)
    FilesBar.__call__ = lambda bar, done, total: os.kill(os.getpid(), signal.SIGTERM) if done == 6 else None
    os._exit(main(["search", str(run), str(folder), "red"]))


def test_sigterm_keeps_what_was_embedded(run, towers, folder):
    assert _ended(_forked(_terminated, run, folder)) == 128 + signal.SIGTERM
    assert SearchIndex(towers, folder).refresh().embedded == 4


def _die_while_writing(towers, folder):
    torch.set_num_threads(1)
    mmssl.files.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    SearchIndex(towers, folder).refresh(workers=0)


def test_killed_while_it_writes_nothing_is_lost_and_nothing_stays(towers, folder):
    index = SearchIndex(towers, folder)
    index.refresh()
    before = index.search("snow")
    repaint(folder / "new.png")
    assert _ended(_forked(_die_while_writing, towers, folder)) == -signal.SIGKILL
    beside = index.file.parent
    assert any(path.suffix == ".tmp" for path in beside.iterdir())
    after = SearchIndex(towers, folder)
    assert after.search("snow") == before
    assert after.refresh().embedded == 1
    assert [path.name for path in beside.iterdir()] == [index.file.name]


def test_an_interruption_keeps_what_was_done(towers, folder):
    def progress(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    index = SearchIndex(towers, folder)
    with pytest.raises(KeyboardInterrupt):
        index.refresh(batch_size=2, workers=0, progress=progress)
    assert len(index) == 4
    assert SearchIndex(towers, folder).refresh().embedded == 6


def _first(towers, folder, started, waiting, answers):
    torch.set_num_threads(1)
    search_index.FIRST_COMMIT = search_index.COMMIT_SECONDS = 0.0

    def progress(done, total):
        started.set()
        assert waiting.wait(60)

    answers.put(("first", SearchIndex(towers, folder).refresh(batch_size=2, workers=0, progress=progress).embedded))


def _second(towers, folder, started, waiting, answers):
    torch.set_num_threads(1)
    assert started.wait(60)
    index = SearchIndex(towers, folder)
    say = index._say_waiting
    index._say_waiting = lambda: (say(), waiting.set())
    answers.put(("second", index.refresh(workers=0).embedded))


def test_of_two_processes_one_works_and_the_other_waits_and_finds_nothing_to_do(towers, folder, capfd):
    started, waiting, answers = FORK.Event(), FORK.Event(), FORK.Queue()
    children = [_forked(do, towers, folder, started, waiting, answers) for do in (_first, _second)]
    assert dict(answers.get(timeout=60) for _ in children) == {"first": 10, "second": 0}
    assert [_ended(child) for child in children] == [0, 0]
    assert "another process is refreshing" in capfd.readouterr().err
    index = SearchIndex(towers, folder)
    assert names(index) == sorted(brute_force(index, towers, "red"))
    assert [path.name for path in index.file.parent.iterdir()] == [index.file.name]


def test_threads_search_while_one_refreshes(towers, folder, monkeypatch):
    monkeypatch.setattr(search_index, "COMMIT_SECONDS", 0.0)
    index = SearchIndex(towers, folder)
    index.refresh()
    vector, faults, over = index.vector("snow"), [], threading.Event()

    def ask():
        while not over.is_set():
            try:
                assert len(index.nearest(vector, 50)) == 10
            except Exception as error:
                faults.append(error)
                return

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        for path in folder.rglob("*.png"):
            repaint(path, shade=100)
        index.refresh(batch_size=1, workers=0)
    finally:
        over.set()
        for thread in asking:
            thread.join(60)
    assert faults == []
