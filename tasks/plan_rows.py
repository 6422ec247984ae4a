"""What a step takes in memory under each DeepSpeed configuration: what ``plan`` and a dry run print."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from mmssl.cost import Footprint, Memory, Sharding, plan
from mmssl.engine.optim import ADAMW_STATE
from tasks.build import Recipe

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""Shipped configurations, in the order in which they are worth trying: each takes less and costs more time."""
ALONE = "none"
"""In the place of a configuration: one process, without DeepSpeed."""


def planned(recipe: Recipe, foot: Footprint, sharding: Sharding | None) -> Memory:
    """Plan a recipe's memory from the footprint of its step."""
    moments = len(ADAMW_STATE) if recipe.optim.name == "adamw" else int(recipe.optim.momentum > 0)
    return plan(foot, moments, recipe.train.ema is not None, sharding)


def shardings(recipe: Recipe, ranks: int, offload: bool = True) -> Iterator[tuple[str, Sharding | None]]:
    """Yield what the state can be spread by over so many ranks, by the name of the configuration.

    Without ``offload``, where the device is the host: its memory would be the same.
    """
    from mmssl.engine.deepspeed_setup import system_config

    if ranks == 1:
        yield ALONE, None
    for name in CONFIGS if recipe.optim.name == "adamw" else ():
        sharding = Sharding.of(system_config(name), ranks)
        if offload or not sharding.offload:
            yield name, sharding


def stage_rows(recipe: Recipe, foot: Footprint, ranks: int, micro: int, offload: bool = True) -> list[dict[str, Any]]:
    """Return the memory of a process, whole and by its parts in GB, under each configuration."""
    return [
        {
            "deepspeed_config": name,
            "ranks": ranks,
            "micro_batch": micro,
            **parts(planned(recipe, foot, sharding), foot, sharding),
        }
        for name, sharding in shardings(recipe, ranks, offload)
    ]


def parts(memory: Memory, foot: Footprint, sharding: Sharding | None) -> dict[str, float]:
    """Return the memory of a process in GB: all of it, then the parts.

    ``step`` is the most that gradients, activations and what passes take together, which is less than their sum.
    """
    return {
        "memory_gb": memory.total / 1e9,
        "weights_gb": memory.weights / 1e9,
        "gradients_gb": foot.gradients * (1.0 if sharding is None else sharding.gradients) / 1e9,
        "moments_gb": memory.moments / 1e9,
        "averages_gb": memory.averages / 1e9,
        "activations_gb": foot.activations / 1e9,
        "step_gb": memory.step / 1e9,
        "buffers_gb": (memory.buffers + memory.batch) / 1e9,
        "host_memory_gb": memory.host / 1e9,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows of plain values as a table for people; sizes are in GB."""
    made = Table(*(name.removesuffix("_gb").replace("_", " ") for name in rows[0]), box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(in_words(value, 3) for value in row.values()))
    return made


def size(gigabytes: float) -> str:
    """Return a size with its unit, in MB where GB would be small."""
    return f"{gigabytes:,.1f} GB" if abs(gigabytes) >= 1 else f"{1e3 * gigabytes:.3g} MB"


def duration(seconds: float) -> str:
    """Return how long something takes, in the unit that a person would take."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def counted(number: int, what: str) -> str:
    """Return a number of things: "1 step", "2 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_words(value: Any, digits: int = 4) -> str:
    """Return a fact as a person reads it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def savers(recipe: Recipe) -> list[str]:
    """Return the keys that spare memory for activations and do not change what is learned."""
    # Not every backbone can compute its activations again.
    again = [
        f"{recipe.prefix(name)}model.backbone.checkpointing=true"
        for name, config in recipe.encoders.items()
        if getattr(config.model.backbone, "checkpointing", None) is False
    ]
    return ["objective.chunk" if recipe.objective.several else "train.accumulate", *again]
