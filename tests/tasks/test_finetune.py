"""Fine-tuning as whole runs: what is kept, validation and early stopping, killing and resuming, seeds, protocols.

Planted bugs that fail here: the last weights exported instead of the best, measurements forgotten on resume, the best
weights of an unfinished stretch kept, the best weights of an older checkpoint thrown away, a validation file trained
on, the same labels for every seed, raw weights measured where there are averages.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score

import tasks.finetune as module
from mmssl import checkpoint
from mmssl.data.listing import list_files
from mmssl.distributed import World
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import NonFiniteLoss, UnusableData, UserError
from mmssl.run import Run
from modalities.classifier import Classifier
from modalities.encoder import Encoder, EncoderConfig, typed
from tasks.finetune import finetune, finetune_seeds
from tasks.predict import predict
from tasks.validation import Measure, Validator, shared_features

ROOT = Path(__file__).parents[2]
FAST = {"data.workers": 0, "train.batch_size": 4, "train.steps": 4, "train.log_every": 1, "optim.base_lr": 0.1}
MEASURED = {**FAST, "train.steps": 10, "train.ema": 0.5, "train.validate_every": 0.4, "checkpoint.every_steps": 4,
            "checkpoint.keep": 9, "model.backbone.drop_path": 0.2}  # fmt: skip
"""A measurement every 2 of the 10 steps on 18 files, a checkpoint every 4."""


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 16, "depth": 2, "num_heads": 2}}
    return Encoder(typed(EncoderConfig, "image", "test")(modality="image", signal={"size": (16, 16)}, model=model))


@pytest.fixture(scope="module")
def halves(photos):
    return [list_files(photos / name, frozenset({".png"}), "image") for name in ("train", "test")]


SCORES = {2: 0.3, 4: 0.5, 6: 0.7, 8: 0.6, 10: 0.7}


def told(self, step):
    """Stands in for ``Validator._measure``: scores that do not depend on the weights."""
    return Measure(step, SCORES[step], 1.0)


@pytest.fixture(scope="module")
def measured(encoder, halves, tmp_path_factory):
    """A run of 10 steps, all of them on the disk, with a validation part on which the 6th is the best."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("measured") / "run"
    every = {**MEASURED, "checkpoint.every_steps": 1, "checkpoint.keep": 99}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "_measure", told)
        return finetune(encoder, *halves, out, validation="20%", overrides=every)


def stored(run, step):
    found = checkpoint.Checkpoint(run / "checkpoints" / f"step-{step:08d}")
    return {name: found.read(name) for name in found.names()}


def tensors(folder):
    return {f"{file.parent.name}/{file.name}/{name}": tensor for file in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


# --- validation -------------------------------------------------------------------------------------------------------


def test_the_averages_of_the_best_step_are_kept_as_encoder_classifier_and_objective(measured):
    best = stored(measured.run, 6)
    kept = load_file(measured.run / "encoder" / "model.safetensors")
    head = load_file(measured.run / "encoder" / "classifier.safetensors")
    whole = load_file(measured.run / "objective" / "model.safetensors")
    assert all(torch.equal(tensor, best[f"ema/encoder.{name}"]) for name, tensor in kept.items())
    assert all(torch.equal(tensor, best[f"ema/head.{name}"]) for name, tensor in head.items())
    assert all(torch.equal(tensor, best[f"ema/{name}"]) for name, tensor in whole.items())
    assert not torch.equal(kept["backbone.norm.weight"], best["param/encoder.backbone.norm.weight"])


def test_the_best_step_is_told_everywhere(measured):
    status = json.loads((measured.run / "status.json").read_text())
    assert status["state"] == "done"
    assert status["best"] == {"step": 6, "score": 0.7, "loss": 1.0}
    facts = json.loads((measured.run / "finetune.json").read_text())["validation"]
    assert facts["best_step"] == 6
    assert [one["step"] for one in facts["history"]] == [2, 4, 6, 8, 10]
    assert facts == json.loads((measured.run / "validation.json").read_text())
    kept = sorted(path.name for path in (measured.run / "best").iterdir())
    assert kept == [f"step-{step:08d}.safetensors" for step in (2, 4, 6)]  # all checkpoints are there
    assert "the weights are those of step 6, the best of 5 measurements" in (measured.run / "report.html").read_text()


def test_what_is_measured_is_what_the_exported_classifier_scores(encoder, halves, tmp_path):
    train, test = halves
    held, rest = [0, 3, 11, 14, 20], [i for i in range(22) if i not in (0, 3, 11, 14, 20)]
    result = finetune(encoder, train.select(rest), test, tmp_path / "run", validation=train.select(held),
                      overrides={**MEASURED, "train.steps": 6})  # fmt: skip
    best = next(m for m in result.validation["history"] if m["step"] == result.validation["best_step"])
    files = train.select(held)
    scores = Classifier(result.run).scores(files.paths)
    target = torch.tensor([["across", "along"].index(label) for label in files.labels()])
    assert best["score"] == pytest.approx((scores.argmax(1) == target).double().mean().item())
    assert best["loss"] == pytest.approx(torch.nn.functional.nll_loss(scores.log(), target).item(), abs=1e-5)


@pytest.fixture
def captured(monkeypatch):
    """Every call of ``fit`` from now on, as (training files, validation files or none); nothing is trained."""
    calls = []

    def fit(recipe, listing, run, targets, initial, resume, deepspeed_config, validation):
        labels = [recipe.objective.classes[t] for t in targets] if targets.ndim == 1 else None
        assert labels is None or labels == listing.labels()
        calls.append((listing.paths, validation and validation.files.paths))
        raise InterruptedError

    monkeypatch.setattr(module, "fit", fit)

    def call(*arguments, **options):
        with pytest.raises(InterruptedError):
            finetune(*arguments, **options)
        return calls[-1]

    return call


def test_a_validation_file_is_never_trained_on_and_comes_from_the_labels_there_are(encoder, halves, captured):
    every = set(halves[0].paths)
    trained, held = captured(encoder, *halves, "x", validation="20%")
    assert set(trained).isdisjoint(held)
    assert {*trained, *held} == every
    twice = halves[0].select([*range(22), *range(22)])
    trained, held = captured(encoder, twice, halves[1], "x", validation="20%")
    assert set(trained).isdisjoint(held)
    few, held = captured(encoder, *halves, "x", validation="20%", shots=5)
    assert set(few).isdisjoint(held)
    assert (len(few), len(held)) == (8, 2)
    assert {*few, *held} == set(captured(encoder, *halves, "x", shots=5)[0])


def test_the_labels_belong_to_the_seed_whatever_the_start(encoder, halves, captured):
    parts = [
        [captured(encoder, *halves, "x", labels="20%", scratch=scratch, overrides={"train.seed": seed})[0]
         for scratch in (False, True)] for seed in (0, 1, 2)
    ]  # fmt: skip
    assert all(a == b for a, b in parts)
    assert len({tuple(part[0]) for part in parts}) > 1


def test_early_stopping_stops_and_keeps_the_best(encoder, halves, tmp_path, monkeypatch):
    monkeypatch.setitem(SCORES, 6, 0.4)
    monkeypatch.setitem(SCORES, 8, 0.5)
    monkeypatch.setattr(Validator, "_measure", told)
    settings = {**MEASURED, "train.steps": 100, "train.patience": 2}
    result = finetune(encoder, *halves, tmp_path / "run", validation="20%", overrides=settings)
    assert result.steps == 8
    assert result.validation["best_step"] == 4
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["best"]["step"]) == ("done", 8, 4)
    kept = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(kept[name], stored(tmp_path / "run", 4)[f"ema/encoder.{name}"])
    assert not torch.equal(kept[name], stored(tmp_path / "run", 8)[f"ema/encoder.{name}"])
    # It is finished, however often it is resumed.
    again = finetune(encoder, *halves, tmp_path / "run", validation="20%", overrides=settings, resume=True)
    assert again.as_dict() == result.as_dict()


class Killed(BaseException):
    """As sudden as SIGKILL: nobody catches it, and nothing is written."""


@pytest.mark.parametrize("killed", [6, 7, 9])
def test_a_killed_run_goes_on_as_if_nothing_had_been(measured, encoder, halves, tmp_path, killed, monkeypatch):
    """Killed in step 7, it has kept better weights than the last checkpoint, of step 4, knows of."""
    monkeypatch.setattr(Validator, "_measure", told)
    settings = {"validation": "20%", "overrides": MEASURED}
    taken, step = [0], TorchEngine.step

    def counting(self, micros, lr):
        taken[0] += 1
        if taken[0] == killed:
            raise Killed
        return step(self, micros, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "step", counting)
        with pytest.raises(Killed):
            finetune(encoder, *halves, tmp_path / "run", **settings)
    best = tmp_path / "run" / "best"
    shutil.copy(next(best.iterdir()), best / "step-00000099.safetensors")  # of a stretch that is not repeated
    resumed = finetune(encoder, *halves, tmp_path / "run", **settings, resume=True)
    assert resumed.validation == measured.validation
    assert resumed.measured == measured.measured
    for part in ("encoder", "objective", "best"):
        expected = tensors(measured.run / part)
        expected = {
            name: tensor for name, tensor in expected.items() if "step-00000002" not in name
        }  # before the first
        assert_same(tensors(resumed.run / part), expected)
    assert_same(stored(resumed.run, 10), stored(measured.run, 10))
    losses = [[line["loss"] for line in Run(result.run).metrics()] for result in (resumed, measured)]
    assert losses[0] == losses[1]


def test_resuming_with_another_validation_part_is_refused(encoder, halves, measured):
    train, test = halves
    for validation in (None, "40%"):
        with pytest.raises(UserError, match=r"the files or their labels are not those|needs files to measure"):
            finetune(encoder, train, test, measured.run, validation=validation, overrides=MEASURED, resume=True)


def test_a_damaged_newest_checkpoint_gives_way_to_one_with_other_best_weights(encoder, halves, tmp_path, monkeypatch):
    monkeypatch.setitem(SCORES, 10, 0.9)
    monkeypatch.setattr(Validator, "_measure", told)
    settings = {"validation": "20%", "overrides": {**MEASURED, "checkpoint.keep": 2}}
    straight = finetune(encoder, *halves, tmp_path / "straight", **settings)
    names = sorted(path.name for path in (straight.run / "best").iterdir())
    assert names == ["step-00000006.safetensors", "step-00000010.safetensors"]
    shutil.copytree(straight.run, tmp_path / "run")
    (shard,) = (tmp_path / "run" / "checkpoints" / "step-00000010").glob("shard*")
    shard.write_bytes(b"junk")
    resumed = finetune(encoder, *halves, tmp_path / "run", **settings, resume=True)
    assert (resumed.validation, resumed.measured) == (straight.validation, straight.measured)
    for part in ("encoder", "objective", "best"):
        assert_same(tensors(resumed.run / part), tensors(straight.run / part))
    assert_same(stored(resumed.run, 10), stored(straight.run, 10))
    (tmp_path / "run" / "best" / "step-00000010.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000010.safetensors: the best weights so far are not readable"):
        finetune(encoder, *halves, tmp_path / "run", **settings, resume=True)


def test_resuming_with_other_labels_is_refused(encoder, tmp_path, halves, photos):
    def rows(names):
        paths = sorted((photos / "train").rglob("*.png"))
        text = "\n".join(f"{path},{name}" for path, name in zip(paths, names, strict=True))
        (tmp_path / "train.csv").write_text(f"path,label\n{text}\n")
        return list_files(tmp_path / "train.csv", frozenset({".png"}), "image")

    names = halves[0].labels()
    overrides = {**FAST, "train.steps": 1}
    finetune(encoder, rows(names), halves[1], tmp_path / "run", overrides=overrides)
    finetune(encoder, rows(names), halves[1], tmp_path / "run", overrides=overrides, resume=True)
    with pytest.raises(UserError, match="--resume: the files or their labels are not those that"):
        finetune(encoder, rows(names[::-1]), halves[1], tmp_path / "run", overrides=overrides, resume=True)


def test_a_number_is_better_than_none():
    nothing, little = Measure(1, float("nan"), float("nan")), Measure(2, 0.0, 9.0)
    assert little.beats(nothing)
    assert not nothing.beats(little)
    assert not nothing.beats(nothing)
    assert Measure(3, 0.5, 0.1).beats(Measure(2, 0.5, 0.2))
    assert Measure(3, 0.5, 0.1).beats(Measure(2, 0.5, float("nan")))


def test_a_model_that_diverges_is_blamed_and_no_file(encoder, halves, tmp_path, monkeypatch):
    result = finetune(encoder, *halves, tmp_path / "whole", overrides={**FAST, "train.steps": 1})
    file = result.run / "encoder" / "classifier.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    with pytest.raises(NonFiniteLoss, match="scores of the test files are NaN or infinite: the training has diverged"):
        module.measure(Run(result.run), halves[1], np.zeros(8, int), np.zeros(8, int))

    def diverged(self):
        self.copy.head.linear.weight.data.fill_(float("nan"))

    monkeypatch.setattr(Validator, "_fill", diverged)
    with pytest.raises(NonFiniteLoss, match="at step 2 the scores of the validation files are NaN or infinite"):
        finetune(encoder, *halves, tmp_path / "run", validation="20%", overrides=MEASURED)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


# --- what is trained, and how -----------------------------------------------------------------------------------------


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
    ("depth", "expected"), [(12, (5e-4, 0.65, 100, 0.1)), (24, (1e-3, 0.75, 50, 0.2)), (32, (1e-3, 0.75, 50, 0.3))]
)
def test_the_mae_protocol_depends_on_the_depth(depth, expected):
    with torch.device("meta"):
        config = typed(EncoderConfig, "image", "test")
        model = {"backbone": {"dim": 16, "depth": depth, "num_heads": 2}}
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


def test_predicting_is_evaluating(measured, halves):
    test = halves[1]
    found = predict(measured.run, [test.root], top=1)
    first = [best[0]["label"] for _, best in found.predictions]
    hits = list(zip(first, test.labels(), strict=True))
    right = {label: [guess == own for guess, own in hits if own == label] for label in ("across", "along")}
    for label, hits in right.items():
        assert measured.measured.per_class[label].score.value == pytest.approx(np.mean(hits))
        assert measured.measured.per_class[label].files == len(hits)
    assert measured.scores["top1"].value == pytest.approx(np.mean(right["across"] + right["along"]))
    assert measured.as_dict()["per_class"]["along"]["test"] == 4


@pytest.fixture
def tagged(photos, tmp_path):
    """Manifests of the photos with several labels each: the class, and whether the name is even."""

    def make(name):
        rows = ["path,label"]
        for path in sorted((photos / name).rglob("*.png")):
            tags = [path.parent.name] if int(path.stem) % 3 else []
            rows.append(f"{path},{'|'.join([*tags, *(['even'] if int(path.stem) % 2 == 0 else [])])}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
        return list_files(tmp_path / f"{name}.csv", frozenset({".png"}), "image")

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
    few = list_files(tmp_path / "few.csv", frozenset({".png"}), "image")
    train = train.select([i for i in range(len(train)) if i != bare])
    options = {"multi_label": True, "skip_broken": True, "overrides": {**FAST, "train.steps": 1}}
    with pytest.raises(UserError, match="none of the 1 validation files that can be read has a label"):
        finetune(encoder, train, test, tmp_path / "x", validation=few, **options)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="none of the 1 test files that can be read has a label"):
        finetune(encoder, train, few, tmp_path / "x", **options)


def test_ranks_leave_out_what_one_process_leaves_out(encoder, halves, tmp_path):
    """Planted bug that fails here: a rank gives up because all files of its share are broken."""
    for i, path in enumerate(halves[1].paths[:5]):
        (tmp_path / f"{i}.png").write_bytes(b"" if i % 2 else Path(path).read_bytes())
    files = list_files(tmp_path, frozenset({".png"}), "image")

    def asked(files):
        said = []

        def alone(value):
            said.append(value)
            raise InterruptedError

        for rank in (0, 1):
            with pytest.raises(InterruptedError):
                shared_features(encoder, files, True, World(rank, 2), SimpleNamespace(gather=alone))
        return shared_features(encoder, files, True, World(0, 2), SimpleNamespace(gather=lambda _: said))

    one, two = shared_features(encoder, files, True), asked(files)
    assert two.kept == one.kept == [0, 2, 4]
    assert two.skipped == one.skipped == [("1.png", "empty file"), ("3.png", "empty file")]
    assert torch.equal(one.vectors, two.vectors)
    with pytest.raises(UnusableData, match=r"none of the 2 files can be read; the first is 1\.png: empty file"):
        asked(files.select([1, 3]))
    with pytest.raises(UnusableData, match=r"1\.png: empty file"):
        shared_features(encoder, files, False)


def test_a_broken_validation_file_stops_the_run_by_name_or_is_left_out(encoder, halves, tmp_path):
    train, _ = halves
    folder = tmp_path / "validation" / "along"
    folder.mkdir(parents=True)
    (folder / "bad.png").write_bytes(b"")
    shutil.copy(train.paths[-1], folder / "good.png")
    validation = list_files(tmp_path / "validation", frozenset({".png"}), "image")
    with pytest.raises(UnusableData, match=r"bad\.png: empty file"):
        finetune(encoder, *halves, tmp_path / "a", validation=validation, overrides=FAST)
    assert not (tmp_path / "a").exists()
    done = finetune(encoder, *halves, tmp_path / "b", validation=validation, skip_broken=True, overrides=FAST)
    assert done.validation["best_step"] is not None


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


def test_validation_files_that_are_trained_or_tested_on_are_refused(encoder, halves, tmp_path):
    train, test = halves
    with pytest.raises(UserError, match="in both the validation and the training set"):
        finetune(encoder, train, test, tmp_path / "x", validation=train)
    with pytest.raises(UserError, match="in both the validation and the test set"):
        finetune(encoder, train, test, tmp_path / "x", validation=test)


# --- the command, and many processes ----------------------------------------------------------------------------------


def test_the_command_takes_seeds_and_a_validation_split(encoder, photos, tmp_path, capfd):
    from tasks.cli import main

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


def start_rank(rank, port, folder, words):
    """Start a rank as the launcher does."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    own = {"MASTER_ADDR": "127.0.0.1", "TORCH_EXTENSIONS_DIR": str(folder / "ext"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tasks" / "finetune.py", f"--local_rank={rank}", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **own, **{name: str(value) for name, value in facts.items()}},
    )  # fmt: skip


@pytest.mark.distributed
def test_two_ranks_equal_one_process(encoder, photos, halves, tmp_path):
    encoder.save(tmp_path / "encoder")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = {**MEASURED, "train.steps": 4, "objective.mix.mixup": 0.8, "objective.train_blocks": 1}
    words = [tmp_path / "encoder", "--train", photos / "train", "--test", photos / "test", "--out", tmp_path / "two",
             "--validation", "20%", "--deepspeed_config", "zero1"]  # fmt: skip
    words += [f"{key}={value}" for key, value in overrides.items()]
    ranks = [start_rank(rank, port, tmp_path, words) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=250)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-4000:]
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
