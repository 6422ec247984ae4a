"""CLIP's loss and its backward pass at large batches: ours in tiles against open_clip's and against the plain formula.

``python benchmarks/clip_loss.py [--pairs 4096 8192 16384 32768] [--dim 512] [--threads N] [--repeats 3]`` prints, for
each number of pairs, the memory that one loss with its gradients takes, and the time. Plain is what figure 3 of the
paper says: the logits once, and ``F.cross_entropy`` of them both ways. open_clip takes part where it is installed:
``pip install --no-deps --target DIR open_clip_torch ftfy regex wcwidth``, and then ``PYTHONPATH=DIR``.

Memory is the greatest resident size of a fresh process, less that of right before the loss, after one of a few pairs;
gradients of the vectors are part of it, the vectors are not. Time is the median of turns in one process. A side whose
matrices would not fit into ``--limit`` gigabytes is left out. The sides must agree before anything is measured.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.contrastive import pairwise_sigmoid, symmetric_info_nce

OURS, PLAIN, OPEN_CLIP, SIGMOID = "ours", "plain", "open_clip", "ours, sigmoid"
MATRICES = {PLAIN: 4.5, OPEN_CLIP: 4.5}
"""About how many N x N there are at the peak, which tells what would not fit."""
SCALE = 1 / 0.07
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Return the loss from the whole matrix."""
    logits, labels = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def make_sides() -> dict[str, Side]:
    """Return every side that is there."""
    sides: dict[str, Side] = {
        OURS: lambda a, b, scale: symmetric_info_nce(a, b, scale).losses.mean(),
        SIGMOID: lambda a, b, scale: pairwise_sigmoid(a, b, scale, torch.tensor(-10.0)).losses.mean(),
        PLAIN: plain,
    }
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return sides
    return {**sides, OPEN_CLIP: ClipLoss()}


def leaves(pairs: int, dim: int) -> list[Tensor]:
    """Return vectors whose pairs are somewhat alike, and the scale."""
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(pairs, dim, generator=generator), dim=1)
    b = torch.randn(pairs, dim, generator=generator).div_(dim**0.5).add_(a, alpha=0.3)
    return [x.requires_grad_() for x in (a, F.normalize(b, dim=1), torch.tensor(SCALE))]


def step(side: Side, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the loss and the gradients."""
    loss = side(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def check(sides: dict[str, Side], dim: int) -> None:
    """Raise AssertionError unless the losses and gradients of all are the same (the sigmoid is another loss)."""
    inputs = leaves(1500, dim)
    wanted = step(plain, inputs)
    for name in sides.keys() - {SIGMOID}:
        for mine, want in zip(step(sides[name], inputs), wanted, strict=True):
            assert (mine - want).norm() <= 1e-5 * want.norm(), name


def status(key: str) -> int:
    """Return a size from this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def memory_here(name: str, pairs: int, dim: int) -> int:
    """Return the bytes that one step takes at most in this process, which has done little else."""
    side, inputs = make_sides()[name], leaves(pairs, dim)
    step(side, leaves(64, dim))
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size so far
    before = status("VmRSS")
    kept = step(side, inputs)
    assert all(value.isfinite().all() for value in kept)
    return status("VmHWM") - before


def memory(name: str, pairs: int, options: argparse.Namespace) -> int:
    """Return the bytes that one step takes at most, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--pairs", pairs]
    command += ["--dim", options.dim, "--threads", options.threads]
    return int(subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE).stdout)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(sides: dict[str, Side], pairs: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the memory and the time of every side that fits."""
    fitting = {k: v for k, v in sides.items() if 4 * pairs**2 * MATRICES.get(k, 0) <= options.limit * 1e9}
    inputs = leaves(pairs, options.dim)
    times: dict[str, list[float]] = {name: [] for name in fitting}
    for _ in range(options.repeats):
        for name, side in fitting.items():
            times[name].append(seconds(lambda side=side: step(side, inputs)))  # type: ignore[misc]
    return {name: {"bytes": memory(name, pairs, options), "seconds": median(times[name])} for name in fitting}


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [
        f"{result['threads']} threads, {result['cpu']}, torch {result['torch']}; fp32 vectors of {result['dim']}\n",
        "| pairs | side | memory | of open_clip's | loss + backward | of open_clip's |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for pairs, rows in result["pairs"].items():
        for name, row in rows.items():
            parts = [f"{row[key] / rows[OPEN_CLIP][key]:.2f}" if OPEN_CLIP in rows else "" for key in row]
            lines.append(
                f"| {pairs:,} | {name} | {row['bytes'] / 1e6:,.0f} MB | {parts[0]} "
                f"| {row['seconds']:.2f} s | {parts[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8, help="gigabytes that a side's matrices may take")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(memory_here(options.child, options.pairs[0], options.dim))
        return
    sides = make_sides()
    check(sides, options.dim)
    result = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": options.threads,
        "dim": options.dim,
        "pairs": {pairs: measure(sides, pairs, options) for pairs in options.pairs},
    }
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
