"""Mixing in pairs: exact shares, a slow twin, and no dependence on how a batch is cut."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmssl.config import validate
from mmssl.errors import UserError
from mmssl.mixing import MixConfig, MixDraw, mix, partner

SIZES = [(37,), (13, 22), (4, 9, 7)]
BOTH = MixConfig(mixup=0.8, cutmix=1.0)


def draws(config, axes, count, seed=0):
    draw, rng = MixDraw(config, axes), np.random.default_rng(seed)
    rows = [draw(rng, (4,) * axes) for _ in range(count)]
    return [torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("mix_weight", "mix_box")]


def slow(signal, weight, box):
    """Mix sample by sample, in Python's own numbers; returns the shares as fractions where they are counts."""
    mixed, own = signal.clone(), []
    for i in range(len(signal)):
        even, other = i - i % 2, i + 1 - 2 * (i % 2)
        edges, size = box[even].view(-1, 2).tolist(), signal.shape[2:]
        if all(stop > start for start, stop in edges):
            inside = [[start * n <= k + 0.5 < stop * n for k in range(n)] for (start, stop), n in zip(edges, size)]  # noqa: B905
            count = 0
            for place in np.ndindex(*size):
                if all(axis[k] for axis, k in zip(inside, place)):  # noqa: B905
                    mixed[(i, slice(None), *place)] = signal[(other, slice(None), *place)]
                    count += 1
            own.append(1 - Fraction(count, int(np.prod(size))))
        else:
            lam = weight[even]
            mixed[i] = lam * signal[i] + (1 - lam) * signal[other]
            own.append(lam.item())
    return mixed, own


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [BOTH, MixConfig(mixup=0.4), MixConfig(cutmix=1.0), MixConfig(cutmix=0.1)])
def test_it_agrees_with_its_slow_twin(size, config):
    signal = torch.randn(16, 3, *size)
    weight, box = draws(config, len(size), 16)
    mixed, own = mix(signal, weight, box)
    expected, shares = slow(signal, weight, box)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    assert own.dtype == torch.float32
    assert own.tolist() == [np.float32(float(share)) for share in shares]


@pytest.mark.parametrize("size", SIZES)
def test_the_own_weight_is_the_exact_share_of_what_stayed(size):
    signal = torch.arange(64.0).view(64, 1, *[1] * len(size)).expand(64, 2, *size)
    mixed, own = mix(signal, *draws(MixConfig(cutmix=1.0), len(size), 64))
    stayed = (mixed == signal).flatten(1).double().mean(1)
    assert torch.equal(own, stayed.float())
    assert ((mixed == signal) | (mixed == partner(signal))).all()
    assert own.std() > 0.05


def test_mixup_keeps_the_mean_of_a_pair_and_blends_by_the_weight():
    signal = torch.randn(8, 3, 5, 6)
    weight, box = draws(MixConfig(mixup=1.0), 2, 8)
    mixed, own = mix(signal, weight, box)
    pairs = torch.stack([signal, mixed]).unflatten(1, (4, 2)).mean(2)
    torch.testing.assert_close(pairs[0], pairs[1])
    assert torch.equal(own[0::2], weight[0::2])
    value = own.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, value * signal + (1 - value) * partner(signal))


def test_labels_of_a_pair_are_weighed_as_its_pixels_are():
    # A picture whose every pixel is its label shows what share of it each label has.
    label = torch.randint(0, 5, (32,))
    signal = torch.nn.functional.one_hot(label, 5).float()[:, :, None, None].expand(-1, -1, 12, 17)
    mixed, own = mix(signal, *draws(BOTH, 2, 32))
    soft = own[:, None] * signal[:, :, 0, 0] + (1 - own)[:, None] * partner(signal)[:, :, 0, 0]
    torch.testing.assert_close(mixed.mean((2, 3)), soft)
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    assert torch.equal(partner(label).view(-1, 2), label.view(-1, 2).flip(1))


@pytest.mark.parametrize("cuts", [[4, 4], [2, 6], [2, 2, 2, 2]])
def test_how_a_batch_is_cut_changes_nothing(cuts):
    signal = torch.randn(8, 3, 8, 8)
    weight, box = draws(BOTH, 2, 8, seed=2)
    whole = mix(signal, weight, box)
    parts = [mix(*part) for part in zip(signal.split(cuts), weight.split(cuts), box.split(cuts), strict=True)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_the_even_sample_decides_for_its_pair():
    signal = torch.randn(8, 3, 8, 8)
    weight, box = draws(BOTH, 2, 8)
    mixed, own = mix(signal, weight, box)
    assert torch.equal(own[0::2], own[1::2])
    swapped, swapped_own = mix(partner(signal), weight, box)
    torch.testing.assert_close(swapped, partner(mixed))
    assert torch.equal(own, swapped_own)
    weight[1::2], box[1::2] = 0.123, 0.5
    assert torch.equal(mix(signal, weight, box)[0], mixed)
    weight[0::2] = 0.123
    box[0::2] = 0.5
    assert not torch.equal(mix(signal, weight, box)[0], mixed)


@pytest.mark.parametrize("config", [MixConfig(), MixConfig(mixup=0.8, cutmix=1.0, probability=0)])
def test_off_leaves_every_bit_and_draws_nothing(config):
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    MixDraw(config, 2)(rng, (4, 4))
    assert rng.bit_generator.state == before
    assert not config.active
    signal = torch.randn(6, 3, 8, 8)
    signal[0, 0, 0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    mixed, own = mix(signal, *draws(config, 2, 6))
    assert torch.equal(mixed.view(torch.int32), signal.view(torch.int32))
    assert torch.equal(own, torch.ones(6))


def test_a_box_too_small_for_any_pixel_leaves_every_bit():
    signal = torch.randn(2, 3, 4, 4)
    mixed, own = mix(signal, torch.full((2,), 0.99), torch.tensor([[0.01, 0.1, 0.01, 0.9]]).expand(2, -1))
    assert torch.equal(mixed, signal)
    assert torch.equal(own, torch.ones(2))


def test_a_box_without_width_is_no_box():
    signal, weight = torch.randn(2, 3, 4, 4), torch.full((2,), 0.3)
    flat = torch.tensor([[0.2, 0.9, 0.5, 0.5]]).expand(2, -1)
    mixed, own = mix(signal, weight, flat)
    assert torch.equal(mixed, mix(signal, weight, torch.zeros(2, 4))[0])
    assert torch.equal(own, weight)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_weights_follow_beta(alpha):
    weight, box = draws(MixConfig(mixup=alpha), 2, 4000)
    variance = 1 / (4 * (2 * alpha + 1))
    assert weight.mean() == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)
    assert weight.var() == pytest.approx(variance, rel=0.08)
    assert not box.any()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_cutmix_boxes_have_equal_shares_of_the_axes_and_follow_beta_where_not_clipped(axes):
    weight, box = draws(MixConfig(cutmix=1.0), axes, 4000)
    start, stop = box.view(-1, axes, 2).unbind(2)
    assert start.min() >= 0
    assert stop.max() <= 1
    side = stop - start
    torch.testing.assert_close(weight, 1 - side.prod(1))
    whole = ((start > 0) & (stop < 1)).all(1)
    torch.testing.assert_close(side[whole], side[whole, :1].expand(-1, axes))
    # Beta(1, 1) is uniform: an unclipped box of sides s, s^axes uniform, lies inside with probability (1 - s)^axes.
    volumes, chances = np.linspace(0, 1, 20001), (1 - np.linspace(0, 1, 20001) ** (1 / axes)) ** axes
    assert whole.float().mean() == pytest.approx(chances.mean(), abs=0.03)
    expected = (volumes * chances).mean() / chances.mean()
    assert (1 - weight[whole]).mean() == pytest.approx(expected, abs=0.02)
    middle = (start + stop)[whole].mean() / 2
    assert middle == pytest.approx(0.5, abs=0.03)


def test_switch_and_probability():
    weight, box = draws(MixConfig(mixup=1, cutmix=1, switch=0.25, probability=0.5), 2, 4000)
    cut = box.any(1)
    assert cut.float().mean() == pytest.approx(0.125, abs=0.02)
    assert (~cut & (weight < 1)).float().mean() == pytest.approx(0.375, abs=0.03)
    assert (~cut & (weight == 1)).float().mean() == pytest.approx(0.5, abs=0.03)
    # Each has its own Beta: one nearly 0 or 1, the other nearly half.
    weight, box = draws(MixConfig(mixup=0.05, cutmix=500), 2, 400)
    cut = box.any(1)
    assert ((weight[~cut] - 0.5).abs() > 0.4).float().mean() > 0.7
    assert (weight[cut] > 0.4).all()
    assert not draws(MixConfig(mixup=1, switch=1), 2, 50)[1].any()
    assert draws(MixConfig(cutmix=1, switch=0), 2, 50)[1].any(1).all()


def test_the_generator_alone_decides():
    draw = MixDraw(BOTH, 2)
    first, other = draw(np.random.default_rng(5), (3, 4)), draw(np.random.default_rng(6), (3, 4))
    again = pickle.loads(pickle.dumps(draw))(np.random.default_rng(5), (14, 14))
    assert list(first) == ["mix_weight", "mix_box"]
    for name, shape in (("mix_weight", ()), ("mix_box", (4,))):
        assert isinstance(first[name], np.ndarray)
        assert first[name].dtype == np.float32
        assert first[name].shape == shape
        assert np.array_equal(first[name], again[name])
    assert first["mix_weight"] != other["mix_weight"]


def test_odd_batches_are_refused_and_empty_ones_pass():
    with pytest.raises(ValueError, match="in pairs, but a batch here has 3"):
        mix(torch.zeros(3, 1, 4), torch.ones(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="in pairs"):
        partner(torch.zeros(1))
    mixed, own = mix(torch.zeros(0, 1, 4), torch.ones(0), torch.zeros(0, 2))
    assert (mixed.shape, own.shape) == ((0, 1, 4), (0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_signals_type_stays(dtype):
    signal = torch.randn(8, 3, 8, 8, dtype=dtype)
    mixed, own = mix(signal, *draws(BOTH, 2, 8))
    assert (mixed.dtype, own.dtype) == (dtype, torch.float32)


def test_nothing_waits_for_the_device():
    # The meta device has no values: whatever asked for one would fail, as it would stall a GPU.
    signal, weight, box = torch.empty(4, 3, 8, 8), torch.empty(4), torch.empty(4, 4)
    mixed, own = mix(*(x.to("meta") for x in (signal, weight, box)))
    assert (mixed.shape, own.shape) == (signal.shape, weight.shape)


def test_mistakes_get_a_sentence():
    with pytest.raises(UserError, match="'cutmixx' is not a key; did you mean 'cutmix'"):
        validate(MixConfig, {"cutmixx": 1}, "r.yaml")
    with pytest.raises(UserError, match="mixup: "):
        validate(MixConfig, {"mixup": -1}, "r.yaml")
