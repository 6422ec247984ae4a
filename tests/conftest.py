"""Shared fixtures: one thread and one seed (so that bits do not depend on the machine's load), and tiny models."""

import csv
import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from media import numbered, tone, write_sound, write_video
from torch import Tensor

from mmssl import launch
from mmssl.objectives.mae import MAE
from modalities.encoder import Encoder

ROOT = Path(__file__).parents[1]

launch.PRELOADED = "loaded"


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_encoder() -> Callable[..., Encoder]:
    """Make an image encoder of 2 narrow blocks; keywords not named there reach the backbone."""
    return tiny.tiny_encoder


@pytest.fixture(scope="session")
def tiny_mae() -> Callable[..., MAE]:
    """Make a MAE of a tiny encoder and a decoder of 2 blocks, both as wide; keywords reach ``tiny_encoder``."""
    return tiny.tiny_mae


@pytest.fixture(scope="session")
def draw_batch() -> Callable[..., dict[str, Tensor]]:
    """Collate signals [B, C, *size] with masks drawn from ``seed``: what an objective is called with."""
    return tiny.draw_batch


@pytest.fixture(scope="session")
def mae_step() -> ModuleType:
    """The step benchmark as a module: it holds the translation of transformers' ViTMAE weights into ours."""
    spec = importlib.util.spec_from_file_location("mae_step", ROOT / "benchmarks" / "mae_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = {
    "train.batch_size": 8,
    "train.steps": 12,
    "train.log_every": 1,
    "train.ema": 0.9,
    "data.workers": 0,
    "optim.clip": 1.0,
}
SMALL = {
    "model.backbone": {"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2},
    "objective.decoder": {"dim": 16, "depth": 1, "num_heads": 2},
    **RUN,
}
"""Overrides of any tiny recipe that leave a model of a few thousand weights, with everything stochastic switched on."""
TINY = {"signal.size": [16, 16], "model.tokenizer.patch_size": [4, 4], **SMALL}
TINY_VIDEO = {
    "signal.frames": 4, "signal.size": [16, 16], "signal.stride": 2, "model.tokenizer.patch_size": [2, 4, 4],
    "objective.mask_ratio": 0.75, "objective.decode_ratio": 0.5, "data.repeats": 2, **SMALL,
}  # fmt: skip
TINY_PAIRS = {
    **TINY,
    "signal.look.gap": [2, 6],
    "signal.look.unit": "frames",
    "objective.past_mask_ratio": 0.25,
    "data.repeats": 2,
}
TINY_AUDIO = {
    "signal.sample_rate": 8000, "signal.seconds": 0.32, "signal.mels": 32, "signal.fill": "pad",
    "model.tokenizer.patch_size": [8, 8], "objective.mask": "time_frequency", **SMALL,
}  # fmt: skip
TINY_CPC = {
    "signal.sample_rate": 8000, "signal.seconds": 0.32, "signal.fill": "pad", "data.repeats": 2,
    "model.tokenizer": {"name": "wave", "kernels": [10, 8, 4], "strides": [5, 4, 2]},
    "model.backbone": {"name": "gru", "dim": 16, "input_dim": 12, "depth": 2},
    "objective.steps": 3, "objective.skip": 1, "objective.negatives.count": 32, **RUN,
}  # fmt: skip
TINY_TEXT = {
    "signal.sentences": 4, "signal.length": 24, "model.backbone.dim": 16, "objective.steps": 2,
    **RUN,
}  # fmt: skip

TINY_CLIP = {
    "towers.image.signal.size": [16, 16], "towers.image.signal.flip": True,
    "towers.image.model.tokenizer.patch_size": [8, 8],
    "towers.image.model.backbone": {"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.2},
    "towers.text.signal.context": 12, "towers.text.model.tokenizer.vocab_size": 530,
    "towers.text.model.backbone": {"dim": 12, "depth": 2, "num_heads": 2, "drop_path": 0.2},
    "objective.dim": 8, "objective.chunk": 3, **RUN,
}  # fmt: skip


class Material(NamedTuple):
    """What a modality's whole runs are tested with."""

    recipe: str
    folder: Path
    settings: dict[str, Any]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 videos of 10 to 21 frames, 32 x 40 pixels, in two classes: forwards and backwards."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(12):
        frames = numbered(10 + i, 32, 40, first=3 * i)
        part = folder / ("test" if i >= 8 else "train") / ("forwards", "backwards")[i % 2]
        part.mkdir(parents=True, exist_ok=True)
        write_video(part / f"{i:02d}.mp4", frames[:: -1 if i % 2 else 1], fps=10)
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 tones of 0.25 to 0.7 s, some shorter than a tiny crop, in two classes: low and high."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(16):
        part = folder / ("test" if i >= 10 else "train") / ("low", "high")[i % 2]
        part.mkdir(parents=True, exist_ok=True)
        wave = tone(0.25 + 0.03 * i, 8000, (300 if i % 2 == 0 else 1500) * (1 + 0.02 * i))
        write_sound(part / f"{i:02d}.{('wav', 'flac')[i % 2]}", wave, 8000)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 texts of 3 to 10 sentences, some shorter than a passage, in two classes: letters and digits."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(16):
        part = folder / ("test" if i >= 10 else "train") / ("letters", "digits")[i % 2]
        part.mkdir(parents=True, exist_ok=True)
        words = ("ab", "cde", "éf") if i % 2 == 0 else ("12", "345", "67")
        lines = [" ".join(words[(i + j + k) % 3] for k in range(2 + j % 3)) + "." for j in range(3 + i // 2)]
        (part / f"{i:02d}.txt").write_text(" ".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory, photos: Path, clips: Path, sounds: Path) -> Path:
    """A manifest of 12 rows with a picture, a video, a sound and a caption each; one caption is long."""
    folder = tmp_path_factory.mktemp("captioned")
    found = [sorted(path for path in one.rglob("*.*") if path.is_file()) for one in (photos, clips, sounds)]
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "video_path", "audio_path", "caption", "label", "split"])
        for i, files in enumerate(islice(zip(*found, strict=False), 12)):
            words = f"picture {i}, {files[0].parent.name}" + ", and so on and on" * (4 if i == 3 else 0)
            writer.writerow([*files, words, files[0].parent.name, "test" if i >= 10 else "train"])
    return folder


@pytest.fixture(scope="session")
def materials(photos: Path, clips: Path, sounds: Path, texts: Path, captioned: Path) -> dict[str, Material]:
    """By modality, for pairs of frames, CPC of sounds and CLIP: a tiny recipe, files, settings for runs of a second."""
    return {
        "image": Material("image-mae-tiny", photos, TINY),
        "video": Material("video-mae-tiny", clips, TINY_VIDEO),
        "audio": Material("audio-mae-tiny", sounds, TINY_AUDIO),
        "pairs": Material("siam-mae-tiny", clips, TINY_PAIRS),
        "cpc": Material("cpc-audio-tiny", sounds, TINY_CPC),
        "text": Material("cpc-text-tiny", texts, TINY_TEXT),
        "clip": Material("clip-tiny", captioned, TINY_CLIP),
    }


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
