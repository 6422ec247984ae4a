import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sharding import AUDIO, IMAGE, TEXT, member, read, write_tar

from mmssl.data import tars
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.data.tars import TarMember, entries, scan
from mmssl.errors import UnusableData, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def shard(tmp_path):
    names = ["cats/1.png", "é/2.png", f"{'long/' * 30}3.png"]
    return write_tar(tmp_path / "a.tar", [(name, f"bytes {i}".encode() * 200) for i, name in enumerate(names)])


def reason(path):
    with pytest.raises(BrokenFile) as caught:
        guarded(read, str(path), None)
    return caught.value.reason


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_by_their_place_whatever_the_layout(tmp_path, layout):
    names = ["./plain.png", "é" * 20 + ".png", "folder/" * (20 if layout != tarfile.USTAR_FORMAT else 10) + "x.png"]
    shard = write_tar(tmp_path / "a.tar", [(n, n.encode()) for n in names], layout)
    for i, name in enumerate(names):
        path = str(member(shard, i))
        assert path.endswith(f"/{name.removeprefix('./')}")
        assert TarMember.parse(path) == member(shard, i)
        assert guarded(read, path, None) == name.encode()


def test_other_paths_are_no_members():
    for path in ("/a/b.tar", "/a/b.tar@12/x.png", "/a/b.tar@1+2", "/a/b.png", "data:,x.tar@1+2", "/a@1+2/b.png"):
        assert TarMember.parse(path) is None


def test_what_is_wrong_with_a_shard_is_the_members_reason(shard, tmp_path):
    whole = shard.read_bytes()
    last = member(shard, 2)
    assert reason(last._replace(shard=str(tmp_path / "gone.tar"))) == "its shard: no such file"
    assert reason(last._replace(size=0)) == "empty file"
    assert reason(last._replace(offset=10**9)) == "truncated: its shard ends before it"
    assert reason(last._replace(offset=0)) == "byte 0 of its shard cannot be where a file begins"
    other = "its shard holds something else at this place: is the manifest of other shards?"
    assert reason(last._replace(size=5)) == other
    assert reason(last._replace(offset=last.offset + 512)) == other
    assert reason(member(shard, 0, name="cats/9.png")) == other
    shard.write_bytes(whole[: last.offset + 700])
    assert reason(last) == f"truncated: its shard ends after 700 of its {last.size} bytes"
    assert guarded(read, str(member_of(shard, whole)), None) == b"bytes 0" * 200


def member_of(shard, whole):
    # The first member of what has been cut behind it.
    return TarMember(str(shard), whole.index(b"bytes 0"), 1400, "cats/1.png")


def test_a_shard_that_is_written_anew_is_read_anew(shard):
    first = member(shard, 0)
    assert guarded(read, str(first), None)[:7] == b"bytes 0"
    aside = write_tar(shard.with_name("b.tar"), [("cats/1.png", b"ANOTHER" * 200)])
    aside.replace(shard)
    assert guarded(read, str(first), None)[:7] == b"ANOTHER"


def test_no_more_shards_stay_open_than_are_kept(tmp_path, monkeypatch):
    shards = [write_tar(tmp_path / f"{i}.tar", [("x.png", b"x")]) for i in range(tars.HANDLES + 9)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for shard in shards:
        assert guarded(read, str(member(shard, 0)), None) == b"x"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + tars.HANDLES


@pytest.mark.parametrize("cut", [100, 700, 1100, -1500])
def test_a_truncated_shard_is_named(shard, cut):
    whole = shard.read_bytes()
    shard.write_bytes(whole[:cut] if cut > 0 else whole[: member(shard, 2).offset + 5])
    with pytest.raises(UnusableData, match=r"a\.tar is (truncated|no whole tar file)"):
        scan(str(shard))


def test_a_shard_cut_between_members_is_truncated_too(shard):
    shard.write_bytes(shard.read_bytes()[: member(shard, 1).offset - 512])
    with pytest.raises(UnusableData, match="truncated: it ends after 1 files"):
        scan(str(shard))
    shard.write_bytes(b"no tar" * 500)
    with pytest.raises(UnusableData, match="no whole tar file"):
        list_files(shard, IMAGE)


def picture(shade):
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 5, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def dataset(tmp_path):
    """Two shards by WebDataset's own writer: 5 samples, the last without a picture."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "wds").mkdir()
    for shard, keys in enumerate(("abc", "de")):
        with webdataset.TarWriter(str(tmp_path / "wds" / f"{shard}.tar")) as writer:
            for key in keys:
                sample = {"__key__": f"sub/{key}", "cls": str(ord(key)), "txt": f"letter {key}\n"}
                sample["json"] = json.dumps({"speaker": key, "age": 7, "path": "no", "box": [1, 2], "caption": ""})
                if key != "e":
                    sample |= {"png": picture(ord(key)), "seg.png": picture(0)}
                writer.write(sample)
    return tmp_path / "wds"


def test_shards_of_others_give_samples_labels_captions_and_columns(dataset):
    listing = list_files(dataset, IMAGE)
    assert [path.partition("/sub/")[2] for path in listing.paths] == ["a.png", "b.png", "c.png", "d.png"]
    assert listing.labels() == ["97", "98", "99", "100"]
    assert listing.columns == {
        "label": ["97", "98", "99", "100"],
        "caption": [f"letter {key}" for key in "abcd"],
        "speaker": [*"abcd"],
        "age": ["7"] * 4,
    }
    assert listing.name(3).startswith("1.tar@")
    for path, key in zip(listing.paths, "abcd", strict=True):
        assert guarded(read, path, None) == picture(ord(key))
    assert len(list_files(dataset / "0.tar", IMAGE)) == 3
    assert list_files(dataset / "0.tar", IMAGE).name(0).startswith("0.tar@")


def test_their_captions_are_texts_and_pairs(dataset):
    texts = list_files(dataset, TEXT)
    assert guarded(read, texts.paths[4], None) == b"letter e\n"
    pairs = list_pairs(dataset, [IMAGE, TEXT], strict=False)
    assert [path is not None for path in pairs.media["image"]] == [True] * 4 + [False]
    assert guarded(read, pairs.media["text"][3], None) == b"letter d\n"
    with pytest.raises(UserError, match="2 tar shards hold no file of modality audio"):
        list_files(dataset, AUDIO)


def test_a_folder_of_shards_and_of_loose_media_is_refused(dataset):
    (dataset / "README.txt").write_text("on letters")
    assert len(list_files(dataset, TEXT)) == 5
    (dataset / "x.png").write_bytes(picture(3))
    with pytest.raises(UserError, match=r"holds 1 \.png and 2 tar shards; name one of them or move the other"):
        list_files(dataset, IMAGE)


def test_patterns_and_compressed_shards_get_a_hint(tmp_path):
    for name in ("{0..3}.tar", "*.tar"):
        with pytest.raises(UserError, match="does not exist; patterns are not expanded: give the folder"):
            list_files(tmp_path / name, IMAGE)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed"):
        list_files(tmp_path / "a.tar.gz", IMAGE)


def test_what_no_reader_agrees_on_is_refused(tmp_path):
    one, two = (write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", b"x")]) for name in "ab")
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UnusableData, match=r"a\.tar goes on behind the mark of its end"):
        scan(str(one))
    write_tar(two, [("x.png", b"1"), ("y.png", b"2"), ("./x.png", b"3")])
    with pytest.raises(UnusableData, match=r"b\.tar holds 2 files called x\.png"):
        scan(str(two))


def test_scans_are_kept_until_a_shard_changes(dataset, cache, monkeypatch):
    shard = str(dataset / "0.tar")
    found = entries(shard)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tars, "scan", lambda _: pytest.fail("scanned again"))
    assert entries(shard) == found
    next(cache.iterdir()).write_text("[[1")
    monkeypatch.setattr(tars, "scan", scan)
    assert entries(shard) == found
    write_tar(shard, [("other.png", b"")])
    assert [entry.name for entry in entries(shard)] == ["other.png"]
