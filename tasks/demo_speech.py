"""The demo of contrastive predictive coding on speech: who speaks, and which word, told from waveforms."""

from pathlib import Path

import numpy as np
import PIL.Image

from mmssl.data.listing import Listing, list_files
from modalities.encoder import Encoder
from tasks.demo import DATA, Demo
from tasks.demo_audio import baselines
from tasks.demo_labels import FewLabels, Question
from tasks.embed import embed
from tasks.report import Pictures, Section
from tasks.show import show

PRETRAINING = {
    # Telephone speech: 100 tokens a second of 8,000 samples.
    "signal.sample_rate": 8000,
    "signal.seconds": 1.28,
    # For the baselines that have spectrograms.
    "signal.mels": 40,
    "model.tokenizer": {"name": "wave", "kernels": [10, 8, 4, 4], "strides": [5, 4, 2, 2]},
    "model.backbone": {"name": "gru", "dim": 96, "input_dim": 96},
    "optim.lr": 5e-4,
    "train.batch_size": 16,
    "train.steps": 800,
    "data.workers": 1,
}
FINETUNING = {
    "signal.fill": "pad",
    "optim.base_lr": 5e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 20,
    "train.steps": 60,
    "data.workers": 1,
}


def shown(test: Listing) -> list[int]:
    """Return a file per voice."""
    speakers = test.columns["speaker"]
    return [speakers.index(one) for one in dict.fromkeys(speakers)]


def speaker_map(encoder: Encoder, out: Path) -> list[Section]:
    """Return a map of the test utterances, coloured by who speaks; ``out`` gets the vectors and the picture."""
    vectors, picture = out / "utterances.parquet", out / "speakers.png"
    embed(encoder, list_files(out / "data", encoder.kind, split="test"), vectors, "speaker")
    result = show(vectors, out=picture, panel="tsne")
    with PIL.Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    return [Pictures("Utterances by speaker", f"t-SNE of the test utterances. {result.note}", [""], [[pixels]])]


DEMO = Demo(
    "speech",
    DATA / "speech.tar.xz",
    "cpc-audio-tiny",
    PRETRAINING,
    FewLabels(
        "audio",
        [
            Question("speakers", None, 5, finetuning=FINETUNING, labels="speaker"),
            Question("words", "words", 8, "train-words", "test-words", finetuning=FINETUNING),
        ],
        baselines,
        shown,
        drawn=speaker_map,
    ),
    "sounds",
    "Scratch, random weights and statistics (mean and deviation of each mel bin or cepstrum over time) are the same "
    "measurements without pre-training. Three people (one of them in two languages, each a label) and four synthetic "
    "voices speak; the words are cut out of what the synthetic ones say, and test words come from other sentences, in "
    "the same voices.",
    learner="contrastive predictive coding",
    task="An encoder learned by telling which of many moments comes next.",
)
