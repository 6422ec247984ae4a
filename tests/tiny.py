"""Tiny models and their batches; functions of a module, so that a test's other processes have them too."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.heads.decoder import MaskedDecoder
from mmssl.masking import RandomMask
from mmssl.objectives.mae import MAE
from modalities.encoder import Encoder, EncoderConfig, typed


def tiny_encoder(
    size: tuple[int, int] = (16, 16),
    patch_size: tuple[int, int] = (4, 4),
    dim: int = 32,
    cls_token: bool = True,
    target: str = "normalized",
    positions: str = "sincos",
    **backbone: Any,
) -> Encoder:
    """Make an image encoder of 2 narrow blocks; keywords not named here reach the backbone."""
    model = {
        "tokenizer": {"patch_size": patch_size, "target": target, "positions": positions},
        "backbone": {"dim": dim, "depth": 2, "num_heads": 4, **backbone},
        "cls_token": cls_token,
    }
    config = typed(EncoderConfig, "image", "test")
    return Encoder(config(modality="image", signal={"size": size}, model=model))


def tiny_mae(
    mask_ratio: float = 0.75,
    objective: type[MAE] = MAE,
    decoder: type[MaskedDecoder] = MaskedDecoder,
    **options: Any,
) -> MAE:
    """Make a MAE of a tiny encoder and a decoder of 2 blocks, both as wide; keywords reach ``tiny_encoder``."""
    encoder = tiny_encoder(**options)
    tokenizer = encoder.tokenizer
    head = decoder(encoder.dim, tokenizer.patch_dim, tokenizer.grid, dim=encoder.dim, depth=2, num_heads=4)
    return objective(encoder, head, RandomMask(mask_ratio))


def draw_batch(objective: Any, signal: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Collate signals [B, C, *size] with masks drawn from ``seed``: what an objective is called with."""
    mask, rng = objective.draw(), np.random.default_rng(seed)
    grid = objective.encoder.tokenizer.grid_of(signal.shape[2:])
    rows = [mask(rng, grid) for _ in signal]
    masks = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return {"signal": signal, "seed": torch.arange(len(signal)), **masks}
