"""Padding does not exist: a sound among longer ones is classified as it is alone, and nothing in it is scored."""

import numpy as np
import pytest
import torch

from mmssl.losses.reconstruction import patch_mse
from mmssl.mixing import MixDraw, mix, partner
from mmssl.objectives.classify import ClassifyConfig
from modalities.classifier import Classifier
from modalities.encoder import Encoder, EncoderConfig, typed

SIGNAL = {"sample_rate": 8000, "seconds": 0.32, "mels": 32}
HEADS = [
    {"pool": "mean"},
    {"pool": "cls"},
    {"pool": "cls+mean", "layers": 2},
    {"pool": "attentive", "num_heads": 2},
]


def encoder(**model):
    config = typed(EncoderConfig, "audio", "test")
    backbone = {"dim": 16, "depth": 2, "num_heads": 2}
    model = {"tokenizer": {"patch_size": [8, 8]}, "backbone": backbone, **model}
    return Encoder(config(modality="audio", signal=SIGNAL, model=model)).eval()


def classify(head=None, **more):
    config = ClassifyConfig(classes=["a", "b", "c"], head=head or {}, **more)
    return config.build({"audio": encoder()}).eval()


def padded(model, frames):
    """Return a batch of sounds of so many frames each, as long as the longest, with rubbish behind them."""
    log_mel = model.encoder.tokenizer.log_mel
    length = [log_mel.samples(n) for n in frames]
    return {"signal": torch.randn(len(frames), 1, max(length)), "length": torch.tensor(length)}


@pytest.mark.parametrize("head", HEADS)
def test_a_sound_is_classified_among_longer_ones_as_alone(head):
    model = classify(head)
    for name, parameter in model.head.named_parameters():
        parameter.data.normal_(float("norm" in name), 0.5)
    batch = padded(model, [16, 8, 32])
    together = model.logits(batch)
    for row, signal, length in zip(together, batch["signal"], batch["length"], strict=True):
        alone = model.logits({"signal": signal[None, :, :length]})
        torch.testing.assert_close(row, alone[0], rtol=0, atol=1e-5)
    # Without its length it would be another sound.
    assert not torch.allclose(model.logits({"signal": batch["signal"]})[1], together[1], atol=1e-3)


def test_a_mixed_sound_is_as_long_as_the_longer():
    model = classify(mix={"mixup": 1.0}).train()
    batch = padded(model, [16, 32])
    drawn = [MixDraw(model.mix, 1)(np.random.default_rng(i), (4, 4)) for i in range(2)]
    batch |= {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}
    batch |= {"target": torch.tensor([0, 2]), "seed": torch.arange(2)}
    signal, own = mix(batch["signal"], batch["mix_weight"], batch["mix_box"])
    logits = model.logits({"signal": signal, "seed": batch["seed"]})
    expected = own * model.losses(logits, batch["target"]) + (1 - own) * model.losses(logits, partner(batch["target"]))
    torch.testing.assert_close(model(batch).loss, expected.mean())
    assert 0.01 < own[0] < 0.99


def test_only_what_is_scored_counts_and_every_sample_alike():
    prediction, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    scored = torch.tensor([[True] * 4, [True, False, False, True], [False] * 4])
    losses = patch_mse(prediction, target, scored)
    errors = (prediction - target).square().mean(2)
    torch.testing.assert_close(losses, torch.stack([errors[0].mean(), errors[1, [0, 3]].mean(), torch.tensor(0.0)]))
    torch.testing.assert_close(patch_mse(prediction, target, scored | True), patch_mse(prediction, target))


@pytest.mark.parametrize("multi_label", [False, True])
def test_views_are_averaged_as_probabilities(multi_label):
    model = classify(multi_label=multi_label)
    classifier = Classifier.of(model, ["a", "b", "c"])
    model.head.linear.weight.data.normal_(std=3)
    views = torch.randn(2, 4, 1, model.encoder.tokenizer.size[0])
    single = classifier.probabilities(classifier.features(views.flatten(0, 1))).unflatten(0, (2, 4))
    torch.testing.assert_close(classifier.probabilities(classifier.features(views)), single.mean(1))
    vectors = model.encoder.features(views.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(model.encoder.features(views), vectors)
