"""A stand-in for an encoder and small coloured pictures, for the frozen evaluations."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmssl.data.listing import Listing, list_files
from modalities.encoder import MODALITIES, Encoder, EncoderConfig, typed
from tasks.cli import main

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

    batch_size = 256

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
        return list_files(tmp_path / name, MODALITIES["image"])

    return make


@pytest.fixture(scope="session")
def untrained():
    """An image encoder of two narrow blocks for pictures of 16 x 16 pixels, with random weights."""
    torch.manual_seed(0)
    model = {"tokenizer": {"patch_size": 8}, "backbone": {"dim": 16, "depth": 2, "num_heads": 2}}
    return Encoder(typed(EncoderConfig, "image", "test")(modality="image", signal={"size": (16, 16)}, model=model))


@pytest.fixture(scope="session")
def listed_halves(photos):
    """The training and the test photos."""
    return [list_files(photos / name, MODALITIES["image"]) for name in ("train", "test")]


@pytest.fixture
def ask(capfd):
    """Run a command and return (exit code, stdout, stderr)."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture(scope="session")
def write_vectors():
    """Write a parquet file as embed does: one vector per label, in two groups."""

    def write(path, labels, dim=6, spoil=None):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(len(labels), dim)).astype(np.float32)
        values[:, 0] += [4.0 if label == "left" else -4.0 for label in labels]
        if spoil is not None:
            values[spoil, 0] = np.nan
        columns = {
            "path": [f"{i}.png" for i in range(len(labels))],
            "split": pa.array([None if i % 3 == 0 else "train" for i in range(len(labels))], pa.string()),
            "label": pa.array(labels, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim),
        }
        pq.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture(scope="session")
def vectors(tmp_path_factory, write_vectors):
    """40 vectors in two groups, some without a label."""
    return write_vectors(tmp_path_factory.mktemp("vectors") / "v.parquet", ["left", "right"] * 18 + [None] * 4)
