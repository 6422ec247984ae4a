import io
import json
import os
import signal

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from mmssl.errors import UserError
from modalities.image import Image
from tasks import data_check
from tasks.data_check import check


class Fragile(Image):
    """Decodes like its parent, but a file called bomb kills the process, as a bug in a C library does."""

    def decode(self, path):
        if "bomb" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(path)


@pytest.fixture
def photos(tmp_path):
    """40 good pictures of growing size, two broken ones and two files of other kinds."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        PIL.Image.fromarray(np.zeros((10 + i, 20 + i, 3), np.uint8)).save(root / "sub" / f"{i:02}.png")
    (root / "sub" / "07b.jpg").touch()
    (root / "note.jpg").write_text("not a picture")
    (root / "read.me").touch()
    (root / "list.txt").touch()
    return root


BROKEN = [
    {"path": "note.jpg", "reason": "not an image: cannot identify image file"},
    {"path": "sub/07b.jpg", "reason": "empty file"},
]


def test_the_report(photos, tmp_path):
    ledger, done = tmp_path / "out" / "ledger.jsonl", []
    result = check(photos, "image", workers=2, ledger_out=ledger, progress=lambda *seen: done.append(seen))
    assert json.loads(json.dumps(result.as_dict())) == {
        "path": str(photos),
        "modality": "image",
        "files": 42,
        "ok": 40,
        "broken": BROKEN,
        "ignored": {".me": 1, ".txt": 1},
        "size": {"smallest": [10, 20], "median": [29, 39], "largest": [49, 59]},
        "size_words": ["height", "width"],
    }
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == BROKEN
    assert done == [(i + 1, 42) for i in range(42)]
    ledger.write_text('{"path": "old.jpg", "reason": "of another check"}\n')
    assert check(photos, "image", workers=1, ledger_out=ledger) == result
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == BROKEN


def test_a_file_that_kills_its_decoder_is_named_and_the_rest_is_reported(photos, monkeypatch):
    monkeypatch.setitem(data_check.MODALITIES, "image", Fragile())
    (photos / "sub" / "05 bomb.png").touch()
    (photos / "sub" / "30 bomb.png").touch()
    result = check(photos, "image", workers=2)
    crashed = [{"path": f"sub/{name} bomb.png", "reason": "crashes its decoder"} for name in ("05", "30")]
    assert result.broken == [BROKEN[0], crashed[0], BROKEN[1], crashed[1]]
    assert result.ok == 40


def test_a_manifest_and_its_missing_files(photos):
    (photos / "manifest.csv").write_text("path\nsub/03.png\ngone.png\n")
    result = check(photos, "image", workers=1)
    assert result.broken == [{"path": "gone.png", "reason": "no such file"}]
    assert result.as_dict()["size"] == {which: [13, 23] for which in ("smallest", "median", "largest")}


def test_the_table_tells_people(photos):
    (photos / "[odd].png").touch()
    console = Console(file=io.StringIO(), width=60)
    check(photos, "image", workers=1).render(console)
    text = console.file.getvalue()
    for expected in (
        "43",
        "empty file",
        "[odd].png: empty file",
        "smallest: height 10, width 20",
        "largest: height 49, width 59",
        ".txt",
    ):
        assert expected in text


def test_a_path_without_pictures(tmp_path):
    with pytest.raises(UserError, match="no file of modality image"):
        check(tmp_path, "image")
    with pytest.raises(UserError, match="'imgae' is not a modality; did you mean 'image'"):
        check(tmp_path, "imgae")
