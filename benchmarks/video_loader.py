"""Training clips from 240p and 720p videos, and from what ``mmssl data shrink`` makes of 720p: how fast, and who waits.

``python benchmarks/video_loader.py`` prints clips per second of the data workers alone (16 frames, every fourth, crops
of 224 pixels, one clip per opened file), by their number, and the share of a step that training waits for them: the
share in ``metrics.jsonl`` of short runs with one worker, of a laptop's model and of ViT-S/16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from video_pipeline import videos

from mmssl.data.dataset import Bucket, Plan, Samples, Stream, loader
from mmssl.distributed import World
from modalities.video import Video, VideoSignal

SIZE = (16, 224, 224)
RUNS = {
    "video-mae-tiny": ["train.batch_size=16", "data.repeats=1", "train.steps=24"],
    "video-mae-s16": ["train.batch_size=4", "data.repeats=1", "train.steps=6"],
}


def sources(folder: Path) -> dict[str, list[str]]:
    """Write the videos, and small copies of the large ones."""
    with ProcessPoolExecutor(1) as maker:
        made = maker.submit(videos, folder).result()
    large = folder / "720p"
    large.mkdir()
    for path in made["720p"]:
        Path(path).rename(large / Path(path).name)
    words = ["data", "shrink", str(large), str(folder / "small"), "--short-side", "256"]
    subprocess.run([sys.executable, "-m", "mmssl", *words], check=True, stdout=subprocess.DEVNULL)
    found = {
        name: sorted(map(str, (folder / sub).glob("*.mp4"))) for name, sub in (("720p", "720p"), ("256p", "small"))
    }
    return {"240p": made["240p"], "720p": found["720p"], "720p, shrunk to 256": found["256p"]}


def clips_per_second(paths: list[str], workers: int, batches: int) -> float:
    """Return the rate of so many data workers that nobody disturbs, from the second batch on."""
    bucket = Bucket(SIZE, (8, 14, 14), range(len(paths)))
    samples = Samples(paths, Video().views(VideoSignal()), [bucket], None, seed=0, timeout=60)
    batch = 4
    read = iter(loader(samples, Plan([Stream(bucket.members, 0)], batch, 1, World(), 0, batches), workers, pin=False))
    next(read)
    began = time.perf_counter()
    for _ in read:
        pass
    return batch * (batches - 1) / (time.perf_counter() - began)


def waiting(recipe: str, paths: list[str], folder: Path) -> dict[str, float]:
    """Train for a few steps with one worker; return the share of waiting and the samples per second after the first."""
    manifest = folder / "manifest.csv"
    manifest.write_text("path\n" + "\n".join(paths) + "\n")
    out = folder / "run"
    words = ["pretrain", recipe, "--data", str(manifest), "--out", str(out), "data.workers=1", "train.log_every=1"]
    subprocess.run(
        [sys.executable, "-m", "mmssl", *words, *RUNS[recipe]], check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    later = lines[len(lines) // 2 :]  # what had been read ahead is used up
    mean = {key: sum(line[key] for line in later) / len(later) for key in ("wait", "samples_per_s")}
    return {"wait": mean["wait"], "samples_per_s": mean["samples_per_s"]}


def main() -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, dict[int, float]] = {}
    waits: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for source, paths in sources(Path(name)).items():
            rates[source] = {n: clips_per_second(paths, n, options.batches) for n in options.workers}
            for recipe in RUNS:
                with tempfile.TemporaryDirectory() as run:
                    waits.setdefault(source, {})[recipe] = waiting(recipe, paths, Path(run))
    if options.json:
        print(json.dumps({"clips_per_s": rates, "training": waits}))
        return
    print(f"| source | {' | '.join(f'clips/s, {n} worker' + 's' * (n > 1) for n in options.workers)} |")
    print(f"|---|{'--:|' * len(options.workers)}")
    for source, row in rates.items():
        print(f"| {source} | {' | '.join(f'{value:.1f}' for value in row.values())} |")
    print(
        f"\n| source | {' | '.join(f'{recipe}: waiting | clips/s' for recipe in RUNS)} |\n|---|{'--:|--:|' * len(RUNS)}"
    )
    for source, runs in waits.items():
        cells = (f"{100 * one['wait']:.0f} % | {one['samples_per_s']:.1f}" for one in runs.values())
        print(f"| {source} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
