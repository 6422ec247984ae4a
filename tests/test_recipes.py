"""Every shipped recipe: it resolves, can be planned, and trains a step; published models have their published sizes."""

import math

import pytest
import timm
import torch
from ranks import at_once

from mmssl.config import read_yaml
from mmssl.run import Run
from modalities.encoder import MODALITIES, load
from modalities.joint import JointEncoder
from tasks.build import as_objective, load_recipe, parse_recipe, recipe_names, sketch_objective
from tasks.pretrain import dry_run, pretrain

RECIPES = sorted(recipe_names())

SMALL = {"train.batch_size": 4, "train.steps": 1, "data.workers": 0}
SMALL_MODEL = {"model.backbone.dim": 16, "model.backbone.depth": 2}
"""What makes a recipe a second's work and leaves the rest of it (checkpointing, schedules ...) as it is."""
SMALL_SIGNAL = {
    "image": {"signal.size": [32, 32]},
    "video": {"signal.frames": 4, "signal.size": [16, 16], "signal.stride": 2, "signal.short": "hold"},
    "audio": {"signal.seconds": 0.32, "signal.mels": 32},
    "text": {"signal.sentences": 4, "signal.length": 24, "signal.context": 12},
}
SMALL_CROPS = {"patch_size": 8, "stride": 4, "blocks": [1, 1], "channels": [8, 16], "bottlenecks": [4, 4]}
SMALL_PATCH = {"image": 8, "video": [2, 4, 4], "audio": 8}
DECODER = {"dim": 16, "depth": 1, "num_heads": 2}


def small(recipe):
    """Return the settings that make a recipe small, whatever its parts are."""
    settings = dict(SMALL)
    if hasattr(recipe.objective, "decoder"):
        settings |= {"objective.decoder": DECODER}
    if recipe.objective.name == "cpc":
        settings |= {"objective.steps": 2}
    for name, encoder in recipe.encoders.items():
        settings |= {f"{place(recipe, name)}{key}": value for key, value in small_encoder(name, encoder).items()}
    return settings


def place(recipe, modality):
    """Return what the keys of an encoder's settings begin with."""
    return f"towers.{modality}." if recipe.objective.several else ""


def small_encoder(modality, encoder):
    """Return the settings that make an encoder small."""
    settings, tokenizer = SMALL_MODEL | SMALL_SIGNAL[modality], encoder.model.tokenizer
    if hasattr(encoder.model.backbone, "num_heads"):
        settings |= {"model.backbone.num_heads": 2}
    if hasattr(encoder.model.backbone, "input_dim"):
        settings |= {"model.backbone.input_dim": 16}
    if hasattr(tokenizer, "patch_size"):
        settings |= {"model.tokenizer.patch_size": SMALL_PATCH[modality]}
    if getattr(tokenizer, "name", None) == "crops":
        settings |= {"model.tokenizer": SMALL_CROPS}
    if hasattr(tokenizer, "vocab_size"):
        settings |= {"model.tokenizer.vocab_size": 530}
    return settings


PUBLISHED = {
    "image-mae-b16": ("vit_base_patch16_224", 85_798_656),
    "image-mae-l16": ("vit_large_patch16_224", 303_301_632),
    "image-mae-h14": ("vit_huge_patch14_224", 630_764_800),
}
"""timm's names of MAE's encoders, and how many weights they have without a head: 86, 303 and 631 million.

MAE's own code (arXiv:2111.06377) builds its encoders from timm's VisionTransformer; there, positions are a parameter
that is not trained, of which ours is a table that is computed.
"""

CLIPS = {"clip-b32": 151_277_313, "clip-b16": 149_620_737, "clip-l14": 427_616_513}
"""The weights of OpenAI's models, as transformers' CLIPModel counts them. Our picture towers have a bias of the
patches where theirs have a position of the class token: as many numbers."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_page_that_resolves_and_reads_back(name):
    path = recipe_names()[name]
    page = path.read_text(encoding="utf-8")
    assert page.startswith("# ")
    assert len(page.splitlines()) <= 40
    recipe = load_recipe(name)
    assert parse_recipe(recipe.as_dict(), name).as_dict() == recipe.as_dict()
    given = read_yaml(path)
    assert list(recipe.encoders) == (list(given["towers"]) if "towers" in given else [given["modality"]])
    assert recipe.train.batch_size == given["train"]["batch_size"]


def plan(name, **settings):
    return dry_run(load_recipe(name, {"train.precision": "bf16", **settings}), None).as_dict()


def check_plan(planned):
    assert planned["estimated_memory_gb"] > 12 * planned["parameters"] / 1e9
    totals = {row["deepspeed_config"]: row["memory_gb"] for row in planned["zero"]}
    assert len(totals) == 6
    assert totals["zero0"] < planned["estimated_memory_gb"]
    return totals


def shallow(recipe):
    """Return the settings that leave a recipe as wide as it is and with one of all that repeats.

    What a plan takes is in its operations, which are as many for a long signal as for a short one: but not in a GRU.
    """
    settings = {f"{place(recipe, modality)}model.backbone.depth": 1 for modality in recipe.encoders}
    if hasattr(recipe.objective, "decoder"):
        settings |= {"objective.decoder.depth": 1}
    if recipe.objective.several:
        settings |= {"train.batch_size": 64}
    if recipe.objective.name == "cpc":
        settings |= {"objective.steps": 2}
        if "audio" in recipe.encoders:
            settings |= {"signal.seconds": 0.32}
    for modality, encoder in recipe.encoders.items():
        if hasattr(encoder.model.tokenizer, "blocks"):
            ones = [1] * len(encoder.model.tokenizer.blocks)
            settings |= {f"{place(recipe, modality)}model.tokenizer.blocks": ones}
    return settings


def plan_shallow(names):
    return {name: plan(name, **shallow(load_recipe(name))) for name in names}


@pytest.fixture(scope="module")
def plans():
    """The plans of all recipes, by name; half of them are made in each of two processes."""
    one, other = at_once(plan_shallow, [RECIPES[::2], RECIPES[1::2]])
    return one | other


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned(plans, name):
    check_plan(plans[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_can_be_planned_whole(name):
    totals = check_plan(plan(name))
    assert totals["zero2"] < totals["zero0"]


SINGLE = [name for name in RECIPES if "towers" not in read_yaml(recipe_names()[name])]
TOWERS = sorted(set(RECIPES) - set(SINGLE))


@pytest.mark.parametrize("name", SINGLE)
def test_a_recipe_trains(name, materials, tmp_path):
    given = load_recipe(name)
    files = materials[given.modality].folder
    source = MODALITIES[given.modality].source(given.signal).name
    pairs = {"signal.look": {"gap": [2, 4], "unit": "frames"}} if source != given.modality else {}
    settings = small(given) | pairs
    result = pretrain(name, materials[source].folder, tmp_path / "run", settings)
    assert result.steps == 1
    assert math.isfinite(result.loss)
    stored = read_yaml(Run(result.run).config_file)
    checkpointing = given.as_dict()["model"]["backbone"].get("checkpointing")
    assert stored["model"]["backbone"].get("checkpointing") == checkpointing
    assert stored["optim"] == given.as_dict()["optim"]
    encoder = load(result.run)
    vectors = encoder.embed(encoder.files(files / "test").paths)
    assert vectors.shape[1] == 16
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize("name", TOWERS)
def test_a_recipe_of_several_towers_trains(name, captioned, tmp_path):
    given = load_recipe(name)
    result = pretrain(name, captioned, tmp_path / "run", small(given))
    assert result.steps == 1
    assert math.isfinite(result.loss)
    assert read_yaml(Run(result.run).config_file)["optim"] == given.as_dict()["optim"]
    for modality in given.encoders:
        tower = JointEncoder(result.run / f"encoder-{modality}")
        vectors = tower.embed(tower.encoder.files(captioned, split="test").paths)
        assert vectors.shape == (2, given.objective.dim)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_their_published_sizes(name):
    objective = sketch_objective(load_recipe(name))
    encoder = as_objective(objective).encoders()["image"]
    tokens = math.prod(encoder.tokenizer.grid)
    ours = sum(p.numel() for p in encoder.parameters()) + (tokens + 1) * encoder.dim
    timms, published = PUBLISHED[name]
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=0)
    assert ours == published == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CLIPS)
def test_clips_have_as_many_weights_as_openais(name):
    objective = sketch_objective(load_recipe(name))
    assert sum(p.numel() for p in objective.parameters()) == CLIPS[name]


def test_the_large_recipes_are_the_papers():
    large, huge = load_recipe("image-mae-l16"), load_recipe("image-mae-h14")
    base = load_recipe("image-mae-b16")
    for section in ("optim", "objective", "signal"):
        assert large.as_dict()[section] == huge.as_dict()[section] == base.as_dict()[section]
    assert {recipe.train.batch_size for recipe in (base, large, huge)} == {4096}
    assert {recipe.optim.warmup for recipe in (base, large, huge)} == {"40ep"}
    assert (base.train.epochs, large.train.epochs, huge.train.epochs) == (800, 800, 1600)
    assert huge.model.backbone.checkpointing
