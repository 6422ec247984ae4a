"""How many threads a tiny model should leave to its data worker: the demo's pre-training, 12,800 pictures a row.

``python benchmarks/demo_threads.py``; the combinations take turns twice, and the better pace of each is printed.
"""

import tempfile
from pathlib import Path

import torch

from mmssl.run import Run
from tasks.demo import unpack
from tasks.demo_image import DEMO, PRETRAINING
from tasks.pretrain import pretrain

PICTURES_SEEN = 12_800
ROWS = ((1, 128), (2, 128), (1, 256), (2, 256))


def pace(data: Path, out: Path, threads: int, batch_size: int) -> float:
    """Return samples per second over the second half of a short run."""
    torch.set_num_threads(threads)
    steps = PICTURES_SEEN // batch_size
    length = {"train.batch_size": batch_size, "train.steps": steps, "train.log_every": steps // 2}
    pretrain("image-mae-tiny", data, out, {**PRETRAINING, **length})
    return float(Run(out).metrics()[-1]["samples_per_s"])


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        unpack(DEMO.archive, data)
        found = {
            row: max(pace(data, Path(folder) / f"{row}-{turn}", *row) for turn in range(2))
            for row in ROWS
        }  # fmt: skip
    print("| threads | batch | samples/s |\n|--:|--:|--:|")
    for (threads, batch_size), value in found.items():
        print(f"| {threads} | {batch_size} | {value:,.0f} |")


if __name__ == "__main__":
    main()
