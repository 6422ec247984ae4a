"""A stand-in for an encoder and small coloured pictures, for the frozen evaluations."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.data.listing import Listing, list_files

COLOURS = {"blue": (30, 40, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


class FakeEncoder:
    """The mean colour through a fixed random projection; counts the signals it has seen."""

    def __init__(self, dim: int = 8) -> None:
        self.projection = torch.randn(3, dim, generator=torch.Generator().manual_seed(1))
        self.preprocess = {"size": [8, 8]}
        self.seen = 0

    @staticmethod
    def decode(path: str) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    @staticmethod
    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def features(self, signal: torch.Tensor) -> torch.Tensor:
        self.seen += len(signal)
        return signal.mean((2, 3)) @ self.projection

    def fingerprint(self) -> str:
        return f"fake {self.projection.tolist()}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def pictures(tmp_path):
    """Make a folder of noisy 8 x 8 pictures, ``per_class`` of each colour, and list it."""

    def make(name: str, per_class: int, noise: float = 25.0, colours=COLOURS) -> Listing:
        rng = np.random.default_rng(sum(name.encode()))
        for label in colours:
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(per_class):
                shade = np.array(COLOURS.get(label, (120, 120, 120))) + rng.normal(0, noise, 3)
                pixels = np.clip(shade + rng.normal(0, 10, (8, 8, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        return list_files(tmp_path / name, frozenset({".png"}), "image")

    return make
