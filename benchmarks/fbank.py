"""Log-mel filterbanks on one core: ours on batches against torchaudio's Kaldi filterbank clip by clip.

``python benchmarks/fbank.py`` prints milliseconds of CPU time per clip, the sides taking turns, medians; and how far
each side is from Kaldi's fp32 values and from the exact (float64) ones. Two other ways are measured beside ours: the
same steps on all frames at once, and one matrix product from frames to spectra.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from modalities import fbank
from modalities.fbank import FLOOR, PREEMPHASIS, LogMel, log_mel_reference

RATE = 16000
BATCHES = ((8, 10.0), (32, 2.0))
"""Clips and their seconds."""
KALDI, OURS, AT_ONCE, MATRIX = "torchaudio's Kaldi, clip by clip", "ours", "ours, all frames at once", "one matrix"

Side = Callable[[Tensor], Tensor]


def clip_by_clip(waveform: Tensor) -> Tensor:
    """Return what Kaldi's filterbank makes of waveforms [B, samples]: [B, mels, frames]."""
    settings = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "dither": 0.0}
    return torch.stack([kaldi.fbank(clip[None], num_mel_bins=128, **settings).T for clip in waveform])


def all_at_once(log_mel: LogMel) -> Side:
    """Return ours without the slices that fit the cache."""

    def side(waveform: Tensor) -> Tensor:
        with patch.object(fbank, "AT_ONCE", 2**40):
            return log_mel(waveform)

    return side


def one_matrix(log_mel: LogMel) -> Side:
    """Return a side that folds mean, pre-emphasis, window and DFT, in float64, into one fp32 matrix."""
    window = log_mel.window
    time_axis = torch.arange(window, dtype=torch.float64)
    centre = torch.eye(window, dtype=torch.float64) - 1 / window
    emphasise = torch.eye(window, dtype=torch.float64) - PREEMPHASIS * torch.eye(window, dtype=torch.float64).roll(1, 0)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * time_axis / (window - 1))
    angle = (
        2 * math.pi / log_mel.fft * torch.outer(torch.arange(log_mel.fft, dtype=torch.float64)[log_mel.bins], time_axis)
    )
    matrix = ((torch.cat((angle.cos(), angle.sin())) * hann) @ emphasise @ centre).T.float().contiguous()
    bins = len(angle)

    def side(waveform: Tensor) -> Tensor:
        frames = waveform.unfold(1, window, log_mel.hop)
        out = frames.new_empty(len(frames), log_mel.mels, frames.shape[1])
        size = max(1, fbank.AT_ONCE // len(frames))
        for some, place in zip(frames.split(size, dim=1), out.split(size, dim=2), strict=True):
            squares = (some @ matrix).square_()
            power = squares[..., :bins] + squares[..., bins:]
            place.copy_((power @ log_mel.filters).clamp_(min=FLOOR).log_().transpose(1, 2))
        return out

    return side


def measure(clips: int, seconds: float, repeats: int) -> dict[str, dict[str, float]]:
    """Return milliseconds per clip and the largest differences by side; raises AssertionError where ours is wrong."""
    log_mel = LogMel(RATE)
    sides: dict[str, Side] = {
        KALDI: clip_by_clip, OURS: log_mel, AT_ONCE: all_at_once(log_mel), MATRIX: one_matrix(log_mel)
    }  # fmt: skip
    waveform = 0.1 * torch.randn(clips, int(seconds * RATE), generator=torch.Generator().manual_seed(0))
    # The twin is slow: one clip shows how far off fp32 is.
    theirs, exact = clip_by_clip(waveform), log_mel_reference(waveform[:1].double(), log_mel)
    rows: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        out = side(waveform)
        rows[name] = {
            "from_kaldi": (out - theirs).abs().max().item(),
            "from_exact": (out[:1] - exact).abs().max().item(),
        }
    assert rows[OURS]["from_kaldi"] < 1e-5, f"ours is {rows[OURS]['from_kaldi']:.1e} away from Kaldi's"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.process_time()
            side(waveform)
            times[name].append(1e3 * (time.process_time() - began) / clips)
    for name, values in times.items():
        rows[name]["ms"] = median(values)
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [
        f"one thread, {result['cpu']}, torch {result['torch']}; 128 mel bins, 25 / 10 ms, {RATE} Hz, white noise\n",
        "| clips | side | per clip | faster than Kaldi's by | furthest from Kaldi's | furthest from float64 |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for batch, rows in result["batches"].items():
        for name, row in rows.items():
            away = " | ".join(f"{row[key]:.1e}" for key in ("from_kaldi", "from_exact"))
            lines.append(f"| {batch} | {name} | {row['ms']:.2f} ms | {rows[KALDI]['ms'] / row['ms']:.2f} x | {away} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="log-mel filterbanks: ours against torchaudio's Kaldi, one core")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    batches = {f"{clips} of {seconds:g} s": measure(clips, seconds, options.repeats) for clips, seconds in BATCHES}
    result = {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "batches": batches}
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
