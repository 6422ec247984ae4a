"""Reading clips of 16 frames, every fourth of the source, per core: PyAV against decord; and what memory they take.

``python benchmarks/video_pipeline.py`` prints milliseconds of CPU time per clip, opening and checking included, on one
thread, the sides taking turns; the memory of 1 to 8 forked workers that have each read clips, imported before the fork
or in the worker; and how a worker's memory grows over 2,000 clips. The videos are made here: a camera moving over
overlapping discs with a grain, 10 seconds at 25 frames per second, H.264 with B-frames and up to 250 frames per group.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from image_pipeline import leaves

from modalities.video_read import open_video
from modalities.video_sampling import dense

SOURCES = ((240, 426), (720, 1280))
EACH = 2
"""Videos of a size."""
TARGET = (256, 340)
DECODERS = ("pyav", "decord")


def videos(folder: Path, frames: int = 250) -> dict[str, list[str]]:
    """Write the files and return their paths by height."""
    import av  # in a process of its own: see main

    made: dict[str, list[str]] = {}
    for height, width in SOURCES:
        for i in range(EACH):
            path = folder / f"{height}-{i}.mp4"
            wide = np.asarray(leaves(height + 64, width + 2 * frames, i))
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=25, options={"crf": "23", "preset": "medium"})
                stream.height, stream.width, stream.pix_fmt = height, width - width % 2, "yuv420p"
                for t in range(frames):
                    top = round(32 + 30 * np.sin(t / 20))
                    view = wide[top : top + height, 2 * t : 2 * t + stream.width]
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(view))))
                container.mux(stream.encode())
            made.setdefault(f"{height}p", []).append(str(path))
    return made


def clip(path: str, decoder: str, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read one clip as training does."""
    with open_video(path, decoder=decoder) as reader:
        places = dense(reader.frames, reader.fps, 16, 4, None, np.random.default_rng(seed))
        return reader.read(places, TARGET)


def milliseconds(paths: list[str], repeats: int) -> dict[str, float]:
    """Return the median CPU time of a clip by decoder, the two taking turns."""
    times: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
    for i in range(-1, repeats):
        for decoder in DECODERS:
            began = time.process_time()
            clip(paths[i % len(paths)], decoder, i + 1)
            if i >= 0:  # the first round loads the decoder
                times[decoder].append(1e3 * (time.process_time() - began))
    return {decoder: median(values) for decoder, values in times.items()}


def mebibytes(field: str) -> float:
    """Return this process's "Rss", or its "Pss": what is shared counts as one part for each who shares it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def forked(work: Callable[[], None], workers: int, before: Callable[[], None]) -> float:
    """Return the MiB (Pss) of a parent and its workers together, when all of them have done their work."""
    # Everybody says when the work is done, waits for all others, measures, and waits again until all have measured.
    said, measure, leave = os.pipe(), os.pipe(), os.pipe()

    def report() -> None:
        os.write(said[1], f"{0:9.3f}".encode())
        os.read(measure[0], 1)
        os.write(said[1], f"{mebibytes('Pss'):9.3f}".encode())
        os.read(leave[0], 1)

    parent = os.fork()
    if parent == 0:  # a process of its own: nothing that is imported here stays with the benchmark
        before()
        for _ in range(workers):
            if os.fork() == 0:
                work()
                report()
                os._exit(0)
        report()
        os._exit(0)
    with os.fdopen(said[0], "rb") as heard:
        heard.read(9 * (workers + 1))
        os.write(measure[1], b"." * (workers + 1))
        total = sum(float(heard.read(9)) for _ in range(workers + 1))
    os.write(leave[1], b"." * (workers + 1))
    os.waitpid(parent, 0)
    for end in (said[1], *measure, *leave):
        os.close(end)
    return total


def memory(paths: list[str], counts: list[int]) -> dict[str, dict[int, float]]:
    """Return the MiB of parent and workers by where the decoder is imported, and by workers."""

    def read(decoder: str) -> None:
        for i in range(4):
            clip(paths[i % len(paths)], decoder, i)

    table: dict[str, dict[int, float]] = {"none": {n: forked(lambda: None, n, lambda: None) for n in counts}}
    for decoder, module in zip(DECODERS, ("modalities.video_stream", "decord"), strict=True):
        for where, before in (("before the fork", lambda m=module: __import__(m)), ("in the worker", lambda: None)):
            table[f"{decoder}, {where}"] = {n: forked(lambda d=decoder: read(d), n, before) for n in counts}
    return table


def growth(paths: list[str], decoder: str, clips: int) -> dict[int, float]:
    """Return the MiB (Rss) of a fresh process after so many clips."""
    inlet, outlet = os.pipe()
    if os.fork() == 0:
        seen = {}
        for i in range(clips):
            clip(paths[i % len(paths)], decoder, i)
            if i + 1 in (clips // 20, clips // 4, clips // 2, clips):
                seen[i + 1] = mebibytes("Rss")
        os.write(outlet, json.dumps(seen).encode())
        os._exit(0)
    os.close(outlet)
    with os.fdopen(inlet) as stream:
        seen = json.loads(stream.read())
    os.wait()
    return {int(count): value for count, value in seen.items()}


def main() -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="clips per decoder and size")
    parser.add_argument("--clips", type=int, default=2000, help="over which memory may grow")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1) as maker:
            made = maker.submit(videos, Path(folder)).result()
        # Memory first: what this process has not imported its children have not either.
        held = memory(made["240p"], options.workers)
        grown = {decoder: growth(made["240p"], decoder, options.clips) for decoder in DECODERS}
        times = {size: milliseconds(paths, options.repeats) for size, paths in made.items()}
    if options.json:
        print(json.dumps({"milliseconds": times, "mebibytes": held, "growth": grown}))
        return
    print("| source | decoder | CPU time per clip | clips/s per core |\n|---|---|--:|--:|")
    for size, row in times.items():
        for decoder, value in row.items():
            print(f"| {size} | {decoder} | {value:.1f} ms | {1e3 / value:.1f} |")
    print(f"\n| decoder, imported | {' | '.join(f'{n} workers' for n in options.workers)} |")
    print(f"|---|{'--:|' * len(options.workers)}")
    for name, figures in held.items():
        print(f"| {name} | {' | '.join(f'{value:.0f} MiB' for value in figures.values())} |")
    print(
        f"\n| decoder | {' | '.join(f'after {n} clips' for n in grown['pyav'])} |\n|---|{'--:|' * len(grown['pyav'])}"
    )
    for decoder, seen in grown.items():
        print(f"| {decoder} | {' | '.join(f'{value:.0f} MiB' for value in seen.values())} |")


if __name__ == "__main__":
    main()
