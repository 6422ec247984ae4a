"""Shards as they are written: what is in them, what stays of an earlier run, and what is refused."""

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmssl.data.guard import guarded
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.data.tars import TarMember, scan
from mmssl.errors import Stopped, UserError
from modalities.encoder import MODALITIES
from tasks import data_pack
from tasks.data_check import check
from tasks.data_pack import pack

IMAGE = MODALITIES["image"]
FILES = {"shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "manifest.parquet", "shards.json"}


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures in two classes, one of them broken, and a note."""
    root = tmp_path / "pictures"
    for i in range(11):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((6, 7, 3), 20 * i, np.uint8)).save(root / "ab"[i % 2] / f"{i:02}.v1.png")
    (root / "b" / "05.v1.png").write_text("no picture")
    (root / "notes.md").touch()
    return root


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def read(path):
    return Path(path).read_bytes()


def contents(listing):
    return [guarded(read, path, None) for path in listing.paths]


def test_shards_hold_what_the_folder_held(folder, tmp_path):
    result = pack(folder, tmp_path / "out", per_shard=4, workers=1)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*FILES, "ledger.jsonl"}
    broken = {"path": "b/05.v1.png", "reason": "not an image: cannot identify image file"}
    facts = result.as_dict()
    assert facts.pop("seconds") >= 0
    assert json.loads(json.dumps(facts)) == {
        "path": str(folder),
        "out": str(tmp_path / "out"),
        "modalities": ["image"],
        "samples": 10,
        "rows": 10,
        "shards": 3,
        "kept": 0,
        "broken": [broken],
        "ignored": {".md": 1},
        "bytes": sum(file.stat().st_size for file in (tmp_path / "out").glob("*.tar")),
    }
    before, after = list_files(folder, IMAGE), list_files(tmp_path / "out", IMAGE)
    whole = before.select([i for i in range(11) if "05" not in before.paths[i]])
    assert contents(after) == contents(whole)
    assert after.labels() == whole.labels() == ["a"] * 6 + ["b"] * 4
    assert [one["samples"] for one in json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]] == [4, 4, 2]
    assert [TarMember.parse(path).name for path in after.paths[:2]] == ["a/00_v1.png", "a/02_v1.png"]
    assert (tmp_path / "out" / "ledger.jsonl").read_text() == json.dumps(broken) + "\n"
    page = io.StringIO()
    result.render(Console(file=page, width=160))
    assert "broken b/05.v1.png: not an image" in page.getvalue()


def test_webdataset_reads_our_shards(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pack(folder, tmp_path / "out", per_shard=4, workers=1)
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    seen = {one["__key__"]: one for one in webdataset.WebDataset(shards, shardshuffle=False).decode("pil")}
    assert len(seen) == 10
    for i in (0, 7):
        one = seen[f"{'ab'[i % 2]}/{i:02}_v1"]
        assert one["png"].getpixel((0, 0)) == (20 * i,) * 3
        assert (one["cls"], one["json"]) == (i % 2, {"label": "ab"[i % 2]})


def test_the_same_files_make_the_same_bytes_wherever_they_lie(folder, tmp_path):
    pack(folder, tmp_path / "one", per_shard=4, workers=1)
    shutil.copytree(folder, tmp_path / "copy")  # the times too
    pack(tmp_path / "copy", tmp_path / "two", per_shard=4, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def stopped_after(monkeypatch, after, signum):
    """Make a signal arrive after so many samples."""
    said, count = data_pack._Packer._said, [0]

    def fail(*words):
        count[0] += 1
        if count[0] > after:
            signal.raise_signal(signum)
        return said(*words)

    monkeypatch.setattr(data_pack._Packer, "_said", fail)


@pytest.mark.parametrize(("after", "signum"), [(0, 15), (2, 2), (6, 15), (9, 2)])
def test_a_run_that_was_stopped_is_gone_on_with_and_gives_the_same_bytes(folder, tmp_path, monkeypatch, after, signum):
    pack(folder, tmp_path / "straight", per_shard=4, workers=1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, after, signum)
        with pytest.raises(Stopped, match=f"stopped after {after // 4} shards; run the same command") as stopped:
            pack(folder, out, per_shard=4, workers=1)
    assert stopped.value.exit_code == 128 + signum
    with pytest.raises(UserError, match="is not packed to its end"):
        list_files(out, IMAGE)
    with (out / data_pack.DONE).open("a") as lines:
        lines.write('{"shard": 2, "fi')
    (out / ".shard-000002.tar.1.tmp").write_text("half")
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    result = pack(folder, out, per_shard=4, workers=1)
    assert result.kept == len(written) == after // 4
    assert all((out / name).stat().st_mtime_ns == when for name, when in written.items())
    assert digests(out) == digests(tmp_path / "straight")
    assert result.broken == pack(folder, tmp_path / "straight", per_shard=4, workers=1).broken


def unfinished(out):
    return (out / "packing.json").exists()


def test_a_finished_pack_is_left_alone_but_for_damage(folder, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    pack(folder, out, per_shard=4, workers=1)
    right = digests(out)
    shard = out / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert pack(folder, out, per_shard=4, workers=1).kept == 2
    assert (
        "shard-000001.tar: its checksum is not that with which it was written; it is packed anew"
        in capfd.readouterr().err
    )
    assert digests(out) == right
    with monkeypatch.context() as patch:
        patch.setattr(data_pack, "_write_manifest", lambda *_: pytest.fail("all is there") if unfinished(out) else 10)
        assert pack(folder, out, per_shard=4, workers=1).kept == 3


def test_a_source_that_has_changed_is_told(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out, per_shard=4, workers=1)
    right = digests(out)
    PIL.Image.new("RGB", (3, 3)).save(folder / "b" / "01.v1.png")
    with pytest.raises(UserError, match=r"has changed since .*out was begun \(shard-000001.tar, from a/08.v1.png on\)"):
        pack(folder, out, per_shard=4, workers=1)
    with pytest.raises(UserError, match="begun with per_shard 4, and this is 5"):
        pack(folder, out, per_shard=5, workers=1)
    with pytest.raises(UserError, match=r"no file of modality audio .*\(11 \.png.*\); .* --modality image"):
        pack(folder, out, modality="audio")
    assert digests(out) == right


def test_what_cannot_be_packed_there_is_refused(folder, tmp_path):
    for out, words in (
        (folder / "out", "lies in, the folder"),
        (folder, "lies in, the folder"),
        (tmp_path, "other things"),
    ):
        with pytest.raises(UserError, match=words):
            pack(folder, out)
    with pytest.raises(UserError, match="written on this machine"):
        pack(folder, "s3://bucket/out")
    with pytest.raises(UserError, match="exclude each other"):
        pack(folder, tmp_path / "out", modality="image", recipe="image-mae-tiny")
    with pytest.raises(UserError, match="did you mean 'image'"):
        pack(folder, tmp_path / "out", modality="imge")
    with pytest.raises(UserError, match="0 samples"):
        pack(folder, tmp_path / "out", per_shard=0)
    for i in range(3):
        shutil.copy(folder / "a" / "00.v1.png", folder / "a" / f"{i}.png")
    for other in (folder / "b", folder / "notes.md"):
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    for odd in (folder / "a").glob("*.v1.png"):
        odd.unlink()
    with pytest.raises(UserError, match="is a folder of frames"):
        pack(folder, tmp_path / "out", modality="video")
    assert not (tmp_path / "out").exists()


def write_manifest(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_columns_pieces_and_repeated_files_stay(sounds, tmp_path):
    files = sorted(sounds.rglob("*.*"))[:2]
    rows = [
        (files[0], "", 0.1, "one", "train"),
        (files[1], 0.05, "", "two", "test"),
        (files[0], 0.1, 0.2, "three", "train"),
    ]
    write_manifest(tmp_path / "manifest.csv", ["path", "start", "end", "speaker", "split"], rows)
    result = pack(tmp_path / "manifest.csv", tmp_path / "out", modality="audio", workers=1)
    assert (result.samples, result.rows) == (2, 3)
    audio = MODALITIES["audio"]
    before, after = list_files(tmp_path / "manifest.csv", audio), list_files(tmp_path / "out", audio)
    assert after.columns == before.columns
    assert [path.partition("#")[2] for path in after.paths] == ["t=0,0.1", "t=0.05", "t=0.1,0.2"]
    assert after.paths[0].partition("#")[0] == after.paths[2].partition("#")[0]
    assert [audio.decode(path).waveform.tolist() for path in after.paths] == [
        audio.decode(path).waveform.tolist() for path in before.paths
    ]
    assert len(list_files(tmp_path / "out", audio, split="test")) == 1
    write_manifest(tmp_path / "own.csv", ["path"], [(f"{files[0]}#t=0,0.1",), (f"{files[0]}#t=0.1",)])
    pack(tmp_path / "own.csv", tmp_path / "own", modality="audio", workers=1)
    assert [path.partition("#")[2] for path in list_files(tmp_path / "own", audio).paths] == ["t=0,0.1", "t=0.1"]


def test_rows_of_several_media_and_captions_are_one_sample(captioned, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pack(captioned, tmp_path / "out", per_shard=5, workers=1)
    kinds = [MODALITIES[name] for name in ("image", "video", "audio", "text")]
    before, after = (list_pairs(place, kinds) for place in (captioned, tmp_path / "out"))
    others = {name: values for name, values in before.columns.items() if not name.endswith("_path")}
    assert {name: after.columns[name] for name in others} == others
    for name in ("image", "video", "audio"):
        pairs = zip(before.media[name], after.media[name], strict=True)
        assert all(guarded(read, a, None) == guarded(read, b, None) for a, b in pairs)
    assert after.media["text"] == before.media["text"]
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    one = next(iter(webdataset.WebDataset(shards, shardshuffle=False)))
    assert {"png", "mp4", "flac", "txt", "json", "cls"} <= one.keys()
    assert one["txt"].decode() == before.columns["caption"][0]
    # Without the manifest it is what others have.
    (tmp_path / "out" / "manifest.parquet").unlink()
    found = list_pairs(tmp_path / "out", [MODALITIES["image"], MODALITIES["text"]])
    assert found.columns["label"] == before.columns["label"]
    assert guarded(read, found.media["text"][2], None).decode() == before.columns["caption"][2]


def test_several_captions_of_a_picture_are_rows_of_one_sample(folder, tmp_path):
    rows = [("a/00.v1.png", "red,\ncat"), ("a/02.v1.png", "dog"), ("a/00.v1.png", "a cat")]
    write_manifest(folder / "manifest.csv", ["path", "caption"], rows)
    result = pack(folder, tmp_path / "out", recipe="clip-tiny", workers=1)
    assert (result.samples, result.rows, result.modalities) == (2, 3, ["image"])
    after = list_pairs(tmp_path / "out", [IMAGE, MODALITIES["text"]])
    assert after.columns["caption"] == ["red,\ncat", "dog", "a cat"]
    assert after.media["image"][0] == after.media["image"][2]
    entries = {entry.name: entry.text for entry in scan(str(tmp_path / "out" / "shard-000000.tar"))}
    assert entries["a/00_v1.txt"] == "red, cat\na cat"
    assert json.loads(entries["a/00_v1.json"]) == {"rows": [{"caption": "red,\ncat"}, {"caption": "a cat"}]}
    write_manifest(folder / "manifest.csv", ["caption"], [("only words",)])
    with pytest.raises(UserError, match="all its texts stand in the manifest itself"):
        pack(folder, tmp_path / "texts", modality="text")


def test_names_that_would_clash_and_files_outside_and_gone(folder, tmp_path):
    outside = tmp_path / "x.png"
    for path in (outside, folder / "a" / "1.png", folder / "a" / "1.bmp", folder / "a" / "1.x.png"):
        PIL.Image.new("RGB", (len(path.name), 2)).save(path)
    rows = [("../x.png",), (str(outside),), ("a/1.png",), ("a/1.bmp",), ("a/1.x.png",), ("a/1_x.png",), ("gone.png",)]
    shutil.copy(folder / "a" / "1.x.png", folder / "a" / "1_x.png")
    write_manifest(folder / "manifest.csv", ["path"], rows)
    result = pack(folder, tmp_path / "out", workers=1)
    listing = list_files(tmp_path / "out", IMAGE)
    names = [TarMember.parse(path).name for path in listing.paths]
    assert names[2:] == ["a/1.png", "a/1-2.bmp", "a/1_x.png", "a/1_x-2.png"]
    assert len(set(names)) == 6
    assert [IMAGE.decode(path).width for path in listing.paths] == [5, 5, 5, 5, 7, 7]
    assert result.broken == [{"path": "gone.png", "reason": "no such file"}]
    assert not result.all_broken


def test_shards_are_cut_by_size_too_and_packed_again_from_shards(folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for i in range(5):
        PIL.Image.fromarray(noise).save(folder / "a" / f"big{i}.png")  # half a megabyte each
    result = pack(folder, tmp_path / "out", max_shard_mb=1, workers=1)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.tar"))]
    assert result.shards == len(sizes) > 2
    assert max(sizes) < 1.1e6
    again = pack(tmp_path / "out", tmp_path / "again", per_shard=4, workers=1)
    assert again.samples == result.samples
    both = [list_files(tmp_path / name, IMAGE) for name in ("out", "again")]
    assert contents(both[0]) == contents(both[1])
    assert both[0].columns == both[1].columns
    assert not check(tmp_path / "again", "image", workers=1).broken
    assert pq.read_schema(tmp_path / "again" / "manifest.parquet").names == ["path", "label"]


def test_check_tells_damaged_shards_and_members(folder, tmp_path, ask):
    (folder / "b" / "05.v1.png").unlink()
    out = tmp_path / "out"
    assert ask("data", "pack", folder, out, "--per-shard", 4, "--workers", 1, "--json")[0] == 0
    result = check(out, "image", workers=1)
    assert (result.shards, result.damaged, result.broken) == (3, [], [])
    victim = TarMember.parse(list_files(out, IMAGE).paths[1])
    data = bytearray((out / "shard-000000.tar").read_bytes())
    data[victim.offset : victim.offset + 8] = bytes(8)
    (out / "shard-000000.tar").write_bytes(data)
    (out / "shard-000001.tar").unlink()
    (out / "shard-000002.tar").write_bytes((out / "shard-000002.tar").read_bytes()[:1000])
    code, text, _ = ask("data", "check", out, "--workers", 1, "--json")
    report = json.loads(text)
    assert code == 3
    assert [entry["path"] for entry in report["damaged_shards"]] == [f"shard-00000{i}.tar" for i in range(3)]
    assert [entry["reason"].partition(",")[0] for entry in report["damaged_shards"]] == [
        "its checksum is not that with which it was written", "no such file", "has 1000 bytes",
    ]  # fmt: skip
    reasons = {entry["path"].rpartition("/")[2]: entry["reason"] for entry in report["broken"]}
    assert reasons["02_v1.png"] == "not an image: cannot identify image file"
    assert reasons["08_v1.png"] == "its shard: no such file"
    assert report["ok"] == 4
    assert "0 of 3 shards are as they were written" in ask("data", "check", out, "--workers", 1)[1]
    (out / "shards.json").write_text("{")
    assert ask("data", "check", out, "--workers", 1)[0] == 2


def test_nothing_that_can_be_packed_is_code_3(tmp_path, ask):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no picture")
    code, text, _ = ask("data", "pack", tmp_path / "in", tmp_path / "out", "--json")
    assert code == 3
    assert json.loads(text)["broken"][0]["path"] == "a.png"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ledger.jsonl"]
    PIL.Image.new("RGB", (3, 3)).save(tmp_path / "in" / "a.png")
    assert pack(tmp_path / "in", tmp_path / "out", workers=1).broken == []
    assert "--per-shard" in ask("data", "pack", tmp_path / "in", tmp_path / "other", "--per-shard", 0)[2]


def test_two_packs_into_one_folder_are_one(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out is being packed by another process"):
        pack(folder, out, workers=1)
    os.close(handle)
    assert pack(folder, out, workers=1).samples == 10


@pytest.mark.parametrize("text", ["[]", "{}", '{"shards": 3}', '{"sources": ["a"], "shards": [{}], "modalities": []}'])
def test_notes_of_others_are_refused(folder, tmp_path, text):
    out = tmp_path / "out"
    for name in ("shards.json", "packing.json"):
        out.mkdir()
        (out / name).write_text(text if name == "shards.json" or "sources" not in text else "{")
        with pytest.raises(UserError, match=f"{name} is not what 'data pack' writes"):
            pack(folder, out, workers=1)
        shutil.rmtree(out)


@pytest.mark.parametrize("line", ["7", "{}", '{"shard": "x"}', '{"shard": 99, "file": "f", "samples": 1'])
def test_lines_of_others_count_for_nothing(folder, tmp_path, line, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, 2, signal.SIGINT)
        with pytest.raises(Stopped):
            pack(folder, out, per_shard=4, workers=1)
    (out / data_pack.DONE).write_text(line)
    assert pack(folder, out, per_shard=4, workers=1).kept == 0


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(folder, tmp_path):
    (folder / "a" / "00.v1.png").rename(folder / "a" / "\udcff.png")
    with pytest.raises(UserError, match=r"'a/\\udcff.png' is not UTF-8"):
        pack(folder, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_where_files_lie_is_not_in_their_members_names(folder, tmp_path):
    write_manifest(tmp_path / "m.csv", ["path"], [(file,) for file in sorted(folder.rglob("0[0-3]*.png"))])
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "m.csv", tmp_path / "elsewhere" / "m.csv")
    pack(tmp_path / "elsewhere" / "m.csv", tmp_path / "out", workers=1)
    names = [entry.name for entry in scan(str(tmp_path / "out" / "shard-000000.tar"))]
    assert names == ["a/00_v1.png", "a/02_v1.png", "b/01_v1.png", "b/03_v1.png"]


def test_columns_that_shards_cannot_hold(folder, tmp_path, capfd):
    data = [file.read_bytes() for file in sorted((folder / "a").iterdir())[:2]]
    columns = {"image": [data[0], None, data[1]], "label": ["x", "y", "z"], "vector": [[1], [2], [3]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    result = pack(tmp_path / "a.parquet", tmp_path / "out", workers=1)
    assert (result.samples, [entry["reason"] for entry in result.broken]) == (2, ["nothing in its cell"])
    assert "not packed are the columns of lists, structs or bytes: vector" in capfd.readouterr().err
    pq.write_table(pa.table({"image": data, "depth": data}), tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    noted = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    pq.write_table(table.replace_schema_metadata({b"huggingface": noted.encode()}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="column 'depth' holds files of no modality of this pack"):
        pack(tmp_path / "b.parquet", tmp_path / "two", workers=1)


def test_check_finds_shards_by_their_manifest_and_as_a_url(sounds, tmp_path, ask):
    pack(sounds, tmp_path / "out", modality="audio", per_shard=99, workers=1)
    for place in (tmp_path / "out", tmp_path / "out" / "manifest.parquet", f"file://{tmp_path}/out"):
        result = check(place, workers=1)
        assert (result.modality, result.shards, result.damaged) == ("audio", 1, [])
        assert result.path == str(place).removeprefix("file://")


def test_shrinking_shards_is_refused(clips, tmp_path, ask):
    pack(clips, tmp_path / "out", modality="video", workers=1)
    code, _, err = ask("data", "shrink", tmp_path / "out", tmp_path / "small")
    assert code == 2
    assert "shrink the loose files, then pack them" in err
