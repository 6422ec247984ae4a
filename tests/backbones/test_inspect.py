"""Attention maps against the block's own output; the 60 % mass against the definition by exhaustion."""

from itertools import combinations

import pytest
import torch

from mmssl.backbones.blocks import attention_kernel
from mmssl.backbones.inspect import attention_maps, heaviest, inputs_of, jaccard
from mmssl.backbones.vit import ViT


def small_vit(**options):
    vit = ViT(dim=24, depth=3, num_heads=4, **options)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"checkpointing": True}, {"layer_scale": 0.5}], ids=str)
def test_the_blocks_output_follows_from_its_maps(block, options):
    vit, tokens = small_vit(**options), torch.randn(2, 7, 24)
    maps = attention_maps(vit, tokens, block)
    assert maps.shape == (2, 4, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 7))
    attention = vit.blocks[block].attn
    with torch.no_grad(), attention_kernel("sdpa"), inputs_of(attention) as seen:
        vit(tokens)
        expected = attention(seen[0])
        value = attention.qkv(seen[0])[..., 48:].unflatten(-1, (4, 6)).transpose(1, 2)
        recomputed = attention.proj((maps @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(recomputed, expected, atol=1e-5, rtol=1e-5)


def test_looking_leaves_nothing_behind():
    vit, tokens = small_vit(), torch.randn(1, 5, 24)
    before = vit(tokens)
    attention_maps(vit, tokens)
    assert torch.equal(vit(tokens), before)
    assert not any(module._forward_pre_hooks for module in vit.modules())
    with pytest.raises(IndexError):
        attention_maps(vit, tokens, 3)


@pytest.mark.parametrize("mass", [0.05, 0.6, 0.9, 1.0])
def test_the_heaviest_tokens_are_the_fewest_that_hold_the_mass(mass):
    weights = torch.rand(3, 2, 7).softmax(-1)
    kept = heaviest(weights, mass)
    assert kept.shape == weights.shape
    assert kept.dtype == torch.bool
    for row, mask in zip(weights.flatten(0, 1), kept.flatten(0, 1), strict=True):
        total = row.sum()
        assert row[mask].sum() >= mass * total - 1e-6
        fewer = combinations(row.tolist(), int(mask.sum()) - 1)
        assert all(sum(part) < mass * total for part in fewer)


def test_equal_weights_go_to_the_first_and_rounding_costs_no_token():
    assert heaviest(torch.full((10,), 0.1), 0.6).tolist() == [True] * 6 + [False] * 4
    # The order of the tokens means nothing but for equal ones.
    weights, order = torch.rand(20), torch.randperm(20)
    assert torch.equal(heaviest(weights, 0.6)[order], heaviest(weights[order], 0.6))
    assert torch.equal(heaviest(weights, 0.6), heaviest(7 * weights, 0.6))


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.1, float("nan")])
def test_a_mass_that_is_no_share_is_refused(mass):
    with pytest.raises(ValueError, match="share above 0"):
        heaviest(torch.rand(4), mass)


def test_jaccard():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    truth = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([1 / 3, 1, 0, 1, 0])
    torch.testing.assert_close(jaccard(mask, truth), expected)
    assert torch.equal(jaccard(mask, truth), jaccard(truth, mask))
