"""Indices that are damaged, another's or in odd places: told or made anew, and never a wrong answer.

Planted bugs that fail here: no checksum of vectors, another encoder's vectors compared, a rebuild that forgets first.
"""

# Fixtures of another module are imported by the names by which tests ask for them.
# ruff: noqa: F811

import json
import os

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from searching import folder, repaint, run, towers  # noqa: F401
from towers import untrained

import mmssl.files
from mmssl import SearchIndex
from mmssl.errors import UnusableData, UserError
from tasks import search_file, search_index
from tasks.search_file import FACTS, Entry, Facts, State, StoredIndex, states_of, write_index


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
    with pytest.raises(UserError, match=r"0\.png is no search index; give another --index$"):
        SearchIndex(towers, folder, picture)
    assert picture.read_bytes() == before
    with pytest.raises(UserError, match="is a folder"):
        SearchIndex(towers, folder, folder)
    with pytest.raises(UserError, match="does not exist"):
        SearchIndex(towers, folder, folder / "nowhere" / "x.arrow")


def _flip(file, needle, by=0):
    data = bytearray(file.read_bytes())
    at = data.rindex(needle) + by
    data[at] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("where", ["a vector", "a state", "the facts"])
def test_flipped_bits_are_told_and_our_own_index_is_made_anew(towers, folder, tmp_path, where, capsys):
    for given in (None, tmp_path / "mine.arrow"):
        index = SearchIndex(towers, folder, given)
        index.refresh()
        needle = {
            "a vector": index._stored.vectors([3]).tobytes(),
            "a state": index._stored._batches[0].column("size").to_numpy().tobytes(),
            "the facts": index.facts.fingerprint.encode(),
        }[where]
        _flip(index.file, needle)
        if given is not None:
            with pytest.raises((UnusableData, UserError), match=r"mine\.arrow is"):
                SearchIndex(towers, folder, given).refresh()
            continue
        again = SearchIndex(towers, folder)
        again.refresh()
        assert "makes it anew" in capsys.readouterr().err
        again.refresh()
        truth = SearchIndex(towers, folder, tmp_path / f"{where}.arrow")
        truth.refresh()
        assert again.search("red", 100) == truth.search("red", 100)


def test_a_rebuild_that_is_stopped_keeps_what_was_known(towers, folder, monkeypatch):
    index = SearchIndex(towers, folder)
    index.refresh()
    before = index.search("red", 100)
    monkeypatch.setattr(search_index, "FIRST_COMMIT", 0.0)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.refresh(batch_size=2, workers=0, progress=stop, anew=True)
    assert SearchIndex(towers, folder).search("red", 100) == before


def test_files_that_are_away_for_a_while_are_read_again(towers, folder, tmp_path, monkeypatch):
    index = SearchIndex(towers, folder)
    listed = search_index.states_of

    def away(paths):
        found = listed(paths)
        folder.rename(tmp_path / "away")
        return found

    monkeypatch.setattr(search_index, "states_of", away)
    assert len(index.refresh(workers=0).broken) == 10
    (tmp_path / "away").rename(folder)
    monkeypatch.setattr(search_index, "states_of", listed)
    assert index.refresh(workers=0).embedded == 10
    opened = PIL.Image.open

    def no_handles(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(PIL.Image, "open", no_handles)
    assert len(index.refresh(workers=0, anew=True).broken) == 10
    monkeypatch.setattr(PIL.Image, "open", opened)
    assert index.refresh(workers=0).embedded == 10


def test_links_in_a_folder_of_frames_do_not_go_in_circles(tmp_path):
    repaint(tmp_path / "1.png")
    for i in range(3):
        (tmp_path / f"l{i}").symlink_to(".")
    assert states_of([str(tmp_path)])


def test_an_index_lies_where_names_are_no_text(towers, folder, tmp_path):
    place = tmp_path / os.fsdecode(b"bad\xff")
    place.mkdir()
    assert SearchIndex(towers, folder, place / "i.arrow").refresh().embedded == 10
    assert len(SearchIndex(towers, folder, place / "i.arrow")) == 10
    os.mkfifo(place / ".j.arrow.lock")
    with pytest.raises(OSError, match="cannot be written"):
        SearchIndex(towers, folder, place / "j.arrow").refresh()


def test_vectors_that_are_longer_than_one_are_no_answer(towers, folder, tmp_path):
    index = SearchIndex(towers, folder, tmp_path / "mine.arrow")
    index.refresh()
    stored = index._stored
    entries = {path: Entry(state, 3 * stored.vectors([row])[0]) for path, (row, state, _) in stored.states().items()}
    write_index(index.file, index.facts, None, entries, entries)
    with pytest.raises(UnusableData, match="damaged: vectors are longer than 1"):
        SearchIndex(towers, folder, index.file).search("red")
    with pytest.raises(ValueError, match="of length 1"):
        index.nearest(torch.ones(index.facts.dim))


def test_a_link_leads_to_the_index_and_stays_a_link(towers, folder, tmp_path):
    (tmp_path / "link.arrow").symlink_to(tmp_path / "real.arrow")
    SearchIndex(towers, folder, tmp_path / "link.arrow").refresh()
    assert (tmp_path / "link.arrow").is_symlink()
    assert len(SearchIndex(towers, folder, tmp_path / "real.arrow")) == 10


def test_a_full_disk_is_told_by_the_index_and_the_old_one_answers(towers, folder, tmp_path, monkeypatch):
    index = SearchIndex(towers, folder, tmp_path / "mine.arrow")
    index.refresh()
    repaint(folder / "new.png")

    def full(path):
        raise OSError(28, "No space left on device", "something hidden")

    monkeypatch.setattr(mmssl.files, "sync", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)") as told:
        index.refresh()
    assert told.value.filename == str(index.file)
    assert len(SearchIndex(towers, folder, index.file)) == 10
    assert sorted(tmp_path.iterdir()) == [tmp_path / "mine", index.file]


def test_an_interruption_before_anything_was_embedded_leaves_no_index(towers, folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(towers["image"], "features", interrupted)
    index = SearchIndex(towers, folder, tmp_path / "mine.arrow")
    with pytest.raises(KeyboardInterrupt):
        index.refresh(workers=0)
    assert not index.file.exists()
    with pytest.raises(UserError, match="there is no index"):
        index.search("red")


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
