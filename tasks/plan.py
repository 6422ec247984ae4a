"""What a recipe needs on so many cards: memory by ZeRO stage, operations, days, and the words that start it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from mmssl.cards import CARDS, card
from mmssl.config import override
from mmssl.cost import Footprint, Sharding
from mmssl.engine.precision import DTYPES as PRECISIONS
from mmssl.engine.precision import Precision
from mmssl.errors import UserError
from tasks.batches import training_files
from tasks.build import (
    Recipe,
    as_objective,
    default_device,
    kinds,
    load_recipe,
    measure_cost,
    parse_recipe,
    precision,
    sketch_objective,
)
from tasks.fit import check_locked, inherited
from tasks.plan_cuts import Cuts
from tasks.plan_rows import ALONE, duration, in_words, planned, savers, shardings, size, stage_rows, table
from tasks.writer import say

NODE = 8
"""Cards that one machine has, at most."""
USUAL = "h100"
SHORT = 0.01
"""Seconds below which a step is not the time of its operations."""
DURATIONS = {"seconds_per_step": ("time per step", 1.0), "days": ("time in all", 86400.0)}
"""Facts that are durations: what people call them, and their unit in seconds."""


@dataclass(frozen=True)
class Machines:
    """What a recipe is to run on."""

    ranks: int
    memory: float
    """GB of a rank's device."""
    fixed: float
    """GB of it that are taken whatever is trained."""
    lost: float
    """Share of it that the allocator cannot give out."""
    card: str | None
    tflops: Mapping[str, float]
    """What a device can do, by precision; empty where that is not known."""
    mfu: float
    """Share of that which a run is thought to reach."""

    @property
    def usable(self) -> float:
        """GB that a step may take."""
        return self.memory * (1 - self.lost) - self.fixed

    @property
    def margin(self) -> str:
        """What is left free, in words."""
        what = "CUDA, cuBLAS and NCCL" if self.card is not None else "the libraries"
        if self.usable <= 0:
            return f"{size(self.memory)} are less than {what} and what the allocator holds back take"
        return (
            f"{size(self.usable)} of {size(self.memory)} can be used: {self.fixed:g} GB are for {what}, "
            f"{100 * self.lost:.0f} % for what the allocator holds back in pieces"
        )


def cards(gpus: int, kind: str, memory: float | None, tflops: float | None, mfu: float) -> Machines:
    """Return so many cards of a kind, with ``memory`` GB and ``tflops`` TFLOP/s instead of its own where given."""
    known = kind in CARDS or memory is None or tflops is None
    able: list[str] = list(card(kind).tflops if known else PRECISIONS)
    return Machines(
        ranks=gpus,
        memory=card(kind).memory if memory is None else memory,
        fixed=1.5,
        lost=0.06,
        card=kind,
        tflops=card(kind).tflops if tflops is None else dict.fromkeys(able, tflops),
        mfu=mfu,
    )


def processors(ranks: int, memory: float | None, tflops: float | None, mfu: float) -> Machines:
    """Return ``ranks`` processes without a card, each with ``memory`` GB or its share of this machine's."""
    each = psutil.virtual_memory().total / 1e9 / ranks if memory is None else memory
    able = {} if tflops is None else dict.fromkeys(map(str, PRECISIONS), tflops)
    # glibc keeps freed memory in pieces: up to 44 % more than what is in use (benchmarks/RESULTS.md).
    return Machines(ranks, each, fixed=0.6, lost=0.3, card=None, tflops=able, mfu=mfu)


@dataclass(frozen=True)
class Proposal:
    """How to cut the batch and to spread the state."""

    deepspeed_config: str
    micro_batch: int
    accumulate: int
    chunk: int | None
    memory_gb: float

    @property
    def words(self) -> str:
        """What it is, for people."""
        pieces = [f"micro-batches of {self.micro_batch:,} per rank"]
        if self.accumulate > 1:
            pieces.append(f"{self.accumulate} of them accumulated")
        if self.chunk is not None:
            pieces.append(f"embedded {self.chunk:,} at a time")
        name = "one process without DeepSpeed" if self.deepspeed_config == ALONE else self.deepspeed_config
        return f"{name}, {', '.join(pieces)}: {size(self.memory_gb)}"


@dataclass(frozen=True)
class Plan:
    """What a recipe would need and cost."""

    facts: dict[str, Any]
    stages: list[dict[str, Any]]
    """Memory under each configuration at the proposed cut, and the greatest that fits."""
    proposal: Proposal | None
    command: str | None
    problem: str | None
    """Why nothing fits, and what would help."""
    margin: str
    remarks: list[str] = field(default_factory=list)
    """What the time does not count."""
    checked: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.facts,
            "stages": self.stages,
            "proposal": None if self.proposal is None else self.proposal.__dict__,
            "command": self.command,
            "problem": self.problem,
            "margin": self.margin,
            "remarks": self.remarks,
            "checked": self.checked,
        }

    def render(self, console: Console) -> None:
        """Print the facts, the table and the words to type."""
        facts = Table(show_header=False, box=None, pad_edge=False)
        for name, value in self.facts.items():
            if value is not None:
                facts.add_row(*fact(name, value))
        console.print(facts)
        console.print(
            "\nGB per rank at the peak of a step; step is the most that gradients and activations take at once:"
        )
        console.print(table(self.stages))
        console.print(f"{self.margin}.", soft_wrap=True)
        if self.facts["days"] is None:
            console.print("How long it takes: --samples N or --data PATH, and for other cards --tflops, tell.")
        if self.facts["mfu"] is not None:
            # So that nobody takes them for measured.
            console.print(f"The cards and a share of {self.facts['mfu']:.0%} of their peak are assumed: --gpu, --mfu.")
        for remark in self.remarks:
            console.print(f"{remark}.", soft_wrap=True)
        if self.checked:
            console.print("\nMeasured here, small enough for this machine:")
            console.print(table(self.checked))
        if self.proposal is None:
            console.print(f"\n{self.problem}", soft_wrap=True)
            return
        console.print(f"\nproposed: {self.proposal.words}\n  {self.command}", soft_wrap=True, markup=False)


def plan(
    name: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    machines: Machines | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    samples: int | None = None,
    check: bool = False,
) -> Plan:
    """Plan a recipe for ``machines`` (8 cards of the usual kind), on ``data`` or on so many ``samples``.

    With ``check``, real steps that are small enough for this machine are measured beside what was planned for them.
    Raises UserError for a batch that does not divide, and for settings that the machines do not have.
    """
    recipe = override_recipe(name, overrides)
    machines = machines or cards(8, USUAL, None, None, 0.4)
    check_locked(recipe)
    recipe = inherited(with_precision(recipe, machines))
    if recipe.optim.name != "adamw" and machines.ranks > 1:
        raise UserError(f"optim.name '{recipe.optim.name}' is for one process; DeepSpeed runs with 'adamw' alone")
    cuts = Cuts(recipe, machines.ranks)
    say("tracing steps on tensors without data, which takes seconds, for large models a minute or more")
    spread = shardings(recipe, machines.ranks, offload=machines.card is not None)
    fitting = {key: cuts.greatest(fits(recipe, one, machines)) for key, one in spread}
    chosen = next((key for key, cut in fitting.items() if cut is not None), None)
    cut = cuts.sizes[0] if chosen is None else fitting[chosen]
    assert cut is not None
    rows = stage_rows(recipe, cuts.trace(cut), machines.ranks, cuts.micro(cut), offload=machines.card is not None)
    unit = "chunk" if recipe.objective.several else "micro_batch"
    stages = [{**row, f"greatest_{unit}": fitting[row["deepspeed_config"]]} for row in rows]
    files = samples if data is None else len(training_files(recipe, data, split))
    proposal = None if chosen is None else proposed(cuts, chosen, cut, stages)
    facts = costs(recipe, machines, files)
    result = Plan(
        facts=facts,
        stages=stages,
        proposal=proposal,
        command=None if proposal is None else command(name, overrides or {}, cuts, proposal, machines, data, split),
        problem=None if proposal is not None else shortage(recipe, stages, machines),
        margin=machines.margin,
        remarks=remarks(cuts.recipe_of(cut), facts["seconds_per_step"]),
    )
    if not check:
        return result
    from tasks.plan_check import checked

    return replace(result, checked=checked(recipe, cuts.micro(cut)))


def override_recipe(name: str | Path | Recipe, overrides: Mapping[str, Any] | None) -> Recipe:
    """Return a recipe by its name or itself, with settings changed."""
    if not isinstance(name, Recipe):
        return load_recipe(name, overrides)
    page = name.as_dict()
    return parse_recipe(override(page, overrides or {}, kinds(page)), "the recipe")


def with_precision(recipe: Recipe, machines: Machines) -> Recipe:
    """Return the recipe with its precision decided as the machines would; UserError for one that a card lacks."""
    kind: Precision = "bf16" if "bf16" in machines.tflops else "fp32"
    if recipe.train.precision != "auto":
        kind = recipe.train.precision
    elif machines.card is None:
        kind = precision(recipe, default_device())
    if machines.card is not None and kind not in machines.tflops:
        raise UserError(f"train.precision is {kind}, which {machines.card} does not have; use fp16 or fp32")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": kind})})


def fits(recipe: Recipe, sharding: Sharding | None, machines: Machines) -> Any:
    """Return what tells whether a step of some footprint fits."""

    def enough(foot: Footprint) -> bool:
        return planned(recipe, foot, sharding).total <= 1e9 * machines.usable

    return enough


def proposed(cuts: Cuts, config: str, cut: int, stages: Sequence[Mapping[str, Any]]) -> Proposal:
    """Return the proposal of a configuration and a cut."""
    memory = next(row["memory_gb"] for row in stages if row["deepspeed_config"] == config)
    recipe = cuts.recipe_of(cut)
    chunk = getattr(recipe.objective, "chunk", None)
    return Proposal(config, cuts.micro(cut), recipe.train.accumulate, chunk, memory)


def costs(recipe: Recipe, machines: Machines, files: int | None) -> dict[str, Any]:
    """Return what a recipe is and what it costs in operations and time."""
    objective = sketch_objective(recipe)
    cost, train = measure_cost(recipe, objective), recipe.train
    encoders = as_objective(objective).encoders().values()
    steps = train.steps if files is None else recipe.steps(files)
    peak = machines.tflops.get(train.precision, 0.0)
    pace = machines.ranks * peak * machines.mfu  # TFLOP per second
    seconds = cost.gflop_train * train.batch_size / 1e3 / pace if pace else None
    return {
        "parameters": cost.parameters,
        "encoder_parameters": sum(p.numel() for one in encoders for p in one.parameters()),  # type: ignore[attr-defined]
        "ranks": machines.ranks,
        "device": machines.card or "cpu",
        "precision": train.precision,
        "batch_size": train.batch_size,
        "gflop_per_sample_training": cost.gflop_train,
        "tflop_per_step": cost.gflop_train * train.batch_size / 1e3,
        "samples": files,
        "steps": steps,
        "peak_tflops_per_device": peak or None,
        "mfu": machines.mfu if pace else None,
        "seconds_per_step": seconds,
        "days": None if seconds is None or steps is None else steps * seconds / 86400,
    }


def remarks(recipe: Recipe, seconds: float | None) -> list[str]:
    """Return what the time of a step, where it is known, does not count."""
    if seconds is None:
        return []
    twice = ["objective.chunk"] if getattr(recipe.objective, "chunk", None) is not None else []
    twice += [
        f"{recipe.prefix(name)}model.backbone.checkpointing"
        for name, config in recipe.encoders.items()
        if getattr(config.model.backbone, "checkpointing", None)
    ]
    found = []
    if twice:
        found.append(
            f"the time is for operations of the model as it is written: {' and '.join(twice)} computes what it spares "
            "again, up to a third more"
        )
    if seconds < SHORT:
        found.append(
            f"{duration(seconds)} per step is less than it takes to start kernels and to exchange gradients: expect "
            "longer, or raise train.batch_size"
        )
    return found


def fact(name: str, value: Any) -> tuple[str, str]:
    """Return the name of a fact and its value as a person reads them."""
    if name in DURATIONS:
        words, unit = DURATIONS[name]
        return words, duration(value * unit)
    return name.replace("_", " "), in_words(value)


def command(
    name: str | Path | Recipe, overrides: Mapping[str, Any], cuts: Cuts, proposal: Proposal, machines: Machines,
    data: str | Path | None, split: str | None,
) -> str:  # fmt: skip
    """Return the words that start a run as proposed."""
    recipe = "RECIPE" if isinstance(name, Recipe) else shlex.quote(str(name))
    words = ["mmssl", "pretrain"]
    if proposal.deepspeed_config != ALONE:
        words = ["deepspeed", *launched(machines), "tasks/pretrain.py"]
    words += [recipe, "--data", "PATH" if data is None else shlex.quote(str(data)), "--out", "RUN"]
    words += [] if split is None else ["--split", shlex.quote(split)]
    if proposal.deepspeed_config != ALONE:
        words += ["--deepspeed_config", proposal.deepspeed_config]
    settings = dict(overrides)
    if proposal.accumulate != cuts.recipe.train.accumulate:
        settings["train.accumulate"] = proposal.accumulate
    if proposal.chunk != getattr(cuts.recipe.objective, "chunk", None):
        settings["objective.chunk"] = proposal.chunk
    return " ".join([*words, *(quoted(key, value) for key, value in settings.items())])


def launched(machines: Machines) -> list[str]:
    """Return the launcher's options for so many ranks."""
    if machines.card is None:
        return ["--num_accelerators", str(machines.ranks)]
    if machines.ranks <= NODE:
        return ["--num_gpus", str(machines.ranks)]
    return ["--hostfile", "HOSTS"]


def quoted(key: str, value: Any) -> str:
    """Return a setting as a word of a command line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return shlex.quote(f"{key}={text}")


def shortage(recipe: Recipe, stages: Sequence[Mapping[str, Any]], machines: Machines) -> str:
    """Return a sentence of what is missing where nothing fits, and of the keys that help."""
    least = min(stages, key=lambda row: float(row["memory_gb"]))
    if machines.usable <= 0:
        return f"nothing fits: {machines.margin}; --memory says how much a rank has"
    missing = least["memory_gb"] - machines.usable
    what = f"{least['deepspeed_config']} with micro-batches of {least['micro_batch']}"
    return (
        f"nothing fits: the least is {size(least['memory_gb'])} ({what}), {size(missing)} more than there is; "
        f"{' or '.join(savers(recipe))} makes activations smaller, more ranks (--gpus) what ZeRO spreads"
    )
