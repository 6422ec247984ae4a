"""The index of a search: what a refresh reads again, files that go and break, other processes, kills, damage.

Planted bugs that fail here: changed files by name alone, vectors of dropped files given to their neighbours, a commit
that forgets what the old index had, no lock, the half-written file left behind, another encoder's vectors compared.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from towers import untrained, write_rows

import mmssl.files
from mmssl import JointEncoder, SearchIndex
from mmssl.data import inline
from mmssl.errors import UnusableData, UserError
from tasks import search_file, search_index
from tasks.search_file import FACTS, Entry, Facts, State, StoredIndex, state_of, write_index

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text")


@pytest.fixture(scope="module")
def towers(run):
    return {name: JointEncoder(run / f"encoder-{name}") for name in ("image", "text")}


@pytest.fixture
def folder(tmp_path, photos):
    """Ten pictures."""
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))[:10]):
        shutil.copy2(path, tmp_path / "mine" / ("deeper" if i % 2 else ".") / f"{i}.png")
    return tmp_path / "mine"


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


def repaint(path, shade=0):
    PIL.Image.fromarray(np.full((20, 24, 3), shade, np.uint8)).save(path)


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
    before = state_of(str(tmp_path))
    assert state_of(str(tmp_path)) == before
    stat = (tmp_path / "1.png").stat()
    os.utime(tmp_path / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert state_of(str(tmp_path)) != before


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
    search_index.COMMIT_SECONDS = 0.0

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
    search_index.COMMIT_SECONDS = 0.0

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


# What is no index, or another's


def test_an_index_of_another_encoder_or_folder_is_refused(run, towers, folder, tmp_path):
    mine = tmp_path / "mine.arrow"
    SearchIndex(towers, folder, mine).refresh()
    other = untrained(tmp_path / "other", "image", "text", seed=1)
    with pytest.raises(UserError, match=r"mine\.arrow is the index of another encoder; give another --index"):
        SearchIndex(other, folder, mine)
    with pytest.raises(UserError, match=f"is the index of another folder, {folder}"):
        SearchIndex(run, folder / "deeper", mine)
    # By default each has its own.
    SearchIndex(other, folder).refresh()
    assert len(SearchIndex(run, folder)) == 0
    assert len(SearchIndex(run, folder, mine)) == 10


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -9])
def test_a_truncated_index_is_told_and_made_anew_where_it_is_the_default_one(towers, folder, tmp_path, cut, capsys):
    for given in (None, tmp_path / "mine.arrow"):
        index = SearchIndex(towers, folder, given)
        index.refresh()
        index.file.write_bytes(index.file.read_bytes()[:cut])
        if given is None:
            again = SearchIndex(towers, folder)
            assert "is not a whole search index" in capsys.readouterr().err
            assert len(again) == 0
            assert again.refresh().embedded == 10
            assert capsys.readouterr().err == ""  # it has been told
        else:
            with pytest.raises(UnusableData, match=r"mine\.arrow is not a whole search index.*remove it, or give"):
                SearchIndex(towers, folder, given)


def test_a_file_that_is_no_index_is_left_alone(towers, folder):
    picture = folder / "0.png"
    before = picture.read_bytes()
    with pytest.raises(UnusableData, match="is not a whole search index"):
        SearchIndex(towers, folder, picture)
    assert picture.read_bytes() == before
    with pytest.raises(UserError, match="is a folder"):
        SearchIndex(towers, folder, folder)
    with pytest.raises(UserError, match="does not exist"):
        SearchIndex(towers, folder, folder / "nowhere" / "x.arrow")


def test_an_index_of_another_format_is_refused(towers, folder, tmp_path):
    file = tmp_path / "mine.arrow"
    SearchIndex(towers, folder, file).refresh()
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    facts = json.loads(table.schema.metadata[FACTS])
    for change in ({"format": 2}, {"whole": 11}, {"dim": 9}, {"whole": None}):
        metadata = {FACTS: json.dumps({**facts, **change})}
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
            writer.write_table(table)
        with pytest.raises((UserError, UnusableData), match=r"mine\.arrow"):
            SearchIndex(towers, folder, file)


def test_an_index_in_many_parts_is_one(tmp_path, monkeypatch):
    """Written three rows at a time, in two steps, it holds and gives back what one part would."""
    monkeypatch.setattr(search_file, "ROWS", 3)
    facts = Facts(fingerprint="f", modality="image", folder="/x", split=None, dim=4)
    rng = np.random.default_rng(0)
    vectors = {f"/x/\udcff{i:02d}": rng.normal(size=4).astype(np.float16) for i in range(11)}
    broken = {f"/x/{i:02d}z": f"reason {i}" for i in range(4)}
    entries = {path: Entry(State(i, -i), vector) for i, (path, vector) in enumerate(vectors.items())}
    entries |= {path: Entry(State(7, 7), None, reason) for path, reason in broken.items()}
    half = dict(list(entries.items())[::2])
    write_index(tmp_path / "a", facts, None, half, entries)
    first = StoredIndex(tmp_path / "a")
    write_index(tmp_path / "a", facts, first, {path: entries[path] for path in entries.keys() - half.keys()}, entries)
    for stored in (StoredIndex(tmp_path / "a"),):
        assert stored.facts == facts
        assert len(stored) == 11
        assert dict(stored.broken()) == broken
        paths = [stored.path(row) for row in range(len(stored))]
        assert paths == sorted(vectors)
        assert [len(block) for block in stored.blocks] == [3, 3, 3, 2]
        for row, (path, one) in enumerate(zip(paths, np.concatenate(stored.blocks), strict=True)):
            assert np.array_equal(one, vectors[path])
            assert np.array_equal(stored.vectors([row])[0], one)
        assert {path: state for path, (_, state, _) in stored.states().items()} == {
            path: entry.state for path, entry in entries.items()
        }
    # What was opened before stays as it was.
    assert len(first) == sum(path in vectors for path in half)
    assert first.path(0) == min(path for path in half if path in vectors)
