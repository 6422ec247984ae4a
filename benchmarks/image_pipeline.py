"""Training crops of picture files per core: torchvision's v1 transforms on Pillow pictures against ours, step by step.

``python benchmarks/image_pipeline.py`` prints milliseconds of CPU time per picture, one thread, the sides taking turns;
what looking up the bucket of a file costs; and pictures per second of wall-clock time through the loader, by workers.
The pictures are made here: overlapping discs of all sizes with a grain, as JPEG files of quality 90 in the sizes of
ImageNet, of screens and of cameras, and as small palette PNG files.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw
from torchvision import transforms
from torchvision.transforms import functional

from mmssl.data.dataset import Bucket, Plan, Samples, Stream, loader
from mmssl.distributed import World
from modalities import image_views
from modalities.image import Image
from modalities.image_settings import ImageSignal

JPEGS = ((375, 500), (480, 640), (768, 1024), (3000, 4000))
EACH = 4
"""Pictures of a kind."""
SIZE = (224, 224)
BICUBIC = PIL.Image.Resampling.BICUBIC
BOTH_SIDES = ImageSignal(draft=False)
SIDES = ("torchvision v1", "Pillow alone", "+ bytes bicubic", "+ torchvision's decoder", "+ draft = ours")

Side = Callable[[str, int], torch.Tensor]


def leaves(height: int, width: int, seed: int) -> PIL.Image.Image:
    """Draw discs whose radii follow r ** -3, which gives edges and spectrum of natural pictures, and a grain."""
    rng = np.random.default_rng(seed)
    image = PIL.Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(6000):
        r = height / 100 / np.sqrt(rng.uniform(1e-3, 1))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(20, 235, 3)))
    grain = rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    return PIL.Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def pictures(folder: Path) -> dict[str, list[str]]:
    """Write the files and return their paths by kind."""
    made: dict[str, list[str]] = {}
    for height, width in JPEGS:
        paths = [folder / f"{width}-{i}.jpg" for i in range(EACH)]
        for i, path in enumerate(paths):
            leaves(height, width, i).save(path, quality=90)
        made[f"JPEG {width} x {height}"] = [str(path) for path in paths]
    paths = [folder / f"{i}.png" for i in range(EACH)]
    for i, path in enumerate(paths):
        leaves(64, 64, i).quantize(64).save(path)
    made["palette PNG 64 x 64"] = [str(path) for path in paths]
    return made


def reference() -> Side:
    """Return torchvision's v1 transforms with its own draws."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(BOTH_SIDES.mean, BOTH_SIDES.std),
        ]
    )
    return lambda path, seed: transform(PIL.Image.open(path).convert("RGB"))


def ours(signal: ImageSignal, *replaced: tuple[str, object]) -> Side:
    """Return our views with functions of their module replaced by slower ones."""
    views = Image().views(signal)

    def run(path: str, seed: int) -> torch.Tensor:
        with ExitStack() as stack:
            for name, function in replaced:
                stack.enter_context(patch.object(image_views, name, function))
            return views(path, [np.random.default_rng(seed)], SIZE)[0]

    return run


def refuse(*_: object) -> None:
    """Stand for a torchvision without a decoder: Pillow's is taken."""
    raise RuntimeError


def pillow(picture: PIL.Image.Image, box: tuple[float, ...], size: tuple[int, int]) -> torch.Tensor:
    """Stand for ``resampled``."""
    part = picture.crop(tuple(map(int, box))).resize(size[::-1], BICUBIC)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def sides() -> dict[str, Side]:
    """Return what is compared, each with one trick more than the one before."""
    steps = (
        reference(),
        ours(BOTH_SIDES, ("decode_jpeg", refuse), ("resampled", pillow)),
        ours(BOTH_SIDES, ("decode_jpeg", refuse)),
        ours(BOTH_SIDES),
        ours(ImageSignal()),
    )
    return dict(zip(SIDES, steps, strict=True))


def check(path: str) -> None:
    """Compare our crops with Pillow's of the same boxes; exits where they differ by more than rounding."""
    raw = ImageSignal(mean=(0, 0, 0), std=(1, 1, 1), draft=False, flip=False)
    image = PIL.Image.open(path).convert("RGB")
    for seed in range(10):
        x = Image().views(raw)(path, [np.random.default_rng(seed)], SIZE)[0]["signal"]
        part = image.crop(image_views.crop_box(image.height, image.width, raw, np.random.default_rng(seed)))
        # Rows first, as Pillow before 13 always did: later ones choose by the shape, and both passes round and clip.
        theirs = part.resize((SIZE[1], part.height), BICUBIC).resize(SIZE[::-1], BICUBIC)
        wrong = (functional.to_tensor(theirs) - x).abs() * 255
        if wrong.mean() > 0.02 or wrong.max() > 2.01:
            raise SystemExit(f"the sides differ: {wrong.mean():.2f} of 255 on average, {wrong.max():.0f} at most")


def milliseconds(paths: list[str], repeats: int) -> dict[str, float]:
    """Return the median CPU time of every side on these files, the sides taking turns."""
    compared = sides()
    times: dict[str, list[float]] = {name: [] for name in compared}
    for i in range(-1, repeats):
        for name, side in compared.items():
            began = time.process_time()
            side(paths[i % len(paths)], i + 1)
            if i >= 0:  # the first round warms up
                times[name].append(1e3 * (time.process_time() - began))
    return {name: median(values) for name, values in times.items()}


def throughput(paths: list[str], workers: int, batches: int) -> tuple[float, float]:
    """Return pictures per second of wall-clock time through the loader, its start left out, and CPU ms per picture."""
    bucket = Bucket(SIZE, (14, 14), range(len(paths)))
    samples = Samples(paths, Image().views(ImageSignal()), [bucket], None, seed=0, timeout=60)
    micro = 16
    # What is under way when the clock starts was prefetched; so many batches more are timed.
    ahead = 4 * max(workers, 1)
    plan = Plan([Stream(bucket.members, 0)], micro, 1, World(), 0, ahead + batches)
    spent = cpu_seconds()
    for i, _ in enumerate(loader(samples, plan, workers, pin=False)):
        if i == ahead - 1:
            began = time.perf_counter()
    rate = micro * batches / (time.perf_counter() - began)
    return rate, 1e3 * (cpu_seconds() - spent) / (micro * (ahead + batches))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in both)


def lookup(paths: list[str], repeats: int) -> float:
    """Return the microseconds of CPU time that one file's bucket takes."""
    signal, kind = ImageSignal(buckets=((192, 256), (256, 192))), Image()
    times = []
    for i in range(repeats):
        began = time.process_time()
        kind.bucket(paths[i % len(paths)], signal)
        times.append(1e6 * (time.process_time() - began))
    return median(times)


def main() -> None:
    """Print the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60, help="pictures per side and kind; a tenth for cameras'")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = pictures(Path(folder))
        check(made["JPEG 500 x 375"][0])
        kib = {kind: median(Path(path).stat().st_size for path in paths) / 1024 for kind, paths in made.items()}
        few = {kind: max(6, options.repeats // 10) if "4000" in kind else options.repeats for kind in made}
        times = {kind: milliseconds(paths, few[kind]) for kind, paths in made.items()}
        buckets = {kind: lookup(paths, 200) for kind, paths in made.items()}
        rounds = [{w: throughput(made["JPEG 500 x 375"], w, 24) for w in (0, 1, 2)} for _ in range(5)]
    workers = {w: [median(values) for values in zip(*(each[w] for each in rounds), strict=True)] for w in rounds[0]}
    if options.json:
        print(json.dumps({"kib": kib, "milliseconds": times, "bucket_microseconds": buckets, "workers": workers}))
        return
    print(f"| file | KiB | {' | '.join(SIDES)} | ours is faster by | bucket |\n|---|--:{'|--:' * 7}|")
    for kind, row in times.items():
        cells = [f"{value:.2f} ms" for value in row.values()]
        faster = row[SIDES[0]] / row[SIDES[-1]]
        print(f"| {kind} | {kib[kind]:.0f} | {' | '.join(cells)} | {faster:.2f} x | {buckets[kind]:.0f} µs |")
    print("\n| data workers | pictures/s (JPEG 500 x 375) | CPU time per picture |\n|--:|--:|--:|")
    for w, (rate, spent) in workers.items():
        print(f"| {w} | {rate:.0f} | {spent:.2f} ms |")


if __name__ == "__main__":
    main()
