"""Label propagation: a step of ours against the dense affinity of all tokens with all, on this CPU.

``python benchmarks/propagation.py`` prints milliseconds of one step (features of a new frame in, its labels out) at the
480p features of a ViT-S/16: 30 x 54 tokens of 384 channels, the first frame and 7 more, radius 12, top-5, fp32. The
sides take turns, medians; peak extra memory is that of the tensors which a step makes. ``--threads`` sets the threads.

The dense side is written as usual: a masked copy of the affinity, and a product of all weights with the labels. The
tightened one masks in place and gathers the few labels that count: the best that can be had without windows.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.cost import Live
from mmssl.propagation import Propagator, Window, dense_propagate, dense_window

DENSE, TIGHT, OURS = "dense", "dense, tightened", "ours"
TEMPERATURE = 0.1


def tightened(query: Tensor, sources: Sequence[Tensor], labels: Sequence[Tensor], outside: Tensor, topk: int) -> Tensor:
    """Return the labels [N, C] by all similarities, without a masked copy and without a product of all weights."""
    similarity = query @ torch.cat(tuple(sources)).T
    similarity.view(len(query), len(sources), -1).masked_fill_(outside.unsqueeze(1), -torch.inf)
    values, index = similarity.topk(topk)
    return ((values / TEMPERATURE).softmax(1).unsqueeze(2) * torch.cat(tuple(labels))[index]).sum(1)


def make_sides(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Return one step of each side, to the same frame after a full queue, and the tensors that there are before.

    Ours keeps what it is given, so that only its first call is the same step as the others'; the rest cost as much.
    """
    grid, tokens = (options.rows, options.columns), options.rows * options.columns
    generator = torch.Generator().manual_seed(0)
    # Neighbouring frames are much alike, as in a video.
    still = torch.randn(tokens, options.channels, generator=generator)
    video = [still + torch.randn(still.shape, generator=generator) for _ in range(options.context + 2)]
    first = F.one_hot(torch.randint(options.labels, (tokens,), generator=generator), options.labels).float()
    carrier = Propagator(grid, options.context, options.radius, options.topk, TEMPERATURE)
    carrier.start(video[0], first)
    labels = [first, *(carrier.step(features) for features in video[1:-1])]
    inside = dense_window(grid, options.radius)
    outside = ~inside
    sources = [F.normalize(features, dim=1) for features in video[:-1]]

    def normalised() -> Tensor:
        return F.normalize(video[-1], dim=1)

    sides = {
        DENSE: lambda: dense_propagate(normalised(), sources, labels, inside, options.topk, TEMPERATURE),
        TIGHT: lambda: tightened(normalised(), sources, labels, outside, options.topk),
        OURS: lambda: carrier.step(video[-1]),
    }
    return sides, [video[-1], inside, outside, carrier._features, carrier._labels]


def milliseconds(run: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return time, memory and difference by side; raises AssertionError where ours is wrong."""
    sides, before = make_sides(options)
    wanted = sides[DENSE]()
    rows: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        with Live(before) as live:
            difference = (side() - wanted).abs().max().item()
        rows[name] = {"difference": difference, "peak_mb": max(others for _, others in live.timeline) / 1e6}
    assert rows[OURS]["difference"] <= 1e-6, f"ours is {rows[OURS]['difference']:.1e} away from the dense labels"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            times[name].append(milliseconds(side))
    for name, values in times.items():
        rows[name]["ms"] = median(values)
        rows[name]["ratio"] = median(dense / mine for dense, mine in zip(times[DENSE], values, strict=True))
        rows[name]["ratio_tightened"] = median(tight / mine for tight, mine in zip(times[TIGHT], values, strict=True))
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [
        f"{result['threads']} threads, {result['cpu']}, torch {result['torch']}; {result['setting']}\n",
        "| side | step | faster than dense by | than tightened by | furthest from dense | peak extra memory |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["sides"].items():
        lines.append(
            f"| {name} | {row['ms']:.1f} ms | {row['ratio']:.2f} x | {row['ratio_tightened']:.2f} x "
            f"| {row['difference']:.1e} | {row['peak_mb']:.1f} MB |"
        )
    built = result["window_ms"]
    return "\n".join([*lines, f"\nneighbourhood, built once: dense {built[DENSE]:.1f} ms, ours {built[OURS]:.2f} ms"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="one step of label propagation: ours against the dense affinity")
    sizes = {"rows": 30, "columns": 54, "channels": 384, "context": 7, "radius": 12, "topk": 5, "labels": 4}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    grid = options.rows, options.columns
    with torch.no_grad():
        result = {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": options.threads,
            "setting": f"{grid[0]} x {grid[1]} tokens of {options.channels}, {options.context} frames and the first, "
            f"radius {options.radius}, top-{options.topk}, {options.labels} labels, fp32",
            "sides": measure(options),
            "window_ms": {
                DENSE: median(milliseconds(lambda: dense_window(grid, options.radius)) for _ in range(5)),
                OURS: median(milliseconds(lambda: Window(grid, options.radius)) for _ in range(5)),
            },
        }
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
