"""Pre-training: a recipe and a folder in, a run folder with an encoder out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from mmssl.config import override
from mmssl.data.listing import Listing, list_files
from mmssl.distributed import world
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.build import (
    Recipe,
    as_objective,
    build_objective,
    default_device,
    load_recipe,
    measure_cost,
    parse_recipe,
    use_bf16,
)
from tasks.fit import check_batch, fit
from tasks.report import write_report
from tasks.run_report import run_sections


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


def training_files(recipe: Recipe, data: str | Path, split: str | None) -> Listing:
    """Return the files to pre-train on: those of ``split``, or of the split ``train`` where the data has splits."""
    kind = MODALITIES[recipe.modality]
    return list_files(data, kind.suffixes, kind.name, split=split, default_split="train")


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
        recipe = parse_recipe(override(recipe.as_dict(), overrides or {}), "the recipe")
    else:
        recipe = load_recipe(recipe, overrides)
    listing, run = training_files(recipe, data, split), Run(out)
    fit(recipe, listing, run, resume=resume, deepspeed_config=deepspeed_config)
    metrics = run.metrics()
    result = PretrainResult(
        run=run.path,
        steps=recipe.steps(len(listing)),
        files=len(listing),
        broken=len(run.ledger_file.read_text().splitlines()) if run.ledger_file.exists() else 0,
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"recipe": self.recipe.as_dict(), "files": self.files, **self.facts}

    def render(self, console: Console) -> None:
        """Print the resolved recipe and a table of costs."""
        console.print(self.recipe.as_yaml(), markup=False, highlight=False, soft_wrap=True)
        table = RichTable(show_header=False, box=None, pad_edge=False)
        for name, value in self.facts.items():
            text = (
                f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            )
            table.add_row(name.replace("_", " "), text)
        console.print(table)
        console.print(
            "Memory is that of weights, gradients, moments and activations; libraries and workers come on top."
        )


def dry_run(recipe: Recipe, data: str | Path | None, split: str | None = None) -> DryRun:
    """Resolve a recipe and say what it would cost, without training; ``data`` may be left out."""
    listing = training_files(recipe, data, split) if data is not None else None
    me = world()
    check_batch(recipe, me)
    objective = build_objective(recipe)
    cost = measure_cost(recipe, objective)
    encoder = next(iter(as_objective(objective).encoders().values()))
    draw = as_objective(objective).draw()
    total = int(np.prod(encoder.tokenizer.grid))
    seen = len(draw(np.random.default_rng(0), encoder.tokenizer.grid).get("keep", range(total))) if draw else total
    micro = recipe.train.batch_size // (recipe.train.accumulate * me.size)
    device = default_device()
    facts: dict[str, Any] = {
        "parameters": cost.parameters,
        "encoder_parameters": sum(p.numel() for p in encoder.parameters()),  # type: ignore[attr-defined]
        "gflop_per_sample_forward": cost.gflop_forward,
        "gflop_per_sample_training": cost.gflop_train,
        "tokens_seen": f"{seen} of {total}",
        "micro_batch": micro,
        "estimated_memory_gb": cost.memory_bytes(micro, recipe.train.ema is not None) / 1e9,
        "device": device.type,
        "precision": "bf16" if use_bf16(recipe, device) else "fp32",
    }
    if listing is not None:
        steps = recipe.steps(len(listing))
        facts |= {"steps": steps, "epochs": steps * recipe.train.batch_size / recipe.epoch(len(listing))}
    return DryRun(recipe, None if listing is None else len(listing), facts)


if __name__ == "__main__":
    # Run as a script by the launcher: the application is imported under its own name, or its classes would exist twice.
    import sys

    from tasks.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
