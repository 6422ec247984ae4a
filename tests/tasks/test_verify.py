"""Ranks against one process: every objective at every stage is equal, and planted mistakes of ranks are seen."""

import json

import leaky
import numpy as np
import pytest
import torch
from ranks import at_once

from modalities.encoder import MODALITIES
from tasks.batches import training_files
from tasks.build import load_recipe, parse_recipe
from tasks.verify import STAGES, make_job, make_row, on_ranks, parse_worlds, synthetic_listing
from tasks.verify_ranks import compare, references

SYSTEMS = [f"zero{stage}" for stage in STAGES]
MISTAKES = ["negatives", "statistics", "summed", "teacher", "queue"]
CLASSIFY = {"name": "classify", "classes": ["a", "b", "c"], "label_smoothing": 0.1, "mix": {"mixup": 0.8}}


def settings_of(material, **objective):
    """A tiny recipe's settings with another objective."""
    kept = {key: value for key, value in material.settings.items() if not key.startswith("objective")}
    return {**kept, "objective": objective}


def three_towers(material):
    """A tiny recipe of pictures and texts with a third tower, of sounds: rows may lack one of them."""
    page = load_recipe(material.recipe, material.settings).as_dict()
    page["towers"]["audio"] = {
        "modality": "audio",
        "signal": {"sample_rate": 8000, "seconds": 0.32, "mels": 32},
        "model": {"tokenizer": {"patch_size": [8, 8]}, "backbone": {"dim": 16, "depth": 2, "num_heads": 2}},
    }
    return parse_recipe(page, "test")


def prepared(recipes, folder, steps=2):
    """Jobs for recipes by name, each in a folder of its own."""
    jobs = {}
    for name, recipe in recipes.items():
        (folder / name).mkdir()
        jobs[name] = make_job(recipe, None, None, steps, folder / name)
    return jobs


def rows_of(jobs, found, compared, world):
    """Return the rows of the table, by job."""
    return {
        name: [make_row(job, world, system, one, result) for system, result in each.items()]
        for (name, job), one, each in zip(jobs.items(), found, compared, strict=True)
    }


def on_one_rank(jobs):
    """What one process finds, and how one rank at each stage compares with it."""
    found = references(jobs)
    return found, compare(jobs, found, SYSTEMS)


@pytest.fixture(scope="module")
def table(materials, tmp_path_factory):
    """Everything there is on 1 and 2 ranks, started once for all: rows by objective."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("verify")
    recipes = {name: load_recipe(one.recipe, one.settings) for name, one in materials.items()}
    image, audio = materials["image"], materials["audio"]
    recipes["audio"] = load_recipe(audio.recipe, {**audio.settings, "train.accumulate": 2})
    recipes["classify"] = load_recipe(image.recipe, {**settings_of(image, **CLASSIFY), "optim.layer_decay": 0.7})
    recipes["clip"] = three_towers(materials["clip"])
    jobs = prepared(recipes, folder)
    halves = [[*jobs.values()][start::2] for start in (0, 1)]
    found, alone = [None] * len(jobs), [None] * len(jobs)
    for start, (references_, compared) in enumerate(at_once(on_one_rank, halves)):
        found[start::2], alone[start::2] = references_, compared
    one = rows_of(jobs, found, alone, 1)
    two = rows_of(jobs, found, on_ranks(compare, ([*jobs.values()], found, SYSTEMS), 2, folder), 2)
    return {name: one[name] + two[name] for name in jobs}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["image", "video", "audio", "pairs", "cpc", "text", "clip", "classify"])
def test_every_objective_is_equal_on_1_and_2_ranks_at_every_stage(table, name):
    assert [(row.world, row.zero) for row in table[name]] == [(w, s) for w in (1, 2) for s in SYSTEMS]
    assert {row.verdict for row in table[name]} == {"equal"}, table[name]


@pytest.fixture(scope="module")
def planted(materials, tmp_path_factory):
    """An objective with a teacher, a queue and statistics, without and with mistakes, on 2 ranks: one row by name."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("planted")
    image = materials["image"]
    recipes = {
        name: load_recipe(image.recipe, settings_of(image, name="leaky", mistake=name)) for name in ("none", *MISTAKES)
    }
    for name, more in (("accumulated", {"train.accumulate": 2}), ("unclipped", {"optim.clip": None})):
        mistake = "none" if name == "accumulated" else "summed"
        recipes[name] = load_recipe(image.recipe, {**settings_of(image, name="leaky", mistake=mistake), **more})
    jobs = prepared(recipes, folder)
    found = on_ranks(leaky.references, ([*jobs.values()],), 1, folder)
    rows = rows_of(jobs, found, on_ranks(leaky.compare, ([*jobs.values()], found, ["zero1"]), 2, folder), 2)
    few = {"same samples": jobs["none"]}
    rows |= rows_of(
        few, found[:1], on_ranks(leaky.compare_same_samples, ([*few.values()], found[:1], ["zero1"]), 2, folder), 2
    )
    return {name: row for name, (row,) in rows.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["none", "accumulated"])
def test_a_teacher_a_queue_and_statistics_are_equal(planted, name):
    assert planted[name].verdict == "equal", planted[name]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("negatives", "losses"),
        ("statistics", "losses"),
        ("summed", "gradient norms"),
        ("unclipped", "tensors"),
        ("teacher", "tensors"),
        ("queue", "tensors"),
        ("same samples", "samples"),
    ],
)
def test_planted_mistakes_of_ranks_are_seen(planted, name, differs):
    assert differs in planted[name].verdict
    assert "equal" not in planted[name].verdict


def test_the_command_verifies_files_and_prints_a_table(ask, materials, tmp_path):
    recipe, folder, settings = materials["image"]
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    asked = ["--data", folder, "--world", "2", "--zero", "3", "--steps", "2", "--out", tmp_path / "a" / "found.json"]
    code, out, said = ask("verify", recipe, *words, "train.precision=bf16", *asked, "--json")
    assert code == 0, out
    report = json.loads(out)
    assert report == json.loads((tmp_path / "a" / "found.json").read_text())
    assert report["equal"]
    assert report["precision"] == "bf16"
    assert len(report["losses"]) == 2
    (row,) = report["rows"]
    assert (row["world"], row["zero"], row["samples"], row["verdict"]) == (2, "3", True, "equal")
    assert "2 steps of 8 samples, " in said


def test_a_difference_is_printed_and_is_exit_code_1(ask, materials, monkeypatch):
    monkeypatch.setattr("tasks.verify.references", leaky.references)
    monkeypatch.setattr("tasks.verify.compare", leaky.compare)
    settings = settings_of(materials["image"], name="leaky", mistake="negatives")
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    code, out, _ = ask("verify", materials["image"].recipe, *words, "--world", "2", "--zero", "0", "--steps", "1")
    assert code == 1
    assert "losses and gradient norms and" in out
    assert "tensors differ" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--world", "3"], "train.batch_size 8 does not divide by 3 ranks x train.accumulate 1, but 6 and 9 do"),
        (["--split", "train"], "give --data too"),
        (["--zero", "zero2_fp16"], "add train.precision=fp16"),
        (["--out", "."], "--out . is a folder"),
        (["--world", "0"], "--world 0: give numbers of ranks"),
        (["--world", "two"], "--world two: give numbers of ranks"),
        (["--zero", "4"], "4 is neither a DeepSpeed JSON file nor the name of a shipped one"),
        (["optim.name=sgd"], "optim.name 'sgd' is for the torch engine"),
        (["train.batch_size=1048576"], "are free: lower train.batch_size"),
    ],
)
def test_what_cannot_be_verified_is_told_before_anything_starts(ask, materials, monkeypatch, words, sentence):
    monkeypatch.setattr("tasks.verify.on_ranks", None)
    settings = [f"{key}={json.dumps(value)}" for key, value in materials["image"].settings.items()]
    code, out, said = ask("verify", materials["image"].recipe, *settings, *words)
    assert (code, out) == (2, "")
    assert sentence in said


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
    ],
)
def test_what_deepspeed_refuses_is_told_before_a_step_and_names_the_file(
    ask, materials, monkeypatch, tmp_path, system, words
):
    monkeypatch.setattr("tasks.verify.references", None)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(system))
    settings = [f"{key}={json.dumps(value)}" for key, value in materials["image"].settings.items()]
    code, out, said = ask("verify", materials["image"].recipe, *settings, "--zero", file, "--world", "2")
    assert (code, out) == (2, "")
    assert str(file) in said
    assert words in said.splitlines()[-1]


def test_a_number_of_ranks_is_taken_once():
    assert parse_worlds("2,1,2") == [2, 1]


def test_synthetic_rows_have_what_each_modality_may_lack_and_must_agree_in(materials):
    recipe = load_recipe(materials["clip"].recipe, materials["clip"].settings)
    assert None not in [path for paths in synthetic_listing(recipe, 3).media.values() for path in paths]
    listing = synthetic_listing(three_towers(materials["clip"]), 3)
    assert None not in listing.media["image"]
    for name in ("text", "audio"):
        assert None in listing.media[name]
    assert all(sum(path is not None for path in row) >= 2 for row in zip(*listing.media.values(), strict=True))


@pytest.mark.parametrize("name", ["image", "video", "audio", "pairs", "cpc", "text"])
def test_synthetic_samples_have_the_keys_and_shapes_of_real_ones(materials, name):
    material = materials[name]
    recipe = load_recipe(material.recipe, material.settings)
    (config,) = recipe.encoders.values()
    kind = MODALITIES[config.modality]
    (size, *_), rng = kind.sizes(config.signal, config.model.tokenizer), np.random.default_rng
    path = training_files(recipe, material.folder, None).paths[-1]
    (real,) = kind.views(config.signal, config.model.tokenizer)(path, [rng(0)], size)
    text = synthetic_listing(recipe, 1).paths[0]
    drawn = [kind.synthetic(config.signal, config.model.tokenizer)(text, [rng(seed)], size)[0] for seed in (0, 0, 1)]
    assert {key: (value.shape, value.dtype) for key, value in real.items()} == {
        key: (value.shape, value.dtype) for key, value in drawn[0].items()
    }
    assert torch.equal(drawn[0]["signal"], drawn[1]["signal"])
    assert not torch.equal(drawn[0]["signal"], drawn[2]["signal"])
