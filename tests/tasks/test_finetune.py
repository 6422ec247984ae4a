"""Fine-tuning as whole runs: what is trained, seeds, protocols, several labels per file, ranks, mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuned import FAST, MEASURED, assert_same, tensors
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from sound_encoders import recurrent

import tasks.finetune as module
from mmssl import checkpoint
from mmssl.data.listing import list_files
from mmssl.errors import UserError
from mmssl.launch import run
from mmssl.run import Run
from modalities.classifier import Classifier
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, typed
from tasks.cli import main
from tasks.finetune import finetune, finetune_seeds

ROOT = Path(__file__).parents[2]
# --- what is trained, and how -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(untrained):
    return untrained


@pytest.fixture(scope="module")
def halves(listed_halves):
    return listed_halves


def test_a_frozen_encoder_is_kept_bitwise(encoder, halves, tmp_path):
    overrides = {**FAST, "objective.train_blocks": 0, "train.ema": 0.9, "objective.class_weights": "balanced"}
    finetune(encoder, *halves, tmp_path / "run", overrides=overrides)
    kept = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert_same(kept, dict(encoder.state_dict()))
    weights = checkpoint.Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004").weights(averaged=True)
    head = load_file(tmp_path / "run" / "encoder" / "classifier.safetensors")
    assert torch.equal(head["linear.weight"], weights["head.linear.weight"])
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "class_weights:\n  - 1.0\n  - 1.0\n" in config


def test_the_mae_protocol_is_pinned_and_what_is_changed_is_shown(encoder, halves, tmp_path):
    overrides = {**FAST, "train.steps": 2, "optim.layer_decay": 0.5}
    del overrides["train.batch_size"]
    result = finetune(encoder, *halves, tmp_path / "run", protocol="mae", overrides=overrides)
    protocol = json.loads((tmp_path / "run" / "finetune.json").read_text())["protocol"]
    assert protocol["name"] == "mae"
    assert protocol["settings"]["optim.layer_decay"] == 0.65
    assert protocol["settings"]["objective.mix"] == {"mixup": 0.8, "cutmix": 1.0}
    assert protocol["settings"]["train.batch_size"] == 1024
    assert protocol["overrides"] == {"train.steps": 2, "optim.layer_decay": 0.5, "optim.base_lr": 0.1}
    assert "train.batch_size is 22, because there are 22 training files" in protocol["notes"]
    recipe = module.finetune_recipe(encoder, ["a", "b"], overrides, 22, "mae")[0]
    assert recipe.optim.layer_decay == 0.5
    assert recipe.train.batch_size == 22
    assert recipe.model.backbone.drop_path == 0.1
    assert recipe.signal.augment.randaugment.ops == 2
    assert "but train.steps=2, optim.base_lr=0.1, optim.layer_decay=0.5" in str(result.protocol)
    assert module.finetune_recipe(encoder, ["a", "b"], {}, 21, "mae")[0].train.batch_size == 20


@pytest.mark.parametrize(
    ("dim", "expected"), [(768, (5e-4, 0.65, 100, 0.1)), (1024, (1e-3, 0.75, 50, 0.2)), (1280, (1e-3, 0.75, 50, 0.3))]
)
def test_the_mae_protocol_depends_on_the_width(dim, expected):
    with torch.device("meta"):
        config = typed(EncoderConfig, "image", "test")
        model = {"backbone": {"dim": dim, "depth": 2, "num_heads": 2}}
        big = Encoder(config(modality="image", model=model))
    recipe = module.finetune_recipe(big, ["a", "b"], {}, 5000, "mae")[0]
    optim, length = recipe.optim, recipe.train
    assert (optim.base_lr, optim.layer_decay, length.epochs, recipe.model.backbone.drop_path) == expected
    assert (length.batch_size, optim.warmup, optim.betas) == (1024, "5ep", (0.9, 0.999))


def test_several_seeds_give_mean_and_deviation_and_a_run_each(encoder, halves, tmp_path):
    options = {"shots": 4, "overrides": FAST}
    result = finetune_seeds(encoder, *halves, tmp_path / "runs", [0, 1, 2], **options)
    values = [run.scores["top1"].value for run in result.runs]
    assert result.summary["top1"]["mean"] == pytest.approx(np.mean(values))
    assert result.summary["top1"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert [run.seed for run in result.runs] == [0, 1, 2]
    facts = json.loads((tmp_path / "runs" / "finetune.json").read_text())
    assert facts == json.loads(json.dumps(result.as_dict()))
    assert [Path(run["run"]).name for run in facts["runs"]] == ["seed-0", "seed-1", "seed-2"]
    assert "seed 2" in (tmp_path / "runs" / "report.html").read_text()
    alone = finetune(encoder, *halves, tmp_path / "alone", shots=4, overrides={**FAST, "train.seed": 2})
    assert_same(tensors(tmp_path / "alone" / "encoder"), tensors(tmp_path / "runs" / "seed-2" / "encoder"))
    assert alone.scores == result.runs[2].scores
    for rank in ("0", "1"):  # every rank finds it, or the others would wait for those that do
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="is not empty"):
            patch.setenv("RANK", rank)
            finetune_seeds(encoder, *halves, tmp_path / "runs", [3, 4], **options)
    shutil.rmtree(tmp_path / "runs" / "seed-2")  # as if stopped before the third
    again = finetune_seeds(encoder, *halves, tmp_path / "runs", [0, 1, 2], resume=True, **options)
    assert again.as_dict() == result.as_dict()


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def tagged(photos, tmp_path):
    """Manifests of the photos with several labels each: the class, and whether the name is even."""

    def make(name):
        rows = ["path,label"]
        for path in sorted((photos / name).rglob("*.png")):
            tags = [path.parent.name] if int(path.stem) % 3 else []
            rows.append(f"{path},{'|'.join([*tags, *(['even'] if int(path.stem) % 2 == 0 else [])])}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
        return list_files(tmp_path / f"{name}.csv", MODALITIES["image"])

    return [make("train"), make("test")]


def test_several_labels_per_file_are_scored_by_map(encoder, tagged, tmp_path):
    result = finetune(encoder, *tagged, tmp_path / "run", multi_label=True, labels="80%", validation="20%",
                      overrides=FAST)  # fmt: skip
    classifier = Classifier(result.run)
    assert classifier.classes == ["across", "along", "even"]
    scores = classifier.scores(tagged[1].paths)
    cells = [set((cell or "").split("|")) for cell in tagged[1].columns["label"]]
    target = np.array([[name in cell for name in classifier.classes] for cell in cells])
    assert result.scores["mAP"].value == pytest.approx(average_precision_score(target, scores, average="macro"))
    one = result.as_dict()["per_class"]["even"]
    assert one["average_precision"]["value"] == pytest.approx(average_precision_score(target[:, 2], scores[:, 2]))
    assert one["test"] == target[:, 2].sum()
    assert result.as_dict()["random_order"] == pytest.approx(target.mean(0).mean())
    assert result.validation["metric"] == "mAP"
    assert not torch.allclose(scores.sum(1), torch.ones(len(scores)))
    with pytest.raises(UserError, match="--shots 2: files with several labels"):
        finetune(encoder, *tagged, tmp_path / "x", multi_label=True, shots=2)


def test_a_class_that_no_test_file_has_is_not_measured_and_no_class_at_all_is_a_mistake(
    encoder, tagged, tmp_path, monkeypatch
):
    train, test = tagged
    few = test.select([i for i, cell in enumerate(test.columns["label"]) if "even" not in (cell or "")])
    result = finetune(encoder, train, few, tmp_path / "run", multi_label=True, overrides=FAST)
    assert result.as_dict()["per_class"]["even"] == {"average_precision": None, "test": 0}
    assert "NaN" not in (tmp_path / "run" / "finetune.json").read_text()
    monkeypatch.setattr(module, "fit", None)
    bare = [i for i, cell in enumerate(train.columns["label"]) if cell is None][:3]
    assert bare
    none, rest = train.select(bare), train.select([i for i in range(len(train)) if i not in bare])
    for halves, validation, what in (((rest, none), None, "test"), ((rest, test), none, "validation")):
        with pytest.raises(UserError, match=f"none of the {len(bare)} {what} files has a label"):
            finetune(encoder, *halves, tmp_path / "x", validation=validation, multi_label=True, overrides=FAST)


def test_labels_of_broken_files_are_no_labels(encoder, tagged, tmp_path):
    train, test = tagged
    (tmp_path / "bad.png").write_bytes(b"")
    bare = train.columns["label"].index(None)
    (tmp_path / "few.csv").write_text(f"path,label\nbad.png,even\n{train.paths[bare]},\n")
    few = list_files(tmp_path / "few.csv", MODALITIES["image"])
    train = train.select([i for i in range(len(train)) if i != bare])
    options = {"multi_label": True, "skip_broken": True, "overrides": {**FAST, "train.steps": 1}}
    with pytest.raises(UserError, match="none of the 1 validation files that can be read has a label"):
        finetune(encoder, train, test, tmp_path / "x", validation=few, **options)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="none of the 1 test files that can be read has a label"):
        finetune(encoder, train, few, tmp_path / "x", **options)


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        ({"protocol": "mea"}, {}, "'mea' is not a protocol; did you mean 'mae'"),
        ({"validation": "10"}, {}, "--validation 10: give a percentage"),
        ({}, {"train.patience": 3}, "train.patience needs files to measure on: give --validation"),
        (
            {},
            {"objective.mix.mixup": 0.8, "train.batch_size": 5},
            "micro-batches of 5 samples, but objective.mix needs",
        ),
        ({}, {"objective.mix.mixup": 0.8, "train.batch_size": 6, "train.accumulate": 2}, "micro-batches of 3"),
        ({}, {"objective.train_blocks": 3}, "train_blocks is 3, but the encoder has 2 blocks"),
        ({}, {"objective.multi_label": True}, "objective.multi_label cannot be set here: give --multi-label"),
        ({}, {"objective.class_weights": [1, 2, 3]}, "class_weights has 3 numbers for 2 classes"),
        ({}, {"objective.class_weights": "balance"}, "did you mean 'balanced'"),
        ({"multi_label": True}, {}, "--multi-label needs a manifest"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_made(encoder, halves, tmp_path, options, overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        finetune(encoder, *halves, tmp_path / "x", overrides=overrides, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_the_command_takes_seeds_and_a_validation_split(encoder, photos, tmp_path, capfd):

    encoder.save(tmp_path / "encoder")
    rows = ["path,label,split"]
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))):
        rows.append(f"{path},{path.parent.name},{('train', 'train', 'val', 'test')[i % 4]}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    data = ["--train", str(tmp_path / "data.csv"), "--test", str(tmp_path / "data.csv"), "--json"]
    words = [f"{key}={value}" for key, value in FAST.items()]
    command = ["finetune", str(tmp_path / "encoder"), *data, *words, "--out"]
    assert main([*command, str(tmp_path / "runs"), "--seeds", "0,1", "--validation-split", "val"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["summary"]["top1"]) == {"mean", "std", "seeds"}
    assert [run["validation"]["files"] for run in result["runs"]] == [5, 5]
    assert main([*command, str(tmp_path / "one"), "--seeds", "7", "--shots", "2"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["protocol"]["seed"] == 7
    assert (tmp_path / "one" / "encoder" / "classifier.json").is_file()
    for extra, said in (
        (["--seeds", "1,1"], "--seeds 1,1: give different whole numbers"),
        (["--seeds", "a"], "--seeds a: give"),
        (["--seeds", "1", "train.seed=2"], "train.seed is what --seeds sets"),
        (["--validation", "10%", "--validation-split", "val"], "exclude each other"),
        (["--validation-split", "vla"], "no row has split 'vla'; did you mean 'val'"),
    ):
        assert main([*command, str(tmp_path / "x"), *extra]) == 2
        assert said in capfd.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(encoder, photos, halves, tmp_path):
    encoder.save(tmp_path / "encoder")
    overrides = {**MEASURED, "train.steps": 4, "objective.mix.mixup": 0.8, "objective.train_blocks": 1}
    words = ["finetune", tmp_path / "encoder", "--train", photos / "train", "--test", photos / "test", "--out",
             tmp_path / "two", "--validation", "20%", "--deepspeed_config", "zero1"]  # fmt: skip
    words += [f"{key}={value}" for key, value in overrides.items()]
    assert run(main, [[str(word) for word in words]]) == [0, 0]
    one = finetune(encoder, *halves, tmp_path / "one", validation="20%", overrides=overrides)
    two = json.loads((tmp_path / "two" / "finetune.json").read_text())
    losses = [[line["loss"] for line in Run(tmp_path / name).metrics()] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses[0]) == 4
    for a, b in zip(one.validation["history"], two["validation"]["history"], strict=True):
        assert (a["step"], a["score"]) == (b["step"], b["score"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert two["scores"] == json.loads(json.dumps(one.as_dict()["scores"]))
    other = tensors(tmp_path / "two" / "encoder")
    for name, tensor in tensors(tmp_path / "one" / "encoder").items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=0)


def test_the_audiomae_protocol_hides_the_papers_share_of_a_spectrogram():
    config = typed(EncoderConfig, "audio", "test")
    for seconds, mels, expected in ((10.24, 128, (192, 48)), (1.92, 64, (36, 24))):
        with torch.device("meta"):
            model = {"backbone": {"dim": 16, "depth": 2, "num_heads": 2}}
            encoder = Encoder(config(modality="audio", signal={"seconds": seconds, "mels": mels}, model=model))
        recipe, protocol = module.finetune_recipe(encoder, ["a", "b"], {}, 500, "audiomae")
        assert (recipe.signal.spec_mask.time, recipe.signal.spec_mask.frequency) == expected
        assert recipe.objective.mix.mixup == 10
        assert bool(protocol.notes) == (seconds < 10)
    with pytest.raises(UserError, match="protocol mae is for modality image, and this encoder is of modality audio"):
        module.finetune_recipe(encoder, ["a", "b"], {}, 500, "mae")
    with pytest.raises(UserError, match="protocol audiomae is for ViT encoders, and this encoder's backbone is 'gru'"):
        module.finetune_recipe(recurrent(), ["a", "b"], {}, 500, "audiomae")
