"""Parameter groups, the average of the weights, and the watch over NaN."""

import pytest
import torch

from mmssl.engine.ema import EMA
from mmssl.engine.finite import FiniteGuard, NonFiniteSamples
from mmssl.engine.optim import adamw, layer_of, param_groups, set_lr


def groups_by_name(objective, **options):
    names = {id(p): name for name, p in objective.named_parameters()}
    return {names[id(p)]: group for group in param_groups(objective, 0.05, **options) for p in group["params"]}


def test_every_parameter_is_in_one_group_and_only_matrices_decay(tiny_mae):
    objective = tiny_mae(positions="learned")
    groups = groups_by_name(objective)
    assert groups.keys() == {name for name, _ in objective.named_parameters()}
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert undecayed == {
        name for name, p in objective.named_parameters() if p.ndim < 2 or name.endswith(("token", "positions.table"))
    }
    assert {"encoder.cls_token", "decoder.mask_token", "encoder._tokenizer.positions.table"} <= undecayed


def test_what_is_frozen_is_in_no_group(tiny_mae):
    objective = tiny_mae()
    objective.encoder.requires_grad_(False)
    assert all(name.startswith("decoder.") for name in groups_by_name(objective))


def test_layer_decay_falls_towards_the_input(tiny_mae):
    groups = groups_by_name(tiny_mae(), layer_decay=0.5, depth=2)
    scale = {name: group["lr_scale"] for name, group in groups.items()}
    assert scale["encoder._tokenizer.proj.weight"] == scale["encoder.cls_token"] == 0.5**3
    assert scale["encoder.backbone.blocks.0.attn.qkv.weight"] == 0.5**2
    assert scale["encoder.backbone.blocks.1.mlp.fc1.bias"] == 0.5
    assert scale["encoder.backbone.norm.weight"] == scale["decoder.head.weight"] == 1.0
    assert layer_of("head.weight", 12) == 13


def test_set_lr_scales_each_group(tiny_mae):
    optimizer = adamw(param_groups(tiny_mae(), 0.05, layer_decay=0.5, depth=2), (0.9, 0.95), 1e-8)
    set_lr(optimizer, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5**i for i in range(4)}


def test_ema_follows_the_recursion():
    weight = torch.tensor([1.0, 2.0])
    ema, expected = EMA([weight], 0.9), weight.clone()
    for _ in range(5):
        weight += 1
        ema.update()
        expected = 0.9 * expected + 0.1 * weight
    assert torch.allclose(ema.averages[0], expected)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda objective, batch: batch["signal"].fill_(float("inf")), "the batch's 'signal'"),
        (lambda objective, batch: objective.decoder.head.weight.data.fill_(float("nan")), "the weight decoder.head"),
        (lambda objective, batch: None, "the loss itself"),
    ],
)
def test_the_guard_names_the_first_bad_tensor(tiny_mae, draw_batch, spoil, named):
    objective = tiny_mae()
    batch = {**draw_batch(objective, torch.randn(3, 3, 16, 16)), "index": torch.tensor([7, 8, 9])}
    spoil(objective, batch)
    guard = FiniteGuard(objective)
    guard.watch(torch.tensor(1.0), batch)
    with pytest.raises(NonFiniteSamples, match=named) as caught:
        guard.watch(torch.tensor(float("nan")), batch)
    assert caught.value.samples == [7, 8, 9]
