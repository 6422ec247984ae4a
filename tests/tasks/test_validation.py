"""Validation while fine-tuning: what is kept, early stopping, killing and resuming, and who is blamed.

Planted bugs that fail here: the last weights exported instead of the best, measurements forgotten on resume, the best
weights of an unfinished stretch kept, the best weights of an older checkpoint thrown away, a validation file trained
on, the same labels for every seed, raw weights measured where there are averages.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetuned import FAST, MEASURED, assert_same, stored, tensors
from safetensors.torch import load_file, save_file

import tasks.finetune as module
from mmssl.data.listing import list_files
from mmssl.distributed import World
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import NonFiniteLoss, UnusableData, UserError
from mmssl.run import Run
from modalities.classifier import Classifier
from modalities.encoder import MODALITIES
from tasks.finetune import finetune
from tasks.predict import predict
from tasks.probe_protocols import probe
from tasks.validation import Measure, Validator, shared_features


@pytest.fixture(scope="module")
def encoder(untrained):
    return untrained


@pytest.fixture(scope="module")
def halves(listed_halves):
    return listed_halves


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

    def fit(recipe, listing, run, targets, initial, resume, deepspeed_config, validation, before=None):
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
        return list_files(tmp_path / "train.csv", MODALITIES["image"])

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


def test_ranks_leave_out_what_one_process_leaves_out(encoder, halves, tmp_path):
    """Planted bug that fails here: a rank gives up because all files of its share are broken."""
    for i, path in enumerate(halves[1].paths[:5]):
        (tmp_path / f"{i}.png").write_bytes(b"" if i % 2 else Path(path).read_bytes())
    files = list_files(tmp_path, MODALITIES["image"])

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


def test_a_broken_test_file_is_found_before_anything_is_trained(encoder, halves, tmp_path):
    folder = tmp_path / "test" / "along"
    folder.mkdir(parents=True)
    (folder / "bad.png").write_bytes(b"")
    test = list_files(tmp_path / "test", MODALITIES["image"])
    with pytest.raises(UnusableData, match=r"bad\.png: empty file"):
        finetune(encoder, halves[0], test, tmp_path / "run", overrides=FAST)
    with pytest.raises(UnusableData, match=r"bad\.png: empty file"):
        probe(encoder, halves[0], test, "dino", tmp_path / "run", overrides={"train.epochs": 1, "data.workers": 0})
    assert not (tmp_path / "run").exists()


def test_a_broken_validation_file_stops_the_run_by_name_or_is_left_out(encoder, halves, tmp_path):
    train, _ = halves
    folder = tmp_path / "validation" / "along"
    folder.mkdir(parents=True)
    (folder / "bad.png").write_bytes(b"")
    shutil.copy(train.paths[-1], folder / "good.png")
    validation = list_files(tmp_path / "validation", MODALITIES["image"])
    with pytest.raises(UnusableData, match=r"bad\.png: empty file"):
        finetune(encoder, *halves, tmp_path / "a", validation=validation, overrides=FAST)
    assert not (tmp_path / "a").exists()
    done = finetune(encoder, *halves, tmp_path / "b", validation=validation, skip_broken=True, overrides=FAST)
    assert done.validation["best_step"] is not None


def test_validation_files_that_are_trained_or_tested_on_are_refused(encoder, halves, tmp_path):
    train, test = halves
    with pytest.raises(UserError, match="in both the validation and the training set"):
        finetune(encoder, train, test, tmp_path / "x", validation=train)
    with pytest.raises(UserError, match="in both the validation and the test set"):
        finetune(encoder, train, test, tmp_path / "x", validation=test)


# --- the command, and many processes ----------------------------------------------------------------------------------
