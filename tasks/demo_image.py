"""The demo on pictures: handwritten digits, and emoji for their colours."""

from mmssl.data.listing import Listing
from tasks.demo import DATA, Demo
from tasks.demo_labels import FewLabels, Question
from tasks.features import RawPixels

PRETRAINING = {
    # 28 x 28 digits: patches of 7 leave 16 tokens, few enough to learn something from in two minutes.
    "signal.size": [28, 28],
    "signal.crop_scale": [0.5, 1.0],
    "signal.flip": False,  # a mirrored 2 is not a 2
    # The same for each channel: with ImageNet's, black is a little coloured, and normalised patches amplify that.
    "signal.mean": [0.5, 0.5, 0.5],
    "signal.std": [0.5, 0.5, 0.5],
    "model.tokenizer.patch_size": [7, 7],
    # Many small steps: 128 at a time reached with 110,000 pictures a lower loss than 256 with 150,000.
    "optim.base_lr": 3e-3,
    "train.batch_size": 128,
    "train.steps": 1000,
    "data.workers": 1,
}
FINETUNING = {
    "optim.base_lr": 5e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 50,
    "train.steps": 200,
    "data.workers": 1,
}


def shown(test: Listing) -> list[int]:
    """Return six digits and all emoji."""
    sources = test.columns["source"]
    digits, emoji = ([i for i, one in enumerate(sources) if one == source] for source in ("digits", "emoji"))
    return [*digits[:: max(1, len(digits) // 6)][:6], *emoji]


DEMO = Demo(
    "image",
    DATA / "pictures.tar.xz",
    "image-mae-tiny",
    PRETRAINING,
    FewLabels(
        "image",
        [Question("digits", "digits", 10, finetuning=FINETUNING)],
        lambda encoder: {"raw pixels": RawPixels(encoder)},
        shown,
    ),
    "pictures",
    "Scratch, random weights and raw pixels are the same measurements without pre-training.",
)
