"""Zero-shot classification in Python: vectors, scores and thresholds by hand, every kind of input, and the test set.

Planted bugs that fail here: prompts averaged without normalising the mean, the temperature divided by instead of
multiplied with, a template filled by ``str.format``, per-template scores of the first template for all, an expected
calibration error over signed gaps of files instead of intervals.
"""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from towers import untrained, write_rows

from mmssl import Document, JointEncoder, ZeroShotClassifier, list_files, zero_shot
from mmssl.errors import UnusableData, UserError
from modalities.encoder import MODALITIES
from modalities.joint import joint_encoders
from tasks.templates import BARE, SETS, chosen, fill
from tasks.zero_shot import name_files
from tasks.zero_shot_classifier import reader
from tasks.zero_shot_result import calibration_error, most_mistaken

CLASSES = ["cat", "dog", "red fox", "bird", "snail", "newt"]
TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text")


@pytest.fixture(scope="module")
def sigmoid_run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("siglip") / "run", "image", "text", loss="sigmoid")


@pytest.fixture
def files(photos):
    return sorted((photos / "test").rglob("*.png"))


def test_a_class_is_the_normalised_mean_of_its_prompts(run):
    classify = ZeroShotClassifier(run, {"cat": ["cat", "kitten"], "dog": ["dog"]}, TEMPLATES)
    text = JointEncoder(run / "encoder-text")
    for place, words in enumerate((["cat", "kitten"], ["dog"])):
        found = text.embed([Document(template.replace("{}", word)) for template in TEMPLATES for word in words])
        torch.testing.assert_close(classify.class_vectors[place], F.normalize(found.mean(0), dim=0))
        first = F.normalize(found[: len(words)].mean(0), dim=0)
        torch.testing.assert_close(classify.of_template(0)[place], first)
    assert classify.class_vectors.shape == (2, 8)


def test_scores_are_the_softmax_of_cosines_by_the_learned_temperature(run, files):
    classify = ZeroShotClassifier(run, CLASSES, TEMPLATES)
    cosines = JointEncoder(run / "encoder-image").embed(files) @ classify.class_vectors.T
    torch.testing.assert_close(classify.similarities(files), cosines)
    torch.testing.assert_close(classify.scores(files), (cosines / 0.07).softmax(1))
    warm = ZeroShotClassifier(run, CLASSES, TEMPLATES, temperature=0.5)
    torch.testing.assert_close(warm.scores(files), (cosines / 0.5).softmax(1))
    for row, best in zip((cosines / 0.07).softmax(1), classify(files), strict=True):
        assert [one["label"] for one in best] == [CLASSES[i] for i in row.argsort(descending=True)]
        assert sum(one["score"] for one in best) == pytest.approx(1)


def test_with_the_sigmoid_loss_each_score_is_by_itself(sigmoid_run, files):
    classify = ZeroShotClassifier(sigmoid_run, CLASSES)
    cosines = JointEncoder(sigmoid_run / "encoder-image").embed(files) @ classify.class_vectors.T
    torch.testing.assert_close(classify.scores(files), (10 * cosines - 10).sigmoid())
    assert ZeroShotClassifier(sigmoid_run, ["cat"])(files[0])[0]["label"] == "cat"


def assert_alike(a, b):
    assert [one["label"] for one in a] == [one["label"] for one in b]
    assert [one["score"] for one in a] == pytest.approx([one["score"] for one in b], abs=1e-5)


def test_every_kind_of_input_gives_the_same(run, files):
    classify = ZeroShotClassifier(run, CLASSES)
    one = classify(files[0])
    assert set(one[0]) == {"label", "score"}
    with PIL.Image.open(files[0]) as image:
        picture = image.convert("RGB")
    pixels, signal = np.asarray(picture), classify.transform(picture)
    for same in (str(files[0]), picture, pixels, signal):
        assert_alike(classify(same), one)
        (again,) = classify([same], top=2)
        assert_alike(again, one[:2])
    for several in (np.stack([pixels, pixels]), torch.stack([signal, signal]), (pixels, files[0])):
        assert len(classify(several)) == 2
        assert_alike(classify(several)[1], one)
    assert classify([]) == []


def test_what_is_no_input_is_said_in_a_sentence(run, files, tmp_path):
    classify = ZeroShotClassifier(run, CLASSES)
    for url in (
        "https://example.org/a.jpg",
        "HTTP://example.org/a.jpg",
        "s3://bucket/a.png",
        "data:image/png;base64,AA",
    ):
        with pytest.raises(UserError, match="is a URL, and nothing is downloaded"):
            classify(url)
    grey = np.zeros((8, 8), np.uint8)
    with pytest.raises(UserError, match=r"uint8 \[h, w, 3\], but got uint8 \[8, 8\]"):
        classify([grey])
    with pytest.raises(UserError, match=r"but got float64 \[8, 8, 3\]"):
        classify(np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="preprocessed float signal"):
        classify(torch.zeros(3, 16, 16, dtype=torch.uint8))
    for shape in ((1, 16, 16), (2, 1, 16, 16), (16, 16), (16,)):
        with pytest.raises(ValueError, match="has 3 channels and 2 more axes"):
            classify(torch.zeros(shape))
    with pytest.raises(UnusableData, match="input 2 of 2: its vector is NaN"):
        classify([files[0], torch.full((3, 16, 16), math.nan)])
    with pytest.raises(TypeError, match="a path, a PIL picture or a float tensor is needed, but got int"):
        classify(3)
    (tmp_path / "broken.png").write_bytes(b"words")
    with pytest.raises(UnusableData, match=r"broken\.png"):
        classify([files[0], tmp_path / "broken.png"])


def test_below_the_threshold_a_file_is_none_of_the_classes(run, files):
    plain = ZeroShotClassifier(run, CLASSES)
    best = [one[0]["score"] for one in plain(files)]
    threshold = sorted(best)[len(best) // 2]
    found = ZeroShotClassifier(run, CLASSES, threshold=threshold)(files)
    for score, whole, one in zip(best, plain(files), found, strict=True):
        assert one == ([{"label": None, "score": score}] if score < threshold else whole)
    assert {one[0]["label"] is None for one in found} == {True, False}


def test_prompt_vectors_are_kept_on_disk_by_content(run, cache, monkeypatch):
    first = ZeroShotClassifier(run, CLASSES, TEMPLATES).class_vectors
    assert len(list(cache.iterdir())) == 1
    towers = joint_encoders(run)
    monkeypatch.setattr(towers["text"].encoder, "forward", lambda *_, **__: pytest.fail("embedded again"))
    assert torch.equal(ZeroShotClassifier(towers, CLASSES, TEMPLATES).class_vectors, first)
    with pytest.raises(pytest.fail.Exception):
        _ = ZeroShotClassifier(towers, CLASSES, [TEMPLATES[0]]).class_vectors
    assert len(list(cache.iterdir())) == 1


def test_names_of_any_letters_and_many(run, files):
    names = ["{}", "{0}", "кот", "猫", "🐈", "a, b", "100%", "#t=1,2"]
    classify = ZeroShotClassifier(run, names, "a photo of a {}.")
    text = JointEncoder(run / "encoder-text")
    torch.testing.assert_close(
        classify.class_vectors, text.embed([Document(f"a photo of a {name}.") for name in names])
    )
    many = ZeroShotClassifier(run, [f"class {i}" for i in range(1000)])
    assert len(many(files[0])) == 1000
    assert many.class_vectors.shape == (1000, 8)


def test_classes_and_templates_may_be_any_iterables(run, files):
    classify = ZeroShotClassifier(run, (name for name in CLASSES), (one for one in TEMPLATES))
    assert classify(files[0]) == ZeroShotClassifier(run, CLASSES, TEMPLATES)(files[0])
    twice = {"cat": (word for word in ("cat", "kitten")), "dog": "dog"}
    assert ZeroShotClassifier(run, twice).words == {"cat": ["cat", "kitten"], "dog": ["dog"]}


def test_names_that_read_alike_to_the_text_tower_are_refused(tmp_path):
    run = untrained(tmp_path / "run", "image", "words")
    for other in ("red", " Red  ", "RED"):
        with pytest.raises(UserError, match=f"'Red' and '{other}' read alike to this encoder"):
            ZeroShotClassifier(run, ["Red", "blue", other])
    with pytest.raises(UserError, match="'red' and 'blue' read alike to this encoder"):
        ZeroShotClassifier(run, ["red", "blue"], f"{'a ' * 14}{{}}")  # cut before the name
    # Some words of two classes may be the same.
    ZeroShotClassifier(run, {"river": ["bank", "shore"], "money": ["Bank", "coins"]})


def test_a_text_of_a_manifest_is_named_by_what_it_says(run, tmp_path):
    data = write_rows(tmp_path / "manifest.csv", [{"caption": "a red picture", "label": "red"}])
    for given in (data, tmp_path):
        found = name_files(ZeroShotClassifier(run, CLASSES, modality="text"), [given])
        assert [path for path, _ in found.predictions] == ["a red picture"]


def test_templates():
    assert chosen(None) == BARE == ("{}",)
    assert chosen("a photo of a {}.") == ("a photo of a {}.",)
    assert chosen(["photo", "{}"]) == (*SETS["photo"], "{}")
    assert fill("a {} of {x}", "{0}{}") == "a {0}{} of {x}"
    for one in SETS.values():
        assert len(set(one)) == len(one)
        assert all(template.count("{}") == 1 for template in one)
    for wrong, words in {
        "a photo": "does 0 times",
        "{} and {}": "does 2 times",
        "phto": "did you mean 'photo'?",
    }.items():
        with pytest.raises(UserError) as error:
            chosen([wrong])
        assert words in str(error.value)
    with pytest.raises(UserError, match="given twice"):
        chosen(["{}", "{}"])
    with pytest.raises(UserError, match="no template"):
        chosen([])


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        ([], {}, "no class is given"),
        (["cat", "cat"], {}, "'cat' is given twice"),
        (["cat", " "], {}, "blank"),
        ({"cat": []}, {}, "has no words"),
        ("cat", {}, "a list of names, but got the text 'cat'"),
        (["cat"], {}, "'cat' is the only class"),
        (["cat", "d\0g"], {}, "NUL"),
        (["cat", "\ud800"], {}, "lone surrogate"),
        (["cat", "dog"], {"threshold": 30}, "threshold 30: give a number from 0 to 1"),
        (["cat", "dog"], {"threshold": "high"}, "threshold high: give a number from 0 to 1"),
        (["cat", "dog"], {"threshold": math.nan}, "threshold nan"),
        (["cat", "dog"], {"temperature": 0.0}, "temperature 0.0: give a number from 1e-06"),
        (["cat", "dog"], {"temperature": 1e-40}, "temperature 1e-40: give a number"),
        (["cat", "dog"], {"temperature": math.nan}, "temperature nan: give a number"),
        (None, {}, "classes are a list of texts, but got None"),
        (3, {}, "classes are a list of texts, but got 3"),
        (["cat", 3], {}, "but there is 3 among them"),
        (["cat", ["dog"]], {}, "but there is ['dog'] among them"),
        ({"cat": None, "dog": "dog"}, {}, "the words of class 'cat' are a list of texts, but got None"),
        ({"cat": ["cat", 3], "dog": "dog"}, {}, "there is 3 among them"),
        ([" ", " "], {}, "blank"),
        (["cat", "dog"], {"templates": 3}, "templates are a list of texts, but got 3"),
        (["cat", "dog"], {"templates": ["{}", None]}, "there is None among them"),
        (["cat", "dog"], {"modality": "imag"}, "did you mean 'image'?"),
        (["cat", "dog"], {"templates": "a photo"}, "'a photo of a {}.'"),
    ],
)
def test_a_mistake_is_one_sentence(run, classes, options, words):
    with pytest.raises(UserError) as error:
        _ = ZeroShotClassifier(run, classes, **options).class_vectors
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_tower_that_reads_the_files(tmp_path):
    with pytest.raises(UserError, match="has no tower of modality 'text'"):
        ZeroShotClassifier(untrained(tmp_path / "b", "image", "audio"), ["a", "b"], modality="image")
    towers = joint_encoders(untrained(tmp_path / "a", "image", "text", "audio", "video"))
    assert reader(towers, "run", None, ["a.JPG", "b.png"]).modality == "image"
    assert reader(towers, "run", None, ["a.flac"]).modality == "audio"
    assert reader(towers, "run", "text", ["a.flac"]).modality == "text"
    for paths in ([], ["folder"], ["a.jpg", "a.flac"]):
        with pytest.raises(UserError, match="run reads image and audio and video; say which by modality"):
            reader(towers, "run", None, paths)


def test_files_are_named_as_one_by_one(run, files, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    classify = ZeroShotClassifier(run, CLASSES, threshold=0.2)
    found = name_files(classify, ["test/along", files[0]], top=2, out=tmp_path / "p.jsonl")
    assert found.predictions[-1][0] == str(files[0])
    assert found.predictions[0][0].startswith("test/along/")
    for path, best in found.predictions:
        assert_alike(best, classify(path, top=2))
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == found.as_list()


# Measured on labels


@pytest.fixture
def listing(photos):
    return list_files(photos / "test", MODALITIES["image"])


def test_a_test_set_is_measured_as_by_hand(run, listing, tmp_path):
    classes = ["across", "along", "askew"]
    templates = [TEMPLATES[0], "no. 7: {}!"]
    middle = float(ZeroShotClassifier(run, classes, templates).scores(listing.paths).max(1).values.median()) + 1e-4
    classify = ZeroShotClassifier(run, classes, templates, threshold=middle)
    result = zero_shot(classify, listing, out=tmp_path / "out")
    scores = classify.scores(listing.paths)
    labels = listing.labels()
    guesses = [classes[i] for i in scores.argmax(1)]
    right = np.array([guess == label for guess, label in zip(guesses, labels, strict=True)])
    facts = result.as_dict()
    assert facts["scores"]["top1"]["value"] == pytest.approx(right.mean())
    assert facts["scores"]["top1"]["low"] <= right.mean() <= facts["scores"]["top1"]["high"]
    assert "top5" not in facts["scores"]
    assert facts["chance"] == pytest.approx(1 / 3)
    assert facts["test"] == len(labels) == 8
    for name in ("across", "along"):
        own = right[[label == name for label in labels]]
        assert facts["per_class"][name]["recall"]["value"] == pytest.approx(own.mean())
    assert facts["per_class"]["askew"]["recall"] is None
    assert facts["templates"][0]["top1"] != facts["templates"][1]["top1"]
    for i, template in enumerate(templates):
        alone = zero_shot(ZeroShotClassifier(run, classes, template), listing)
        assert facts["templates"][i] == {"template": template, "top1": alone.as_dict()["scores"]["top1"]}
    confidence = scores.max(1).values.numpy()
    open_set = facts["open_set"]
    assert open_set["rejected"]["value"] == pytest.approx((confidence < middle).mean())
    assert 0 < open_set["rejected"]["value"] < 1
    assert open_set["top1_of_accepted"]["value"] == pytest.approx(right[confidence >= middle].mean())
    assert json.loads((tmp_path / "out" / "zero-shot.json").read_text()) == json.loads(json.dumps(facts))
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(word in page for word in ("a photo of a {}.", "askew", "mostly mistaken for"))


def test_a_label_that_is_no_class_and_a_broken_file(run, photos, listing, tmp_path):
    with pytest.raises(UserError, match="no class is given for the label 'along'"):
        zero_shot(ZeroShotClassifier(run, ["across", "up"]), listing)
    folder = tmp_path / "copy"
    for name in ("across", "along"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(next((photos / "test" / name).iterdir()).read_bytes())
    (folder / "along" / "b.png").write_bytes(b"words")
    classify, broken = ZeroShotClassifier(run, ["across", "along"]), list_files(folder, MODALITIES["image"])
    with pytest.raises(UnusableData, match=r"along/b\.png"):
        zero_shot(classify, broken)
    facts = zero_shot(classify, broken, skip_broken=True).as_dict()
    assert facts["test"] == 2
    assert facts["skipped"][0]["path"] == "along/b.png"


def test_the_calibration_error_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(300), rng.random(300) < 0.5
    confidence[:3] = [0, 1 / 15, 1]
    expected = 0.0
    for i in range(15):
        low, high = i / 15, (i + 1) / 15
        inside = (confidence > low) & (confidence <= high) | ((i == 0) & (confidence == 0))
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(torch.from_numpy(confidence), torch.from_numpy(right)) == pytest.approx(expected)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0


def test_what_a_class_is_mostly_mistaken_for():
    target, found = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([2, 1, 2, 0, 0, 2])
    assert most_mistaken(found, target, ["a", "b", "c"]) == {"a": "c", "b": "a"}
    assert most_mistaken(target, target, ["a", "b", "c"]) == {}
