"""The demo on sound: telephone prompts in four languages, and sentences that a machine speaks with four voices."""

import json

import torch
from torch import Tensor
from torchaudio.functional import create_dct

from mmssl.data.listing import Listing
from modalities.audio_settings import AudioSignal, filterbank
from modalities.encoder import Encoder
from modalities.views import over_views
from tasks.demo import DATA, Demo
from tasks.demo_labels import FewLabels, Question
from tasks.features import Extractor

PRETRAINING = {
    # Telephone speech: up to 4 kHz, where 40 mel bins are what recognisers of speech have.
    "signal.sample_rate": 8000,
    "signal.mels": 40,
    "signal.seconds": 0.96,
    "signal.longest": 1.92,
    # Mean and deviation of these files (``mmssl data stats``).
    "signal.mean": [-5.5],
    "signal.std": [4.5],
    # All frequencies of 40 ms: 24 tokens, of which 6 are seen.
    "model.tokenizer.patch_size": [40, 4],
    "optim.base_lr": 3e-3,
    "train.batch_size": 128,
    "train.steps": 1000,
    "data.workers": 1,
}
FINETUNING = {
    # What is shorter is padded, not repeated: a word is tested as it is.
    "signal.fill": "pad",
    "optim.base_lr": 5e-3,
    "optim.layer_decay": 0.8,
    "train.batch_size": 20,
    "train.steps": 100,
    "data.workers": 1,
}
CEPSTRA = 13
"""Mel-frequency cepstral coefficients (MFCC), as many as recognisers of speech have."""


class Statistics:
    """Stands in for an encoder with the mean and the deviation of each feature over time: nothing is learned."""

    def __init__(self, encoder: Encoder, cepstra: int = 0) -> None:
        """The features are mel bins, or so many cepstra: cosine transforms of the same log-mel spectrogram."""
        self.decode, self.transform, self.batch_size = encoder.decode, encoder.transform, encoder.batch_size
        settings = encoder.config.signal
        assert isinstance(settings, AudioSignal)
        self._log_mel = filterbank(settings)
        self._cosines = create_dct(cepstra, settings.mels, "ortho") if cepstra else torch.eye(settings.mels)
        self._settings = json.dumps([cepstra, encoder.preprocess], sort_keys=True)

    def features(self, signal: Tensor) -> Tensor:
        """Return [B, 1, samples], or the mean over several views [B, V, 1, samples], as [B, 2 * features]."""
        vectors: Tensor = over_views(self._statistics, signal, 1)
        return vectors.mean(1) if vectors.ndim == 3 else vectors

    def _statistics(self, signal: Tensor) -> Tensor:
        values = self._cosines.T @ self._log_mel(signal[:, 0])
        return torch.cat([values.mean(2), values.std(2)], dim=1)

    def fingerprint(self) -> str:
        """Return a text that depends on the preprocessing alone."""
        return f"statistics {self._settings}"


def baselines(encoder: Encoder) -> dict[str, Extractor]:
    """Return what sounds are described by without learning."""
    return {"mel statistics": Statistics(encoder), "MFCC statistics": Statistics(encoder, CEPSTRA)}


def shown(test: Listing) -> list[int]:
    """Return four prompts, one per language, and four sentences, one per voice."""
    speakers = test.columns["speaker"]
    return [speakers.index(one) for one in dict.fromkeys(speakers)][:8]


DEMO = Demo(
    "audio",
    DATA / "speech.tar.xz",
    "audio-mae-tiny",
    PRETRAINING,
    FewLabels(
        "audio",
        [
            Question("languages", "prompts", 5, finetuning=FINETUNING),
            Question("words", "words", 8, "train-words", "test-words", finetuning=FINETUNING),
        ],
        baselines,
        shown,
    ),
    "sounds",
    "Scratch, random weights and statistics (mean and deviation of each mel bin or cepstrum over time) are the same "
    "measurements without pre-training. English and Spanish have one speaker, French and Italian one each, so a "
    "language is told by the voice too. The words are cut out of sentences that four synthetic voices speak; test "
    "words come from other sentences, in the same voices.",
)
