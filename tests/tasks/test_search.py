"""The search command: results as JSON and for people, across modalities, the contact sheet, and mistakes.

Planted bugs that fail here: words given to an encoder without any, an example read by the wrong tower, names relative
to the wrong folder, a sheet that is written where nothing was found out.
"""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console
from towers import untrained

from mmssl import SearchIndex, load, search
from mmssl.errors import UnusableData, UserError
from modalities.joint import joint_encoders
from tasks.search import written_name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text", "audio", "video")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of pictures and texts, whose image tower also stands as an encoder without a joint space."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(untrained(folder / "run", "image", "text") / "encoder-image", folder / "encoder")
    for left in (folder / "encoder").glob("joint.*"):
        left.unlink()
    return folder / "encoder"


def test_words_find_pictures_as_json(run, photos, ask):
    code, out, err = ask("search", run, photos, "a red flower", "--modality", "image", "--top", 3, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"task", "query", "modality", "results", "files", "refreshed", "skipped", "out"}
    assert found["query"] == {"text": "a red flower"}
    assert found["refreshed"] == {"embedded": 30, "kept": 0, "dropped": 0, "broken": 0}
    assert [set(one) for one in found["results"]] == [{"path", "score"}] * 3
    towers = joint_encoders(run)
    paths = [one["path"] for one in found["results"]]
    expected = towers["image"].embed(paths) @ towers["text"].embed(["data:,a%20red%20flower"])[0]
    assert [one["score"] for one in found["results"]] == pytest.approx(expected.tolist(), abs=2e-3)
    assert sorted(expected.tolist(), reverse=True) == pytest.approx(expected.tolist(), abs=2e-3)
    assert all(path.startswith(str(photos)) for path in paths)

    code, out, _ = ask("search", run, photos, "a red flower", "--modality", "image", "--top", 3, "--no-refresh")
    assert code == 0
    assert "the best 3 of 30 files" in out
    assert all(path.rpartition("/")[2] in out for path in paths)


def test_a_sound_finds_pictures_and_a_picture_finds_sounds_and_films(run, photos, sounds, clips):
    towers = joint_encoders(run)
    sound, picture = str(next(sounds.rglob("*.wav"))), str(next(photos.rglob("*.png")))
    for folder, modality, like, reader in (
        (photos, "image", sound, "audio"),
        (sounds, "audio", picture, "image"),
        (clips, "video", picture, "image"),
    ):
        result = search(towers, folder, like=like, top=4)  # the folder says which modality it is of
        assert result.modality == modality
        vectors = towers[modality].embed([hit["path"] for hit in result.hits])
        expected = vectors @ towers[reader].embed([like])[0]
        assert [hit["score"] for hit in result.hits] == pytest.approx(expected.tolist(), abs=2e-3)


def test_an_animation_is_read_as_what_is_searched(run, photos, clips, tmp_path):
    (tmp_path / "a.gif").touch()
    for folder, modality in ((photos, "image"), (clips, "video"), (photos, "text")):
        reader = SearchIndex(run, folder, modality=modality).reader(str(tmp_path / "a.gif"))
        assert reader.modality == ("image" if modality == "text" else modality)


def test_an_encoder_without_words_takes_examples_alone(alone, photos, sounds):
    index = SearchIndex(alone, photos)
    index.refresh()
    like = sorted(photos.rglob("*.png"))[4]
    found = index.search(like=like, top=30)
    assert found[0]["path"] == str(like)
    vectors = torch.nn.functional.normalize(load(alone).embed([hit["path"] for hit in found]), dim=1)
    assert [hit["score"] for hit in found] == pytest.approx((vectors @ vectors[0]).tolist(), abs=2e-3)
    assert index.search(like=PIL.Image.open(like).convert("RGB"), top=30) == found
    with pytest.raises(UserError, match="knows no words; give a file that others are to be like by --like"):
        index.search("red")
    with pytest.raises(UserError, match=r"reads image, and this is a \.\w+ file"):
        index.search(like=next(path for path in sounds.rglob("*.*") if path.is_file()))


def test_one_tower_of_several_says_where_the_words_are(run, photos):
    index = SearchIndex(run / "encoder-image", photos)
    index.refresh()
    with pytest.raises(UserError, match="one of several towers, and words are for another; name the run"):
        index.search("red")
    assert index.file == SearchIndex(run, photos).file


def test_mistakes_are_one_sentence_before_any_file_is_read(run, photos, captioned, ask, tmp_path, monkeypatch):
    monkeypatch.setattr("modalities.image.decode", None)
    picture = next(photos.rglob("*.png"))
    for words, message in (
        ((photos,), "search needs words or --like, a file"),
        ((photos, "red", "--like", picture), "they exclude each other"),
        ((photos, "  "), "the query is blank"),
        ((photos, ""), "an argument is empty"),
        ((photos, "red", "--top", 0), "--top 0: give a number from 1"),
        ((photos, "red", "--top", "x"), "--top"),
        ((photos, "--like", picture.with_suffix(".pgn")), "does not exist; did you mean"),
        ((photos, "--like", "https://example.org/a.png"), "is a URL"),
        ((photos / "trian", "red"), "trian does not exist; did you mean 'train'"),
        ((photos, "red", "--modality", "imgae"), "no tower of modality 'imgae'; did you mean 'image'"),
        ((photos, "red", "--split", "test"), "has no 'split' column"),
        ((photos, "red", "--out", tmp_path / "a.jpg"), "must end in .png or .html"),
        ((photos, "red", "--out", tmp_path / "no" / "a.png"), "does not exist"),
        ((photos, "red", "--no-refresh"), "there is no index of"),
        ((tmp_path, "red"), "holds no file of modality image, audio or video"),
        ((captioned, "red"), "reads image, audio and video; say which by modality (--modality image)"),
        ((tmp_path, "red", "--modality", "image"), "holds no file of modality image"),
    ):
        code, out, err = ask("search", run, *words)
        assert (code, out) == (2, ""), words
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_a_broken_example_and_a_folder_of_broken_files(run, photos, tmp_path, ask):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    code, _, err = ask("search", run, photos, "--like", bad)
    assert code == 3
    assert "bad.png: not an image" in err
    code, _, err = ask("search", run, tmp_path, "red", "--modality", "image")
    assert code == 3
    assert "none of the 1 files can be read; the first is bad.png: not an image" in err


def test_broken_files_are_told_at_the_end(run, photos, tmp_path, ask):
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:4]):
        shutil.copy(path, tmp_path / f"{i}.png")
    for i in range(7):
        (tmp_path / f"bad{i}.png").write_bytes(b"")
    code, out, _ = ask("search", run, tmp_path, "red", "--modality", "image")
    assert code == 0
    assert f"left out, since it cannot be read: {tmp_path}/bad4.png (empty file)" in out
    assert "2 more files are left out" in out
    _, out, _ = ask("search", run, tmp_path, "red", "--modality", "image", "--json")
    assert len(json.loads(out)["skipped"]) == 7
    assert json.loads(out)["refreshed"] == {"embedded": 0, "kept": 11, "dropped": 0, "broken": 7}


def test_files_are_called_as_the_person_would(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    index = SearchIndex(run, photos.name, modality="image")
    path = str(sorted(photos.rglob("*.png"))[0])
    assert written_name(index, path) == f"{photos.name}/{path.removeprefix(f'{photos}/')}"
    assert written_name(index, "/elsewhere/a.png") == "/elsewhere/a.png"
    assert written_name(index, "data:,a%20cat") == "a cat"


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_a_sheet_is_complete_in_itself(run, photos, sounds, clips, tmp_path, modality, ask):
    folder = {"image": photos, "audio": sounds, "video": clips}[modality]
    picture = next(photos.rglob("*.png"))
    page, png = tmp_path / "sheet.html", tmp_path / "sheet.png"
    code, out, _ = ask("search", run, folder, "--like", picture, "--modality", modality, "--top", 3, "--out", page)
    assert code == 0
    assert f"contact sheet in {page}" in out
    text = page.read_text()
    sources = re.findall(r'<img[^>]* src="([^"]*)"', text)
    assert len(sources) == 4  # the example, and three that were found
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    # What stands for several things are several pictures.
    assert len({base64.b64decode(source.partition(",")[2]) for source in sources[1:]}) == 3
    for i, hit in enumerate(search(run, folder, like=picture, modality=modality, top=3).hits, 1):
        name = hit["path"].removeprefix(f"{folder}/")
        assert f'<figcaption title="{i}   {hit["score"]:.3f}, {name}">' in text
        assert f"<td>{name}</td>" in text
    code, _, _ = ask("search", run, folder, "red", "--modality", modality, "--top", 3, "--out", png)
    assert code == 0
    assert PIL.Image.open(png).width >= 640


def test_a_sheet_shows_words_and_what_has_gone(run, photos, tmp_path):
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:3]):
        shutil.copy(path, tmp_path / f"<{i}&.png")
    index = SearchIndex(run, tmp_path, modality="image")
    index.refresh()
    (tmp_path / "<1&.png").unlink()
    result = search(index, query="<b>red</b>", out=tmp_path / "sheet.html", refresh=False)
    assert len(result.hits) == 3
    text = (tmp_path / "sheet.html").read_text()
    assert "<b>" not in text
    assert "&lt;1&amp;.png" in text
    assert len(re.findall("<img", text)) == 3


def test_names_that_are_no_text_or_steer_a_terminal_are_escaped(run, photos, tmp_path, ask):
    for name in (b"bad\xff.png", b"\x1b[31mred.png", b"a\nb.png"):
        shutil.copy(next(photos.rglob("*.png")), os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    (tmp_path / "\x1b[2Jempty.png").touch()
    code, out, err = ask("search", run, tmp_path, "red", "--modality", "image")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    for words in (r"bad\udcff.png", r"\x1b[31mred.png", r"a\nb.png", r"\x1b[2Jempty.png (empty file)"):
        assert words in out
    code, out, _ = ask("search", run, tmp_path, "red", "--modality", "image", "--json")
    assert os.fsencode(json.loads(out)["results"][0]["path"]).startswith(os.fsencode(tmp_path))


def test_words_need_no_quotes_and_a_sheet_never_replaces_the_example(run, photos, tmp_path, ask):
    code, out, _ = ask("search", run, photos, "a", "red", "flower", "--modality", "image", "--json")
    assert (code, json.loads(out)["query"]) == (0, {"text": "a red flower"})
    mine = shutil.copy(next(photos.rglob("*.png")), tmp_path / "mine.png")
    code, _, err = ask("search", run, photos, "--like", mine, "--out", mine, "--modality", "image")
    assert code == 2
    assert "is the example itself" in err
    assert PIL.Image.open(mine).size
    os.mkfifo(tmp_path / "pipe.png")
    for words in (("--like", tmp_path / "pipe.png"), ("red", "--out", tmp_path / "pipe.png")):
        code, _, err = ask("search", run, photos, *words, "--modality", "image")
        assert code == 2
        assert "no regular file" in err
    code, _, err = ask("search", run, photos, "red", "--index", tmp_path / "pipe.png", "--modality", "image")
    assert code == 2
    code, _, err = ask("search", run, photos, "red", "--rebuild", "--no-refresh", "--modality", "image")
    assert code == 2


def test_markup_in_names_is_only_a_name(run, photos, tmp_path):
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "[red]a[bold].png")
    result = search(run, tmp_path, "red", modality="image")
    console = Console(width=200, record=True, file=io.StringIO())
    result.render(console)
    assert "[red]a[bold].png" in console.export_text()


def test_a_query_without_a_direction_is_an_error(run, photos, monkeypatch):
    index = SearchIndex(run, photos, modality="image")
    monkeypatch.setattr(index.towers["text"], "embed", lambda inputs: torch.zeros(1, 8))
    with pytest.raises(UnusableData, match="its vector is NaN, infinite or zero"):
        index.vector("red")
    assert np.isclose(float(SearchIndex(run, photos, modality="image").vector("red").norm()), 1)
