"""Exact search among float16 vectors: ours against the plain ways, one query, the best 20.

``python benchmarks/search.py`` writes indices of random unit vectors, 512 values each, into a temporary folder and
prints for every number of vectors and of threads the median of the sides, which take turns, with the page cache warm;
whether each finds what float64 finds; and how long it takes to open an index and to write one.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.search_file import Entry, Facts, State, StoredIndex, write_index
from tasks.search_rank import nearest, nearest_plain

TOP = 20
OURS = "ours: float16 product, the best again in float64"
SMALL, LARGE = 2**11, 2**16
"""Rows at a time."""

Found = tuple[Any, Any]


def chunks(convert: Callable[[Tensor], Tensor], size: int) -> Callable[[Sequence[Tensor], Tensor], Found]:
    """Return a search by products of converted chunks and one sort of all scores."""

    def search(blocks: Sequence[Tensor], query: Tensor) -> Found:
        wanted = convert(query)
        scores = torch.cat([convert(part) @ wanted for block in blocks for part in block.split(size)]).float()
        best = scores.topk(min(TOP, len(scores)))
        return best.values.numpy(), best.indices.numpy()

    return search


def by_numpy(blocks: Sequence[Tensor], query: Tensor) -> Found:
    """Convert and multiply in NumPy."""
    wanted = query.numpy()
    parts = [part.numpy().astype(np.float32) @ wanted for block in blocks for part in block.split(SMALL)]
    scores = np.concatenate(parts)
    rows = np.argpartition(-scores, TOP)[:TOP]
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return scores[rows], rows


SIDES: dict[str, Callable[[Sequence[Tensor], Tensor], Found]] = {
    OURS: lambda blocks, query: nearest(blocks, query, TOP),
    "torch, float16 product alone": chunks(Tensor.half, LARGE),
    "torch, chunks to float32": chunks(Tensor.float, SMALL),
    "torch, chunks to bfloat16": chunks(Tensor.bfloat16, LARGE),
    "numpy, chunks to float32": by_numpy,
    "float64, all of it (the slow twin)": lambda blocks, query: nearest_plain(blocks, query, TOP),
}


def measure(count: int, dim: int, threads: Sequence[int], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row per side and number of threads, and what opening and writing take in seconds."""
    facts = Facts(fingerprint="random", modality="image", folder="/", split=None, dim=dim)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.cat([units(len(part), dim, generator) for part in torch.arange(count).split(LARGE)])
    fresh = {f"/{i:08d}.jpg": Entry(State(i, i), vector) for i, vector in enumerate(vectors.numpy())}
    file = folder / f"{count}.arrow"
    began = time.perf_counter()
    write_index(file, facts, None, fresh, fresh)
    written = time.perf_counter() - began
    del vectors, fresh
    began = time.perf_counter()
    stored = StoredIndex(file)
    blocks = stored.blocks
    opened = time.perf_counter() - began
    queries = units(repeats, dim, generator).float()
    rows = []
    for number in threads:
        torch.set_num_threads(number)
        truth = [SIDES[list(SIDES)[-1]](blocks, query) for query in queries]  # warms the page cache too
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        right = dict.fromkeys(SIDES, 0)
        for query, (_, best) in zip(queries, truth, strict=True):
            for name, side in SIDES.items():
                began = time.perf_counter()
                _, found = side(blocks, query)
                times[name].append(time.perf_counter() - began)
                right[name] += bool(np.array_equal(found, best))
        for name, values in times.items():
            rows.append(
                {"vectors": count, "threads": number, "side": name, "ms": 1e3 * statistics.median(values),
                 "right": right[name], "queries": repeats, "open_s": opened, "write_s": written}
            )  # fmt: skip
        assert right[OURS] == repeats, "ours is wrong"
    file.unlink()
    return rows


def units(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return random vectors of length 1, float16."""
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1).half()


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [
        f"{result['cpu']}, torch {result['torch']}, {result['dim']} values per vector, the best {TOP}\n",
        "| vectors | threads | side | median | right |",
        "|--:|--:|---|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['vectors']:,} | {row['threads']} | {row['side']} | {row['ms']:.0f} ms | "
            f"{row['right']} of {row['queries']} |"
        )
    for count in dict.fromkeys(row["vectors"] for row in result["rows"]):
        row = next(row for row in result["rows"] if row["vectors"] == count)
        lines.append(f"\n{count:,} vectors are written in {row['write_s']:.1f} s and opened in {row['open_s']:.3f} s.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="exact search among float16 vectors, against the plain ways")
    parser.add_argument("--vectors", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for count in options.vectors
            for row in measure(count, options.dim, options.threads, options.repeats, Path(folder))
        ]
    cpu = torch.backends.cpu.get_cpu_capability()
    result = {"cpu": cpu, "torch": torch.__version__, "dim": options.dim, "rows": rows}
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
