"""One training step of CLIP ViT-B/32 (`clip-b32`): ours against open_clip's; and ours with gradient caching.

``pip install --no-deps --target DIR open_clip_torch ftfy wcwidth``, and then ``PYTHONPATH=DIR python
benchmarks/clip_step.py [--batch-size 16] [--threads N] [--cached 256 --chunk 32] [--cuda]``. Both models have the same
weights and batches, and take turns in one process, so that a busy machine slows both alike. A step is forward, backward
and AdamW: ours fused, as our engine has it, theirs torch's default, as their training has it. fp32 on a CPU, bf16
autocast with ``--cuda``.

Before anything is timed, unit vectors and losses must agree to 1e-4. What differs: in the pictures' tower, norms of
ours have an epsilon of 1e-6, theirs of 1e-5, which ours is given here (or new weights, whose tokens hardly vary, differ
by 1.5e-4). Ours has a bias in the patch projection, set to zero, and no position of the class token, where it is added
to the token itself. Both have GELU, where CLIP's own code has an approximation of it.

``--cached N``: a step on N pairs at once, and with ``objective.chunk``, each in a process of its own. Memory is the
most that the process had during the step, less what it had before, with AdamW's moments: gradients and activations.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clip_loss import status
from torch import Tensor, nn

from mmssl.contracts import Batch
from mmssl.objectives.clip import CLIP
from tasks.build import Recipe, build_objective, load_recipe

OURS, THEIRS = "ours", "open_clip"
RENAMES = {
    "visual.conv1": "towers.image._tokenizer.proj",
    "visual.class_embedding": "towers.image.cls_token",
    "visual.positional_embedding": "towers.image._tokenizer.positions.table",
    "visual.ln_pre": "towers.image.backbone.pre_norm",
    "visual.ln_post": "towers.image.backbone.norm",
    "visual.transformer.resblocks": "towers.image.backbone.blocks",
    "visual.proj": "projections.image.weight",
    "text_projection": "projections.text.weight",
    "token_embedding": "towers.text._tokenizer.words",
    "ln_final": "towers.text.backbone.norm",
    "transformer.resblocks": "towers.text.backbone.blocks",
    "positional_embedding": "towers.text._tokenizer.positions.table",
    "logit_scale": "temperature.log_scale",
    ".ln_1": ".norm1",
    ".ln_2": ".norm2",
    ".mlp.c_fc": ".mlp.fc1",
    ".mlp.c_proj": ".mlp.fc2",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj": ".attn.proj",
}
TOLERANCE, EPSILON = 1e-4, 1e-5
LENGTHS = 5, 30
"""Least and most tokens of a text, as captions have."""


def translate(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's weights under our names and in our layout."""
    ours = {}
    for name, tensor in theirs.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        # The text tower's attention has no module of its own.
        ours[name.replace(".attn", "") if "towers.text" in name else name] = tensor.detach()
    table = ours.pop("towers.image._tokenizer.positions.table")
    ours["towers.image.cls_token"] = ours["towers.image.cls_token"] + table[0]
    ours["towers.image._tokenizer.positions.table"] = table[1:]
    proj = "towers.image._tokenizer.proj"
    ours[f"{proj}.weight"] = ours[f"{proj}.weight"].permute(0, 2, 3, 1).flatten(1)
    ours[f"{proj}.bias"] = torch.zeros(len(ours[f"{proj}.weight"]))
    for name in ("image", "text"):
        ours[f"projections.{name}.weight"] = ours[f"projections.{name}.weight"].T
    ours["temperature.log_scale"] = ours["temperature.log_scale"].reshape(-1)
    return ours


def make_recipe(chunk: int | None = None) -> Recipe:
    """Return the recipe with a vocabulary of bytes, in a table of CLIP's size."""
    recipe = load_recipe("clip-b32", {"objective.chunk": chunk})
    tokenizer = recipe.encoders["text"].model.tokenizer
    return recipe.with_tokenizer("text", tokenizer.model_copy(update={"merges": ""}))


def make_ours(chunk: int | None = None) -> CLIP:
    """Return our model."""
    objective = build_objective(make_recipe(chunk))
    assert isinstance(objective, CLIP)
    return objective


def make_batch(size: int, device: str) -> Batch:
    """Return pictures of noise and texts of random tokens: what is in them does not change the time."""
    lengths = torch.randint(*LENGTHS, (size,))
    tokens = torch.randint(1, 49000, (size, 77))
    place = torch.arange(77)
    tokens[place.expand(size, -1) == lengths[:, None]] = 49407  # the end of the text, the highest number that there is
    tokens[place.expand(size, -1) > lengths[:, None]] = -1
    batch = {
        "image.signal": torch.randn(size, 3, 224, 224),
        "text.signal": (tokens + 1).unsqueeze(1).float(),
        "seed": torch.arange(size),
        "index": torch.arange(size),
    }
    return {key: value.to(device) for key, value in batch.items()}


class Side(NamedTuple):
    """One side of the comparison."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    vectors: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Unit vectors of pictures and texts, float [B, d], to be compared."""


def make_sides(batch: Batch, device: str) -> dict[str, Side]:
    """Return both sides with the same weights."""
    import open_clip  # type: ignore[import-not-found]

    theirs = open_clip.create_model("ViT-B-32").train()
    ours = make_ours().train()
    ours.load_state_dict(translate(dict(theirs.named_parameters())))
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = EPSILON
    ours.to(device)
    theirs.to(device)
    pictures, texts = batch["image.signal"], (batch["text.signal"][:, 0].long() - 1).clamp(min=0)
    loss = open_clip.ClipLoss()
    rate = 1e-5
    return {
        OURS: Side(
            lambda: ours(batch).loss,
            torch.optim.AdamW(ours.parameters(), lr=rate, fused=True),
            lambda: (ours.features("image", batch), ours.features("text", batch)),
        ),
        THEIRS: Side(
            lambda: loss(*theirs(pictures, texts)),
            torch.optim.AdamW(theirs.parameters(), lr=rate),
            lambda: theirs(pictures, texts)[:2],
        ),
    }


@torch.no_grad()
def check(sides: Mapping[str, Side]) -> dict[str, float]:
    """Return the losses and the greatest difference of unit vectors; raises RuntimeError above the tolerance."""
    mine, other = (torch.cat(side.vectors()) for side in sides.values() if side.vectors is not None)
    found = {"vectors": float((mine - other).abs().max()), **{name: float(side.loss()) for name, side in sides.items()}}
    if max(found["vectors"], abs(found[OURS] - found[THEIRS])) > TOLERANCE:
        raise RuntimeError(f"not the same computation: {found}")
    return found


def timed_step(side: Side, device: str) -> tuple[float, float]:
    """Do one step; return the seconds of forward and backward, and of the optimiser."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = side.loss()
    loss.backward()
    middle = now()
    side.optimizer.step()
    side.optimizer.zero_grad()
    return middle - start, now() - middle


def race(sides: Mapping[str, Side], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Return the median seconds of each side, which take turns; two steps are for warming up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(2 + repeats):
        for name, side in sides.items():
            one = timed_step(side, device)
            if repeat >= 2:
                times[name].append(one)
    parts = ("forward_backward", "optimizer", "step")
    return {
        name: {
            part: statistics.median(values)
            for part, values in zip(parts, (*zip(*found, strict=True), map(sum, found)), strict=True)
        }
        for name, found in times.items()
    }


def cached_here(size: int, chunk: int | None, device: str) -> dict[str, float]:
    """Return seconds and bytes of a step on ``size`` pairs in this process, which has done a step on two before."""
    torch.manual_seed(0)
    ours, batches = make_ours(chunk).to(device), [make_batch(count, device) for count in (2, size)]
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-5, fused=True)
    warm, side = (Side(lambda batch=batch: ours(batch).loss, optimizer) for batch in batches)  # type: ignore[misc]
    timed_step(warm, device)
    if device == "cuda":
        timed_step(side, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(sum(timed_step(side, device)) for _ in range(5))
        return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size so far
    before = status("VmRSS")
    seconds = sum(timed_step(side, device))
    return {"seconds": seconds, "bytes": status("VmHWM") - before}


def cached(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what a step takes plainly and with gradient caching, each in a process of its own."""
    found = {}
    for name, chunk in (("plain", 0), (f"chunks of {options.chunk}", options.chunk)):
        command = [sys.executable, __file__, "--child", "--cached", str(options.cached), "--chunk", str(chunk)]
        command += ["--threads", str(options.threads), *(["--cuda"] if options.cuda else [])]
        found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"{result['machine']}, torch {result['torch']}, {result['precision']}"]
    if "step" in result:
        rows, same = result["step"], result["same"]
        lines += [
            f"same weights: loss {same[OURS]:.6f}, open_clip {same[THEIRS]:.6f}; unit vectors differ by at most "
            f"{same['vectors']:.1e}\n",
            f"| batch {result['batch_size']} | forward + backward | AdamW | step | ours is faster by |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, row in rows.items():
            cells = " | ".join(f"{row[part]:.3f} s" for part in ("forward_backward", "optimizer", "step"))
            lines.append(f"| {name} | {cells} | {row['step'] / rows[OURS]['step']:.2f} x |")
    if "cached" in result:
        lines += [f"\n| batch {result['pairs']} | step | of the plain one | memory | of the plain one |"]
        lines += ["|---|--:|--:|--:|--:|"]
        for name, row in result["cached"].items():
            parts = [f"{row[key] / result['cached']['plain'][key]:.2f}" for key in ("seconds", "bytes")]
            size = f"{row['bytes'] / 1e9:.2f} GB"
            lines.append(f"| {name} | {row['seconds']:.2f} s | {parts[0]} | {size} | {parts[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs of a step; 0 leaves the comparison out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cached", type=int, default=256, help="pairs of a step with gradient caching; 0 for none")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--cuda", action="store_true", help="on a GPU, in bf16")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.cuda else "cpu"
    if options.child:
        print(json.dumps(cached_here(options.cached, options.chunk or None, device)))
        return
    words = torch.cuda.get_device_name() if options.cuda else f"{options.threads} threads"
    result: dict[str, Any] = {
        "machine": f"{words}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "precision": "bf16 autocast" if options.cuda else "fp32",
        "batch_size": options.batch_size,
        "pairs": options.cached,
    }
    if options.batch_size:
        torch.manual_seed(0)
        sides = make_sides(make_batch(options.batch_size, device), device)
        result |= {"same": check(sides), "step": race(sides, options.repeats, device)}
        del sides
    if options.cached:
        result["cached"] = cached(options)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
