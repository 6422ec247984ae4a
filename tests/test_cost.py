"""FLOPs against a count by hand, and memory against what autograd really holds."""

import pytest
import torch

from mmssl.cost import measure, sample_batch, saved_bytes
from tasks.build import build_objective, load_recipe, measure_cost


def vit_flops(tokens, dim, depth, mlp_ratio=4):
    """Two per multiply-add: qkv and projection, the MLP, and the two products of attention."""
    return depth * (2 * tokens * dim * dim * (4 + 2 * mlp_ratio) + 2 * 2 * tokens * tokens * dim)


def test_flops_of_mae_vit_s16_by_hand():
    recipe = load_recipe("image-mae-s16", {"objective.decoder.depth": 3})
    cost = measure_cost(recipe, build_objective(recipe))
    patches, seen, width, narrow = 196, 49, 384, 512
    flops = 2 * seen * 768 * width + vit_flops(seen + 1, width, 12)
    flops += 2 * (seen + 1) * width * narrow + vit_flops(patches + 1, narrow, 2)
    # The last decoder block: keys and values of all tokens, everything else of the masked ones alone.
    masked = patches - seen
    flops += 2 * (patches + 1) * narrow * 2 * narrow + 2 * masked * narrow * narrow * (2 + 8)
    flops += 2 * 2 * masked * (patches + 1) * narrow + 2 * masked * narrow * 768
    assert cost.gflop_forward == pytest.approx(flops / 1e9, rel=1e-3)
    assert cost.gflop_train == 3 * cost.gflop_forward


def test_fewer_visible_tokens_cost_the_encoder_less():
    costs = []
    for ratio in (0.5, 0.75):
        recipe = load_recipe("image-mae-tiny", {"objective.mask_ratio": ratio})
        costs.append(measure_cost(recipe, build_objective(recipe)).gflop_forward)
    assert costs[1] < 0.75 * costs[0]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10))

    def forward(self, batch):
        x = batch["signal"] * self.weight  # saves the input and the weight: neither counts
        y = x.exp()  # saves its output
        return (y * y).sum()  # saves y, which is there already


def test_saved_bytes_count_each_activation_once_and_no_weights():
    assert saved_bytes(Toy(), {"signal": torch.ones(7, 10)}) == 7 * 10 * 4


def test_memory_grows_with_the_batch_and_the_averages():
    cost = measure(Toy(), sample_batch((1, 1, 10), None))
    assert cost.memory_bytes(4) == 10 * 4 * 4 + 4 * 40
    assert cost.memory_bytes(4, ema=True) - cost.memory_bytes(4) == 40
