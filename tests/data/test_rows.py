"""Rows of several media: names of their own, what identifies them, and columns that are missing or misspelt.

Planted bugs that fail here: rows named after their picture alone, contents of the first medium alone.
"""

from types import SimpleNamespace

import pytest

from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.ledger import Ledger
from mmssl.data.listing import list_files
from mmssl.data.pairs import list_pairs
from mmssl.errors import UserError

IMAGE, TEXT, AUDIO = (
    SimpleNamespace(name=name, suffixes=frozenset({suffix}), frame_suffixes=frozenset(), timed=False)
    for name, suffix in (("image", ".png"), ("text", ".txt"), ("audio", ".wav"))
)


def written(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_rows_of_one_picture_are_counted_singly(tmp_path):
    listing = list_pairs(written(tmp_path, "path,caption", "a.png,one", "a.png,two", "b.png,one"), [IMAGE, TEXT])
    names = [listing.name(i) for i in range(3)]
    assert names == ["a.png, row 1", "a.png, row 2", "b.png, row 3"]
    ledger = Ledger(None)
    for name in names:
        ledger.add(name, "its text: empty")
    assert ledger.count == 3
    assert list_files(tmp_path, IMAGE).name(1) == "a.png"


def test_contents_are_those_of_all_columns_wherever_the_folder_lies(tmp_path):
    header = "image_path,caption,audio_path"

    def contents(name, *rows):
        return list_pairs(written(tmp_path / name, header, *rows), [IMAGE, TEXT, AUDIO]).contents()

    here = contents("here", "a.png,one,a.wav", "b.png,,b.wav")
    assert contents("there", "a.png,one,a.wav", "b.png,,b.wav") == here
    others = [("a.png,ONE,a.wav", "b.png,,b.wav"), ("a.png,one,c.wav", "b.png,,b.wav"), ("a.png,one,", "b.png,,b.wav")]
    for rows in others:
        assert contents("there", *rows) != here


def test_names_that_are_no_unicode_have_contents(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text_path": "\\ud800.txt", "caption": "x", "image_path": "a.png"}\n')
    assert b"a.png" in list_pairs(tmp_path / "rows.jsonl", [TEXT, IMAGE]).contents()


@pytest.mark.parametrize(
    ("header", "kinds", "sentence"),
    [
        ("path", [IMAGE, TEXT], r"which of image and text its path is of: .* \(image_path, text_path, caption\)"),
        ("path,caption", [IMAGE, TEXT, AUDIO], r"image and audio its path is of: .* \(image_path, audio_path\)"),
        ("Path,Caption", [IMAGE, TEXT], r"a column image_path or path, but has Path, Caption; did you mean 'Path'\?"),
        ("path,Caption", [IMAGE, TEXT], r"but it has path, Caption; did you mean 'Caption'\?"),
        ("image_path,audio_path", [IMAGE, TEXT], r"text_path or caption or path, but has image_path, audio_path$"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_is_the_one_that_is_named(tmp_path, header, kinds, sentence):
    with pytest.raises(UserError, match=sentence):
        list_pairs(written(tmp_path, header, ",".join("x" for _ in header.split(","))), kinds)


def test_the_limit_around_a_decoder_without_one_is_told_as_such():
    def slow(path):
        while True:
            pass

    with pytest.raises(BrokenFile, match=r"^timed out after 0.05 s$"):
        guarded(lambda path: guarded(slow, path, None), "a.png", 0.05)
