"""Whether a refactoring left training alone: the losses of a fixed recipe at two revisions, compared bit for bit.

``python benchmarks/same_loss.py 4de6ff7 HEAD``; a revision ``.`` is the working tree as it is. The recipe runs on
pictures that are drawn here, in one thread, with everything stochastic switched on. Exit code 1 if any loss differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "train.steps=60", "train.batch_size=32", "train.log_every=1", "train.ema=0.99", "train.seed=3", "data.workers=1",
    "model.backbone.drop_path=0.1", "optim.clip=1.0",
]  # fmt: skip


def draw_pictures(folder: Path, count: int = 96) -> None:
    """Draw smooth pictures of many sizes; PNG, so that no decoder has a say."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(30, 90, 2)
        rows, columns = np.mgrid[:height, :width] / 40
        waves = [np.sin(2 * np.pi * (rows * a + columns * b + c)) for a, b, c in rng.uniform(0, 2, (3, 3))]
        pixels = (127.5 * (1 + np.stack(waves, -1))).clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@contextmanager
def checkout(revision: str):
    """Yield a folder with a revision's files."""
    if revision == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def losses(revision: str, data: Path, out: Path) -> list[float]:
    """Train at a revision and return the loss of every step."""
    with checkout(revision) as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-c", "import sys; from tasks.cli import main; sys.exit(main(sys.argv[1:]))",
             "pretrain", "image-mae-tiny", "--data", data, "--out", out, *SETTINGS],
            cwd=tree, check=True, capture_output=True, env=environment,
        )  # fmt: skip
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Compare two revisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default=".")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        draw_pictures(data)
        before, after = (
            losses(revision, data, Path(folder) / name) for revision, name in ((asked.before, "a"), (asked.after, "b"))
        )
    same = sum(a == b for a, b in zip(before, after, strict=True))
    print(f"{same} of {len(before)} losses are equal to the last bit; the last is {before[-1]!r} and {after[-1]!r}")
    return int(same != len(before))


if __name__ == "__main__":
    sys.exit(main())
