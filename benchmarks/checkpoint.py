"""What a checkpoint costs: bytes, seconds to write, to verify and load, to export; and memory, by stage and ranks.

``python benchmarks/checkpoint.py [--recipe NAME] [--cases torch,1:zero0,2:zero2,2:zero3] [--folder DIR] [key=value
...]``; a case is ranks and DeepSpeed configuration. Each runs in processes of its own, after one step, so that there
are moments. Memory is how much the resident size of rank 0 rises while it writes and while it exports; the reader maps
files, and what it has read of them counts until the system takes it back.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmssl import checkpoint
from mmssl.config import parse_assignments
from mmssl.distributed import Council, world
from mmssl.launch import Ranks
from mmssl.run import Run
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
from tasks.writer import export

CASES = ("torch", "1:zero0", "2:zero0", "2:zero2", "2:zero3")
Settings = dict[str, Any]


def resident(key: str) -> int:
    """Return a size of this process in bytes: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def timed(action: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return what ``action`` returns, its seconds, and by how many bytes the resident size rose at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size so far
    before, began = resident("VmRSS"), time.perf_counter()
    result = action()
    return result, time.perf_counter() - began, resident("VmHWM") - before


def measure(recipe: str, settings: Settings, config: str | None, folder: Path) -> dict[str, Any]:
    """Take a step, write a checkpoint, load and export it."""
    me = world()
    page = load_recipe(recipe, {**settings, "train.batch_size": me.size, "train.precision": "fp32"})
    ds = None if config is None else deepspeed_settings(page, me, config)
    device = default_device() if ds is None else join(me)
    council = Council(me.size)
    objective = build_objective(page)
    engine = build_engine(page, objective, device, ds)
    engine.step([{k: v.to(device) for k, v in synthetic(objective, sizes_of(page)[0], "cpu").items()}], 1e-4)
    run = Run(folder)
    path, write, written = timed(
        lambda: checkpoint.save(run.checkpoints, engine, {"step": 1, "files": ""}, me, council, keep=1)
    )
    found, verify, _ = timed(lambda: checkpoint.newest(run.checkpoints, me, council)[0])
    _, load, _ = timed(lambda: engine.load(found.read, 1))
    council.gather(None)
    if not me.is_main:
        council.gather(None)
        return {}
    opened = checkpoint.Checkpoint(path, verify=slice(0))
    _, out, exported = timed(
        lambda: export(run, page, objective, opened.weights(averaged=False), opened.weights(averaged=True))
    )
    council.gather(None)
    size = sum(file.stat().st_size for file in path.iterdir())
    weights = sum(p.numel() for p in build_objective(page).parameters()) * 4
    return {"bytes": size, "weights": weights, "write": write, "verify": verify, "load": load, "export": out,
            "write_memory": written, "export_memory": exported}  # fmt: skip


def row(case: str, recipe: str, settings: Settings, threads: int, where: Path | None) -> dict[str, Any]:
    """Measure a case."""
    ranks, _, config = case.partition(":") if case != "torch" else ("1", "", None)
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        with Ranks(measure, (recipe, settings, config, folder), int(ranks), threads=threads) as started:
            found = started.results(timeout=1800)[0]
    finally:
        shutil.rmtree(folder)
    return {"case": case, **found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what a checkpoint costs")
    parser.add_argument("--recipe", default="image-mae-b16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="key=value of the recipe")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    settings = parse_assignments(asked.settings)
    if not asked.json:
        print("| ranks and stage | checkpoint | weights | write | verify | load | export | memory: write | export |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for case in asked.cases.split(","):
        found = row(case, asked.recipe, settings, asked.threads, asked.folder)
        sizes = [f"{found[key] / 1e6:.0f} MB" for key in ("bytes", "weights", "write_memory", "export_memory")]
        seconds = [f"{found[key]:.2f} s" for key in ("write", "verify", "load", "export")]
        print(json.dumps(found) if asked.json else f"| {' | '.join([case, *sizes[:2], *seconds, *sizes[2:]])} |")


if __name__ == "__main__":
    main()
