"""What belongs together: columns of a manifest, files of one name, texts that are their own path.

Planted bugs that fail here: captions of white space taken for texts, texts that are not quoted whole, media left behind
by ``select``, notes counted as files.
"""

import csv
import json
import os
from types import SimpleNamespace

import pytest

from mmssl.data import inline
from mmssl.data.ledger import Ledger
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.errors import UserError


def media(name, *suffixes, timed=False):
    return SimpleNamespace(name=name, suffixes=frozenset(suffixes), frame_suffixes=frozenset(), timed=timed)


IMAGE, TEXT = media("image", ".jpg", ".png"), media("text", ".txt")
AUDIO, VIDEO = media("audio", ".wav", timed=True), media("video", ".mp4", timed=True)


@pytest.fixture
def manifest(tmp_path):
    """Write a manifest with these columns and return its path."""

    def make(**columns):
        path = tmp_path / "manifest.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
        return path

    return make


def said(listing):
    return [None if path is None else inline.text(path) for path in listing.media["text"]]


# --- columns of a manifest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["image_path", "path"])
def test_pictures_and_captions(manifest, tmp_path, pictures):
    path = manifest(**{pictures: ["a.jpg", "/b.jpg"], "caption": ["a cat", "50 % #off"], "label": ["x", ""]})
    found = list_pairs(path, [IMAGE, TEXT])
    assert found.media["image"] == found.paths == [str(tmp_path / "a.jpg"), "/b.jpg"]
    assert said(found) == ["a cat", "50 % #off"]
    assert list(found.media) == ["image", "text"]
    assert found.columns["label"] == ["x", None]
    assert list(found.rows) == [1, 2]
    assert [found.name(i) for i in range(2)] == ["a.jpg, row 1", "/b.jpg, row 2"]
    assert list_pairs(tmp_path, [IMAGE, TEXT]).paths == found.paths


def test_the_first_modality_gives_a_row_its_name(manifest):
    path = manifest(path=["a.jpg"], caption=["a cat"])
    assert list_pairs(path, [TEXT, IMAGE]).name(0) == "a cat, row 1"


def test_a_column_of_its_own_comes_before_others(manifest, tmp_path):
    path = manifest(path=["a.jpg"], image_path=["b.jpg"], text_path=["b.txt"], caption=["a cat"])
    found = list_pairs(path, [IMAGE, TEXT])
    assert found.media == {"image": [str(tmp_path / "b.jpg")], "text": [str(tmp_path / "b.txt")]}


def test_path_is_what_no_other_column_gives(manifest, tmp_path):
    path = manifest(path=["a.wav"], image_path=["a.jpg"], caption=["a cat"])
    found = list_pairs(path, [IMAGE, AUDIO, TEXT])
    assert found.media["audio"] == [str(tmp_path / "a.wav")]
    assert list_pairs(path, [AUDIO, TEXT]).paths == [str(tmp_path / "a.wav")]


def test_where_path_could_be_of_two_modalities_it_is_of_none(manifest):
    path = manifest(path=["a.jpg"], label=["x"])
    with pytest.raises(
        UserError, match=r"which of image and audio its path is of: .*\(image_path, audio_path\), but .* path, label"
    ):
        list_pairs(path, [IMAGE, AUDIO])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image_path": ["a.jpg"], "captoin": ["a"]}, "text: it needs a column text_path or caption or path.*captoin"),
        ({"img_path": ["a.jpg"], "caption": ["a"]}, "image: it needs a column image_path or path, but has img_path"),
        ({"image_path": [], "caption": []}, "lists nothing"),
    ],
)
def test_what_a_manifest_lacks_is_a_sentence(manifest, columns, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        list_pairs(manifest(**columns), [IMAGE, TEXT])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_a_row_of_two_towers_has_both(manifest, empty):
    with pytest.raises(UserError, match=r"row 2 has no text"):
        list_pairs(manifest(path=["a.jpg", "b.jpg"], caption=["a", empty]), [IMAGE, TEXT])
    with pytest.raises(UserError, match=r"row 2 has no image"):
        list_pairs(manifest(image_path=["a.jpg", empty], caption=["a", "b"]), [IMAGE, TEXT])


def test_a_row_of_three_towers_has_the_centre_and_another(manifest):
    columns = {
        "image_path": ["a.jpg", "b.jpg", "c.jpg"],
        "audio_path": ["", "b.wav", "c.wav"],
        "caption": ["a", "", "c"],
    }
    found = list_pairs(manifest(**columns), [IMAGE, TEXT, AUDIO])
    assert said(found) == ["a", None, "c"]
    assert [path is None for path in found.media["audio"]] == [True, False, False]
    with pytest.raises(UserError, match=r"row 1 has no audio"):
        list_pairs(manifest(**columns), [AUDIO, IMAGE, TEXT])
    columns |= {"audio_path": ["a.wav", "", "c.wav"]}
    with pytest.raises(UserError, match=r"row 2 has no text or audio"):
        list_pairs(manifest(**columns), [IMAGE, TEXT, AUDIO])


def test_splits(manifest):
    path = manifest(path=["a.jpg", "b.jpg", "c.jpg"], caption=["a", "b", ""], split=["train", "test", "odd"])
    assert said(list_pairs(path, [IMAGE, TEXT], default_split="train")) == ["a"]
    assert said(list_pairs(path, [IMAGE, TEXT], split="test", default_split="train")) == ["b"]
    with pytest.raises(UserError, match="no row has split 'tset'; did you mean 'test'"):
        list_pairs(path, [IMAGE, TEXT], split="tset")
    with pytest.raises(UserError, match="row 3 has no text"):  # of what is asked for alone
        list_pairs(path, [IMAGE, TEXT], default_split="none of these")


def test_seconds_are_of_media_that_have_some(manifest, tmp_path):
    path = manifest(video_path=["a.mp4"], image_path=["a.jpg"], caption=["a"], start=["1"], end=["2.5"])
    found = list_pairs(path, [VIDEO, TEXT, IMAGE])
    assert found.media["video"] == [f"{tmp_path / 'a.mp4'}#t=1,2.5"]
    assert found.media["image"] == [str(tmp_path / "a.jpg")]
    assert said(found) == ["a"]


def test_other_forms_of_manifest_hold_the_same(manifest, tmp_path):
    manifest(path=["a.jpg"], caption=["ein Käfer"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"path": "a.jpg", "caption": "ein Käfer"}) + "\n")
    assert list_pairs(rows, [IMAGE, TEXT]).media == list_pairs(tmp_path, [IMAGE, TEXT]).media
    with pytest.raises(UserError, match=r"neither a folder nor a manifest"):
        list_pairs(__file__, [IMAGE, TEXT])
    with pytest.raises(UserError, match=r"rows\.json does not exist; did you mean '.*rows\.jsonl'"):
        list_pairs(tmp_path / "rows.json", [IMAGE, TEXT])


def test_media_follow_rows_that_are_chosen(manifest):
    path = manifest(path=["a.jpg", "b.jpg", "c.jpg"], caption=["a", "b", "c"])
    found = list_pairs(path, [IMAGE, TEXT]).select([2, 0])
    assert said(found) == ["c", "a"]
    assert found.media["image"] == found.paths
    assert list(found.rows) == [3, 1]


def test_one_modality_of_pairs_is_listed_by_its_own_column(manifest, tmp_path):
    path = manifest(image_path=["a.jpg"], caption=["a cat"], label=["x"])
    assert list_files(path, IMAGE).paths == [str(tmp_path / "a.jpg")]
    assert list_files(path, TEXT).paths == [inline.join("a cat")]
    assert list_files(path, IMAGE).labels() == ["x"]
    with pytest.raises(UserError, match="has no 'path' column"):
        list_files(path, AUDIO)
    path = manifest(image_path=["a.jpg", ""], audio_path=["", "b.wav"])
    with pytest.raises(UserError, match="row 2 has an empty image_path"):
        list_files(path, IMAGE)


# --- files of one name ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Make files, and return the folder that they are in."""

    def make(*names):
        for name in names:
            (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "files" / name).touch()
        return tmp_path / "files"

    return make


def test_files_of_one_name_belong_together(folder):
    root = folder("b/x.txt", "b/x.jpg", "a/y.png", "a/y.txt", "a/alone.jpg", "c/x.txt", "notes.md")
    found = list_pairs(root, [IMAGE, TEXT])
    assert [found.name(i) for i in range(len(found))] == ["a/y.png", "b/x.jpg"]
    assert [os.path.relpath(path, root) for path in found.media["text"]] == ["a/y.txt", "b/x.txt"]
    with pytest.raises(UserError, match="no split 'train'"):
        list_pairs(root, [IMAGE, TEXT], split="train")


def test_files_that_do_not_say_what_belongs_together(folder):
    root = folder("a.jpg", "b.txt")
    with pytest.raises(UserError, match="no files of image and text belong together: give them one name"):
        list_pairs(root, [IMAGE, TEXT])
    with pytest.raises(UserError, match="holds no file of modality audio"):
        list_pairs(root, [IMAGE, AUDIO])
    folder("a.txt", "a.png")
    with pytest.raises(UserError, match=r"a\.(png|jpg) and .*a\.(png|jpg) have one name"):
        list_pairs(root, [IMAGE, TEXT])


def test_of_three_towers_a_name_may_lack_one(folder):
    root = folder("a.jpg", "a.txt", "a.wav", "b.jpg", "b.wav")
    found = list_pairs(root, [IMAGE, TEXT, AUDIO])
    assert [path is None for path in found.media["text"]] == [False, True]
    folder("c.txt", "c.wav")
    with pytest.raises(UserError, match=r"c\.txt has no image"):
        list_pairs(root, [IMAGE, TEXT, AUDIO])


# --- texts that are their own path ------------------------------------------------------------------------------------

TEXTS = [
    "a cat",
    "",
    "naïve 日本語 🙂",
    "50%",
    "%41",
    "a#t=1,2",
    "two\nlines\r\n",
    "data:,",
    "/etc/passwd",
    "a+b",
    "\udc80",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_survives_being_a_path(text):
    path = inline.join(text)
    assert inline.text(path) == text
    assert path.isascii()
    assert not set(path.removeprefix(inline.PREFIX)) & set("/#\n ")
    assert inline.join(inline.text(inline.join(path))) == inline.join(path)


def test_a_file_is_no_text():
    assert inline.text("/data/a.txt") is None
    assert inline.text("data") is None


# --- what is said of all files ----------------------------------------------------------------------------------------


def test_notes_are_written_down_and_count_as_no_file(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.note("2 of 9 texts are cut")
    ledger.add("a.jpg", "truncated", index=3)
    assert ledger.count == 1
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.count == 1
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert lines == [{"note": "2 of 9 texts are cut"}, {"path": "a.jpg", "reason": "truncated", "index": 3}]
