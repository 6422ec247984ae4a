"""What MAE may know: masked pixels are a target and nothing else, and only visible ones are encoded."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmssl.backbones.blocks import attention_kernel
from mmssl.losses.reconstruction import patch_mse
from mmssl.masking import gather
from mmssl.objectives import OBJECTIVES
from mmssl.objectives.mae import MAEConfig
from mmssl.objectives.siam_mae import SiamMAEConfig
from modalities.encoder import Encoder, EncoderConfig, typed

SIZES = pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "wide"])


def pixels_of(mae, signal, index):
    """Return a 0/1 signal of the pixels in the patches at ``index``."""
    tokenizer = mae.encoder.tokenizer
    patches = torch.zeros_like(tokenizer.cut(signal))
    patches.scatter_(1, index[..., None].expand(-1, -1, patches.shape[-1]), 1.0)
    return tokenizer.unpatch(patches)


def views(mae, batch):
    """Return latent, prediction, target and loss."""
    tokenizer = mae.encoder.tokenizer
    patches = tokenizer.cut(batch["signal"])
    latent = mae.encoder(patches, batch["keep"], batch["seed"])
    prediction = mae.decoder(latent, batch["keep"], batch["drop"])
    return latent, prediction, tokenizer.target(gather(patches, batch["drop"])), mae(batch).loss


@SIZES
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_masked_patch_moves_its_target_and_nothing_else(tiny_mae, draw_batch, size, cls_token):
    mae = tiny_mae(size=size, cls_token=cls_token)
    batch = draw_batch(mae, torch.randn(3, 3, *size))
    latent, prediction, target, loss = views(mae, batch)
    noise = torch.randn_like(batch["signal"]) * pixels_of(mae, batch["signal"], batch["drop"][:, 1:2])
    latent2, prediction2, target2, loss2 = views(mae, {**batch, "signal": batch["signal"] + noise})
    assert torch.equal(latent, latent2)
    assert torch.equal(prediction, prediction2)
    moved = (target != target2).any(-1)
    assert moved[:, 1].all()
    assert moved.sum() == 3
    assert loss != loss2


def test_a_visible_patch_moves_the_prediction_and_no_target(tiny_mae, draw_batch):
    mae = tiny_mae()
    batch = draw_batch(mae, torch.randn(3, 3, 16, 16))
    _, prediction, target, _ = views(mae, batch)
    noise = torch.randn_like(batch["signal"]) * pixels_of(mae, batch["signal"], batch["keep"])
    _, prediction2, target2, _ = views(mae, {**batch, "signal": batch["signal"] + noise})
    assert torch.equal(target, target2)
    assert (prediction != prediction2).any(-1).all()


def test_gradients_reach_visible_pixels_through_the_prediction_and_masked_ones_through_the_target(tiny_mae, draw_batch):
    mae = tiny_mae()
    batch = draw_batch(mae, torch.randn(3, 3, 16, 16).requires_grad_())
    visible = pixels_of(mae, batch["signal"].detach(), batch["keep"]).bool()
    _, prediction, target, _ = views(mae, batch)
    through_prediction = patch_mse(prediction, target.detach()).mean()
    through_target = patch_mse(prediction.detach(), target).mean()
    for loss, seen in ((through_prediction, visible), (through_target, ~visible)):
        (gradient,) = torch.autograd.grad(loss, batch["signal"], retain_graph=True)
        assert (gradient[~seen] == 0).all()
        assert (gradient[seen] != 0).float().mean() > 0.99


def test_visible_patches_are_never_scored(tiny_mae, draw_batch, monkeypatch):
    mae = tiny_mae()
    batch = draw_batch(mae, torch.randn(3, 3, 16, 16))
    fixed = torch.randn(3, 12, 48)
    monkeypatch.setattr(mae, "_predict", lambda patches, pad, batch: fixed)
    changed = batch["signal"] + 5 * pixels_of(mae, batch["signal"], batch["keep"])
    assert torch.equal(mae(batch).loss, mae({**batch, "signal": changed}).loss)


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_only_visible_tokens_are_encoded_and_only_masked_ones_predicted(tiny_mae, draw_batch, mask_ratio):
    mae, seen = tiny_mae(mask_ratio=mask_ratio), {}
    parts = {
        "embedded": mae.encoder.tokenizer.proj,
        "first block": mae.encoder.backbone.blocks[0],
        "last decoder MLP": mae.decoder.blocks[-1].mlp,
        "head": mae.decoder.head,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))
    batch = draw_batch(mae, torch.randn(2, 3, 16, 16))
    mae(batch)
    kept = batch["keep"].shape[1]
    assert seen == {
        "embedded": kept,
        "first block": 1 + kept,
        "last decoder MLP": 16 - kept,
        "head": 16 - kept,
    }


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_the_encoder_costs_what_its_visible_tokens_cost(tiny_mae, draw_batch, mask_ratio):
    mae = tiny_mae(mask_ratio=mask_ratio)
    batch = draw_batch(mae, torch.randn(1, 3, 16, 16))
    patches = mae.encoder.tokenizer.cut(batch["signal"])
    with attention_kernel("naive"), FlopCounterMode(display=False) as counter:
        mae.encoder(patches, batch["keep"])
    kept, dim, depth = batch["keep"].shape[1], 32, 2
    tokens = 1 + kept
    blocks = depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)
    assert counter.get_total_flops() == 2 * kept * 48 * dim + blocks


def test_the_order_of_kept_and_dropped_tokens_means_nothing(tiny_mae, draw_batch):
    mae = tiny_mae()
    batch = draw_batch(mae, torch.randn(3, 3, 16, 16))
    latent, prediction, _, loss = views(mae, batch)
    keep_order, drop_order = torch.randperm(4), torch.randperm(12)
    shuffled = {**batch, "keep": batch["keep"][:, keep_order], "drop": batch["drop"][:, drop_order]}
    latent2, prediction2, _, loss2 = views(mae, shuffled)
    torch.testing.assert_close(latent2[:, 1:], latent[:, 1:][:, keep_order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction2, prediction[:, drop_order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss2, loss)


def test_the_loss_is_the_mean_over_samples_whatever_their_order_or_company(tiny_mae, draw_batch):
    mae = tiny_mae(drop_path=0.5)
    batch = draw_batch(mae, torch.randn(6, 3, 16, 16))
    alone = torch.stack([mae({name: value[i : i + 1] for name, value in batch.items()}).loss for i in range(6)])
    torch.testing.assert_close(mae(batch).loss, alone.mean())
    assert mae({**batch, "seed": batch["seed"] + 6}).loss != mae(batch).loss


def test_patch_mse_is_one_fp32_number_per_sample():
    prediction, target = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    losses = patch_mse(prediction, target)
    assert losses.dtype == torch.float32
    expected = [(prediction[i].float() - target[i].float()).pow(2).sum() / 20 for i in range(3)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_checkpointing_gives_the_same_loss_and_gradients_to_the_bit(tiny_mae, draw_batch):
    plain, recomputing = tiny_mae(drop_path=0.5), tiny_mae(drop_path=0.5, checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    batch = draw_batch(plain, torch.randn(4, 3, 16, 16))
    results = []
    for mae in (plain, recomputing):
        loss = mae(batch).loss
        results.append([loss, *torch.autograd.grad(loss, list(mae.parameters()))])
    for expected, again in zip(*results, strict=True):
        assert torch.equal(expected, again)


def test_bf16_autocast_is_close_to_fp32_and_the_loss_stays_fp32(tiny_mae, draw_batch):
    mae = tiny_mae()
    batch = draw_batch(mae, torch.randn(8, 3, 16, 16))
    exact = mae(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = mae(batch).loss
    assert rough.dtype == torch.float32
    assert exact != rough
    torch.testing.assert_close(rough, exact, rtol=1e-3, atol=0)


@SIZES
@pytest.mark.parametrize("target", ["normalized", "raw"])
def test_reconstruction_shows_visible_pixels_as_they_are_and_a_perfect_prediction_as_the_truth(
    tiny_mae, draw_batch, monkeypatch, size, target
):
    mae = tiny_mae(size=size, target=target)
    batch = draw_batch(mae, torch.randn(2, 3, *size))
    original, filled, hidden, past = mae.reconstruct(batch)
    assert past is None
    assert torch.equal(original, batch["signal"])
    assert torch.equal(hidden, pixels_of(mae, batch["signal"], batch["drop"]))
    assert torch.equal(filled[hidden == 0], batch["signal"][hidden == 0])
    assert not torch.isclose(filled[hidden == 1], batch["signal"][hidden == 1]).any(dim=0).all()
    perfect = lambda patches, pad, batch: mae.encoder.tokenizer.target(gather(patches, batch["drop"]))  # noqa: E731
    monkeypatch.setattr(mae, "_predict", perfect)
    torch.testing.assert_close(mae.reconstruct(batch).filled, batch["signal"], rtol=1e-4, atol=1e-4)


def test_config_builds_the_objective_that_draws_its_masks(tiny_encoder):
    encoder = tiny_encoder()
    config = MAEConfig(mask_ratio=0.5, decoder={"dim": 16, "depth": 1, "num_heads": 2})
    mae = config.build({"image": encoder})
    assert OBJECTIVES[config.name] is MAEConfig
    assert mae.encoders() == {"image": encoder}
    assert len(mae.draw()(np.random.default_rng(0), encoder.tokenizer.grid)["keep"]) == 8
    assert mae.decoder.head.out_features == 48
    with pytest.raises(ValueError, match="does not divide"):
        MAEConfig(decoder={"dim": 16, "num_heads": 3})


GRU = {"name": "gru", "dim": 16}
VIT = {"name": "vit", "dim": 16, "depth": 1, "num_heads": 2}
CROPS = {"name": "crops", "patch_size": 8, "stride": 4, "blocks": (1,), "channels": (8,), "bottlenecks": (4,)}


@pytest.mark.parametrize("objective", ["mae", "siam_mae"])
@pytest.mark.parametrize(("modality", "model", "words"), [
    ("image", {"tokenizer": CROPS, "backbone": VIT}, "patches that do not overlap"),
    ("image", {"backbone": GRU}, "a backbone that looks at all tokens, but this one reads them in their order"),
    ("image", {"backbone": {"name": "pixelcnn", "dim": 16, "depth": 1}}, "a backbone that looks at all tokens"),
    ("image", {"backbone": VIT, "output": "latent"}, r"with model\.output 'latent' leaves out: set model\.output"),
    ("text", {"backbone": VIT}, "cannot use tokens that do not tell where they are"),
    ("text", {"tokenizer": {"name": "bpe"}, "backbone": VIT}, "symbols, between which there is no distance"),
])  # fmt: skip
def test_encoders_that_cannot_be_masked_are_a_sentence(objective, modality, model, words):
    config = typed(EncoderConfig, modality, "test")
    signal = {"size": (16, 16)} if modality == "image" else {}
    encoder = Encoder(config(modality=modality, signal=signal, model={"cls_token": False, **model}))
    (settings,) = [kind for kind in (MAEConfig, SiamMAEConfig) if kind().name == objective]
    with pytest.raises(ValueError, match=words) as refusal:
        settings().build({modality: encoder})
    assert len(str(refusal.value).splitlines()) == 1
