import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sharding import AUDIO, IMAGE, TEXT, read

from mmssl.data import blocks, cells
from mmssl.data.blocks import Blocks, blocks_of
from mmssl.data.cells import Cell
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.errors import UserError

FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_table(path, columns, features=None, rows=3):
    """Write a table as ``datasets`` does, in row groups of 3 rows."""
    table = pa.table(columns)
    if features is not None:
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({b"huggingface": noted.encode()})
    pq.write_table(table, path, row_group_size=rows)
    return path


def files(count, first=0, name="{}.png"):
    return pa.array(
        [{"bytes": f"file {i}".encode(), "path": name.format(i)} for i in range(first, first + count)], FILE
    )


@pytest.fixture
def photos(tmp_path):
    columns = {"image": files(7), "label": pa.array([0, 1, 0, 1, 0, 1, None]), "caption": [f"no {i}" for i in range(7)]}
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    return write_table(tmp_path / "photos.parquet", columns, features)


def texts(paths):
    return [guarded(read, path, None) for path in paths]


def test_a_table_of_pictures_is_a_listing_of_them(photos):
    listing = list_files(photos, IMAGE)
    assert listing.name(4) == "photos.parquet@4+image/4.png"
    assert texts(listing.paths) == [f"file {i}".encode() for i in range(7)]
    assert texts(reversed(listing.paths)) == [f"file {i}".encode() for i in reversed(range(7))]
    assert listing.select(range(6)).labels() == ["cat", "dog"] * 3
    assert listing.columns["caption"][3] == "no 3"
    with pytest.raises(UserError, match="has no label"):
        listing.labels()
    with pytest.raises(UserError, match="no 'path' column"):
        list_files(photos, AUDIO)


def test_a_picture_and_its_caption_are_a_pair(photos):
    pairs = list_pairs(photos, [IMAGE, TEXT])
    assert (len(pairs), pairs.media["text"][2]) == (7, "data:,no%202")
    assert texts(pairs.media["image"][:1]) == [b"file 0"]


def test_classes_without_names_stay_numbers(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"image": files(2), "label": [3, 5]})
    assert list_files(path, IMAGE).labels() == ["3", "5"]


def test_several_files_are_one_whose_names_say_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split, first, count in (("train", 0, 4), ("test", 4, 2)):
        write_table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", {"image": files(count, first)})
    write_table(tmp_path / "data" / "vectors.parquet", {"path": ["a.png"]})  # no files in it
    listing = list_files(tmp_path, IMAGE, default_split="train")
    assert texts(listing.paths) == [f"file {i}".encode() for i in range(4)]
    assert listing.name(0) == "data/train-00000-of-00001.parquet@0+image/0.png"
    assert texts(list_files(tmp_path, IMAGE, split="test").paths) == [b"file 4", b"file 5"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_and_strange_column_names(tmp_path, kind):
    path = write_table(tmp_path / "a.parquet", {"my / file": pa.array([b"fLaC..", b"RIFF"], kind), "n": [1, 2]})
    listing = list_files(path, AUDIO)
    assert listing.name(1) == "a.parquet@1+my%20%2F%20file/1"
    assert texts(listing.paths) == [b"fLaC..", b"RIFF"]
    with_suffix = guarded(str, listing.paths[0], None)
    assert with_suffix.endswith(".flac")


def test_files_of_several_kinds_go_by_what_datasets_notes_or_by_the_columns_name(tmp_path):
    columns = {"photo": files(2), "depth": files(2, 5), "audio": files(2, 9, "{}.wav")}
    features = {"photo": {"_type": "Image"}, "depth": {"_type": "Image"}}
    pairs = list_pairs(write_table(tmp_path / "a.parquet", columns, features), [IMAGE, AUDIO])
    assert texts(pairs.media["image"]) == [b"file 0", b"file 1"]
    assert texts(pairs.media["audio"]) == [b"file 9", b"file 10"]
    assert texts(pairs.columns["depth_path"]) == [b"file 5", b"file 6"]


def test_empty_cells_are_missing_media(tmp_path):
    cells_ = pa.array([None, {"bytes": b"x", "path": "1.wav"}, {"bytes": None, "path": "2.wav"}], FILE)
    columns = {"image": files(3), "audio": cells_, "caption": ["a", "b", "c"]}
    path = write_table(tmp_path / "a.parquet", columns)
    pairs = list_pairs(path, [IMAGE, AUDIO, TEXT])
    assert [found is not None for found in pairs.media["audio"]] == [False, True, False]


def test_of_one_kind_an_empty_cell_is_a_broken_file(tmp_path):
    cells_ = pa.array([{"bytes": b"x", "path": "0.png"}, None], FILE)
    listing = list_files(write_table(tmp_path / "a.parquet", {"image": cells_}), IMAGE)
    assert guarded(read, listing.paths[0], None) == b"x"
    assert reason(listing.paths[1]) == "nothing in its cell"


def test_names_of_the_hub_say_the_split_too_and_no_class_is_no_label(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    for name in ("train-00000-of-00001-0123456789abcdef", "test/0000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / f"{name}.parquet", {"image": files(2), "label": [1, -1]}, features)
    for split in ("train", "test"):
        assert list_files(tmp_path, IMAGE, split=split).columns["label"] == ["dog", None]


def test_a_damaged_table_is_named_and_one_beside_loose_files_is_refused(tmp_path):
    whole = write_table(tmp_path / "a.parquet", {"image": files(2)})
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet: not a readable parquet file"):
        list_files(tmp_path, IMAGE)
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "x.png").touch()
    with pytest.raises(UserError, match=r"holds 1 \.png and 1 parquet tables; name one of them"):
        list_files(tmp_path, IMAGE)


def reason(cell):
    with pytest.raises(BrokenFile) as caught:
        guarded(read, str(cell), None)
    return caught.value.reason


def test_what_is_wrong_with_a_table_is_the_cells_reason(photos, tmp_path):
    table = str(photos)
    assert reason(Cell(table, 7, "image", "7.png")) == "its table has 7 rows"
    assert reason(Cell(table, 0, "photo", "0.png")).startswith("its table cannot be read: ")
    assert reason(Cell(str(tmp_path / "gone.parquet"), 0, "image", "0.png")) == "its table: no such file"
    empty = write_table(tmp_path / "b.parquet", {"image": pa.array([b"", None], pa.binary())})
    assert reason(Cell(str(empty), 0, "image", "0")) == "empty file"
    assert reason(Cell(str(empty), 1, "image", "1")) == "nothing in its cell"
    photos.write_bytes(photos.read_bytes()[:300])
    assert reason(Cell(table, 0, "image", "0.png")).startswith("its table cannot be read: ")


def test_row_groups_are_kept_and_no_more_of_them_than_fit(photos, monkeypatch):
    found, column = [], cells.Table.column
    monkeypatch.setattr(cells.Table, "column", lambda *words: (found.append(words[1]), column(*words))[1])
    paths = list_files(photos, IMAGE).paths
    for most, groups in ((cells.CACHE_BYTES, [0, 1, 2]), (1, [0, 1, 2, 0, 1, 2])):
        monkeypatch.setattr(cells, "CACHE_BYTES", most)
        monkeypatch.setattr(cells, "_GROUPS", cells._Groups())
        found.clear()
        texts(paths * 2)
        assert found == groups
    assert len(cells._GROUPS._held) == 1


def test_a_table_that_is_written_anew_is_read_anew(photos):
    paths = list_files(photos, IMAGE).paths
    assert texts(paths[:1]) == [b"file 0"]
    write_table(photos, {"image": files(9, 100)})
    assert texts(paths[:1]) == [b"file 100"]


def test_row_groups_set_the_order_where_not_all_can_be_kept(photos, monkeypatch):
    paths = list_files(photos, IMAGE).paths
    assert blocks_of(paths, "auto") is None
    monkeypatch.setattr(blocks, "CACHE_BYTES", 1)
    assert blocks_of(paths, "auto") == Blocks([0, 0, 0, 1, 1, 1, 2], 1)
    assert blocks_of(paths, 2) == Blocks([0, 0, 0, 1, 1, 1, 2], 2)
    assert blocks_of(paths, 3) is blocks_of(paths, None) is None
