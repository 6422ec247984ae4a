"""What DeepSpeed costs: an optimiser step of the torch engine and of ZeRO 0 to 3, in turns in the same ranks.

``python benchmarks/engines.py [--recipe NAME] [--batch N] [--ranks 1,2] [--rounds N] [--threads N] [key=value ...]``;
``--batch`` is samples per rank. On several ranks the torch engine trains on each rank for itself, at the same time:
what the others take longer is DeepSpeed's own work, what the ranks say to each other, and waiting. On one rank the
engines' losses have to agree.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mmssl.config import parse_assignments
from mmssl.contracts import Batch
from mmssl.distributed import world
from mmssl.engine import Engine
from mmssl.launch import Ranks
from tasks.build import (
    build_engine,
    build_objective,
    deepspeed_settings,
    default_device,
    load_recipe,
    sizes_of,
    synthetic,
)
from tasks.fit import join

ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
Settings = dict[str, Any]


def make(recipe: str, settings: Settings, name: str) -> tuple[Engine, Batch]:
    """Make an engine, and a batch of one sample for it."""
    me = world()
    page = load_recipe(recipe, settings)
    ds = None if name == "torch" else deepspeed_settings(page, me, name)
    objective = build_objective(page)
    engine = build_engine(page, objective, default_device(), ds)
    torch.manual_seed(me.rank)
    return engine, synthetic(objective, sizes_of(page)[0], "cpu")


def steps(recipe: str, settings: Settings, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of this rank's steps by engine; all engines take one in each round."""
    me = world()
    join(me)
    settings = {**settings, "train.batch_size": batch * me.size, "train.precision": "fp32"}
    made = {name: make(recipe, settings, name) for name in ENGINES}
    taken: dict[str, list[float]] = {name: [] for name in ENGINES}
    losses: dict[str, float] = {}
    for turn in range(rounds + 2):  # the first two warm up
        for name, (engine, one) in made.items():
            micro = {key: torch.cat([value] * batch).to(engine.device) for key, value in one.items()}
            dist.barrier()
            began = time.perf_counter()
            losses[name] = float(engine.step([micro], 1e-4).loss)
            if turn > 1:
                taken[name].append(time.perf_counter() - began)
    if me.size == 1:
        assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    return taken


def rows(recipe: str, settings: Settings, batch: int, sizes: Sequence[int], rounds: int, threads: int) -> list[Any]:
    """Measure on each number of ranks; the slowest rank's median counts."""
    found = []
    for size in sizes:
        with Ranks(steps, (recipe, settings, batch, rounds), size, threads=threads) as ranks:
            taken = ranks.results(timeout=1800)
        medians = {name: max(statistics.median(rank[name]) for rank in taken) for name in ENGINES}
        found += [
            {"ranks": size, "engine": name, "seconds": median, "ratio": median / medians["torch"]}
            for name, median in medians.items()
        ]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="an optimiser step by engine")
    parser.add_argument("--recipe", default="image-mae-s16")
    parser.add_argument("--batch", type=int, default=4, help="samples per rank")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="threads per rank")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="key=value of the recipe")
    asked = parser.parse_args()
    sizes = [int(word) for word in asked.ranks.split(",")]
    settings = parse_assignments(asked.settings)
    found = rows(asked.recipe, settings, asked.batch, sizes, asked.rounds, asked.threads)
    if asked.json:
        print(json.dumps(found))
        return
    print("| ranks | engine | ms per step | against torch |\n|--:|---|--:|--:|")
    for row in found:
        print(f"| {row['ranks']} | {row['engine']} | {1000 * row['seconds']:.1f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
