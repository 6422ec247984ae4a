"""Shared fixtures: one thread and one seed (so that bits do not depend on the machine's load), and tiny models."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from mmssl.heads.decoder import MaskedDecoder
from mmssl.objectives.mae import MAE
from modalities.encoder import Encoder, EncoderConfig, typed

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny_encoder() -> Callable[..., Encoder]:
    """Make an image encoder of 2 narrow blocks; keywords not named here reach the backbone."""

    def make(
        size: tuple[int, int] = (16, 16),
        patch_size: tuple[int, int] = (4, 4),
        dim: int = 32,
        cls_token: bool = True,
        target: str = "normalized",
        positions: str = "sincos",
        **backbone: Any,
    ) -> Encoder:
        model = {
            "tokenizer": {"patch_size": patch_size, "target": target, "positions": positions},
            "backbone": {"dim": dim, "depth": 2, "num_heads": 4, **backbone},
            "cls_token": cls_token,
        }
        config = typed(EncoderConfig, "image", "test")
        return Encoder(config(modality="image", signal={"size": size}, model=model))

    return make


@pytest.fixture
def tiny_mae(tiny_encoder: Callable[..., Encoder]) -> Callable[..., MAE]:
    """Make a MAE of a tiny encoder and a decoder of 2 blocks, both as wide; keywords reach ``tiny_encoder``."""

    def make(
        mask_ratio: float = 0.75,
        objective: type[MAE] = MAE,
        decoder: type[MaskedDecoder] = MaskedDecoder,
        **options: Any,
    ) -> MAE:
        encoder = tiny_encoder(**options)
        tokenizer = encoder.tokenizer
        head = decoder(encoder.dim, tokenizer.patch_dim, tokenizer.grid, dim=encoder.dim, depth=2, num_heads=4)
        return objective(encoder, head, mask_ratio)

    return make


@pytest.fixture(scope="session")
def draw_batch() -> Callable[..., dict[str, Tensor]]:
    """Collate signals [B, C, *size] with masks drawn from ``seed``: what an objective is called with."""

    def draw(objective: MAE, signal: Tensor, seed: int = 0) -> dict[str, Tensor]:
        mask, rng = objective.draw(), np.random.default_rng(seed)
        grid = objective.encoder.tokenizer.grid_of(signal.shape[2:])
        rows = [mask(rng, grid) for _ in signal]
        masks = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        return {"signal": signal, "seed": torch.arange(len(signal)), **masks}

    return draw


@pytest.fixture(scope="session")
def mae_step() -> ModuleType:
    """The step benchmark as a module: it holds the translation of transformers' ViTMAE weights into ours."""
    spec = importlib.util.spec_from_file_location("mae_step", ROOT / "benchmarks" / "mae_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = {
    "signal.size": [16, 16],
    "model.tokenizer.patch_size": [4, 4],
    "model.backbone": {"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2},
    "objective.decoder": {"dim": 16, "depth": 1, "num_heads": 2},
    "train.batch_size": 8,
    "train.steps": 12,
    "train.log_every": 1,
    "train.ema": 0.9,
    "data.workers": 0,
    "optim.clip": 1.0,
}
"""Overrides of image-mae-tiny that leave a model of a few thousand weights, with everything stochastic switched on."""


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Overrides of a recipe for runs of a second."""
    return TINY


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 smooth colour pictures, 20 x 24 pixels, in two classes by their dominant direction."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:20, :24] / 20
    for i in range(30):
        kind = ("across", "along")[i % 2]
        wave = np.sin(2 * np.pi * ((rows if i % 2 else columns) * rng.uniform(1, 2) + rng.uniform()))
        colour = rng.uniform(0.3, 1, 3)
        pixels = (127.5 * (1 + wave[..., None] * colour)).clip(0, 255).astype(np.uint8)
        part = folder / ("test" if i >= 22 else "train") / kind
        part.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(part / f"{i:02d}.png")
    return folder
