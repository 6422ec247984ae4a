from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sharding import AUDIO, IMAGE, TEXT, read, write_tar

from mmssl.data import paths
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.data.parts import stamp
from mmssl.data.paths import absolute, fetch, given, join, url
from mmssl.data.tars import TarMember, scan
from mmssl.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))


def test_urls_are_told_from_paths_and_get_their_slashes_back():
    assert url(Path("s3://bucket/a.tar")) == url("s3://bucket/a.tar") == "s3://bucket/a.tar"
    for path in ("file:///data/x", Path("file:///data/x"), "local:///data/x"):
        assert (given(path), absolute(path), join("/a", str(path))) == (Path("/data/x"), "/data/x", "/data/x")
    assert url(Path("simplecache::s3://bucket/x")) == "simplecache::s3://bucket/x"
    assert url("s3://bucket/a.tar@512+7/b.png") == "s3://bucket/a.tar@512+7/b.png"
    for path in ("/a/b", "a/b:c", "a:b", "data:,a%20cat", "./s3", "C:/x", "/x/s3://y"):
        assert url(path) is None
    assert (absolute("memory://a/b/"), join("memory://a", "b/c")) == ("memory://a/b", "memory://a/b/c")
    assert (join("/a", "memory://b"), join("memory://a", "/b")) == ("memory://b", "/b")


@pytest.fixture(params=["memory", "file"])
def root(request, tmp_path):
    """The URL of a new folder."""
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/there"


def plain(root):
    """Return what the URL of a folder is taken for."""
    return root.removeprefix("file://")


def put(address, data):
    files, name = fsspec.core.url_to_fs(address)
    files.makedirs(name.rpartition("/")[0], exist_ok=True)
    files.pipe_file(name, data)


def texts(files):
    return [guarded(read, path, None) for path in files]


def test_loose_files(root):
    for name in ("cat/1.png", "cat/2.png", "dog/deep/3.png", "dog/4.txt", ".hidden/5.png"):
        put(f"{root}/{name}", name.encode())
    listing = list_files(root, IMAGE)
    assert listing.paths == [f"{plain(root)}/{name}" for name in ("cat/1.png", "cat/2.png", "dog/deep/3.png")]
    assert listing.labels() == ["cat", "cat", "dog"]
    assert listing.ignored == {".txt": 1}
    assert texts(listing.paths) == [b"cat/1.png", b"cat/2.png", b"dog/deep/3.png"]
    # As the command line has it.
    assert list_files(Path(f"{root}/"), IMAGE).contents() == listing.contents()
    assert list_files(f"{root}/cat/2.png", IMAGE).paths == listing.paths[1:2]
    with pytest.raises(UserError, match="holds no file of modality audio"):
        list_files(root, AUDIO)
    with pytest.raises(UserError, match=f"{plain(root)}/none does not exist"):
        list_files(f"{root}/none", IMAGE)


@pytest.mark.parametrize("manifest", ["manifest.csv", "other.csv", "manifest.jsonl"])
def test_a_manifest_there_is_the_data_there(root, manifest, tmp_path):
    put(f"{root}/a/1.png", b"one")
    here = tmp_path / "here.png"
    here.write_bytes(b"here")
    rows = [("a/1.png", "x"), (f"{root}/a/1.png", "y"), (str(here), "z")]
    if manifest.endswith("csv"):
        text = "path,caption\n" + "".join(f"{path},{word}\n" for path, word in rows)
    else:
        text = "".join(f'{{"path": "{path}", "caption": "{word}"}}\n' for path, word in rows)
    put(f"{root}/{manifest}", text.encode())
    place = root if manifest.startswith("manifest") else f"{root}/{manifest}"
    assert texts(list_files(place, IMAGE).paths) == [b"one", b"one", b"here"]
    pairs = list_pairs(Path(place), [IMAGE, TEXT])
    assert (len(pairs), pairs.media["text"][1]) == (3, "data:,y")
    put(f"{root}/{manifest}", b"path,caption\n1.png\n" if manifest.endswith("csv") else b"[1]\n")
    with pytest.raises(UserError, match=f"^{plain(root)}/{manifest}, line"):
        list_files(place, IMAGE)


def write_shard(root, tmp_path):
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.png", f"file {i}".encode() * 9000) for i in range(3)])
    put(f"{root}/a.tar", shard.read_bytes())
    return [str(TarMember(f"{root}/a.tar", *entry[1:3], entry[0])) for entry in scan(str(shard))]


def test_shards_with_and_without_a_manifest(root, tmp_path):
    members = [plain(member) for member in write_shard(root, tmp_path)]
    assert list_files(root, IMAGE).paths == list_files(f"{root}/a.tar", IMAGE).paths == members
    assert list_files(root, IMAGE).name(1).startswith("a.tar@")
    put(f"{root}/manifest.csv", f"path,label\n{members[2].removeprefix(f'{root}/')},x\n".encode())
    listing = list_files(root, IMAGE)
    assert listing.paths == members[2:]
    assert texts(listing.paths) == [b"file 2" * 9000]
    assert stamp(members[0]) == paths.stamp(plain(f"{root}/a.tar")) != [None, None]


def test_a_table_with_files_in_it(root, tmp_path):
    pq.write_table(pa.table({"image": pa.array([b"one", b"two"]), "label": ["a", "b"]}), tmp_path / "x.parquet")
    put(f"{root}/x.parquet", (tmp_path / "x.parquet").read_bytes())
    for place in (root, f"{root}/x.parquet"):
        listing = list_files(place, IMAGE)
        assert (texts(listing.paths), listing.labels()) == ([b"one", b"two"], ["a", "b"])


def test_no_more_is_fetched_than_a_member(tmp_path, monkeypatch):
    members, fetched = write_shard("memory://few", tmp_path), []
    cat = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda *words, **more: (fetched.append(more), cat(*words, **more))[1]
    )
    texts(members[1:2])
    member = TarMember.parse(members[1])
    assert fetched == [{"start": member.offset - 512, "end": member.offset + member.size}]


def reason(path):
    with pytest.raises(BrokenFile) as caught:
        guarded(read, path, None)
    return caught.value.reason


def test_what_goes_wrong_there_is_a_reason(root, tmp_path, monkeypatch):
    members = write_shard(root, tmp_path)
    assert reason(f"{root}/gone.png") == "no such file"
    assert reason(members[0].replace("a.tar", "gone.tar")) == "its shard: no such file"
    put(f"{root}/a.tar", b"")
    assert reason(members[0]) == "truncated: its shard ends before it"
    assert stamp(f"{root}/gone.png") == [None, None]

    def fail(*words, **more):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(type(fsspec.core.url_to_fs(root)[0]), "cat_file", fail)
    assert reason(members[0]) == "its shard: cannot be fetched: RuntimeError: no route to host"


def test_a_store_that_cannot_be_asked_is_one_sentence(monkeypatch):
    def fail(*words, **more):
        raise RuntimeError("no credentials\nand a page more")

    monkeypatch.setattr(MemoryFileSystem, "exists", fail)
    with pytest.raises(UserError, match=r"^memory://a cannot be read: RuntimeError: no credentials$"):
        list_files("memory://a", IMAGE)


def test_a_protocol_that_nobody_reads_is_one_sentence(monkeypatch):
    def missing(*words, **more):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"what reads s3:// is not installed: pip install 'mmssl\[s3\]'"):
        list_files(Path("s3://bucket/x"), IMAGE)
    with pytest.raises(UserError, match=r"reads gs:// is not installed: .*gcsfs"):
        list_files(Path("gs://bucket/x"), IMAGE)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"memry:// is not a protocol; did you mean 'memory'\?"):
        list_files("memry://x", IMAGE)
    with pytest.raises(BrokenFile, match="memry:// is not a protocol"):
        guarded(read, "memry://x/y.png", None)
    with pytest.raises(UserError):
        fetch("memry://x")
