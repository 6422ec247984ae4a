"""zero-shot and retrieve on the command line: tables, JSON, files, exit codes, and a sentence for each mistake."""

import csv
import json
import shutil

import pytest
from towers import untrained, write_rows

from modalities.encoder import Encoder, EncoderConfig, typed

CLASSES = "across,along,up and down"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text")


@pytest.fixture
def files(photos):
    return sorted((photos / "test").rglob("*.png"))


def test_files_are_named_in_a_table_or_as_json(ask, run, files):
    words = ["zero-shot", run, *files[:2], "--classes", CLASSES, "--template", "a photo of a {}.", "--template", "{}"]
    code, out, _ = ask(*words, "--top", 2, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["task"] == "zero-shot"
    assert [one["path"] for one in result["files"]] == [str(path) for path in files[:2]]
    assert [len(one["predictions"]) for one in result["files"]] == [2, 2]
    best = result["files"][0]["predictions"][0]
    code, out, _ = ask(*words)
    assert code == 0
    assert f"{best['label']} {best['score']:.1%}" in out
    code, out, _ = ask(*words, "--threshold", 1, "--json")
    assert json.loads(out)["files"][0]["predictions"] == [{"label": None, "score": best["score"]}]
    code, out, _ = ask(*words, "--threshold", 1)
    assert f"none of them {best['score']:.1%}" in out


def test_classes_come_from_a_file_and_predictions_go_into_one(ask, run, photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffa, b\n\n  猫 \nalong\n", encoding="utf-8")
    out = tmp_path / "p.csv"
    assert ask("zero-shot", run, photos / "test", "--classes", names, "--out", out)[0] == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"a, b", "猫", "along"}
    assert len(rows) == 3 * 8


def test_a_long_name_is_no_file(ask, run, files):
    code, out, err = ask("zero-shot", run, files[0], "--classes", "a" * 300, "--json")
    assert (code, "is the only class" in err) == (2, True)
    code, out, _ = ask("zero-shot", run, files[0], "--classes", f"{'a' * 300},b", "--json")
    assert code == 0
    assert {one["label"] for one in json.loads(out)["files"][0]["predictions"]} == {"a" * 300, "b"}


def test_accuracy_on_a_folder_with_labels(ask, run, photos, tmp_path):
    code, out, _ = ask("zero-shot", run, "--test", photos / "test", "--template", "photo", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["classes"] == ["across", "along"]
    assert result["chance"] == 0.5
    score = result["scores"]["top1"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    words = ["zero-shot", run, "--test", photos / "test", "--classes", CLASSES, "--threshold", "0.5"]
    code, out, _ = ask(*words, "--template", "drawing", "--out", tmp_path / "out")
    assert code == 0
    for said in (
        "4 templates together",
        "a drawing of a {}.",
        "guessing scores 33.3%",
        "calibration error",
        "threshold",
    ):
        assert said in out
    assert (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "zero-shot.json").read_text())["classes"] == CLASSES.split(",")


def test_a_manifest_has_its_split_and_its_label_column(ask, run, files, tmp_path):
    rows = [{"path": str(path), "kind": path.parent.name, "split": ("train", "test")[i % 2]}
            for i, path in enumerate(files)]  # fmt: skip
    data = write_rows(tmp_path / "rows.csv", rows)
    words = ["zero-shot", run, "--test", data, "--label-column", "kind", "--classes", CLASSES, "--json"]
    assert json.loads(ask(*words)[1])["test"] == 4
    assert "no 'label' column" in ask("zero-shot", run, "--test", data)[2]
    assert json.loads(ask("zero-shot", run, data, "--split", "train", "--classes", "a,b", "--json")[1])["files"][3]


def test_retrieve_prints_what_design_says(ask, run, files, tmp_path):
    rows = [{"path": str(path), "caption": f"picture {i}"} for i, path in enumerate(files)]
    data = write_rows(tmp_path / "rows.csv", rows)
    code, out, _ = ask("retrieve", run, "--data", data, "--json")
    assert code == 0
    result = json.loads(out)
    for way in ("image_to_text", "text_to_image"):
        assert list(result[way]) == ["recall@1", "recall@5", "recall@10"]
        assert set(result[way]["recall@5"]) == {"value", "low", "high"}
    code, out, _ = ask("retrieve", run, "--data", data, "--gallery", tmp_path / "g.png", "--between", "text,image")
    assert code == 0
    assert "text to image" in out
    assert "a random order scores 12.5%, 62.5%, 100.0%" in out
    assert (tmp_path / "g.png").exists()


def test_a_broken_picture_exits_3_and_is_named(ask, run, photos, tmp_path):
    copy = shutil.copytree(photos / "test", tmp_path / "copy")
    victim = next(copy.rglob("*.png"))
    victim.write_bytes(b"words")
    rows = [{"path": str(path), "caption": path.stem} for path in copy.rglob("*.png")]
    data = write_rows(tmp_path / "rows.csv", rows)
    for words in (["zero-shot", run, "--test", copy], ["zero-shot", run, copy, "--classes", "a,b"],
                  ["retrieve", run, "--data", data]):  # fmt: skip
        code, _, err = ask(*words)
        assert code == 3
        assert victim.name in err
        code, out, _ = ask(*words, "--skip-broken", "--json")
        assert code == 0
        assert victim.name in out


# fmt: off
MISTAKES = {
    "zero-shot {run} {photo}": "zero-shot needs --classes",
    "zero-shot {run} --classes a,b": "zero-shot needs files to classify, or --test",
    "zero-shot {run} {photo} --test {photos} --classes a,b": "they exclude each other",
    "zero-shot {run}x {photo} --classes a,b": "does not exist; did you mean 'run'?",
    "zero-shot {run} {photo}x --classes a,b": "does not exist; did you mean",
    "zero-shot {run}/encoder-image {photo} --classes a,b": "is one of several towers; name the run that they are in",
    "zero-shot {plain} {photo} --classes a,b": "has one encoder, image, and nothing to compare it with",
    "zero-shot {run} {photo} --classes a": "'a' is the only class",
    "zero-shot {run} {photo} --classes a,,b": "blank",
    "zero-shot {run} {photo} --classes ,": "blank",
    "zero-shot {run} https://example.org/a.jpg --classes a,b": "https://example.org/a.jpg is a URL, and nothing is",
    "zero-shot {run} {photo} --classes {long}.txt": "name too long",
    "zero-shot {run} {photo} --classes a,b --temperature 1e-40": "temperature 1e-40: give a number from",
    "zero-shot {run} {photo} --classes a,b --temperature nan": "temperature nan: give a number from",
    "zero-shot {run} {photo} --classes a,b,a": "'a' is given twice",
    "zero-shot {run} {photo} --classes no.txt": "no.txt does not exist",
    "zero-shot {run} {photo} --classes a,b --template photos": "did you mean 'photo'?",
    "zero-shot {run} {photo} --classes a,b --top 0": "--top 0: give a number from 1",
    "zero-shot {run} {photo} --classes a,b --threshold 2": "threshold 2.0: give a number from 0 to 1",
    "zero-shot {run} {photo} --classes a,b --out {plain}/x.txt": "must end in one of them",
    "zero-shot {run} {photo} --classes a,b --modality imge": "did you mean 'image'?",
    "zero-shot {run} --test {photos}/test --top 3": "--top is for files",
    "zero-shot {run} --test {photos}/test --classes along,up": "no class is given for the label 'across'",
    "zero-shot {run} --test {photos}/test/along": "make one sub-folder per class",
    "zero-shot {run} --test {photos}/test --out {photo}": "File exists",
    "retrieve {run}": "Missing option '--data'",
    "retrieve {run} --data {photos}": "text",
    "retrieve {run} --data {photos}x": "does not exist",
    "retrieve {plain} --data {photos}": "nothing to compare it with",
    "retrieve {run} --data {rows} --gallery g.jpg": "must end in .png",
    "retrieve {run} --data {rows} --between image": "name two modalities",
    "retrieve {run} --data {rows} --between image,txt": "did you mean 'text'?",
    "retrieve {run} --data {rows} --split val": "split",
}
# fmt: on


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An encoder by itself, as MAE leaves it."""
    folder = tmp_path_factory.mktemp("mae") / "encoder"
    model = {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 16, "depth": 1, "num_heads": 2}}
    config = typed(EncoderConfig, "image", "test")
    Encoder(config(modality="image", signal={"size": (16, 16)}, model=model)).save(folder)
    return folder


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_2(ask, run, photos, plain, files, tmp_path, line):
    rows = write_rows(tmp_path / "rows.csv", [{"path": str(files[0]), "caption": "one"}])
    places = {"run": run, "photos": photos, "photo": files[0], "plain": plain, "rows": rows, "long": "a" * 300}
    words = [word.format(**places) for word in line.split()]
    code, out, err = ask(*words)
    assert code == 2, err
    assert MISTAKES[line] in err
    assert err.startswith("mmssl: ")
    assert err.count("\n") == 1
    assert out == ""
