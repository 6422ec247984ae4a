"""Scaled-dot-product attention against plain products on this CPU, forward and backward, in turns; medians.

What ``mmssl.backbones.blocks.choose_kernel`` rests on: ``python benchmarks/attention.py``.
"""

import time
from statistics import median
from typing import Literal

import torch

from mmssl.backbones.blocks import attend, attention_kernel

SHAPES = ((256, 4, 5, 32), (256, 4, 17, 32), (64, 6, 33, 64), (64, 12, 50, 64), (32, 12, 100, 64), (8, 16, 197, 32))
KERNELS: tuple[Literal["sdpa", "naive"], ...] = ("sdpa", "naive")
REPEATS = 9


def milliseconds(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Time both kernels on q, k, v of [samples, heads, tokens, channels]."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    times: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for _ in range(REPEATS):
        for kernel in KERNELS:
            with attention_kernel(kernel):
                began = time.perf_counter()
                attend(q, k, v).sum().backward()
                times[kernel].append(1e3 * (time.perf_counter() - began))
    return {kernel: median(values) for kernel, values in times.items()}


def main() -> None:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads, AMX {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}\n")
    print(
        "| dtype | samples | heads | tokens | channels | sdpa | plain | sdpa is faster by |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            time_of = milliseconds(shape, dtype)
            cells = [str(dtype).removeprefix("torch."), *map(str, shape), *(f"{time_of[k]:.1f} ms" for k in KERNELS)]
            print(f"| {' | '.join(cells)} | {time_of['naive'] / time_of['sdpa']:.2f} x |")


if __name__ == "__main__":
    main()
