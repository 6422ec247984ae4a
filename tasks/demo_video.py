"""The demo on video: which clip of a film a piece is from, and how fast it is played."""

import torch.nn.functional as F
from torch import Tensor

from mmssl.data.listing import Listing
from modalities.encoder import Encoder
from tasks.demo import DATA, Demo
from tasks.demo_labels import FewLabels, Question
from tasks.features import Extractor, RawPixels

PRETRAINING = {
    # Moments in time, not every so many-th frame: the same frames are there at three speeds.
    "signal.fps": 12.0,
    "signal.size": [32, 48],
    # Read once, a film gives eight clips: reading is what takes longest here.
    "data.repeats": 8,
    "model.backbone": {"dim": 128, "depth": 4, "num_heads": 2},
    # In minutes, 9 of 10 hidden and tubes normalised one by one taught it nothing: the loss stayed at 0.97.
    "model.tokenizer.target": "raw",
    "objective.mask_ratio": 0.75,
    "train.steps": 400,
    "data.workers": 1,
}
FINETUNING = {
    "optim.base_lr": 2e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 30,
    "train.steps": 80,
    "data.workers": 1,
}
SHRINK = 4


class SmallPixels:
    """Raw pixels of shrunken frames: a linear probe on all values of a clip would take as long as pre-training."""

    def __init__(self, encoder: Encoder) -> None:
        self.decode, self.transform, self.batch_size = encoder.decode, encoder.transform, encoder.batch_size
        self._pixels = RawPixels(encoder)

    def features(self, signal: Tensor) -> Tensor:
        """Return [B, 3, t, h, w] as [B, 3 * t * h * w / SHRINK ** 2]."""
        return self._pixels.features(F.avg_pool3d(signal, (1, SHRINK, SHRINK)))

    def fingerprint(self) -> str:
        """Return a text that depends on the preprocessing alone."""
        return f"shrunken by {SHRINK}: {self._pixels.fingerprint()}"


def baselines(encoder: Encoder) -> dict[str, Extractor]:
    """Return what clips are described by without learning."""
    return {"raw pixels": SmallPixels(encoder)}


def shown(test: Listing) -> list[int]:
    """Return every other clip as it was shot, six of them."""
    return [i for i in range(len(test)) if "-" not in test.name(i)][::2][:6]


DEMO = Demo(
    "video",
    DATA / "films.tar.xz",
    "video-mae-tiny",
    PRETRAINING,
    FewLabels(
        "video",
        [
            Question("scenes", "scenes", 6, "train-scenes", "test-scenes", finetuning=FINETUNING),
            Question("speeds", "speeds", 40, "train-speeds", "test-speeds", finetuning=FINETUNING),
        ],
        baselines,
        shown,
    ),
    "videos",
    "Scratch, random weights and raw pixels are the same measurements without pre-training. The scenes are clips of "
    "eight seconds, the first half to learn from, the end to be recognised. A film's speed (as shot, double or "
    "fourfold) is in its motion alone: the coded frames are the same; test speeds are of other clips than the labels. "
    "Pre-training saw none of the clips that are tested.",
)
