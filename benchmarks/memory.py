"""Planned against measured memory of training: a few steps of each case, each in processes of its own.

``python benchmarks/memory.py [RECIPE:BATCH[:checkpointing][:bf16][:zero0|zero1|zero2|zero3|zero3_offload] ...]``; BATCH
is samples per process, and a DeepSpeed configuration means two of them.

On a GPU the measure is what torch's allocator has given out at most, and beside it what it has taken from the device.
On a CPU it is the greatest resident size less that of right before the objective was built, once with an allocator that
gives back at once (MALLOC_MMAP_THRESHOLD_=65536) and once with glibc as it is: it raises its threshold as blocks are
freed, up to 32 MB, and then keeps what is freed in pieces of a heap that do not always fit what comes next.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmssl.contracts import Batch
from mmssl.cost import Sharding
from mmssl.distributed import world
from modalities.encoder import MODALITIES
from tasks.build import (
    Recipe,
    build_engine,
    build_objective,
    deepspeed_settings,
    default_device,
    load_recipe,
    measure_memory,
    sketch_objective,
    synthetic,
)
from tasks.pretrain import planned

CASES = (
    "image-mae-tiny:256", "image-mae-s16:8", "image-mae-s16:16", "image-mae-s16:16:checkpointing",
    "image-mae-b16:4", "image-mae-b16:4:checkpointing", "image-mae-b16:8", "image-mae-b16:8:checkpointing",
    "image-mae-l16:1", "image-mae-l16:2", "image-mae-l16:2:checkpointing",
    "image-mae-b16:1:zero0", "image-mae-b16:1:zero1", "image-mae-b16:1:zero2", "image-mae-b16:1:zero3",
)  # fmt: skip
STEPS = 3
RANKS = 2
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """What is trained; ``batch`` counts the samples of one process."""

    recipe: str
    batch: int
    checkpointing: bool = False
    bf16: bool = False
    deepspeed: str | None = None

    @classmethod
    def parse(cls, words: str) -> "Case":
        """Read ``RECIPE:BATCH[:option ...]``."""
        recipe, batch, *options = words.split(":")
        zero = [option for option in options if option.startswith("zero")]
        return cls(recipe, int(batch), "checkpointing" in options, "bf16" in options, zero[0] if zero else None)

    @property
    def ranks(self) -> int:
        """How many processes train."""
        return RANKS if self.deepspeed else 1

    def load(self) -> Recipe:
        """Return the recipe as it is trained here."""
        settings = {
            "model.backbone.checkpointing": self.checkpointing,
            "train.batch_size": self.batch * self.ranks,
            "train.precision": "bf16" if self.bf16 else "fp32",
        }
        return load_recipe(self.recipe, settings)


def plan_of(case: Case) -> int:
    """Return the planned bytes on the device of one process (under offloading on a CPU, those of the host too)."""
    from mmssl.engine.deepspeed_setup import system_config

    recipe = case.load()
    foot = measure_memory(recipe, sketch_objective(recipe), case.batch)
    sharding = Sharding.of(system_config(case.deepspeed), case.ranks) if case.deepspeed else None
    memory = planned(recipe, foot, sharding)
    return memory.total + (memory.host if default_device().type == "cpu" else 0)


def status(key: str) -> int:
    """Return a size from this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def train(case: Case) -> dict[str, int]:
    """Take a few steps in this process and return the most that they took, in bytes."""
    recipe, me, device = case.load(), world(), default_device()
    ds = deepspeed_settings(recipe, me, case.deepspeed)
    if ds is not None:
        from mmssl.engine.deepspeed_setup import connect

        device = connect(me, device.type)
        import mmssl.engine.deepspeed_engine  # noqa: F401 (its libraries are not part of the measure)
    warm_up(device, ds is not None)
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size so far
    before = status("VmRSS")
    objective = build_objective(recipe)
    engine = build_engine(recipe, objective, device, ds)
    size = next(iter(MODALITIES[recipe.modality].sizes(recipe.signal, recipe.model.tokenizer)))
    one = synthetic(objective, size)
    for _ in range(STEPS):
        batch: Batch = {name: torch.cat([value] * case.batch).to(device) for name, value in one.items()}
        engine.step([batch], 1e-4)
    if device.type == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    return {"peak": status("VmHWM") - before}


def warm_up(device: torch.device, distributed: bool) -> None:
    """Let the libraries allocate what they need once, whatever is trained."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    if distributed:
        torch.distributed.all_reduce(torch.ones(1_000_000, device=device))


def measured(case: Case, environment: dict[str, str]) -> dict[str, int]:
    """Train in fresh processes, and return what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    processes = []
    for rank in range(case.ranks):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        own = {**os.environ, **environment, **(ranks if case.deepspeed else {})}
        processes.append(
            subprocess.Popen(command, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case} failed; run this to see why:\n{' '.join(command[:-1])} '{command[-1]}'")
    result: dict[str, int] = json.loads(outputs[0].splitlines()[-1])
    return result


def row(case: Case) -> dict[str, Any]:
    """Return a case with its planned and measured sizes."""
    found = {**asdict(case), "planned": plan_of(case)}
    if default_device().type == "cuda":
        return found | measured(case, {})
    return found | measured(case, EXACT) | {"held": measured(case, {})["peak"]}


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    kind = "bf16" if found["bf16"] else "fp32"
    cells = [found["recipe"], str(found["batch"]), kind, "yes" if found["checkpointing"] else "no"]
    cells += [found["deepspeed"] or "", f"{found['planned'] / 1e9:.3f} GB"]
    for key in ("peak", "held"):
        cells += [f"{found[key] / 1e9:.3f} GB", f"{found['planned'] / found[key]:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="planned against measured memory")
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(Case(**json.loads(options.child)))))
        return
    held = "taken by the allocator" if default_device().type == "cuda" else "with glibc as it is"
    if not options.json:
        head = f"planned | measured | planned / it | {held} | planned / it |"
        print(f"| recipe | batch | | checkpointing | DeepSpeed | {head}")
        print("|---|--:|---|---|---|--:|--:|--:|--:|--:|")
    for words in options.cases:
        found = row(Case.parse(words))
        print(json.dumps(found) if options.json else line(found), flush=True)


if __name__ == "__main__":
    main()
