"""One optimiser step of MAE ViT-B/16 at 224 pixels: ours against transformers' ViTMAEForPreTraining.

Both run in one process with the same weights and masks, taking turns, so that a busy machine slows both alike. A step
is forward, backward and AdamW: ours fused, as our engine has it; theirs torch's default AdamW, and SDPA attention.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl.contracts import Batch
from mmssl.heads.decoder import DecoderConfig
from mmssl.objectives.mae import MAE, MAEConfig
from modalities.encoder import Encoder, EncoderConfig, typed

RENAMES = {
    "vit.embeddings.patch_embeddings.projection": "encoder._tokenizer.proj",
    "vit.embeddings.cls_token": "encoder.cls_token",
    "vit.layers": "encoder.backbone.blocks",
    "vit.layernorm": "encoder.backbone.norm",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.decoder_layers": "decoder.blocks",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.head",
    ".layernorm_before": ".norm1",
    ".layernorm_after": ".norm2",
    ".attention.o_proj": ".attn.proj",
    ".attention.": ".attn.",
}


def translate(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' ViTMAE tensors, weights or their gradients, under our names and in our layout.

    Queries, keys and values are fused; the patch convolution [D, C, p, q] becomes our linear layer over (p, q, C).
    """
    ours = {}
    for name, tensor in theirs.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        ours[name] = tensor
    for name in [name for name in ours if ".q_proj." in name]:
        parts = [ours.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        ours[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    proj = "encoder._tokenizer.proj.weight"
    ours[proj] = ours[proj].permute(0, 2, 3, 1).flatten(1)
    for name in ("encoder.cls_token", "decoder.mask_token"):
        ours[name] = ours[name].flatten()
    return ours


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters but for fixed position tables."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_weights(theirs: ViTMAEForPreTraining, ours: MAE) -> None:
    """Make ``ours`` compute what ``theirs`` does; raises KeyError where a weight has no counterpart."""
    own = dict(ours.named_parameters())
    translated = translate(trained(theirs))
    if own.keys() != translated.keys():
        raise KeyError(f"no counterpart: {sorted(own.keys() ^ translated.keys())}")
    for name, parameter in own.items():
        parameter.copy_(translated[name].view_as(parameter))
    # The class token has no position of its own in ours. transformers 5.23 leaves the decoder's table at zero.
    theirs.vit.embeddings.position_embeddings[0, 0] = 0
    theirs.vit.embeddings.position_embeddings[0, 1:] = ours.encoder.tokenizer.positions()
    theirs.decoder.decoder_pos_embed[0, 0] = 0
    theirs.decoder.decoder_pos_embed[0, 1:] = ours.decoder.positions()


def noise_of(keep: Tensor, tokens: int) -> Tensor:
    """Return the noise [B, N] from which transformers derives the mask that keeps ``keep`` [B, K], in rising order."""
    noise = 1 + torch.arange(tokens) / tokens
    return noise.repeat(len(keep), 1).scatter_add(1, keep, torch.full(keep.shape, -1.0))


class Shape(NamedTuple):
    """What is trained: a square picture, its patches, and encoder and decoder as width, depth and heads."""

    size: int = 224
    patch_size: int = 16
    encoder: tuple[int, int, int] = (768, 12, 12)
    decoder: tuple[int, int, int] = (512, 8, 16)


VIT_B16 = Shape()


def build(shape: Shape) -> tuple[MAE, ViTMAEForPreTraining]:
    """Return both models with the same weights."""
    width, depth, heads = shape.encoder
    decoder_width, decoder_depth, decoder_heads = shape.decoder
    model = {
        "tokenizer": {"patch_size": shape.patch_size},
        "backbone": {"dim": width, "depth": depth, "num_heads": heads},
    }
    config = typed(EncoderConfig, "image", "benchmark")(modality="image", signal={"size": shape.size}, model=model)
    decoder = DecoderConfig(dim=decoder_width, depth=decoder_depth, num_heads=decoder_heads)
    ours = MAEConfig(decoder=decoder).build({"image": Encoder(config)})
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=shape.size,
            patch_size=shape.patch_size,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=4 * decoder_width,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
            attn_implementation="sdpa",
        )
    )
    copy_weights(theirs, ours)
    return ours.train(), theirs.train()


def make_batch(ours: MAE, batch_size: int) -> Batch:
    """Return signals of noise with masks: what is in them does not change the time."""
    draw, rng = ours.draw(), np.random.default_rng(0)
    masks = [draw(rng, ours.encoder.tokenizer.grid) for _ in range(batch_size)]
    batch = {name: torch.from_numpy(np.stack([mask[name] for mask in masks])) for name in masks[0]}
    return {"signal": torch.randn(batch_size, 3, *ours.encoder.tokenizer.size), **batch}


class Times(NamedTuple):
    """Seconds of one step."""

    model: float
    optimizer: float


def timed_step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, bf16: bool) -> Times:
    """Do one step: forward and backward, then the optimiser."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of()
    loss.backward()
    middle = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    return Times(middle - start, time.perf_counter() - middle)


class Runner(NamedTuple):
    """One side of a comparison: a model and its loss on a fixed batch."""

    model: nn.Module
    loss: Callable[[], Tensor]

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW: for ours what the engine trains with, for theirs torch's default (foreach) one."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=isinstance(self.model, MAE))


def race(runners: Mapping[str, Runner], repeats: int, warmup: int) -> dict[str, Any]:
    """Return the first loss of each, and per precision the median seconds of each; they take turns step by step.

    Raises RuntimeError where "ours" and "transformers" do not compute the same loss.
    """
    with torch.no_grad():
        first = {name: runner.loss().item() for name, runner in runners.items()}
    if abs(first["ours"] - first["transformers"]) > 1e-5:
        raise RuntimeError(f"not the same computation: the losses are {first}")
    optimizers = {name: runner.optimizer() for name, runner in runners.items()}
    precisions = ["fp32", "bf16"] if torch.cpu._is_amx_tile_supported() else ["fp32"]
    times: dict[tuple[str, str], list[Times]] = {(p, name): [] for p in precisions for name in runners}
    for repeat in range(warmup + repeats):
        for (precision, name), series in times.items():
            one = timed_step(runners[name].loss, optimizers[name], precision == "bf16")
            if repeat >= warmup:
                series.append(one)
    return {"loss": first, "seconds": {p: {name: medians(times[p, name]) for name in runners} for p in precisions}}


def runners_of(shape: Shape, batch_size: int) -> dict[str, Runner]:
    """Return both sides with the same weights, signals and masks."""
    ours, theirs = build(shape)
    batch = make_batch(ours, batch_size)
    noise = noise_of(batch["keep"], (shape.size // shape.patch_size) ** 2)
    return {
        "ours": Runner(ours, lambda: ours(batch).loss),
        "transformers": Runner(theirs, lambda: theirs(batch["signal"], noise=noise).loss),
    }


def medians(series: list[Times]) -> dict[str, float]:
    """Return the median of each part and of the whole step."""
    return {
        "forward_backward": statistics.median(t.model for t in series),
        "optimizer": statistics.median(t.optimizer for t in series),
        "step": statistics.median(sum(t) for t in series),
    }


def machine() -> dict[str, Any]:
    """Return the machine in words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.is_file() else []
    amx = "with" if torch.cpu._is_amx_tile_supported() else "without"
    return {
        "cpu": f"{names[0] if names else platform.processor() or platform.machine()}, {amx} AMX",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    m, loss, seconds = result["machine"], result["loss"], result["seconds"]
    lines = [
        f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads; torch {m['torch']}, transformers {m['transformers']}",
        f"same weights, same masks: loss {loss['ours']:.6f}, transformers {loss['transformers']:.6f}",
        "",
        "| precision | | forward + backward | AdamW | step | ours is faster by |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision, rows in seconds.items():
        for name, row in rows.items():
            cells = " | ".join(f"{row[part]:.3f} s" for part in ("forward_backward", "optimizer", "step"))
            lines.append(f"| {precision} | {name} | {cells} | {row['step'] / rows['ours']['step']:.2f} x |")
    if "bf16" in seconds:
        gain = seconds["fp32"]["ours"]["step"] / seconds["bf16"]["ours"]["step"]
        lines.append(f"\nours in bf16 is {gain:.2f} x as fast as ours in fp32")
    else:
        lines.append("| bf16 | | | | | not measured: this CPU has no AMX |")
    return "\n".join(lines)


def report(
    description: str, runners: Callable[[int], Mapping[str, Runner]], arguments: Sequence[str] | None, batch_size: int
) -> None:
    """Read the command line, let ``runners(batch_size)`` race and print the result."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; all cores if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {"machine": machine(), **race(runners(options.batch_size), options.repeats, options.warmup)}
    print(json.dumps(result) if options.json else table(result))


def main(arguments: Sequence[str] | None = None, shape: Shape = VIT_B16) -> None:
    """Measure and print."""
    description = "MAE ViT-B/16 224 training step: ours against transformers"
    report(description, lambda batch_size: runners_of(shape, batch_size), arguments, batch_size=8)


if __name__ == "__main__":
    main()
