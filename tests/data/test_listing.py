import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmssl.data.ledger import Ledger
from mmssl.data.listing import list_files
from mmssl.errors import UserError

PHOTOS = SimpleNamespace(name="image", suffixes=frozenset({".jpg", ".png"}), frame_suffixes=frozenset(), timed=False)


def listing(path, **more):
    return list_files(path, PHOTOS, **more)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(found):
    return [found.name(i) for i in range(len(found))]


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    touch(*(root / name for name in ("dog/b.JPG", "dog/a.png", "cat/deep/er/c.jpg", "cat/x.txt", "cat/README")))
    touch(root / ".hidden.jpg", root / ".thumbs" / "d.jpg")
    return root


def test_folder_lists_sorted_files_of_any_depth_and_counts_the_others(photos):
    found = listing(photos)
    assert names(found) == ["cat/deep/er/c.jpg", "dog/a.png", "dog/b.JPG"]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in found.paths)
    assert found.ignored == {"": 1, ".txt": 1}
    assert found.columns == {}
    assert found.root == photos


def test_folder_labels_are_the_first_sub_folders(photos):
    assert listing(photos).labels() == ["cat", "dog", "dog"]
    touch(photos / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png has no label"):
        listing(photos).labels()
    with pytest.raises(UserError, match="'speaker' was asked for, but there is no manifest"):
        listing(photos).labels("speaker")


def test_names_do_not_depend_on_how_the_folder_is_spelt(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for spelling in (".", "../photos", "../photos/", str(photos)):
        assert names(listing(spelling)) == names(listing(photos))
    monkeypatch.chdir(photos.parent)
    assert names(listing("photos")) == names(listing(photos))


def test_links_are_followed_but_not_in_circles_and_dangling_ones_are_listed(photos):
    (photos / "dog" / "up").symlink_to(photos, target_is_directory=True)
    (photos / "kitten").symlink_to(photos / "cat", target_is_directory=True)
    (photos / "dog" / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    assert names(listing(photos)) == [
        "cat/deep/er/c.jpg",
        "dog/a.png",
        "dog/b.JPG",
        "dog/gone.jpg",
        "kitten/deep/er/c.jpg",
    ]


def test_one_file(photos):
    found = listing(photos / "dog" / "b.JPG")
    assert names(found) == ["b.JPG"]
    with pytest.raises(UserError, match="has no label"):
        found.labels()
    with pytest.raises(UserError, match="neither a folder, a manifest"):
        listing(photos / "cat" / "x.txt")


ROWS = [
    {"path": "dog/a.png", "label": "dog", "split": "train", "caption": 'a "good", wet dog'},
    {"path": "dog/b.JPG", "label": "dog", "split": "test", "caption": None},
    {"path": "cat/new\nline.jpg", "label": "Katze äöü", "split": "train", "caption": "猫"},
]


def write_csv(path, bom=False, newline="\n"):
    def quoted(cell):
        return '"' + (cell or "").replace('"', '""') + '"' if cell and set(cell) & set('",\n') else cell or ""

    lines = [",".join(ROWS[0]), *(",".join(quoted(cell) for cell in row.values()) for row in ROWS)]
    text = "".join(line + newline for line in lines) + newline
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())


def write_jsonl(path, bom=False, newline="\n"):
    # A missing key means the same as null.
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in ROWS]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + (newline.join(lines) + newline * 2).encode())


def write_parquet(path, bom=False, newline="\n"):
    table = pa.Table.from_pylist(ROWS).append_column("vector", pa.array([[0.5, 1.0]] * 3))
    pq.write_table(table, path)


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
@pytest.mark.parametrize(("bom", "newline"), [(False, "\n"), (True, "\r\n")])
@pytest.mark.parametrize("how", ["folder", "file"])
def test_manifests_of_every_kind_say_the_same(tmp_path, write, bom, newline, how):
    touch(tmp_path / "not-in-the-manifest.jpg")
    suffix = write.__name__.removeprefix("write_")
    manifest = tmp_path / (f"manifest.{suffix}" if how == "folder" else f"other.{suffix.upper()}")
    write(manifest, bom, newline)
    found = listing(tmp_path if how == "folder" else manifest)
    assert names(found) == [row["path"] for row in ROWS]
    assert found.paths[0] == str(tmp_path / "dog" / "a.png")
    assert found.columns == {key: [row[key] for row in ROWS] for key in ("label", "split", "caption")}
    assert found.labels() == ["dog", "dog", "Katze äöü"]


def test_numbers_become_text_and_absolute_paths_stay(tmp_path):
    rows = [{"path": str(tmp_path / "sub" / "a.jpg"), "label": 3, "ok": True}, {"path": "/else/b.jpg", "label": 0.5}]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    found = listing(tmp_path)
    assert names(found) == ["sub/a.jpg", "/else/b.jpg"]
    assert found.labels() == ["3", "0.5"]
    assert found.columns["ok"] == ["true", None]


def test_splits(tmp_path):
    write_csv(tmp_path / "manifest.csv")
    assert len(listing(tmp_path)) == 3
    for train in (listing(tmp_path, split="train"), listing(tmp_path, default_split="train")):
        assert names(train) == ["dog/a.png", "cat/new\nline.jpg"]
        assert train.columns["caption"] == ['a "good", wet dog', "猫"]
    assert len(listing(tmp_path, default_split="all of them")) == 3
    with pytest.raises(UserError, match="no row has split 'tets'; did you mean 'test'"):
        listing(tmp_path, split="tets")
    assert names(listing(tmp_path, split="test", default_split="train")) == ["dog/b.JPG"]


def test_a_folder_has_no_split(photos):
    assert len(listing(photos, default_split="train")) == 3
    with pytest.raises(UserError, match="no 'split' column"):
        listing(photos, split="train")


def test_a_missing_label_is_named_by_its_row_even_after_a_selection(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,label\na.jpg,x\nb.jpg,\nc.jpg,y\n")
    with pytest.raises(UserError, match=r"row 2 \(b.jpg\) has no label"):
        listing(tmp_path).select([2, 1]).labels()
    assert listing(tmp_path).select([2, 0]).labels() == ["y", "x"]
    with pytest.raises(UserError, match="has no 'lable' column; did you mean 'label'"):
        listing(tmp_path).labels("lable")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"paht,label\nx.jpg,1\n", "has no 'path' column; did you mean 'paht'"),
        ("a.csv", b"", "has no 'path' column"),
        ("a.csv", b"path,label\n", "lists no file"),
        ("a.csv", b"path,label\nx.jpg,1\n,2\n", "row 2 has an empty path"),
        ("a.csv", b"path,label\nx.jpg,1,2\n", "line 2: 3 cells under 2 column names"),
        ("a.csv", b"path,label\nx.jpg\n", "line 2: 1 cells under 2 column names"),
        ("a.csv", b'path,label\nx.jpg,"1\n', "line 2: not valid CSV"),
        ("a.csv", b"path,path\nx.jpg,y.jpg\n", "more than one column 'path'"),
        ("a.csv", "path\näx.jpg\n".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"path": "x.jpg"}\n{"path": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"path": "x.jpg"}\n["y.jpg"]\n', "line 2: a row is a JSON object, but this is a list"),
        ("a.jsonl", b'{"path": "x.jpg"}\n{"label": "y"}\n', "row 2 has an empty path"),
        ("a.jsonl", b"\xff\xfe{", "not UTF-8"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.parquet", b"", "not a readable parquet file"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        listing(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_two_manifests_are_named(tmp_path):
    touch(tmp_path / "manifest.csv", tmp_path / "manifest.jsonl")
    with pytest.raises(UserError, match=r"more than one manifest: .*manifest\.csv, .*manifest\.jsonl"):
        listing(tmp_path)


def test_paths_that_are_not_there(photos):
    with pytest.raises(UserError, match=r"photso does not exist; did you mean 'photos'\?"):
        listing(photos.parent / "photso")
    with pytest.raises(UserError, match=r"photso/dog does not exist; did you mean 'photos'\?"):
        listing(photos.parent / "photso" / "dog")
    with pytest.raises(UserError, match=r"zzz does not exist$"):
        listing(photos / "zzz")
    with pytest.raises(UserError, match="does not exist"):
        listing("x" * 5000)


def test_a_folder_without_the_modality_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no file of modality image .* and no other file"):
        listing(tmp_path)
    touch(tmp_path / "a.txt", tmp_path / "b.TXT", tmp_path / "c.mp4")
    with pytest.raises(UserError, match=r"only 3 of other kinds \(2 \.txt, 1 \.mp4\)"):
        listing(tmp_path)


def test_a_manifest_may_name_files_that_are_not_there(tmp_path):
    (tmp_path / "manifest.csv").write_text("path\ngone.jpg\nodd.suffix\n")
    assert names(listing(tmp_path)) == ["gone.jpg", "odd.suffix"]


def test_ledger_has_one_line_per_file_and_goes_on_after_a_torn_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add("a.jpg", "truncated")
    ledger.add("a.jpg", "truncated", step=3)
    ledger.add("b.jpg", "empty file", step=4)
    assert ledger.count == 2
    with path.open("a") as file:
        file.write('{"path": "c.jpg", "rea')
    again = Ledger(path)
    assert again.count == 2
    again.add("b.jpg", "empty file")
    again.add("c.jpg", "no such file")
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (lines[0], lines[1], lines[3])] == [
        {"path": "a.jpg", "reason": "truncated"},
        {"path": "b.jpg", "reason": "empty file", "step": 4},
        {"path": "c.jpg", "reason": "no such file"},
    ]
    assert Ledger(path).count == 3


def test_ledger_in_memory():
    ledger = Ledger(None)
    ledger.add("a.jpg", "truncated")
    assert ledger.count == 1


FILMS = SimpleNamespace(
    name="video", suffixes=frozenset({".mp4"}), frame_suffixes=frozenset({".jpg", ".png"}), timed=True
)


def test_a_folder_of_numbered_pictures_is_one_film(tmp_path):
    root = tmp_path / "films"
    touch(*(root / "b" / f"{i}.jpg" for i in range(3)), root / "b" / "notes.txt")
    touch(root / "a.mp4", root / "c" / "d.mp4", root / "c" / "cover1.jpg", root / "c" / "cover2.jpg")
    touch(root / "lone" / "1.png", root / "unnumbered" / "x.png", root / "unnumbered" / "y.png")
    found = list_files(root, FILMS)
    assert names(found) == ["a.mp4", "b", "c/d.mp4"]
    assert found.ignored == {".jpg": 2, ".png": 3, ".txt": 1}
    assert found.select([2]).labels() == ["c"]
    alone = list_files(root / "b", FILMS)
    assert (names(alone), alone.paths) == (["b"], [str(root / "b")])


def test_start_and_end_make_pieces(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,start,end,label\na.mp4,0,1.5,x\na.mp4,1.5,,y\nb.mp4,,,z\n")
    found = list_files(tmp_path, FILMS)
    assert names(found) == ["a.mp4#t=0,1.5", "a.mp4#t=1.5", "b.mp4"]
    assert found.labels() == ["x", "y", "z"]
    # Pictures have no moments.
    assert names(listing(tmp_path)) == ["a.mp4", "a.mp4", "b.mp4"]


@pytest.mark.parametrize("row", ["a.mp4,2,1", "a.mp4,soon,", "a.mp4,,-1", "a.mp4,nan,"])
def test_times_that_are_none_name_their_row(tmp_path, row):
    (tmp_path / "m.csv").write_text(f"path,start,end\nb.mp4,0,1\n{row}\n")
    with pytest.raises(UserError, match=r"row 2 starts at .* give seconds"):
        list_files(tmp_path / "m.csv", FILMS)


def test_a_piece_on_the_command_line(tmp_path):
    touch(tmp_path / "a.mp4")
    found = list_files(f"{tmp_path}/a.mp4#t=1,2", FILMS)
    assert (names(found), len(found)) == (["a.mp4#t=1,2"], 1)
    with pytest.raises(UserError, match="does not exist"):
        list_files(f"{tmp_path}/b.mp4#t=1,2", FILMS)


def test_a_piece_of_a_piece_and_one_that_ends_before_it_starts(tmp_path):
    touch(tmp_path / "a.mp4")
    (tmp_path / "m.csv").write_text("path,start\na.mp4#t=1,0\n")
    with pytest.raises(UserError, match="row 1 names a piece"):
        list_files(tmp_path / "m.csv", FILMS)
    with pytest.raises(UserError, match="ends before it starts"):
        list_files(f"{tmp_path}/a.mp4#t=2,1", FILMS)


def test_pictures_whose_names_differ_in_more_than_numbers_are_no_film(tmp_path):
    for name in ("1f0cf.png", "1f1e6.png", "a12.png"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds no file of modality video"):
        list_files(tmp_path, FILMS)
    (tmp_path / "1f1e6.png").unlink()
    (tmp_path / "a12.png").rename(tmp_path / "2f0cf.png")
    (tmp_path / "cover.png").touch()
    assert list_files(tmp_path, FILMS).paths == [str(tmp_path)]
