"""What SiamMAE may know: the past look is used, masked pixels of the later one are a target and nothing else."""

import math
from pathlib import Path

import pytest
import torch
from ranks import at_once
from tiny import draw_batch, tiny_encoder
from torch import nn

from mmssl.heads.pair_decoder import CrossBlock, PairDecoder
from mmssl.masking import gather
from mmssl.objectives import OBJECTIVES
from mmssl.objectives.siam_mae import SiamMAEConfig
from modalities.encoder import load
from tasks.initial import read_weights, take
from tasks.pretrain import pretrain

KINDS = pytest.mark.parametrize("attention", ["cross_self", "cross", "joint"])


def make_siam(attention="cross_self", past_mask_ratio=0.0, mask_ratio=0.75, depth=2, **options):
    settings = {"dim": 32, "depth": depth, "num_heads": 4, "attention": attention}
    config = SiamMAEConfig(mask_ratio=mask_ratio, past_mask_ratio=past_mask_ratio, decoder=settings)
    return config.build({"image": tiny_encoder(**options)})


@pytest.fixture
def tiny_siam():
    return make_siam


def pair(draw_batch, siam, size=(16, 16), count=3):
    return draw_batch(siam, torch.randn(count, 3, *size)) | {"past": torch.randn(count, 3, *size)}


def predicted(siam, batch):
    return siam._predict(siam.encoder.tokenizer.patches(batch), None, batch)


def at(siam, signal, index):
    """Noise like ``signal`` in the patches at ``index``, nothing elsewhere."""
    patches = torch.zeros_like(siam.encoder.tokenizer.cut(signal))
    patches.scatter_(1, index[..., None].expand(-1, -1, patches.shape[-1]), 1.0)
    return siam.encoder.tokenizer.unpatch(patches) * torch.randn_like(signal)


@KINDS
@pytest.mark.parametrize("cls_token", [True, False])
def test_the_past_moves_the_prediction_and_no_target(tiny_siam, draw_batch, attention, cls_token):
    siam = tiny_siam(attention, cls_token=cls_token, size=(8, 24))
    batch = pair(draw_batch, siam, (8, 24))
    other = {**batch, "past": batch["past"] + at(siam, batch["past"], torch.tensor([[5]] * 3))}
    assert (predicted(siam, batch) != predicted(siam, other)).any(-1).all()
    assert siam(batch).loss != siam(other).loss
    assert torch.equal(siam.reconstruct(batch).original, siam.reconstruct(other).original)


@KINDS
def test_masked_pixels_of_the_later_look_move_their_target_and_nothing_else(tiny_siam, draw_batch, attention):
    siam = tiny_siam(attention)
    batch = pair(draw_batch, siam)
    changed = batch["signal"] + at(siam, batch["signal"], batch["drop"][:, 1:2])
    other = {**batch, "signal": changed}
    assert torch.equal(predicted(siam, batch), predicted(siam, other))
    assert siam(batch).loss != siam(other).loss
    tokenizer = siam.encoder.tokenizer
    targets = [tokenizer.target(gather(tokenizer.cut(x), batch["drop"])) for x in (batch["signal"], changed)]
    moved = (targets[0] != targets[1]).any(-1)
    assert moved[:, 1].all()
    assert moved.sum() == 3


@pytest.mark.parametrize(("attention", "moves"), [("cross_self", True), ("joint", True), ("cross", False)])
def test_visible_patches_of_the_later_look_are_used_unless_attention_goes_to_the_past_alone(
    tiny_siam, draw_batch, attention, moves
):
    siam = tiny_siam(attention)
    batch = pair(draw_batch, siam)
    other = {**batch, "signal": batch["signal"] + at(siam, batch["signal"], batch["keep"])}
    assert bool((predicted(siam, batch) != predicted(siam, other)).any(-1).all()) == moves


def test_symmetric_masking_hides_the_past_too(tiny_siam, draw_batch):
    siam = tiny_siam(past_mask_ratio=0.5)
    batch = pair(draw_batch, siam)
    assert batch["past_keep"].shape == (3, 8)
    assert batch["keep"].shape == (3, 4)
    assert not torch.equal(batch["past_keep"][:, :4], batch["keep"])
    everything = torch.arange(16)
    hidden = torch.stack([everything[~torch.isin(everything, row)] for row in batch["past_keep"]])
    unseen = {**batch, "past": batch["past"] + at(siam, batch["past"], hidden)}
    assert torch.equal(predicted(siam, batch), predicted(siam, unseen))
    seen = {**batch, "past": batch["past"] + at(siam, batch["past"], batch["past_keep"][:, :1])}
    assert (predicted(siam, batch) != predicted(siam, seen)).any(-1).all()
    cut = siam.encoder.tokenizer.cut
    shown = cut(siam.reconstruct(batch).past)
    assert (gather(shown, hidden) == 0).all()
    assert torch.equal(
        gather(shown, batch["past_keep"]), gather(siam.encoder.tokenizer.cut(batch["past"]), batch["past_keep"])
    )


@KINDS
def test_the_order_of_tokens_means_nothing(tiny_siam, draw_batch, attention):
    siam = tiny_siam(attention, past_mask_ratio=0.25)
    batch = pair(draw_batch, siam)
    turned = {name: batch[name].flip(1) for name in ("keep", "drop", "past_keep")}
    torch.testing.assert_close(
        predicted(siam, batch).flip(1), predicted(siam, {**batch, **turned}), atol=1e-5, rtol=1e-4
    )


@KINDS
def test_sparing_the_last_block_and_unread_tokens_changes_nothing(attention):
    torch.manual_seed(1)
    decoder = PairDecoder(8, 6, (4, 4), dim=16, depth=2, num_heads=2, attention=attention)
    keep, drop = torch.arange(3).expand(2, -1), torch.arange(3, 16).expand(2, -1)
    latent, past = torch.randn(2, 4, 8), torch.randn(2, 17, 8)
    table = decoder.positions()
    seen = decoder.embed(past) + torch.cat([torch.zeros(1, 16), table])
    later = decoder.embed(latent) + torch.cat([torch.zeros(1, 16), table[:3]])
    x = torch.cat([later, (decoder.mask_token + table[3:]).expand(2, -1, -1)], dim=1)
    if attention == "joint":
        x = torch.cat([seen + decoder.past.token, x], dim=1)
        for block in decoder.blocks:
            x = block(x)
    else:
        for block in decoder.blocks:
            x = block(x, decoder.past(seen))
    slow = decoder.head(decoder.norm(x[:, -13:]))
    torch.testing.assert_close(decoder(latent, keep, drop, past), slow, atol=1e-5, rtol=1e-4)


def copied(ours, theirs):
    """Give torch's attention the weights of ours."""
    if hasattr(ours, "qkv"):
        weight, bias = ours.qkv.weight, ours.qkv.bias
    else:
        weight, bias = (torch.cat([getattr(ours.q, name), getattr(ours.kv, name)]) for name in ("weight", "bias"))
    state = {
        "in_proj_weight": weight,
        "in_proj_bias": bias,
        "out_proj.weight": ours.proj.weight,
        "out_proj.bias": ours.proj.bias,
    }
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("self_attention", [True, False])
def test_a_cross_block_equals_torchs_attention(self_attention):
    block = CrossBlock(16, 4, 2.0, self_attention, 1e-6)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, past = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    expected = x + copied(block.cross, nn.MultiheadAttention(16, 4, batch_first=True))(block.norm1(x), past, past)[0]
    if self_attention:
        y = block.norm2(expected)
        expected = expected + copied(block.attn, nn.MultiheadAttention(16, 4, batch_first=True))(y, y, y)[0]
    expected = expected + block.mlp(block.norm3(expected))
    torch.testing.assert_close(block(x, past), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        block(x, past, queries=2) if self_attention else expected[:, -2:], expected[:, -2:], atol=1e-5, rtol=1e-4
    )


class PositionsLost(PairDecoder):
    """Planted bug: masked tokens get the positions of the first places of the grid."""

    def forward(self, latent, keep, drop, past, past_keep=None, grid=None):
        return super().forward(latent, keep, torch.arange(drop.shape[1]).expand_as(drop), past, past_keep, grid)


def moved_noise(count, rng):
    """Noise nobody can guess [count, 3, 8, 8], and where it went: one patch to the right, around the border."""
    past = torch.randn(count, 1, 8, 8, generator=rng).expand(-1, 3, -1, -1)
    return past, past.roll(2, -1)


def learned(decoder):
    """Train; returns the error on other signals, and with pasts of others. The trivial predictor's is 1."""
    torch.manual_seed(0)
    siam = make_siam(size=(8, 8), patch_size=(2, 2), target="raw", mask_ratio=0.9)
    siam.decoder.__class__ = decoder
    optimizer = torch.optim.AdamW(siam.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    rng = torch.Generator().manual_seed(1)
    for step in range(260):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / 260))
        past, later = moved_noise(32, rng)
        siam({**draw_batch(siam, later, step), "past": past}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    past, later = moved_noise(64, rng)
    with torch.no_grad():
        error = float(siam({**draw_batch(siam, later, 1000), "past": past}).loss)
        strange = float(siam({**draw_batch(siam, later, 1000), "past": past.flip(0)}).loss)
    return error, strange


@pytest.fixture(scope="module")
def errors():
    """What ``learned`` returns, by decoder; both are trained at once."""
    decoders = (PairDecoder, PositionsLost)
    return dict(zip(decoders, at_once(learned, decoders), strict=True))


@pytest.mark.parametrize("decoder", [PairDecoder, PositionsLost])
def test_it_learns_where_things_went(errors, decoder):
    """Noise and masks are fresh at every step."""
    error, strange = errors[decoder]
    assert (error < 0.2) == (decoder is PairDecoder)
    assert strange > 0.8  # another past is of no use


def test_weights_go_both_ways_between_image_mae_and_siam_mae(tmp_path, materials):
    mae = pretrain(
        materials["image"].recipe,
        materials["image"].folder,
        tmp_path / "mae",
        materials["image"].settings | {"train.steps": 1, "train.ema": None},
    )
    recipe, folder, settings = materials["pairs"]
    siam = pretrain(
        recipe,
        folder,
        tmp_path / "siam",
        settings | {"train.steps": 1, "train.init_from": str(tmp_path / "mae"), "optim.lr": 1e-9, "train.ema": None},
    )
    for name, tensor in ((name, x) for name, x in load(mae.run).state_dict().items() if name != "cls_token"):
        torch.testing.assert_close(load(siam.run).state_dict()[name], tensor, atol=1e-6, rtol=0)
    back = OBJECTIVES["mae"](decoder={"dim": 16, "depth": 1, "num_heads": 2}).build({"image": load(mae.run)})
    taken = take(back, read_weights(Path(siam.run)))
    assert {name for name in back.state_dict() if name.startswith("encoder.")} - set(taken.copied) == {
        "encoder.cls_token"
    }
    assert load(siam.run).preprocess["look"] is None
    assert load(siam.run).embed(load(siam.run).files(materials["image"].folder / "test").paths).isfinite().all()
