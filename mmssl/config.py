"""Typed configuration: the pieces that every recipe shares, YAML, ``key.sub=value`` overrides and readable errors.

Each piece's fields are documented in place, with units and where the default comes from.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mmssl.contracts import Backbone, EncoderModule, Objective
from mmssl.errors import UserError, nearest


class Piece(BaseModel):
    """A frozen group of settings in which an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_key", "{hint}", {"key": str(key), "hint": nearest(str(key), cls.model_fields)}
                )
        return data


def one_of(*pieces: type[Piece]) -> Any:
    """Return the type of settings that are one of several groups, told apart by ``name``; without one, the first."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0].model_fields["name"].default

    def named(value: Any) -> Any:
        return {"name": first, **value} if isinstance(value, Mapping) else value

    union: Any = reduce(or_, pieces)
    return Annotated[union, Field(discriminator="name"), BeforeValidator(named)]


class BackboneConfig(Piece, ABC):
    """The settings of one backbone; ``name`` tells which."""

    name: str
    dim: int
    depth: int

    @property
    def reads(self) -> int:
        """Width of the tokens that it is given."""
        return self.dim

    @property
    def causal(self) -> bool:
        """Whether the order of the tokens means that of time, or of rows, and none sees a later one."""
        return False

    @abstractmethod
    def build(self) -> Backbone:
        """Make the module, freshly initialised."""


class OrderedConfig(BackboneConfig):
    """The settings of a backbone that reads tokens in their order, of any width."""

    input_dim: Annotated[int, Field(gt=0)] | None = None
    """Width of the tokens; null is ``dim``."""

    @property
    def reads(self) -> int:
        """Width of the tokens."""
        return self.input_dim or self.dim

    @property
    def causal(self) -> bool:
        """No token sees a later one."""
        return True


class ObjectiveConfig(Piece, ABC):
    """The settings of one objective; ``name`` is its key in ``OBJECTIVES``."""

    name: str

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name.upper()

    @property
    def micro_batch_multiple(self) -> int:
        """What the number of samples in a micro-batch must be a multiple of."""
        return 1

    @property
    def several(self) -> bool:
        """Whether it learns from several modalities at once, each with an encoder of its own."""
        return False

    @property
    def together(self) -> str | None:
        """The column of a manifest that has one value for all samples of a batch, if it must."""
        return None

    def synthetic_targets(self, files: int) -> np.ndarray[Any, Any] | None:
        """Return a made-up target for each of so many files, where it learns from targets; else None."""
        return None

    @abstractmethod
    def build(self, encoders: Mapping[str, EncoderModule]) -> Objective:
        """Make the objective around the encoders, given by modality."""


class DataConfig(Piece):
    """How files are read."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Data worker processes per rank; auto is one less than the cores of a rank, at most 8. Never changes a result."""
    repeats: Annotated[int, Field(gt=0)] = 1
    """Training samples (crops, clips) made of a file each time it is opened (Hoffer et al., arXiv:1901.09335). Each
    counts as a sample of the batch; an epoch still opens every file once, so it has as many times more steps."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the files that may be broken before pre-training stops with exit code 3."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 30.0
    """Seconds after which a decoder that still works on one file is interrupted, and the file counts as broken."""
    window: Annotated[int, Field(gt=0)] | Literal["auto"] | None = "auto"
    """The order of an epoch: null shuffles all files. A number takes so many blocks (tar shards, row groups of parquet)
    at a time, in random order, and shuffles their files: for what is slow to read here and there. auto: as many row
    groups as a worker keeps in memory, else null."""
    log_samples: bool = False
    """Write into samples.jsonl which samples each step was taken on: proof that none is skipped or repeated."""

    @field_validator("window", mode="before")
    @classmethod
    def _window(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto" and not value.isdecimal():
            raise ValueError(f"takes auto, null or a number of shards or row groups, but got {value!r}")
        return value


class OptimConfig(Piece):
    """The optimiser, a warm-up and a cosine; by default AdamW (MAE, arXiv:2111.06377, table 8)."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """sgd: with momentum. lars: a rate per layer besides (arXiv:1708.03888), for probes. DeepSpeed has adamw alone."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. If not given, ``base_lr`` x batch size / 256."""
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Peak learning rate per 256 samples of batch."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decay of matrices, decoupled in adamw, else added to the gradient; biases, norms and tokens have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """adamw: decay of the averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd and lars: how much of the last step goes on."""
    warmup: str | float = 0.05
    """Linear warm-up: a fraction of the run, "40ep" or "500st"; never longer than the run."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Clip the global gradient norm to this."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate factor per layer below the head (BEiT, arXiv:2106.08254); 1 is none. For fine-tuning."""

    @field_validator("warmup")
    @classmethod
    def _warmup(cls, value: str | float) -> str | float:
        if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?(ep|st)", value):
            try:
                value = float(value)
            except ValueError:
                raise ValueError('takes a fraction such as 0.05, epochs as "40ep" or steps as "500st"') from None
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(
                'a plain number is a fraction of the run (0 to 1); write steps as "500st", epochs as "40ep"'
            )
        return value

    def warmup_steps(self, steps: int, steps_per_epoch: float) -> int:
        """Return the warm-up in steps, at most the run's."""
        if isinstance(self.warmup, str):
            amount = float(self.warmup[:-2])
            return min(steps, round(amount * steps_per_epoch if self.warmup.endswith("ep") else amount))
        return min(steps, round(self.warmup * steps))

    def peak_lr(self, batch_size: int) -> float:
        """Return the learning rate after the warm-up."""
        return self.base_lr * batch_size / 256 if self.lr is None else self.lr


class TrainConfig(Piece):
    """How long, how large and on what."""

    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimiser steps. Either this or ``epochs``."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data."""
    batch_size: Annotated[int, Field(gt=0, le=2**24)] = 256
    """Samples per optimiser step, over all ranks and micro-steps."""
    accumulate: Annotated[int, Field(gt=0)] = 1
    """Micro-steps per optimiser step: less memory, the same result."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Parameters are fp32 always; bf16 and fp16 autocast the products, fp16 with a scale on the loss. auto: what the
    DeepSpeed configuration says, else bf16 on GPUs that have it and for wide models on CPUs with AMX, else fp32."""
    compile: bool = False
    """Compile the objective with ``torch.compile``."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: deepspeed under a launcher or with --deepspeed_config, else torch."""
    init_from: str | None = None
    """Start from the weights of a run or an encoder folder."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which then is what the encoder folder holds."""
    hang_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Of several ranks: stop when none gets on for so long, and say which one the others wait for."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps per line of metrics.jsonl; a line holds the mean over them."""
    tensorboard: bool = False
    """Write every line of metrics for TensorBoard too, into the run folder's tensorboard/."""
    validate_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between two measurements on the validation part, where there is one; the last step is always measured."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """Stop after so many measurements without a new best; none is never. What is kept are the best weights anyway."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}")
        return self

    def total_steps(self, samples: int) -> int:
        """Return the run's optimiser steps where an epoch has ``samples`` samples, at least 1."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.batch_size))


class CheckpointConfig(Piece):
    """When to write what a run resumes from."""

    every_steps: Annotated[int, Field(gt=0)] | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep: Annotated[int, Field(gt=0)] = 2
    """How many of the newest checkpoints stay."""


P = TypeVar("P", bound=BaseModel)


class UniqueKeys(yaml.SafeLoader):
    """Reads plain YAML values, and refuses a mapping that has a key twice instead of forgetting the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises UserError with file and line where it is not one."""
    try:
        data = UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, but this holds a {type(data).__name__}")
    return data


class _Dumper(yaml.SafeDumper):
    """Writes plain values, and texts of several lines as blocks."""


def _block(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Return a mapping as a YAML page that ``read_yaml`` reads again."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def override(
    data: Mapping[str, Any], assignments: Mapping[str, Any], kinds: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return ``data`` with dotted keys set; setting ``train.steps`` clears ``train.epochs`` and the reverse.

    A mapping changes the keys that it names and leaves the others of its section. But ``kinds`` are sections whose
    ``name`` tells of which kind they are, with what it is where there is none: given another name, they start anew, for
    another kind has other keys. Raises UserError where a dotted key
    goes through something that is not a section.
    """
    try:
        result: dict[str, Any] = _copy(data)
        assignments = flat(assignments)
    except RecursionError:
        raise UserError("the recipe holds an anchor that refers to itself") from None
    for section, default in (kinds or {}).items():
        _start_anew(result, section, default, assignments.get(f"{section}.name"))
    for key, value in assignments.items():
        *sections, leaf = key.split(".")
        node = result
        for depth, section in enumerate(sections):
            if node.get(section) is None:  # a section that is switched off, or not there
                node[section] = {}
            if not isinstance(node[section], dict):
                raise UserError(f"{key}: '{'.'.join(sections[: depth + 1])}' is a value, not a section")
            node = node[section]
        node[leaf] = _copy(value)
        if key in ("train.steps", "train.epochs") and value is not None:
            other = "epochs" if leaf == "steps" else "steps"
            if f"train.{other}" not in assignments:
                node.pop(other, None)
    return result


def _start_anew(data: dict[str, Any], section: str, default: str, name: Any) -> None:
    *above, last = section.split(".")
    node: Any = data
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    there = node.get(last) if isinstance(node, dict) else None
    if name is not None and isinstance(there, dict) and there.get("name", default) != name:
        node[last] = {}


def parse_assignments(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``key.sub=value`` words, values as YAML, into dotted keys; UserError for a word of another form."""
    parsed: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
            raise UserError(f"'{word}' is not an override: write key.sub=value, for example train.steps=500")
        try:
            parsed |= flat({key: UniqueKeys(text).get_single_data()})
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"{key}: the value '{text}' is not valid YAML; quote it") from None
    return parsed


def validate(model: type[P], data: Mapping[str, Any], where: str) -> P:
    """Return a validated ``model``; raises UserError with one sentence for the first thing wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error, data)}") from None


def _sentence(error: ValidationError, data: Mapping[str, Any]) -> str:
    # A union reports every branch that did not fit; the first is its main type. Types in the location are not keys.
    first = error.errors()[0]
    location = first["loc"]
    named = [*_keys(location[:-1], data), str(location[-1])] if first["type"] == "missing" else _keys(location, data)
    parts = [part for part in named if not re.search(r"[\[\]()-]|^(int|float|str|literal)$", part)]
    if first["type"] == "unknown_key":
        hint = first["ctx"]["hint"].replace("mean '", "mean '" + "".join(f"{part}." for part in parts))
        return f"'{'.'.join([*parts, first['ctx']['key']])}' is not a key{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{'.'.join(parts)}: {message}" if parts else message
    given = first["input"]
    if first["type"] == "missing":
        return f"'{'.'.join(parts)}' is missing"
    if first["type"].startswith("union_tag"):
        parts.append(first["ctx"]["discriminator"].strip("'"))
        if first["type"] == "union_tag_not_found":
            return f"'{'.'.join(parts)}' is missing"
        given = first["ctx"]["tag"]
    if first["type"] in ("literal_error", "union_tag_invalid"):
        expected = first["ctx"]["expected" if first["type"] == "literal_error" else "expected_tags"]
        options = re.findall(r"'([^']+)'", expected)
        return f"{'.'.join(parts)}: {given!r} is not valid{nearest(str(given), options)}"
    return f"{'.'.join(parts)}: {message[0].lower()}{message[1:]}, but got {given!r}"


def _keys(location: Sequence[str | int], data: Any) -> list[str]:
    # Where one of several groups of settings was chosen by its name, given or not, that is in the location, but no key.
    keys = []
    for part in location:
        if isinstance(data, Mapping) and part not in data:
            continue
        keys.append(str(part))
        data = data.get(part) if isinstance(data, Mapping) else None
    return keys


def _copy(data: Any) -> Any:
    return {key: _copy(value) for key, value in data.items()} if isinstance(data, Mapping) else data
