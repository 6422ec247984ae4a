"""The demo on video: scenes of a film, at three speeds."""

from mmssl.data.listing import Listing
from tasks.demo import DATA, Demo, Question
from tasks.features import RawPixels

PRETRAINING = {
    # Moments in time, not frames of the file: the same film is there at three speeds.
    "signal.fps": 12.0,
    "signal.size": [48, 64],
    "signal.flip": True,
    "train.steps": 600,
    "data.workers": 1,
}
FINETUNING = {
    "optim.base_lr": 2e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 30,
    "train.steps": 200,
    "data.workers": 1,
}


def shown(test: Listing) -> list[int]:
    """Return six films at their own speed."""
    return list(range(len(test)))[::3][::2][:6]


DEMO = Demo(
    "video",
    DATA / "films.tar.xz",
    "video-mae-tiny",
    PRETRAINING,
    [
        Question("speeds", "speeds", 40, "train-speeds", "test-speeds", finetuning=FINETUNING),
        Question("scenes", "scenes", 3, "train-scenes", "test-scenes", finetuning=FINETUNING),
    ],
    lambda encoder: {"raw pixels": RawPixels(encoder)},
    "videos",
    "Scratch, random weights and raw pixels are the same measurements without pre-training. A film's speed (as shot, "
    "double or fourfold) is in its motion alone: the coded frames are the same. Test speeds are of other clips than "
    "the labels. The scenes are clips of eight seconds, the first half to learn from, the end to be recognised. "
    "Pre-training saw none of the clips that are tested.",
    shown,
)
