"""Parameter groups, the optimisers and their state, the average of the weights, and the watch over NaN."""

import numpy as np
import pytest
import torch

from mmssl.engine.ema import EMA
from mmssl.engine.finite import FiniteGuard, NonFiniteSamples
from mmssl.engine.optim import LARS, adamw, layer_of, param_groups, set_lr, sgd
from mmssl.engine.torch_engine import TorchEngine


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


@pytest.mark.parametrize("name", ["encoder.backbone.reader.weight", "backbone.reader.bias", "backbone.reader."])
def test_what_maps_tokens_to_the_width_of_blocks_goes_with_the_tokenizer(name):
    assert layer_of(name, 12) == 0
    assert layer_of("contexts.0.reader.weight", 12) == 13


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


def plain_lars(weights, gradients, lr, decay, momentum, trust):
    """LARS in numpy, float64: the weights after each step."""
    velocity = [np.zeros_like(w) for w in weights]
    for step in gradients:
        for i, gradient in enumerate(step):
            update = gradient + (decay * weights[i] if weights[i].ndim > 1 else 0)
            norms = np.linalg.norm(weights[i]), np.linalg.norm(update)
            if weights[i].ndim > 1 and min(norms) > 0:
                update = update * trust * norms[0] / norms[1]
            velocity[i] = momentum * velocity[i] + update
            weights[i] = weights[i] - lr * velocity[i]
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_equals_a_plain_formula(decay):
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (4,), (2, 3), (2, 2)]
    weights = [rng.standard_normal(shape) for shape in shapes]
    weights[2] = np.zeros((2, 3))  # no norm to compare with: the plain rate
    gradients = [[rng.standard_normal(shape) for shape in shapes] for _ in range(4)]
    gradients[0][3] = np.zeros((2, 2))
    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    module = torch.nn.ParameterList(parameters)
    optimizer = LARS(param_groups(module, decay), momentum=0.8, trust=0.02)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        set_lr(optimizer, 0.3)
        optimizer.step()
    expected = plain_lars(weights, gradients, 0.3, decay, 0.8, 0.02)
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


def test_a_step_of_lars_does_not_depend_on_the_gradients_size():
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.eye(2), 1e4 * torch.eye(2)
    optimizer = LARS(param_groups(torch.nn.ParameterList(weights), 0.0))
    set_lr(optimizer, 1.0)
    optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
    assert (1 - weights[0]).norm().item() == pytest.approx(0.001 * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "sgd without momentum"])
def test_a_restored_optimiser_goes_on_to_the_bit(tiny_mae, draw_batch, name):
    def engine():
        torch.manual_seed(0)
        objective = tiny_mae()
        groups = param_groups(objective, 0.05)
        optimizer = {
            "adamw": lambda: adamw(groups, (0.9, 0.95), 1e-8),
            "sgd": lambda: sgd(groups, 0.9),
            "lars": lambda: LARS(groups, 0.9),
            "sgd without momentum": lambda: sgd(groups, 0.0),
        }[name]()
        return TorchEngine(objective, optimizer, torch.device("cpu"))

    def walk(engine, steps):
        for step in steps:
            signal = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            batch = draw_batch(engine.objective, signal, step)
            engine.step([{**batch, "index": torch.arange(2)}], 0.1)

    whole, resumed = engine(), engine()
    walk(whole, range(3))
    stored = {key: tensor.clone() for key, tensor in whole.state()}
    walk(resumed, range(9, 10))  # what was there before must leave no trace
    resumed.load(stored.__getitem__, 3)
    walk(whole, range(3, 6))
    walk(resumed, range(3, 6))
    kept = {key.split("/")[0] for key in stored}
    moments = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd without momentum": set()}.get(name, {"momentum_buffer"})
    assert kept == {"param"} | moments
    after = dict(resumed.state())
    for key, tensor in whole.state():
        assert torch.equal(after[key], tensor), key
