"""From a recipe to a run's parts: the root configuration, the objective and the engine."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import SerializeAsAny, create_model
from torch import nn

from mmssl.backbones import BACKBONES
from mmssl.config import (
    CheckpointConfig,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    Piece,
    TrainConfig,
    dump_yaml,
    override,
    read_yaml,
    validate,
)
from mmssl.contracts import Batch, Objective, Size
from mmssl.cost import Cost, Footprint, footprint, measure, sample_batch
from mmssl.distributed import World, launched
from mmssl.engine import Engine
from mmssl.engine.optim import LARS, adamw, param_groups, sgd
from mmssl.engine.precision import Precision
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import UserError, nearest
from mmssl.objectives import OBJECTIVES
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, typed

RECIPES = Path(__file__).parent / "recipes"


class Recipe(Piece, ABC):
    """Everything that decides what a run computes, and how it is run."""

    objective: SerializeAsAny[ObjectiveConfig]
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    @abstractmethod
    def encoders(self) -> dict[str, EncoderConfig]:
        """What its encoders are made from, by modality."""

    @abstractmethod
    def prefix(self, name: str) -> str:
        """Return what the keys of the settings of a modality's encoder begin with."""

    @abstractmethod
    def with_tokenizer(self, name: str, tokenizer: Piece) -> Self:
        """Return the recipe with other settings of the tokenizer of a modality."""

    def epoch(self, files: int) -> int:
        """Return how many samples one pass over ``files`` files has."""
        return files * self.data.repeats

    def steps(self, files: int) -> int:
        """Return the run's optimiser steps on ``files`` files."""
        return self.train.total_steps(self.epoch(files))

    def as_dict(self) -> dict[str, Any]:
        """Return the fully resolved recipe as plain values."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """Return the fully resolved recipe as a YAML page."""
        return dump_yaml(self.as_dict())


class EncoderRecipe(Recipe, EncoderConfig):
    """A recipe of one modality, whose encoder's settings stand at its top."""

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        """What its one encoder is made from, by its modality."""
        return {self.modality: self}

    def prefix(self, name: str) -> str:
        """Return nothing: they stand at the top."""
        return ""

    def with_tokenizer(self, name: str, tokenizer: Piece) -> Self:
        """Return the recipe with other settings of its tokenizer."""
        return with_tokenizer(self, tokenizer)


class Tower(EncoderConfig):
    """One of several encoders."""

    init_from: str | None = None
    """Start it from the weights of a run or an encoder folder of its modality, whatever that was trained for."""


class TowersRecipe(Recipe):
    """A recipe of several modalities, each with an encoder."""

    towers: SerializeAsAny[Piece]
    """``Tower`` settings by modality; the order counts."""

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        """What its encoders are made from, by modality."""
        return {name: getattr(self.towers, name) for name in type(self.towers).model_fields}

    def prefix(self, name: str) -> str:
        """Return ``towers.MODALITY.``."""
        return f"towers.{name}."

    def with_tokenizer(self, name: str, tokenizer: Piece) -> Self:
        """Return the recipe with other settings of a tower's tokenizer."""
        tower = with_tokenizer(self.encoders[name], tokenizer)
        return self.model_copy(update={"towers": self.towers.model_copy(update={name: tower})})


E = TypeVar("E", bound=EncoderConfig)


def with_tokenizer(config: E, tokenizer: Piece) -> E:
    """Return an encoder's settings with others of its tokenizer."""
    return config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": tokenizer})})


def recipe_names() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def recipe_path(name: str | Path) -> Path:
    """Return the file of a shipped recipe or of a YAML path; UserError with the nearest name for anything else."""
    shipped = recipe_names()
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe file{nearest(path.name, siblings) if siblings else ''}")
    raise UserError(f"'{name}' is not a recipe{nearest(str(name), shipped)}")


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name or path with dotted overrides applied; UserError for anything wrong in it."""
    path = recipe_path(name)
    page = read_yaml(path)
    return parse_recipe(override(page, overrides or {}, kinds(page)), str(name))


def kinds(page: Mapping[str, Any]) -> dict[str, str]:
    """Return the sections of a recipe that are of one of several kinds, and which kind they are without a name."""
    found = {"objective": ""}
    towers = page.get("towers")
    where = {str(page.get("modality")): ""}
    if isinstance(towers, Mapping):
        where = {str(name): f"towers.{name}." for name in towers}
    for name, prefix in where.items():
        found[f"{prefix}model.backbone"] = str(BACKBONES[0].model_fields["name"].default)
        modality = MODALITIES.get(name)
        if modality is not None and len(modality.tokenizer_types) > 1:
            found[f"{prefix}model.tokenizer"] = str(modality.tokenizer_types[0].model_fields["name"].default)
    return found


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe given as plain values; ``where`` names it in errors."""
    objective = data.get("objective")
    name = objective.get("name") if isinstance(objective, Mapping) else None
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"{where}: objective.name '{name}' is not an objective{nearest(str(name), OBJECTIVES)}")
    kind = OBJECTIVES[name]
    if "towers" in data:
        recipe: Recipe = validate(_typed_towers(data, kind, where), data, where)
    elif "modality" in data:
        recipe = validate(typed(EncoderRecipe, data["modality"], where, objective=(kind, ...)), data, where)
    else:
        raise UserError(f"{where}: 'modality' is missing; valid: {', '.join(MODALITIES)}")
    if recipe.objective.several != isinstance(recipe, TowersRecipe):
        needs = "several modalities, under 'towers'" if recipe.objective.several else "one modality, and no 'towers'"
        raise UserError(f"{where}: objective.name '{name}' learns from {needs}")
    return recipe


def _typed_towers(data: Mapping[str, Any], objective: type[ObjectiveConfig], where: str) -> type[TowersRecipe]:
    towers = data["towers"]
    if not isinstance(towers, Mapping) or len(towers) < 2:
        raise UserError(f"{where}: 'towers' needs two or more of {', '.join(MODALITIES)}, each with its settings")
    if "modality" in data:
        raise UserError(f"{where}: 'modality' is for one encoder, and 'towers' for several: leave one of them out")
    sections: dict[str, Any] = {}
    for name in towers:
        tower = typed(Tower, name, f"{where}: towers")
        named: Any = (Literal[name], name)
        sections[name] = (create_model("Tower", __base__=tower, modality=named), ...)
    section = create_model("Towers", __base__=Piece, **sections)
    return create_model("TowersRecipe", __base__=TowersRecipe, towers=(section, ...), objective=(objective, ...))


def build_objective(recipe: Recipe) -> nn.Module:
    """Make the objective, initialised from ``train.seed`` alone; ``tasks.initial`` copies others into it."""
    torch.manual_seed(recipe.train.seed)
    try:
        encoders = {name: build_encoder(recipe, name) for name in recipe.encoders}
        objective = recipe.objective.build(encoders)
    except ValueError as error:  # settings that are each valid but do not go together
        raise UserError(str(error)) from None
    alone = len(encoders) == 1
    if not alone:
        check_towers(recipe)
    given = [
        key if alone else f"{name}.{key}"
        for name, config in recipe.encoders.items()
        for key in MODALITIES[name].inputs(config.signal)
    ]
    if set(objective.inputs) != set(given):
        raise UserError(
            f"objective.name '{recipe.objective.name}' learns from {' and '.join(objective.inputs)}, but modality "
            f"{' and '.join(encoders)} with these settings gives {' and '.join(given)}; see signal.look of modality "
            "image"
        )
    assert isinstance(objective, nn.Module)
    return objective


def build_encoder(recipe: Recipe, name: str) -> Encoder:
    """Make the encoder of a modality; raises ValueError, where there are several saying which it is."""
    try:
        return Encoder(recipe.encoders[name])
    except ValueError as error:
        where = recipe.prefix(name).removesuffix(".")
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def check_towers(recipe: Recipe) -> None:
    """Raise UserError for settings that one encoder may have, and several together may not."""
    for name, config in recipe.encoders.items():
        sizes = MODALITIES[name].sizes(config.signal, config.model.tokenizer)
        if len(sizes) > 1:
            raise UserError(f"towers.{name}.signal has {len(sizes)} sizes, but a tower takes one")
    if recipe.optim.layer_decay != 1 and len({config.model.blocks for config in recipe.encoders.values()}) > 1:
        raise UserError("optim.layer_decay is for towers of one depth; leave it out")


def sketch_objective(recipe: Recipe) -> nn.Module:
    """Make the objective without the bytes of its weights: to plan what does not fit here.

    Raises MemoryError for a weight whose bytes cannot even be counted.
    """
    try:
        with torch.device("meta"):
            return build_objective(recipe)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise MemoryError(str(error)) from None


def measure_cost(recipe: Recipe, objective: nn.Module) -> Cost:
    """Return what one sample of a recipe costs; of several sizes, one of the dearest."""
    batches = (synthetic(objective, size) for size in sizes_of(recipe))
    return max((measure(objective, batch) for batch in batches), key=lambda cost: cost.gflop_forward)


def sizes_of(recipe: Recipe) -> Sequence[Size]:
    """Return the sizes that signals of the first encoder's modality may have; the others have one."""
    name, config = next(iter(recipe.encoders.items()))
    return MODALITIES[name].sizes(config.signal, config.model.tokenizer)


def measure_memory(recipe: Recipe, objective: nn.Module, samples: int) -> Footprint:
    """Return the bytes of an optimiser step on micro-batches of ``samples``; of several sizes, the greatest's."""
    accumulate, bf16 = recipe.train.accumulate, precision(recipe, default_device()) != "fp32"
    batches = (synthetic(objective, size) for size in sizes_of(recipe))
    feet = (footprint(objective, batch, samples, accumulate, bf16) for batch in batches)
    return max(feet, key=lambda foot: foot.batch + foot.peak())


def synthetic(objective: nn.Module, size: Size, device: str = "meta") -> Batch:
    """Return a batch of one sample of ``size`` for an objective; on "meta" its signal has a shape and nothing else.

    ``size`` is of the first encoder's modality; signals of further ones have their encoders' own.
    """
    viewed = as_objective(objective)
    tokenizers = {name: encoder.tokenizer for name, encoder in viewed.encoders().items()}
    tokenizer = next(iter(tokenizers.values()))
    shapes = {}
    for key in viewed.inputs:
        one = tokenizers[key.partition(".")[0]] if "." in key else tokenizer
        shapes[key] = (one.channels, *(size if one is tokenizer else one.size))
    return sample_batch(shapes, viewed.draw(), tokenizer.grid_of(size), device)


def as_objective(module: nn.Module) -> Objective:
    """View the root module as the objective it is."""
    return module  # type: ignore[return-value]


def deepspeed_settings(recipe: Recipe, world: World, asked: str | None) -> dict[str, Any] | None:
    """Return DeepSpeed's complete configuration, or None where the torch engine is to be used.

    ``asked`` is a JSON file or a shipped name. train.engine=auto means deepspeed under a launcher or where a
    configuration was asked for. Raises UserError for what does not go together.
    """
    length = recipe.train
    if length.engine == "torch":
        if world.size > 1 or asked is not None:
            raise UserError("train.engine=torch runs one process without DeepSpeed; use train.engine=deepspeed here")
        return None
    if length.engine == "auto" and asked is None and not launched():
        return None
    if length.compile:
        raise UserError("train.compile is for the torch engine; leave it out under DeepSpeed")
    if recipe.optim.name != "adamw":
        raise UserError(f"optim.name '{recipe.optim.name}' is for the torch engine; DeepSpeed runs with 'adamw' alone")
    from mmssl.engine.deepspeed_setup import autocast_precision, merge, system_config

    name = asked or "zero0"
    micro_batch = length.batch_size // (length.accumulate * world.size)
    system = system_config(name)
    products = precision(recipe, default_device(), autocast_precision(system, name))
    return merge(system, micro_batch, length.accumulate, recipe.optim.clip, products, where=name)


def default_device() -> torch.device:
    """Return the kind of device that training uses here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(recipe: Recipe, device: torch.device, asked: Precision | None = None) -> Precision:
    """Decide the precision of products: the recipe's, else what a DeepSpeed configuration ``asked`` for, else auto's.

    auto means bf16 where it is known to pay: on GPUs that have it, and on CPUs with AMX from width 768 on (below, casts
    eat what the products gain).
    """
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if asked is not None:
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    widest = max(config.model.backbone.dim for config in recipe.encoders.values())
    return "bf16" if torch.cpu._is_amx_tile_supported() and widest >= 768 else "fp32"


def build_engine(recipe: Recipe, objective: nn.Module, device: torch.device, ds: dict[str, Any] | None) -> Engine:
    """Make the engine: DeepSpeed with the configuration ``ds``, or the torch one for None."""
    optim, length = recipe.optim, recipe.train
    if ds is not None:
        from mmssl.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(objective, make_optimizer(recipe, objective), ds, length.ema)
    objective.to(device)
    optimizer = make_optimizer(recipe, objective)
    products = precision(recipe, device)
    return TorchEngine(objective, optimizer, device, products, optim.clip, length.ema, length.compile)


def make_optimizer(recipe: Recipe, objective: nn.Module) -> torch.optim.Optimizer:
    """Make the recipe's optimiser over what is to be trained."""
    optim = recipe.optim
    depth = max(config.model.blocks for config in recipe.encoders.values())
    groups = param_groups(objective, optim.weight_decay, optim.layer_decay, depth)
    if optim.name == "sgd":
        return sgd(groups, optim.momentum)
    return LARS(groups, optim.momentum) if optim.name == "lars" else adamw(groups, optim.betas, optim.eps)
