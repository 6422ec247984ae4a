"""What tests of the index of a search share: untrained towers, and a folder of ten pictures."""

import shutil

import numpy as np
import PIL.Image
import pytest
from towers import untrained

from mmssl import JointEncoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("clip") / "run", "image", "text")


@pytest.fixture(scope="module")
def towers(run):
    return {name: JointEncoder(run / f"encoder-{name}") for name in ("image", "text")}


@pytest.fixture
def folder(tmp_path, photos):
    """Ten pictures."""
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))[:10]):
        shutil.copy2(path, tmp_path / "mine" / ("deeper" if i % 2 else ".") / f"{i}.png")
    return tmp_path / "mine"


def repaint(path, shade=0):
    PIL.Image.fromarray(np.full((20, 24, 3), shade, np.uint8)).save(path)
