"""Starting from weights that are already there: another run's, or an encoder's, of any size or task."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.backbones.positions import Positions, resize_table, resized_sincos
from mmssl.contracts import Grid
from mmssl.errors import UserError
from modalities.encoder import encoder_folder


@dataclass(frozen=True)
class Weights:
    """Tensors by their name in an objective, and where they come from."""

    tensors: Mapping[str, Tensor]
    source: str
    grids: Mapping[str, Grid]
    """The token grid that each of its encoders was learned on, by what the names of its tensors begin with."""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the backbone that they are of, as far as they are known."""
    modality: str | None = None
    """What the one encoder that they are of is for, as far as it is known; None for several."""

    def grid_of(self, name: str) -> Grid:
        """Return the grid that a tensor was learned on; () for one of no encoder."""
        return next((grid for prefix, grid in self.grids.items() if name.startswith(prefix)), ())


@dataclass(frozen=True)
class Taken:
    """What became of the tensors of a source, and of a model's own: names, none of them in two places."""

    source: str
    copied: list[str]
    resized: list[str]
    """Position tables interpolated to another grid, or computed as they were there."""
    misfits: list[str]
    """In both, but of another shape."""
    unknown: list[str]
    """In the source alone."""
    fresh: list[str]
    """In the model alone: initialised at random."""

    def __str__(self) -> str:
        used = [*self.copied, *self.resized]
        offered = [*used, *self.misfits, *self.unknown]
        text = f"{len(used)} of the {len(offered)} tensors in {self.source} are used"
        parts = {
            "resized": (self.resized, offered),
            "of another shape and not used": (self.misfits, offered),
            "not part of this model": (self.unknown, offered),
            "initialised at random": ([*self.fresh, *self.misfits], [*used, *self.misfits, *self.fresh]),
        }
        for what, (names, among) in parts.items():
            if names:
                text += f"; {what}: {', '.join(collapsed(names, among))}"
        return text


def collapsed(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Return dotted names with those of a whole branch of ``among`` as one: ``decoder.* (12)``."""
    wanted, result, covered = set(names), [], ""
    every = sorted(set(among) | wanted)
    for name in sorted(wanted):
        if covered and name.startswith(covered):
            continue
        parts = name.split(".")
        branches = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        for branch in branches:
            inside = [other for other in every if other.startswith(branch)]
            if len(inside) > 1 and wanted.issuperset(inside):
                covered = branch
                result.append(f"{branch}* ({len(inside)})")
                break
        else:
            result.append(name)
    return result


def read_weights(source: Path) -> Weights:
    """Return the weights of a run (all of its objective) or of an encoder folder; UserError for anything else."""
    whole = source / "objective" / "model.safetensors"
    towers = sorted(folder for folder in source.glob("encoder-*") if (folder / "config.json").is_file())
    folders = {f"towers.{one.name.removeprefix('encoder-')}.": one for one in towers}
    if not (whole.is_file() and folders):
        folders = {"encoder.": encoder_folder(source)}
    file = whole if whole.is_file() else folders["encoder."] / "model.safetensors"
    with _readable(file):
        tensors = load_file(file)
        configs = {prefix: _config(folder) for prefix, folder in folders.items()}
        grids = {prefix: tuple(config["grid"]) for prefix, config in configs.items()}
        one = next(iter(configs.values()))
        backbone, modality = one["model"]["backbone"], one["modality"] if len(configs) == 1 else None
    if file != whole:
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    return Weights(tensors, str(source), grids, backbone, modality)


def tower_weights(source: Path, modality: str) -> Weights:
    """Return the weights of an encoder folder or a run's encoder, as those of the tower of its modality.

    Raises UserError for anything else, and for an encoder of another modality.
    """
    folder, prefix = tower_folder(source, modality), f"towers.{modality}."
    with _readable(folder):
        config = _config(folder)
        if config["modality"] != modality:
            raise UserError(f"towers.{modality}.init_from: {source} is an encoder of modality {config['modality']}")
        tensors = {f"{prefix}{name}": one for name, one in load_file(folder / "model.safetensors").items()}
        return Weights(tensors, str(source), {prefix: tuple(config["grid"])}, config["model"]["backbone"])


def tower_folder(source: Path, modality: str) -> Path:
    """Return the encoder folder of a modality that a path means: its own, a run's, or that of a run with several."""
    own = source / f"encoder-{modality}"
    return encoder_folder(own if own.is_dir() else source)


def known_tokenizer(source: str | None, modality: str) -> Mapping[str, Any]:
    """Return the settings of the tokenizer of the encoder that is at ``source``; {} for None."""
    if source is None:
        return {}
    folder = tower_folder(Path(source), modality)
    with _readable(folder):
        found: Mapping[str, Any] = _config(folder)["model"]["tokenizer"]
        return found


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"init_from: {file} is not readable ({error})") from None


@torch.no_grad()
def take(objective: nn.Module, weights: Weights) -> Taken:
    """Copy into an objective what it knows by name and shape, position tables resized to its grid.

    Raises UserError where nothing of the backbone fits: that is another model, not another size or task of this one.
    """
    own = objective.state_dict()
    state, resized, misfits = {}, [], []
    for name in own.keys() & weights.tensors.keys():
        tensor = weights.tensors[name]
        if tensor.shape == own[name].shape:
            state[name] = tensor
            continue
        owner = objective.get_submodule(name.rpartition(".")[0])
        fits = isinstance(owner, Positions) and tensor.ndim == 2 and tensor.shape[1] == owner.dim
        if fits and isinstance(owner, Positions) and len(owner.grid) == len(weights.grid_of(name)):
            state[name] = resize_table(tensor.float(), weights.grid_of(name), owner.grid)
            resized.append(name)
        else:
            misfits.append(name)
    tables = _computed(objective, own.keys() - weights.tensors.keys(), weights, state)
    state |= tables
    if not any(".backbone." in name for name in state):
        raise UserError(f"no weight of {weights.source} fits this model's backbone{_why(own, weights, misfits)}")
    if not any(tensor.is_meta for tensor in own.values()):  # a sketch is only asked what would fit
        objective.load_state_dict(state, strict=False)
    return Taken(
        weights.source,
        sorted(state.keys() - tables.keys() - set(resized)),
        sorted([*resized, *tables]),
        sorted(misfits),
        sorted(weights.tensors.keys() - own.keys()),
        sorted(own.keys() - weights.tensors.keys() - tables.keys()),
    )


def _computed(
    objective: nn.Module, fresh: Iterable[str], weights: Weights, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the positions to begin with where they are to be learned and were sines there, of which nothing is stored.

    ``fresh`` are tensors that the source has not, ``state`` what was taken from it.
    """
    tables = {}
    for name in fresh:
        module = name.rpartition(".")[0]
        owner, grid = objective.get_submodule(module), weights.grid_of(name)
        beside = module.rpartition(".")[0] + "."
        taken = any(other.startswith(beside) for other in state)
        if isinstance(owner, Positions) and owner.kind == "learned" and taken and len(grid) == len(owner.grid):
            tables[name] = resized_sincos(grid, owner.dim, owner.grid, owner.extend)
    return tables


def _why(own: Mapping[str, Tensor], weights: Weights, misfits: Sequence[str]) -> str:
    """Say why nothing of a backbone fits, and what would."""
    here, there = (any(name.startswith("towers.") for name in names) for names in (own, weights.grids))
    if there and not here:
        folders = ", ".join(f"{weights.source}/encoder-{prefix.split('.')[1]}" for prefix in weights.grids)
        return f": it is of several towers; name the encoder of one: {folders}"
    if here and not there:
        return f": it is one encoder, and this model has several; give it as towers.{weights.modality}.init_from"
    example = next((name for name in sorted(misfits) if ".backbone." in name), None)
    detail = "" if example is None else (
        f": {example} is {list(weights.tensors[example].shape)} there and {list(own[example].shape)} here"
    )  # fmt: skip
    shape = {name: weights.backbone[name] for name in ("dim", "depth", "num_heads") if name in weights.backbone}
    its = f" ({', '.join(f'{name}={value}' for name, value in shape.items())})" if shape else ""
    return f"{detail}; use the same model.backbone{its}"
