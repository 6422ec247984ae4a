"""What joint encoders refuse: towers of different runs or steps, and files that were damaged or edited.

Planted bugs that fail here: every folder that begins with ``encoder-`` counted, ids not compared, ids of the heads
instead of the whole export, heads loaded without a look at their values, settings loaded without their digest.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from towers import untrained

from mmssl import JointEncoder, ZeroShotClassifier, retrieve
from mmssl.errors import UserError
from mmssl.run import Run
from modalities.joint import joint_encoders
from tasks.writer import export, load_objective

APART = "the towers image and text were not written together"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "words")


@pytest.fixture
def run(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "run")


def replaced(run, source):
    shutil.rmtree(run / "encoder-text")
    shutil.copytree(source / "encoder-text", run / "encoder-text")


def test_a_tower_of_another_run_is_refused(ask, run, tmp_path):
    replaced(run, untrained(tmp_path / "other", "image", "words", seed=1))
    code, _, err = ask("zero-shot", run, "a.png", "--classes", "a,b")
    assert code == 2
    assert f"{run}: {APART} (another step or another run)" in err
    assert err.count("\n") == 1


def test_a_tower_of_another_step_is_refused_though_its_way_into_the_space_is_the_same(run, pristine):
    recipe, objective = load_objective(pristine)
    state = objective.state_dict()
    key = next(name for name in state if name.startswith("towers.image."))
    export(Run(run), recipe, objective, state, state | {key: state[key] + 1})
    assert set(joint_encoders(run)) == {"image", "text"}
    replaced(run, pristine)
    with pytest.raises(UserError, match=APART):
        joint_encoders(run)


@pytest.mark.parametrize(
    ("towers", "settings", "words"),
    [
        (("image", "words"), {"dim": 4}, "dim 8 and 4"),
        (("image", "words"), {"loss": "sigmoid"}, "loss softmax and sigmoid"),
        (("words", "image"), {}, "towers image,text and text,image"),
    ],
)
def test_towers_of_different_spaces_are_refused_in_words(run, tmp_path, towers, settings, words):
    other = untrained(tmp_path / "other", *towers, **settings)
    mixed = {"image": JointEncoder(run / "encoder-image"), "text": JointEncoder(other / "encoder-text")}
    for use in (lambda: ZeroShotClassifier(mixed, ["a", "b"]), lambda: retrieve(mixed, tmp_path)):
        with pytest.raises(UserError, match=APART) as error:
            use()
        assert f"({words})" in str(error.value)
    replaced(run, other)
    with pytest.raises(UserError, match=APART):
        joint_encoders(run)


def test_only_the_folders_that_a_run_writes_count(run, pristine, tmp_path):
    shutil.copytree(untrained(tmp_path / "other", "image", "words", seed=1) / "encoder-text", run / "encoder-text-old")
    assert joint_encoders(run)["text"].fingerprint() == JointEncoder(pristine / "encoder-text").fingerprint()
    (run / "encoder-text").rename(run / "encoder-audio")
    with pytest.raises(UserError, match="what is called tower audio is an encoder of modality text"):
        joint_encoders(run)
    shutil.rmtree(run / "encoder-audio")
    with pytest.raises(UserError, match="holds the towers image, but they were trained as image, text"):
        joint_encoders(run)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("temperature.log_scale", math.nan, "temperature.log_scale is NaN or infinite"),
        ("temperature.log_scale", math.inf, "temperature.log_scale is NaN or infinite"),
        ("temperature.log_scale", -1000.0, "makes all similarities zero"),
        ("projection.weight", math.nan, "projection.weight is NaN or infinite"),
    ],
)
def test_damaged_numbers_are_an_error(run, key, value, words):
    file = run / "encoder-image" / "joint.safetensors"
    tensors = load_file(file)
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, file)
    with pytest.raises(UserError, match=words):
        joint_encoders(run)


def test_an_edited_vocabulary_is_an_error(run):
    file = run / "encoder-text" / "config.json"
    stored = json.loads(file.read_text())
    stored["model"]["tokenizer"]["merges"] = "r e"
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"encoder-text/config\.json is not what it was"):
        joint_encoders(run)


@pytest.mark.parametrize("key", ["export", "config", "towers"])
def test_a_file_that_does_not_say_what_it_belongs_to_is_an_error(run, key):
    file = run / "encoder-text" / "joint.json"
    stored = json.loads(file.read_text())
    del stored[key]
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        joint_encoders(run)


def test_what_reads_alike_has_one_digest(pristine, photos):
    towers = joint_encoders(pristine)
    assert towers["text"].seen("data:,Red") == towers["text"].seen("data:,%20red")
    assert towers["text"].seen("data:,red") != towers["text"].seen("data:,read")
    one, other = sorted(map(str, photos.rglob("*.png")))[:2]
    assert towers["image"].seen(one) != towers["image"].seen(other)
