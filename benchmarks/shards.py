"""Loose files against the same files in shards and in a parquet table: how many a data worker reads in a second.

``python benchmarks/shards.py PATH`` packs the pictures under PATH into a temporary folder and reads all three in
random order, in turns, on one thread: the bytes alone, and decoded into training crops of 32 pixels. The pages are
warm, as the copies were just written: what is measured is the way through the system, not the disk. Of the table,
samples are drawn from as many row groups at a time as ``data.window: auto`` takes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmssl.data.blocks import blocks_of
from mmssl.data.dataset import Stream
from mmssl.data.guard import guarded
from mmssl.data.listing import list_files
from modalities.encoder import MODALITIES
from modalities.image_settings import ImageSignal
from tasks.data_pack import pack

SIZE = (32, 32)
ROWS = 500
"""Rows of a row group."""


def sources(path: Path, folder: Path, most: int) -> dict[str, list[str]]:
    """Return the first ``most`` pictures as loose files, members of shards and cells of a table."""
    kind = MODALITIES["image"]
    loose = list_files(path, kind).paths[:most]
    (folder / "in").mkdir()
    rows = "".join(f'{{"path": "{name}"}}\n' for name in loose)
    (folder / "in" / "manifest.jsonl").write_text(rows, encoding="utf-8")
    pack(folder / "in", folder / "shards")
    table = pa.table({"image": pa.array([Path(name).read_bytes() for name in loose])})
    pq.write_table(table, folder / "x.parquet", row_group_size=ROWS, compression="none")
    inside = {
        name: list_files(folder / place, kind).paths for name, place in (("shards", "shards"), ("table", "x.parquet"))
    }
    return {"loose files": loose, **inside}


def rate(paths: list[str], read: Callable[[str], Any]) -> float:
    """Return files per second, in the order of an epoch."""
    stream = Stream(range(len(paths)), seed=0, blocks=blocks_of(paths, "auto"))
    began = time.perf_counter()
    for i in range(len(paths)):
        guarded(read, paths[stream[i].sample], 30)
    return len(paths) / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    views = MODALITIES["image"].views(ImageSignal(size=SIZE))
    readers = {
        "bytes": lambda path: Path(path).read_bytes(),
        "crops": lambda path: views(path, [np.random.default_rng(0)], SIZE),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = sources(arguments.path, Path(folder), arguments.files)
        count = len(found["loose files"])
        size = sum(Path(path).stat().st_size for path in found["loose files"]) / count
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for what, read in readers.items():
                for name, paths in found.items():
                    rates.setdefault((name, what), []).append(rate(paths, read))
    print(
        f"{count} pictures of {size / 1000:.1f} kB, files per second, "
        f"median of {arguments.rounds} rounds (least to greatest)\n"
    )
    print("| | " + " | ".join(readers) + " |\n|" + "---|" * (1 + len(readers)))
    for name in found:
        cells = (rates[name, what] for what in readers)
        print(f"| {name} | " + " | ".join(f"{median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in cells) + " |")


if __name__ == "__main__":
    main()
