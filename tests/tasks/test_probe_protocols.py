"""The probes that papers train: their pinned numbers, that nothing but the head moves, and what is said about them.

Planted bugs that fail here: an encoder that trains along, the class token probed where a mean is asked for, a batch
larger than the training set, a deviation that is not shown, layers of the per-layer probe in reverse order.
"""

import io
import json
import signal
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from media import write_sound
from rich.console import Console
from safetensors.torch import load_file
from sound_encoders import RATE, recurrent, transformer

from mmssl.data.listing import list_files
from mmssl.engine.optim import LARS, param_groups
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import Stopped, UnusableData, UserError
from mmssl.heads.classifier import HeadConfig
from mmssl.objectives.classify import Classify
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.cli import main
from tasks.linear_probe import linear_probe
from tasks.per_layer import Layers, per_layer_probe
from tasks.probe_protocols import PROTOCOLS, pin, probe, protocol_probe, sentences

FEW = {"train.epochs": 3, "data.workers": 0}
CLASSES = ["blue", "green"]


def rendered(result) -> str:
    screen = io.StringIO()
    result.render(Console(file=screen, width=400))
    return screen.getvalue()


@pytest.mark.parametrize(
    ("name", "peak_lr", "expected"),
    [
        ("mae", 6.4, {"optim.name": "lars", "optim.momentum": 0.9, "optim.weight_decay": 0.0, "optim.warmup": "10ep",
                      "train.batch_size": 16384, "train.epochs": 90, "objective.head.batch_norm": True,
                      "objective.head.pool": "cls", "objective.head.layers": 1}),
        ("dino", 0.004, {"optim.name": "sgd", "optim.momentum": 0.9, "optim.weight_decay": 0.0, "optim.warmup": 0.0,
                         "train.batch_size": 1024, "train.epochs": 100, "objective.head.batch_norm": False}),
        ("attentive", 0.001, {"optim.name": "adamw", "optim.weight_decay": 0.001, "optim.betas": [0.9, 0.999],
                              "optim.clip": 1.0, "train.batch_size": 1024, "train.epochs": 20,
                              "objective.head.pool": "attentive", "objective.head.num_heads": 4}),
    ],
)  # fmt: skip
def test_the_numbers_are_the_papers(tiny_encoder, name, peak_lr, expected):
    settings = pin(name, tiny_encoder(), CLASSES, 20_000).settings()
    assert {key: settings[key] for key in expected} == expected
    assert settings["peak_lr"] == pytest.approx(peak_lr)
    assert settings["signal.crop_scale"] == [0.08, 1.0]
    assert settings["signal.flip"] is True
    assert settings["objective.train_blocks"] == 0
    assert settings["optim.min_lr"] == settings["objective.label_smoothing"] == 0.0


@pytest.mark.parametrize(
    ("dim", "cls_token", "pool", "layers"),
    [(32, True, "cls", 2), (32, False, "mean", 2), (768, True, "cls+mean", 1), (768, False, "mean", 1)],
)
def test_dino_probes_what_suits_the_width(tiny_encoder, dim, cls_token, pool, layers):
    settings = pin("dino", tiny_encoder(dim=dim, cls_token=cls_token), CLASSES, 2000).settings()
    assert (settings["objective.head.pool"], settings["objective.head.layers"]) == (pool, layers)


def test_mae_probes_the_mean_where_there_is_no_class_token(tiny_encoder):
    assert pin("mae", tiny_encoder(cls_token=False), CLASSES, 20).settings()["objective.head.pool"] == "mean"


def test_the_batch_is_cut_to_the_training_set_and_the_rate_with_it(tiny_encoder):
    pinned = pin("mae", tiny_encoder(), CLASSES, 131)
    assert pinned.notes[0] == "the batch is 131 instead of 16384: there are 131 training files"
    assert "90 steps; on ImageNet the protocol takes 7038" in pinned.notes[1]
    assert pinned.recipe.train.batch_size == 131
    assert pinned.settings()["peak_lr"] == pytest.approx(0.1 * 131 / 256)
    parts = pin("mae", tiny_encoder(), CLASSES, 131, {"train.accumulate": 2})
    assert parts.recipe.train.batch_size == 130
    assert "micro-batches" in parts.notes[2]
    assert pin("mae", tiny_encoder(), CLASSES, 1_000_000).notes == []


def test_what_was_changed_is_in_the_title(tiny_encoder):
    def title(overrides):
        return pin("mae", tiny_encoder(), CLASSES, 20, overrides).title

    assert title({}) == title({"optim.base_lr": 0.1, "data.workers": 0, "train.seed": 3}) == "mae"
    assert title({"train.epochs": 5}) == "mae, but train.epochs=5"
    assert title({"train.steps": 5}) == "mae, but train.steps=5"
    assert title({"objective.head": {"pool": "mean"}}) == "mae, but objective.head.pool=mean"


def test_settings_of_pretraining_do_not_reach_the_probe(tiny_encoder):
    encoder = tiny_encoder()
    signal = encoder.config.signal.model_validate({"size": [16, 16], "flip": False, "augment": {"grey": 0.5}})
    encoder.config = encoder.config.model_copy(update={"signal": signal})
    settings = pin("dino", encoder, CLASSES, 20).settings()
    assert (settings["signal.flip"], settings["signal.augment.grey"]) == (True, 0.0)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_only_the_head_moves(tiny_encoder, pictures, tmp_path, name):
    encoder, out = tiny_encoder(drop_path=0.5), tmp_path / "run"
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    result = protocol_probe(encoder, pictures("train", 5), pictures("test", 2), name, out, overrides=FEW)
    objective = load_file(out / "objective" / "model.safetensors")
    for states in (encoder.state_dict(), load_file(out / "encoder" / "model.safetensors")):
        assert all(torch.equal(states[key], tensor) for key, tensor in before.items())
    assert all(torch.equal(objective[f"encoder.{key}"], tensor) for key, tensor in before.items())
    assert objective["head.linear.bias"].abs().sum() > 0
    stored = json.loads((out / "linear-probe.json").read_text())
    assert stored == result.as_dict()
    assert stored["protocol"]["name"] == name
    assert stored["protocol"]["title"] == f"{name}, but train.epochs=3"
    assert stored["protocol"]["deviations"] == {"train.epochs": 3.0}
    assert stored["protocol"]["steps"] == 3
    assert name in (out / "report.html").read_text()
    shown = rendered(result)
    assert f"protocol {name}, but train.epochs=3" in shown
    assert f"optim.name={stored['protocol']['optim.name']}" in shown
    assert "the batch is 15 instead of" in shown


def test_a_probe_separates_colours(tiny_encoder, pictures):
    encoder = tiny_encoder()
    train, test = pictures("train", 8), pictures("test", 4)
    overrides = {"train.epochs": 40, "data.workers": 0, "optim.lr": 10}
    result = protocol_probe(encoder, train, test, "mae", overrides=overrides)
    assert result.scores["top1"].value > 0.8
    again = protocol_probe(encoder, train, test, "mae", overrides=overrides)
    assert again.as_dict() == result.as_dict()


def test_without_a_folder_nothing_is_left(tiny_encoder, pictures, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    result = protocol_probe(tiny_encoder(), pictures("train", 3), pictures("test", 2), "dino", overrides=FEW)
    assert result.as_dict()["run"] is None
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_broken_training_file_is_named_or_counted(tiny_encoder, pictures):
    train, test = pictures("train", 3), pictures("test", 2)
    Path(train.paths[4]).write_text("not a picture")
    with pytest.raises(UnusableData, match=r"green/1.png: .*never leaves a file out unasked"):
        protocol_probe(tiny_encoder(), train, test, "attentive", overrides=FEW)
    result = protocol_probe(tiny_encoder(), train, test, "attentive", skip_broken=True, overrides=FEW)
    assert "1 broken training files were left out" in result.as_dict()["notes"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"protocol": "mea"}, "--protocol mea: no such protocol; did you mean 'mae'?"),
        ({"protocol": "mae", "per_layer": True}, "--per-layer is for --protocol logistic; leave out --protocol mae"),
        ({"overrides": {"optim.lr": 1}}, r"optim.lr is a setting of a protocol that trains \(mae, dino, attentive\)"),
        ({"overrides": {"objective.train_blocks": 2}}, "setting of a protocol that trains"),
        ({"protocol": "mae", "overrides": {"objective.train_blocks": 2}}, "a probe's encoder is frozen"),
        ({"protocol": "mae", "overrides": {"model.backbone.depth": 2}}, "model.backbone.depth cannot be set here"),
        ({"protocol": "mae", "overrides": {"train.init_from": "x"}}, "train.init_from cannot be set here"),
        ({"protocol": "mae", "overrides": {"optim.nam": "sgd"}}, "'optim.nam' is not a key; did you mean 'optim.name'"),
        (
            {"protocol": "mae", "overrides": {"optim.name": "lar"}},
            "'lar' is not valid; did you mean 'lars'",
        ),
        ({"protocol": "dino", "overrides": {"objective.head.layers": 9}}, "layers is 9, but the encoder has 2 blocks"),
        ({"protocol": "attentive", "overrides": {"objective.head.num_heads": 5}}, "num_heads 5 does not divide"),
        ({"protocol": "mae", "overrides": {"train.batch_size": 1}}, "needs 2 samples or more"),
        ({"protocol": "mae", "overrides": {"train.engine": "deepspeed"}}, "'lars' is for the torch engine"),
    ],
)
def test_mistakes_get_one_sentence(tiny_encoder, pictures, asked, sentence):
    overrides = {**asked.pop("overrides", {}), **({"data.workers": 0} if asked.get("protocol") else {})}
    with pytest.raises(UserError, match=sentence) as caught:
        probe(tiny_encoder(), pictures("train", 2), pictures("test", 2), **asked, overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_that_crop_pictures_refuse_sounds(name):
    with pytest.raises(UserError, match=f"--protocol {name} trains on crops of pictures, and .* of modality audio"):
        pin(name, recurrent(), ["a", "b"], 8)


@pytest.mark.parametrize(("encoder", "normed"), [(recurrent, False), (transformer, True)])
def test_a_final_norm_is_told_of_where_there_is_one(encoder, normed, tmp_path):
    for split, label, i in product(("train", "test"), "ab", range(4)):
        (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
        wave = np.random.default_rng([i, ord(label)]).normal(0, 0.1, RATE // 3).astype(np.float32)
        write_sound(tmp_path / split / label / f"{i}.wav", wave, RATE, "FLOAT")
    listings = [list_files(tmp_path / split, MODALITIES["audio"]) for split in ("train", "test")]
    result = per_layer_probe(encoder(), *listings)
    assert ("final norm" in rendered(result)) == normed


def test_who_stops_a_probe_is_not_told_to_resume_it(tmp_path):
    with pytest.raises(Stopped, match="cannot be resumed") as caught, sentences(Run(tmp_path), skip_broken=False):
        raise Stopped("add --resume to go on", signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_a_full_folder_is_not_written_into(tiny_encoder, pictures, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="full is not empty; give another --out"):
        probe(tiny_encoder(), pictures("train", 2), pictures("test", 2), "mae", tmp_path / "full", overrides=FEW)


def test_a_head_with_batch_norm_resumes_to_the_bit(tiny_encoder):
    def engine():
        torch.manual_seed(1)
        encoder = tiny_encoder()
        head = HeadConfig(batch_norm=True).build(encoder.dim, encoder.num_prefix, encoder.pooling, 3)
        objective = Classify(encoder, head, train_blocks=0)
        return TorchEngine(objective, LARS(param_groups(objective, 0.0)), torch.device("cpu"))

    def walk(engine, steps):
        for step in steps:
            signal = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            batch = {"signal": signal, "target": torch.arange(4) % 3, "index": torch.arange(4)}
            engine.step([batch], 1.0)

    whole, resumed = engine(), engine()
    walk(whole, range(3))
    stored = {name: tensor.clone() for name, tensor in whole.state()}
    assert {"buffer/head.norm.running_mean", "buffer/head.norm.batches"} <= stored.keys()
    resumed.load(stored.__getitem__, 3)
    walk(whole, range(3, 5))
    walk(resumed, range(3, 5))
    after = dict(resumed.state())
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.state())


def test_every_layer_is_probed_in_one_pass(tiny_encoder, pictures, tmp_path, monkeypatch):
    encoder, train, test = tiny_encoder(), pictures("train", 6, noise=60), pictures("test", 4, noise=60)
    seen = []
    features = Layers.features
    monkeypatch.setattr(Layers, "features", lambda self, signal: seen.append(len(signal)) or features(self, signal))
    result = probe(encoder, train, test, per_layer=True, seed=2, out=tmp_path / "out")
    assert sum(seen) == len(train) + len(test)
    own = linear_probe(encoder, train, test, seed=2)
    assert result.layers[-1].as_dict() == own.as_dict()
    assert len(result.layers) == 2
    report = json.loads((tmp_path / "out" / "linear-probe.json").read_text())
    assert report == result.as_dict()
    assert report["protocol"]["name"] == "logistic"
    assert report["protocol"]["per_layer"] is True
    assert [row["layer"] for row in report["layers"]] == [1, 2]
    assert [row["scores"] for row in report["layers"]] == [layer.as_dict()["scores"] for layer in result.layers]
    page = (tmp_path / "out" / "linear-probe.html").read_text()
    assert "Accuracy by layer" in page
    shown = rendered(result)
    assert "2 (the encoder's output)" in shown
    assert "protocol logistic: L-BFGS" in shown
    per_layer_probe(encoder, train, test)  # from the cache
    assert sum(seen) == len(train) + len(test)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_layer_is_the_block_after_the_final_norm_pooled_as_the_encoder_pools(tiny_encoder, pool):
    encoder, signal = tiny_encoder(), torch.randn(3, 3, 16, 16)
    encoder.pooling = pool
    blocks = encoder.backbone.blocks
    tokens = encoder._embed(encoder.tokenizer.cut(signal), None, None)
    outputs = []
    for block in blocks:
        tokens = block(tokens)
        normed = encoder.backbone.norm(tokens)
        outputs.append(normed[:, 0] if pool == "cls" else normed[:, 1:].mean(1))
    torch.testing.assert_close(Layers(encoder).features(signal), torch.cat(outputs, 1))
    torch.testing.assert_close(Layers(encoder).features(signal)[:, -encoder.dim :], encoder.features(signal))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--protocol", "dyno"], "did you mean 'dino'"),
        (["--per-layer", "--protocol", "mae"], "--per-layer is for --protocol logistic"),
        (["--batch-norm"], "objective.head.batch_norm is a setting of a protocol that trains"),
    ],
)
def test_the_command_line_says_what_is_wrong(tiny_encoder, pictures, tmp_path, capsys, words, sentence):
    tiny_encoder().save(tmp_path / "encoder")
    sides = ["--train", str(pictures("train", 2).root), "--test", str(pictures("test", 2).root)]
    assert main(["linear-probe", str(tmp_path / "encoder"), *sides, *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_the_command_line_probes_with_a_deviation(tiny_encoder, pictures, tmp_path, capsys):
    tiny_encoder().save(tmp_path / "encoder")
    sides = ["--train", str(pictures("train", 3).root), "--test", str(pictures("test", 2).root)]
    words = ["train.steps=2", "data.workers=0", "--protocol", "dino", "--batch-norm", "--json", "--seed", "5"]
    assert main(["linear-probe", str(tmp_path / "encoder"), *sides, *words]) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert protocol["title"] == "dino, but objective.head.batch_norm=True, train.steps=2"
    assert (protocol["train.seed"], protocol["steps"]) == (5, 2)
