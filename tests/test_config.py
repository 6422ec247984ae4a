"""Recipes, overrides and what is said about mistakes in them."""

import pytest
import yaml

from mmssl.config import OptimConfig, TrainConfig, override, parse_assignments, read_yaml
from mmssl.engine.schedule import WarmupCosine
from mmssl.errors import UserError
from tasks.build import build_objective, load_recipe, parse_recipe, recipe_names


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(recipe.as_yaml()), name).as_dict() == recipe.as_dict()
    head = recipe_names()[name].read_text().splitlines()[0]
    assert head.startswith("# ")


def test_the_papers_settings_are_in_the_recipe():
    recipe = load_recipe("image-mae-b16")
    assert (recipe.model.backbone.dim, recipe.model.backbone.depth, recipe.model.backbone.num_heads) == (768, 12, 12)
    assert recipe.objective.model_dump()["mask_ratio"] == 0.75
    decoder = recipe.objective.model_dump()["decoder"]
    assert decoder.items() >= {"dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0, "attention": "global"}.items()
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.optim.weight_decay == 0.05
    assert recipe.optim.peak_lr(4096) == pytest.approx(2.4e-3)
    assert recipe.optim.warmup_steps(100_000, 312.8) == round(40 * 312.8)
    assert recipe.signal.model_dump()["crop_scale"] == (0.2, 1.0)
    assert recipe.model.model_dump()["tokenizer"]["target"] == "normalized"


def test_steps_and_epochs_clear_each_other():
    assert load_recipe("image-mae-tiny", {"train.steps": 7}).train.epochs is None
    assert load_recipe("image-mae-tiny", {"train.epochs": 7}).train.steps is None
    with pytest.raises(UserError, match="exactly one of steps and epochs"):
        load_recipe("image-mae-tiny", {"train.epochs": 7, "train.steps": 7})


def test_override_touches_nothing_it_was_given():
    base, value = {"a": {"b": 1}}, {"c": 2}
    result = override(base, {"a.x": value, "a.x.c": 3})
    assert result == {"a": {"b": 1, "x": {"c": 3}}}
    assert (base, value) == ({"a": {"b": 1}}, {"c": 2})


def test_assignments_are_yaml_values():
    parsed = parse_assignments(["a=1", "b.c=[1, 2]", "d=true", "e=1e-4", "f=x=y", "g="])
    assert parsed == {"a": 1, "b.c": [1, 2], "d": True, "e": "1e-4", "f": "x=y", "g": None}
    assert load_recipe("image-mae-tiny", parse_assignments(["optim.lr=1e-4"])).optim.lr == 1e-4


MISTAKES = {
    "train.stepz=1": "'train.stepz' is not a key; did you mean 'train.steps'?",
    "optim.lrr=1": "'optim.lrr' is not a key; did you mean 'optim.lr'?",
    "modell.x=1": "'modell' is not a key; did you mean 'model'?",
    "model.backbone.heads=1": "did you mean 'model.backbone.num_heads'?",
    "model.tokenizer.patchsize=1": "did you mean 'model.tokenizer.patch_size'?",
    "objective.maskratio=1": "did you mean 'objective.mask_ratio'?",
    "objective.name=mea": "'mea' is not an objective; did you mean 'mae'?",
    "modality=imge": "'imge' is not a modality; did you mean 'image'?",
    "train.precision=bf61": "'bf61' is not valid; did you mean 'bf16'?",
    "train.engine=deepsped": "did you mean 'deepspeed'?",
    "train.batch_size=many": "train.batch_size: .*integer.*'many'",
    "train.batch_size=-1": "train.batch_size: .*greater than 0.*-1",
    "objective.mask_ratio=1.5": "objective.mask_ratio: .*less than 1.*1.5",
    "model.backbone.num_heads=5": "dim 128 does not divide into num_heads 5",
    "signal.size=[30,30]": r"size \[30, 30\] is not a multiple of patch size \[8, 8\]",
    "optim.warmup=40epochs": '"40ep"',
    "optim.warmup=3": "fraction of the run",
    "train.seed.x=1": "'train.seed' is a value, not a section",
    "train.accumulate=3": "batch_size 256 does not divide by accumulate 3",
    "data.workers=two": "data.workers",
    "train.steps": "not an override: write key.sub=value",
    "9=1": "not an override",
    "a=[": "not valid YAML",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(word):
    with pytest.raises(UserError, match=MISTAKES[word]) as caught:
        build_objective(load_recipe("image-mae-tiny", {"train.seed": 0, **parse_assignments([word])}))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_recipe_file_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "a.yaml").write_text("modality: [image")
    with pytest.raises(UserError, match=r"a\.yaml, line 1: not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds a list"):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(UserError, match=r"no such recipe file; did you mean 'a\.yaml'"):
        load_recipe(tmp_path / "aa.yaml")


def test_a_key_that_is_there_twice_and_an_endless_anchor_are_sentences(tmp_path):
    (tmp_path / "a.yaml").write_text("modality: image\ntrain: {steps: 1}\ntrain: {steps: 2}\n")
    with pytest.raises(UserError, match="'train' is there twice"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("modality: image\nmodel: &m {tokenizer: *m}\n")
    with pytest.raises(UserError, match="refers to itself"):
        load_recipe(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("modality: image\nobjective: {name: mae}\n5: 6\n")
    with pytest.raises(UserError, match="'5' is not a key"):
        load_recipe(tmp_path / "c.yaml")


def test_warmup_forms():
    assert OptimConfig(warmup="10st").warmup_steps(100, 9) == 10
    assert OptimConfig(warmup="2ep").warmup_steps(100, 9) == 18
    assert OptimConfig(warmup=0.1).warmup_steps(100, 9) == 10
    assert OptimConfig(warmup="0.1").warmup_steps(100, 9) == 10
    assert OptimConfig(warmup="40ep").warmup_steps(100, 9) == 100
    assert OptimConfig(lr=0.5).peak_lr(1024) == 0.5


def test_length_of_a_run():
    assert TrainConfig(epochs=2.5, batch_size=10).total_steps(100) == 25
    assert TrainConfig(epochs=1, batch_size=256).total_steps(10) == 1
    assert TrainConfig(steps=3).total_steps(10**6) == 3


def test_the_schedule_warms_up_and_ends_at_the_floor():
    schedule = WarmupCosine(peak=1.0, steps=110, warmup=10, floor=0.1)
    assert schedule(0) == 0.1
    assert schedule(9) == schedule(10) == 1.0
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == pytest.approx(0.1)
    assert all(schedule(step) > schedule(step + 1) for step in range(10, 109))
    assert WarmupCosine(1.0, 5, warmup=5)(4) == 1.0


def test_a_mapping_changes_the_keys_that_it_names():
    data = {"optim": {"lr": 1.0, "clip": 2.0}, "train": {"epochs": 3}, "signal": {"augment": {"erase": None}}}
    changed = override(data, parse_assignments(["optim={lr: 0.5}", "train={steps: 7, seed: 1}"]))
    assert changed["optim"] == {"lr": 0.5, "clip": 2.0}
    assert changed["train"] == {"steps": 7, "seed": 1}
    switched_on = override(data, {"signal.augment.erase.probability": 0.5})
    assert switched_on["signal"] == {"augment": {"erase": {"probability": 0.5}}}
    assert parse_assignments(["optim={lr: 1}"]) == {"optim.lr": 1}
    with pytest.raises(UserError, match="not valid YAML"):
        parse_assignments(["optim={lr: 1, lr: 2}"])


def test_a_part_of_another_kind_starts_anew():
    # What the recipe says of a spectrogram's patches and of a Transformer is nothing to a waveform and a GRU.
    kinds = {"model.tokenizer.name": "wave", "model.backbone.name": "gru", "objective.name": "cpc"}
    recipe = load_recipe("audio-mae-tiny", {**kinds, "model.backbone.input_dim": 32, "model.cls_token": False})
    assert recipe.model.tokenizer.strides == (5, 4, 2, 2, 2)
    assert (recipe.model.backbone.dim, recipe.model.backbone.reads) == (256, 32)
    assert recipe.objective.steps == 12
    with pytest.raises(UserError, match=r"'objective\.decoder' is not a key"):
        load_recipe("audio-mae-tiny", {**kinds, "objective.decoder.dim": 8})


@pytest.mark.parametrize("name", ["vit", "spectrogram"])
def test_a_part_of_the_same_kind_keeps_its_settings(name):
    section = "model.backbone" if name == "vit" else "model.tokenizer"
    recipe, plain = load_recipe("audio-mae-tiny", {f"{section}.name": name}), load_recipe("audio-mae-tiny")
    assert recipe.as_dict() == plain.as_dict()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("model.backbone.name=gruu", "model.backbone.name: 'gruu' is not valid; did you mean 'gru'"),
        ("model.backbone.units=3", "'model.backbone.units' is not a key; valid: depth, dim, input_dim, name"),
        ("model.tokenizer.stride=3", "'model.tokenizer.stride' is not a key; did you mean 'model.tokenizer.strides'"),
        ("model.backbone.dim=many", "model.backbone.dim: input should be a valid integer"),
        ("objective.negatives.source=speakers", "'speakers' is not valid; did you mean 'speaker'"),
    ],
)
def test_a_mistake_in_one_of_several_kinds_names_the_key_alone(word, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe("cpc-audio-tiny", parse_assignments([word]))
