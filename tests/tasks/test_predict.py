"""Predictions: in Python and on the command line, for files and folders, and what a stranger gets wrong.

Planted bugs that fail here: worst first, softmax where files have several labels, names of another file after a broken
one.
"""

import csv
import json
import shutil

import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from mmssl import Classifier
from mmssl.errors import UnusableData, UserError
from mmssl.objectives.classify import ClassifyConfig
from modalities.classifier import save_classifier
from modalities.encoder import Encoder, EncoderConfig, typed
from tasks.cli import main
from tasks.predict import predict

CLASSES = ["cat", "cow", "dog", "eel", "fly", "gnu"]


@pytest.fixture(scope="module")
def objective():
    """A classifier that was never trained, but is sure of what it says."""
    torch.manual_seed(0)
    model = {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 16, "depth": 2, "num_heads": 2}}
    encoder = Encoder(typed(EncoderConfig, "image", "test")(modality="image", signal={"size": (16, 16)}, model=model))
    made = ClassifyConfig(classes=CLASSES).build({"image": encoder})
    torch.nn.init.normal_(made.head.linear.weight, std=2)
    return made.eval()


@pytest.fixture
def folder(objective, tmp_path):
    """Write the classifier; keywords replace its facts."""

    def make(**facts):
        objective.encoder.save(tmp_path / "made")
        _, head, own = objective.kept()["image"]
        save_classifier(tmp_path / "made", {**own, **facts}, head.state_dict())
        return tmp_path / "made"

    return make


@pytest.fixture
def files(photos):
    return sorted((photos / "test").rglob("*.png"))


def assert_alike(a, b):
    """The same labels and, but for the rounding of another batch size, the same scores."""
    assert [one["label"] for one in a] == [one["label"] for one in b]
    assert [one["score"] for one in a] == pytest.approx([one["score"] for one in b], abs=1e-5)


def test_a_classifier_says_what_the_objective_computes_best_first(folder, objective, files):
    classify = Classifier(folder())
    assert classify.classes == CLASSES
    scores = classify.scores(files)
    signal = torch.stack([objective.encoder.transform(PIL.Image.open(file)) for file in files])
    expected = objective.logits({"signal": signal}).softmax(1)
    torch.testing.assert_close(scores, expected)
    assert scores.dtype == torch.float32
    found = classify(files)
    for row, best in zip(expected, found, strict=True):
        assert [one["label"] for one in best] == [CLASSES[i] for i in row.argsort(descending=True)]
        assert [one["score"] for one in best] == pytest.approx(row.sort(descending=True).values.tolist())
        assert sum(one["score"] for one in best) == pytest.approx(1)
    assert len({best[0]["label"] for best in found}) > 1


def test_one_input_gives_one_list_and_several_give_several(folder, objective, files):
    classify = Classifier(folder())
    one = classify(str(files[0]))
    assert one == classify(files[0]) == classify.classify(files[:1])[0]
    assert set(one[0]) == {"label", "score"}
    with PIL.Image.open(files[0]) as picture:
        assert classify(picture) == one
        for again in classify([picture, picture], top=2):
            assert_alike(again, one[:2])
        signal = objective.encoder.transform(picture)
    assert classify(signal) == one
    for again in classify(signal.expand(2, -1, -1, -1)):
        assert_alike(again, one)
    assert classify([]) == []


def test_with_several_labels_each_score_is_a_probability_by_itself(folder, objective, files):
    classify = Classifier(folder(multi_label=True))
    signal = objective.encoder.transform(PIL.Image.open(files[0]))
    expected = objective.logits({"signal": signal[None]})[0].sigmoid()
    assert {one["label"]: one["score"] for one in classify(files[0])} == pytest.approx(
        dict(zip(CLASSES, expected.tolist(), strict=True))
    )


def test_a_saturated_score_does_not_lose_the_order(folder):
    classify = Classifier(folder())
    logits = torch.tensor([[3000.0, 5000.0, 0.0, 4000.0, -1.0, -2.0]])
    assert [one["label"] for one in classify.ranked(logits, 4)[0]] == ["cow", "eel", "cat", "dog"]


def test_its_fingerprint_depends_on_the_head_and_the_classes(folder, objective):
    first = Classifier(folder()).fingerprint()
    assert first == Classifier(folder()).fingerprint()
    assert first != Classifier(folder(classes=CLASSES[::-1])).fingerprint()
    other = Classifier(folder())
    with torch.no_grad():
        other.objective.head.linear.bias += 1
    assert other.fingerprint() != first


def test_files_and_folders_are_predicted_under_the_names_they_were_given(folder, files, photos, monkeypatch):
    monkeypatch.chdir(photos)
    found = predict(folder(), ["test/along", files[0]], top=2)
    names = [path for path, _ in found.predictions]
    assert names == [*(f"test/along/{path.name}" for path in files if path.parent.name == "along"), str(files[0])]
    classify = Classifier(folder())
    for path, best in found.predictions:
        assert_alike(best, classify(path, top=2))


def test_every_written_form_holds_the_same(folder, files, tmp_path):
    made = folder()
    entries = predict(made, files, top=2, out=tmp_path / "p.jsonl").as_list()
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == entries
    rows = [{"path": e["path"], "rank": i, **one} for e in entries for i, one in enumerate(e["predictions"], 1)]
    predict(made, files, top=2, out=tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == rows
    predict(made, files, top=2, out=tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]


def test_a_broken_file_is_an_error_or_left_out_by_name(folder, files, tmp_path):
    shutil.copytree(files[0].parent, tmp_path / "photos")
    (tmp_path / "photos" / "24a.png").write_bytes(b"words")
    with pytest.raises(UnusableData, match=r"24a\.png"):
        predict(folder(), [tmp_path / "photos"])
    with pytest.raises(UnusableData, match=r"24a\.png"):
        Classifier(folder())(tmp_path / "photos" / "24a.png")
    found = predict(folder(), [tmp_path / "photos"], skip_broken=True)
    whole = predict(folder(), sorted(p for p in (tmp_path / "photos").iterdir() if p.name != "24a.png"))
    assert found.predictions == whole.predictions
    assert found.as_list()[-1]["path"] == str(tmp_path / "photos" / "24a.png")
    assert found.as_list()[-1]["predictions"] == []
    assert "not an image" in found.as_list()[-1]["error"]


def test_the_command_prints_a_table_or_json(folder, files, capfd):
    made = folder()
    assert main(["predict", str(made), *map(str, files[:2]), "--top", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)["files"]
    assert [entry["path"] for entry in result] == [str(path) for path in files[:2]]
    assert [len(entry["predictions"]) for entry in result] == [1, 1]
    assert main(["predict", str(made), *map(str, files[:2])]) == 0
    out = capfd.readouterr().out
    best = result[0]["predictions"][0]
    assert f"{best['label']} {best['score']:.1%}" in out
    assert files[1].name in out


def test_mistakes_are_one_sentence(folder, objective, files, tmp_path, capfd):
    made, file = folder(), str(files[0])
    objective.encoder.save(tmp_path / "plain")
    cases = {
        ("predict", str(tmp_path / "plain"), file): "without a classifier; fine-tune it first: mmssl finetune",
        ("predict", f"{made}x", file): "does not exist; did you mean 'made'?",
        ("predict", str(made)): "Missing argument 'FILE_OR_FOLDER...'",
        ("predict", str(made), f"{file}x"): "does not exist",
        ("predict", str(made), str(tmp_path / "plain")): "holds no file of modality image",
        ("predict", str(made), file, "--top", "0"): "--top 0: give a number from 1",
        ("predict", str(made), file, "--out", str(tmp_path / "x.txt")): "must end in one of them",
        ("predict", str(made), file, "--out", str(tmp_path / "no" / "x.csv")): "does not exist",
    }
    for words, said in cases.items():
        assert main(list(words)) == 2, words
        out, err = capfd.readouterr()
        assert said in err
        assert err.startswith("mmssl: ")
        assert err.count("\n") == 1
        assert out == ""


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("classifier.json", "{}", "not written in format 1"),
        ("classifier.json", "[", "not a readable classifier"),
        ("classifier.json", '{"format": 1, "classes": ["a", "b"]}', "does not fit its configuration"),
        ("classifier.json", '{"format": 1, "clases": []}', "did you mean 'classes'"),
        ("classifier.safetensors", "no", "not a readable classifier"),
    ],
)
def test_a_damaged_classifier_is_one_sentence(folder, file, content, words):
    made = folder()
    (made / file).write_text(content)
    with pytest.raises(UserError, match=words):
        Classifier(made)
