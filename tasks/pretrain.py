"""Pre-training: a recipe and a folder in, a run folder with an encoder out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

from mmssl.config import override
from mmssl.cost import Footprint, Memory, Sharding
from mmssl.data.ledger import Ledger
from mmssl.distributed import world
from mmssl.errors import UserError
from mmssl.run import Run
from tasks.batches import say_films, training_files
from tasks.build import (
    Recipe,
    as_objective,
    deepspeed_settings,
    default_device,
    kinds,
    load_recipe,
    measure_cost,
    measure_memory,
    parse_recipe,
    precision,
    sizes_of,
    sketch_objective,
)
from tasks.fit import check_batch, check_locked, fit, inherited, sources
from tasks.initial import take
from tasks.plan_rows import in_words, planned, savers, stage_rows, table
from tasks.report import write_report
from tasks.run_report import run_sections

RANKS = 8
"""Where a dry run is of one process, what DeepSpeed would need is told for this many."""


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run was; ``run`` can be handed to ``load`` and to every other command."""

    run: Path
    steps: int
    files: int
    broken: int
    loss: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "run": str(self.run)}

    def render(self, console: Console) -> None:
        """Print a sentence."""
        skipped = f", {self.broken} broken files skipped (see ledger.jsonl)" if self.broken else ""
        console.print(
            f"{self.steps} steps on {self.files} files in {self.seconds:.0f} s, last loss {self.loss:.4f}{skipped}\n"
            f"encoder and report in {self.run}",
            soft_wrap=True,
        )


def pretrain(
    recipe: str | Path | Recipe,
    data: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    split: str | None = None,
    resume: bool = False,
    deepspeed_config: str | None = None,
) -> PretrainResult:
    """Pre-train ``recipe`` (a shipped name, a YAML path or a Recipe) on ``data`` into the run folder ``out``.

    ``overrides`` maps dotted keys to values. Raises UserError for a mistake, UnusableData for too many broken files.
    """
    if isinstance(recipe, Recipe):
        page = recipe.as_dict()
        recipe = parse_recipe(override(page, overrides or {}, kinds(page)), "the recipe")
    else:
        recipe = load_recipe(recipe, overrides)
    if recipe.train.patience is not None:
        raise UserError("train.patience needs files to measure on, which finetune alone has (--validation)")
    listing, run = training_files(recipe, data, split), Run(out)
    say_films(recipe, listing)
    fit(recipe, listing, run, resume=resume, deepspeed_config=deepspeed_config)
    metrics = run.metrics()
    result = PretrainResult(
        run=run.path,
        steps=recipe.steps(len(listing)),
        files=len(listing),
        broken=Ledger(run.ledger_file, write=False).count,
        loss=metrics[-1]["loss"],
        seconds=metrics[-1]["seconds"],
    )
    if world().is_main:
        subtitle = f"{recipe.objective.name} on {len(listing):,} files of {listing.root}, {result.steps:,} steps"
        write_report(run.report_file, f"{run.path.name}: pre-trained", subtitle, run_sections(run, listing))
    return result


@dataclass(frozen=True)
class DryRun:
    """What a run would be and cost."""

    recipe: Recipe
    files: int | None
    facts: dict[str, Any]
    zero: list[dict[str, Any]]
    """Memory under each shipped DeepSpeed configuration."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"recipe": self.recipe.as_dict(), "files": self.files, **self.facts, "zero": self.zero}

    def render(self, console: Console) -> None:
        """Print the resolved recipe and a table of costs."""
        console.print(self.recipe.as_yaml(), markup=False, highlight=False, soft_wrap=True)
        facts = RichTable(show_header=False, box=None, pad_edge=False)
        for name, value in self.facts.items():
            facts.add_row(name.replace("_", " "), in_words(value))
        console.print(facts)
        console.print(
            "Memory is at the peak of a step, on one process's device: gradients grow while activations go, so step is "
            "less than their sum. Libraries, data workers and what the allocator holds back come on top.",
            soft_wrap=True,
        )
        if self.zero:
            console.print(f"\nOn {self.zero[0]['ranks']} ranks, by --deepspeed_config, in GB (see mmssl plan):")
            console.print(table(self.zero))
            console.print(
                "More ranks do not make activations and communication buckets smaller: where these dominate, "
                f"{' or '.join(savers(self.recipe))} does.",
                soft_wrap=True,
            )


def dry_run(
    recipe: Recipe, data: str | Path | None, split: str | None = None, deepspeed_config: str | None = None
) -> DryRun:
    """Resolve a recipe and say what it would cost, without training; ``data`` may be left out."""
    listing = training_files(recipe, data, split) if data is not None else None
    me = world()
    check_batch(recipe, me)
    check_locked(recipe)
    recipe = inherited(recipe)
    ds = deepspeed_settings(recipe, me, deepspeed_config)
    objective = sketch_objective(recipe)
    cost = measure_cost(recipe, objective)
    encoders = as_objective(objective).encoders().values()
    device = default_device()
    facts: dict[str, Any] = {
        "parameters": cost.parameters,
        "encoder_parameters": sum(p.numel() for one in encoders for p in one.parameters()),  # type: ignore[attr-defined]
        "gflop_per_sample_forward": cost.gflop_forward,
        "gflop_per_sample_training": cost.gflop_train,
        "tokens_seen": tokens_seen(recipe, objective),
        "micro_batch": recipe.train.batch_size // (recipe.train.accumulate * me.size),
        "device": device.type,
        "precision": precision(recipe, device),
    }
    foot = measure_memory(recipe, objective, facts["micro_batch"])
    facts |= memory_facts(foot, planned(recipe, foot, None if ds is None else Sharding.of(ds, me.size)))
    taken = [str(take(objective, weights)) for weights in sources(recipe)]
    if taken:
        facts["init_from"] = "\n".join(taken)
    if listing is not None:
        steps = recipe.steps(len(listing))
        facts |= {"steps": steps, "epochs": steps * recipe.train.batch_size / recipe.epoch(len(listing))}
    zero = zero_plans(recipe, objective, me.size if me.size > 1 else RANKS)
    return DryRun(recipe, None if listing is None else len(listing), facts, zero)


def tokens_seen(recipe: Recipe, objective: nn.Module) -> str:
    """Return how many tokens the encoder sees of a sample, for each size that there is: "4 of 16"."""
    root = as_objective(objective)
    tokenizers, draw = {name: one.tokenizer for name, one in root.encoders().items()}, root.draw()
    if len(tokenizers) > 1:
        return ", ".join(f"{name} {prod(tokenizer.grid)}" for name, tokenizer in tokenizers.items())
    (tokenizer,) = tokenizers.values()
    words = []
    for size in sizes_of(recipe):
        grid = tokenizer.grid_of(size)
        drawn = draw(np.random.default_rng(0), grid) if draw else {}
        words.append(f"{len(drawn['keep']) if 'keep' in drawn else prod(grid)} of {prod(grid)}")
    return ", ".join(words)


def memory_facts(foot: Footprint, memory: Memory) -> dict[str, float]:
    """Return the memory of a process in gigabytes, the whole and its parts."""
    parts = {name: value for name, value in asdict(memory).items() if value or name not in ("buffers", "host")}
    parts |= {"gradients": foot.gradients, "activations": foot.activations}
    return {"estimated_memory_gb": memory.total / 1e9, **{f"memory_{key}_gb": n / 1e9 for key, n in parts.items()}}


def zero_plans(recipe: Recipe, objective: nn.Module, ranks: int) -> list[dict[str, Any]]:
    """Plan a recipe's memory under each shipped DeepSpeed configuration; empty where the batch does not divide."""
    micro, rest = divmod(recipe.train.batch_size, recipe.train.accumulate * ranks)
    if rest or recipe.optim.name != "adamw":
        return []
    return stage_rows(recipe, measure_memory(recipe, objective, micro), ranks, micro)


if __name__ == "__main__":
    # Run as a script by the launcher: the application is imported under its own name, or its classes would exist twice.
    import sys

    from mmssl.distributed import leave
    from tasks.cli import main

    leave(main(["pretrain", *sys.argv[1:]]))
