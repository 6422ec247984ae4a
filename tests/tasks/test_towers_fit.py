"""Whole runs of pictures with captions: what is written, starting from other runs, evaluations, mistakes in recipes.

Planted bugs that fail here: media in another order than the towers, a source's grid forgotten, a vocabulary learned
again, notes made again on resuming, a joint encoder without unit vectors, mistakes found behind the run folder.
"""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from mmssl.backbones.positions import resize_table
from mmssl.config import read_yaml
from mmssl.data import inline
from mmssl.errors import UnusableData, UserError
from mmssl.run import Run
from modalities.encoder import load
from modalities.joint import JointEncoder
from tasks.build import load_recipe
from tasks.pretrain import dry_run, pretrain
from tasks.writer import load_objective

IMAGE_TOKENIZER = {"patch_size": [8, 8], "positions": "learned"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory, materials):
    """A run of 12 steps."""
    torch.set_num_threads(1)
    recipe, folder, settings = materials["clip"]
    return pretrain(recipe, folder, tmp_path_factory.mktemp("clip") / "run", settings).run


def learned(run):
    return read_yaml(run / "config.yaml")["towers"]["text"]["model"]["tokenizer"]["merges"]


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_a_run_of_towers_holds_an_encoder_for_each(clip):
    names = {path.name for path in clip.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "checkpoints", "objective", "status.json", "report.html"}
    assert wanted | {"encoder-image", "encoder-text"} <= names
    assert "encoder" not in names
    for name in ("image", "text"):
        assert {path.name for path in (clip / f"encoder-{name}").iterdir()} == {
            "model.safetensors", "config.json", "preprocess.json", "README.md", "joint.safetensors", "joint.json",
        }  # fmt: skip
        assert "JointEncoder" in (clip / f"encoder-{name}" / "README.md").read_text()
        facts = json.loads((clip / f"encoder-{name}" / "joint.json").read_text())
        assert facts["towers"] == ["image", "text"]
        assert (facts["dim"], facts["loss"], facts["projected"]) == (8, "softmax", True)
        assert load(clip / f"encoder-{name}").modality == name
    lines = Run(clip).metrics()
    assert len(lines) == 12
    assert {"accuracy_image_to_text", "accuracy_text_to_image", "scale"} <= lines[-1].keys()
    assert json.loads((clip / "status.json").read_text())["state"] == "done"


def test_encoders_hold_the_averages_and_the_objective_the_weights(clip):
    whole = load_file(clip / "objective" / "model.safetensors")
    joint = load_file(clip / "encoder-text" / "joint.safetensors")
    name = "projection.weight"
    assert joint[name].shape == whole["projections.text.weight"].shape
    assert not torch.equal(joint[name], whole["projections.text.weight"])
    assert set(joint) == {name, "temperature.log_scale"}
    encoder = load_file(clip / "encoder-text" / "model.safetensors")
    assert {f"towers.text.{key}" for key in encoder} == {key for key in whole if key.startswith("towers.text.")}


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_joint_encoder_embeds_as_the_objective(clip, captioned, tmp_path, materials, name):
    # Without averages, so that both have the same weights.
    recipe, folder, settings = materials["clip"]
    run = pretrain(recipe, folder, tmp_path / "run", settings | {"train.ema": None, "train.steps": 1}).run
    tower = JointEncoder(run / f"encoder-{name}")
    _, objective = load_objective(run)
    paths = tower.encoder.files(captioned, split="test").paths
    signal = torch.stack([tower.encoder.read(path) for path in paths])
    with torch.no_grad():
        expected = objective.features(name, {f"{name}.signal": signal, "seed": torch.arange(len(signal))})
    torch.testing.assert_close(tower.embed(paths), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tower.temperature.scale(), objective.temperature.scale())
    assert tower.fingerprint() != JointEncoder(clip / f"encoder-{name}").fingerprint() != tower.encoder.fingerprint()


def test_the_vocabulary_is_that_of_the_captions_trained_on(clip, captioned):
    assert "pict ure</w>" in learned(clip).split("\n")
    assert load(clip / "encoder-text").config.model.tokenizer.merges == learned(clip)
    text = JointEncoder(clip / "encoder-text")
    one, other = text.embed([inline.join("picture 1"), inline.join("something else")])
    assert not torch.allclose(one, other)


def test_captions_that_are_cut_are_counted_and_said(materials, tmp_path, capfd):
    recipe, folder, settings = materials["clip"]
    result = pretrain(recipe, folder, tmp_path / "run", settings | {"train.steps": 1})
    words = "of 10 texts are longer than signal.context 12 tokens and are cut"
    assert words in capfd.readouterr().err
    (line,) = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert words in json.loads(line)["note"]
    assert result.broken == 0
    pretrain(recipe, folder, tmp_path / "run", settings | {"train.steps": 2}, resume=True)
    assert (tmp_path / "run" / "ledger.jsonl").read_text().splitlines() == [line]


def test_runs_learn_and_dry_runs_tell(materials, clip):
    recipe, folder, settings = materials["clip"]
    facts = dry_run(load_recipe(recipe, settings), folder).as_dict()
    assert facts["files"] == 10
    assert facts["tokens_seen"] == "image 4, text 12"
    assert facts["encoder_parameters"] < facts["parameters"]
    lines = Run(clip).metrics()
    assert lines[-1]["loss"] < lines[0]["loss"]


# --- starting from other runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae(tmp_path_factory, photos):
    """A run of MAE with learned positions and the backbone of the picture tower."""
    torch.set_num_threads(1)
    settings = {
        "signal.size": [24, 16], "model.tokenizer": IMAGE_TOKENIZER,
        "model.backbone": {"dim": 16, "depth": 2, "num_heads": 2}, "train.ema": 0.5,
        "objective.decoder": {"dim": 16, "depth": 1, "num_heads": 2}, "train.steps": 2, "train.batch_size": 8,
        "data.workers": 0,
    }  # fmt: skip
    return pretrain("image-mae-tiny", photos, tmp_path_factory.mktemp("mae") / "run", settings).run


STILL = {"train.steps": 1, "train.ema": None, "optim.lr": 1e-12, "optim.weight_decay": 0.0}


@pytest.mark.parametrize("part", ["", "encoder"])
def test_a_tower_starts_from_an_encoder_of_another_task_and_size(materials, mae, tmp_path, capfd, part):
    recipe, folder, settings = materials["clip"]
    run = pretrain(recipe, folder, tmp_path / "run", settings | STILL | {"towers.image.init_from": str(mae / part)}).run
    started = load_file(run / "encoder-image" / "model.safetensors")
    given = load_file(mae / "encoder" / "model.safetensors")
    positions = "_tokenizer.positions.table"
    assert started.keys() == given.keys()
    for name, tensor in given.items():
        expected = resize_table(tensor, (3, 2), (2, 2)) if name == positions else tensor
        torch.testing.assert_close(started[name], expected, atol=1e-6, rtol=0)
    said = capfd.readouterr().err
    assert f"{len(given)} of the {len(given)} tensors in {mae / part} are used" in said
    assert f"resized: towers.image.{positions}" in said
    assert "initialised at random: projections.* (2), temperature.log_scale, towers.text.*" in said


def test_a_tower_does_not_start_from_another_modality(materials, mae, clip, tmp_path):
    recipe, folder, settings = materials["clip"]
    for source, sentence in (
        (mae, r"towers\.text\.init_from: .* is an encoder of modality image"),
        (clip / "encoder-image", r"towers\.text\.init_from: .* is an encoder of modality image"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            pretrain(recipe, folder, tmp_path / "run", settings | {"towers.text.init_from": str(source)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["", "encoder-text"])
def test_a_text_tower_takes_the_vocabulary_over(clip, materials, tmp_path, part):
    recipe, folder, settings = materials["clip"]
    other = tmp_path / "rows"
    other.mkdir()
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    for row in rows:
        row["caption"] = f"quite unlike the others {row['label']}"
    with (other / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run = pretrain(recipe, other, tmp_path / "run", settings | STILL | {"towers.text.init_from": str(clip / part)}).run
    assert learned(run) == learned(clip)
    started, given = (load_file(path / "encoder-text" / "model.safetensors") for path in (run, clip))
    for name, tensor in given.items():
        torch.testing.assert_close(started[name], tensor, atol=1e-6, rtol=0)


def test_all_of_it_starts_from_another_run(clip, materials, tmp_path, capfd):
    recipe, folder, settings = materials["clip"]
    run = pretrain(recipe, folder, tmp_path / "run", settings | STILL | {"train.init_from": str(clip)}).run
    started, given = (load_file(path / "objective" / "model.safetensors") for path in (run, clip))
    assert learned(run) == learned(clip)
    assert started.keys() == given.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(started[name], tensor, atol=1e-6, rtol=0)
    assert f"{len(given)} of the {len(given)} tensors in {clip} are used" in capfd.readouterr().err


def test_one_encoder_and_several_do_not_start_from_each_other(clip, mae, materials, photos, tmp_path):
    recipe, folder, settings = materials["clip"]
    with pytest.raises(UserError, match=r"one encoder, .* has several; give it as towers\.image\.init_from"):
        pretrain(recipe, folder, tmp_path / "run", settings | {"train.init_from": str(mae)})
    settings = materials["image"].settings
    with pytest.raises(UserError, match=rf"several towers; name the encoder of one: {clip / 'encoder-image'}, "):
        pretrain("image-mae-tiny", photos, tmp_path / "run", settings | {"train.init_from": str(clip)})
    settings = settings | STILL | {"signal.size": [16, 16], "model.tokenizer": IMAGE_TOKENIZER}
    settings |= {"train.init_from": str(clip / "encoder-image")}
    run = pretrain("image-mae-tiny", photos, tmp_path / "run", settings).run
    started, given = (load_file(one / "model.safetensors") for one in (run / "encoder", clip / "encoder-image"))
    for name, tensor in given.items():
        torch.testing.assert_close(started[name], tensor, atol=1e-6, rtol=0)


def test_a_locked_tower_keeps_what_it_starts_from(materials, mae, tmp_path):
    recipe, folder, settings = materials["clip"]
    settings = settings | {"train.steps": 3, "objective.locked": ["image"], "towers.image.init_from": str(mae)}
    settings |= {"towers.image.signal.size": [24, 16]}
    run = pretrain(recipe, folder, tmp_path / "run", settings).run
    started, given = (load_file(run / "encoder-image" / "model.safetensors"), mae / "encoder" / "model.safetensors")
    given = load_file(given)
    assert all(torch.equal(started[name], tensor) for name, tensor in given.items())
    fresh = load_file(run / "objective" / "model.safetensors")["projections.image.weight"]
    assert fresh.abs().sum() > 0


# --- what is done with its encoders -----------------------------------------------------------------------------------


def test_evaluations_take_one_of_the_encoders(clip, photos, ask, tmp_path, tiny_settings):
    code, out, _ = ask("knn", clip / "encoder-image", "--train", photos / "train", "--test", photos / "test", "--json")
    assert code == 0
    assert 0 <= json.loads(out)["scores"]["20"]["top1"]["value"] <= 1
    code, _, error = ask("embed", clip / "encoder-image", photos / "test", "--out", tmp_path / "v.parquet")
    assert code == 0, error
    words = [f"train.{key}" for key in ("steps=2", "batch_size=8")] + ["data.workers=0"]
    data = ["--train", photos / "train", "--test", photos / "test", "--out", tmp_path / "tuned"]
    code, _, error = ask("finetune", clip / "encoder-image", *data, *words)
    assert code == 0, error
    for name in ("knn", "finetune"):
        code, _, error = ask(name, clip, *data[:4], *(data[4:] if name == "finetune" else ()))
        assert code == 2
        assert f"holds 2 encoders: name one of {clip / 'encoder-image'}, {clip / 'encoder-text'}" in error


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "one tower": ({"towers": {"image": {}}}, "'towers' needs two or more of image, video, audio, text"),
    "towers of a list": ({"towers": ["image", "text"]}, "'towers' needs two or more"),
    "modality besides": ({"modality": "image"}, "'modality' is for one encoder, and 'towers' for several"),
    "mae": ({"objective": {"name": "mae"}}, "objective.name 'mae' learns from one modality, and no 'towers'"),
    "misspelt tower": ({"towers": {"imge": {}, "text": {}}}, "'imge' is not a modality; did you mean 'image'"),
    "misspelt key": ({"towers": {"image": {"modell": {}}, "text": {}}}, r"'towers\.image\.modell' is not a key"),
    "misspelt setting": (
        {"towers": {"image": {"signal": {"sizes": [8, 8]}}, "text": {}}},
        r"'towers\.image\.signal\.sizes' is not a key; did you mean 'towers\.image\.signal\.size'",
    ),
    "another modality inside": (
        {"towers": {"image": {"modality": "text"}, "text": {}}},
        r"towers\.image\.modality: 'text' is not valid; valid: image",
    ),
    "misspelt kind": (
        {"towers": {"image": {}, "text": {"model": {"tokenizer": {"name": "bep"}}}}},
        r"towers\.text\.model\.tokenizer\.name: 'bep' is not valid; did you mean 'bpe'",
    ),
}


def write(path, page):
    path.write_text(json.dumps(page))
    return path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_a_sentence(tmp_path, mistake):
    changes, sentence = MISTAKES[mistake]
    page = {"towers": {"image": {}, "text": {}}, "objective": {"name": "clip"}, "train": {"steps": 1}}
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe(write(tmp_path / "a.yaml", page | changes))
    assert "\n" not in str(caught.value)


def test_clip_needs_towers(tmp_path):
    page = {"modality": "image", "objective": {"name": "clip"}, "train": {"steps": 1}}
    with pytest.raises(UserError, match=r"objective\.name 'clip' learns from several modalities, under 'towers'"):
        load_recipe(write(tmp_path / "a.yaml", page))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data.repeats": 2}, "data.repeats takes several looks at a row"),
        ({"optim.layer_decay": 0.7, "towers.text.model.backbone.depth": 1}, "layer_decay is for towers of one depth"),
        ({"objective.locked": ["audio"]}, "'audio' is not one of the towers"),
        ({"towers.image.signal.size": [20, 20]}, r"size \[20, 20\] is not a multiple of patch size \[8, 8\]"),
        ({"towers.image.model.pool": "cls", "towers.image.model.cls_token": False}, "'cls' needs model.cls_token"),
        ({"towers.image.signal.buckets": [[16, 16], [8, 16]]}, "towers.image.signal"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_do_not_go_together_are_refused_before_there_is_a_run(materials, tmp_path, change, sentence):
    recipe, folder, settings = materials["clip"]
    with pytest.raises(UserError, match=sentence):
        pretrain(recipe, folder, tmp_path / "run", settings | change)
    assert not (tmp_path / "run").exists()


def test_a_run_without_captions_is_refused(photos, tmp_path, materials):
    with pytest.raises(UserError, match="holds no file of modality text"):
        pretrain("clip-tiny", photos, tmp_path / "run", materials["clip"].settings)


# --- broken and missing media -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(captioned, tmp_path):
    """Write the captioned rows again, with a change to each."""

    def make(change):
        found = list(csv.DictReader((captioned / "manifest.csv").open(encoding="utf-8")))
        for i, row in enumerate(found):
            row |= change(i, row)
        path = tmp_path / "changed.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
        return path

    return make


THREE = {
    "towers.audio.signal": {"sample_rate": 8000, "seconds": 0.32, "mels": 32, "fill": "pad"},
    "towers.audio.model": {"tokenizer": {"patch_size": [8, 8]}, "backbone": {"dim": 8, "depth": 1, "num_heads": 2}},
}


def test_three_towers_learn_from_rows_that_lack_one(rows, materials, tmp_path):
    data = rows(lambda i, row: {"audio_path": "" if i % 2 else row["audio_path"], "caption": "" if i == 2 else "a b"})
    settings = materials["clip"].settings | THREE | {"train.steps": 2}
    run = pretrain("clip-tiny", data, tmp_path / "run", settings).run
    lines = Run(run).metrics()
    assert {"loss_image_text", "loss_image_audio", "accuracy_audio_to_image"} <= lines[-1].keys()
    assert JointEncoder(run / "encoder-audio").facts.towers == ("image", "text", "audio")


def test_a_broken_picture_is_ledgered_with_its_modality(rows, materials, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    data = rows(lambda i, row: {"image_path": str(broken)} if i == 4 else {})
    settings = materials["clip"].settings | {"train.steps": 2, "data.max_bad_fraction": 0.2}
    result = pretrain("clip-tiny", data, tmp_path / "run", settings)
    entries = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    (entry,) = [entry for entry in entries if "path" in entry]
    assert entry["reason"].startswith("its image: ")
    assert entry["path"] == "broken.png, row 5"
    assert result.broken == 1


def test_where_no_file_of_a_modality_can_be_read_it_is_a_sentence(rows, materials, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    data = rows(lambda i, row: {"audio_path": str(broken) if i % 2 else ""})
    with pytest.raises(UnusableData, match="no audio can be read"):
        pretrain("clip-tiny", data, tmp_path / "run", materials["clip"].settings | THREE)
