"""Decoders: what a prediction may depend on, in windows and under padding, against a slow twin and full attention."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmssl.backbones.blocks import attention_kernel
from mmssl.heads.decoder import DecoderConfig
from mmssl.heads.local_decoder import cells
from mmssl.masking import RandomMask, RunningCell

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GRIDS = pytest.mark.parametrize("grid", [(8, 4), (5, 7), (9,), (3, 2), (2, 5, 6)], ids=str)


def make(grid, attention="local", window=4, depth=3, **options):
    """A decoder of random weights, biases and norms included, so that each of them matters."""
    config = DecoderConfig(dim=16, depth=depth, num_heads=4, attention=attention, window=window, **options)
    decoder = config.build(12, 6, grid)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def inputs(grid, prefix=1, ratio=0.5, batch=3, mask=None):
    """Return latent, keep and drop of a batch of random masks."""
    rows = [(mask or RandomMask(ratio))(np.random.default_rng(seed), grid) for seed in range(batch)]
    keep, drop = (torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("keep", "drop"))
    return torch.randn(batch, prefix + keep.shape[1], 12), keep, drop


def window_of(place, grid, window, shifted):
    """Name the window of a token: on each axis its number, counted from the start of the (shifted) windows."""
    name = []
    for position, length in zip(np.unravel_index(place, grid), grid, strict=True):
        moved = shifted and length > window
        name.append((position + (window - window // 2 if moved else 0)) // window)
    return tuple(name)


def slow_twin(decoder, latent, keep, drop, grid, pad, window):
    """Decode sample by sample and window by window with whole blocks, on nothing but tokens that may be seen."""
    positions, predictions = decoder.positions(grid), []
    for b in range(len(latent)):
        places = [*keep[b].tolist(), *drop[b].tolist()]
        visible = decoder.embed(latent[b, -keep.shape[1] :]) + positions[keep[b]]
        x = torch.cat([visible, decoder.mask_token + positions[drop[b]]])
        for i, block in enumerate(decoder.blocks):
            names = [window_of(place, grid, window, i % 2 == 1) for place in places]
            new = torch.zeros_like(x)
            for name in set(names):
                inside = [n for n, other in enumerate(names) if other == name and not pad[b, places[n]]]
                if inside:
                    y = x[inside]
                    qkv = block.attn.qkv(block.norm1(y)).unflatten(-1, (3, 4, 4)).permute(1, 2, 0, 3)
                    weights = (qkv[0] @ qkv[1].mT / 2).softmax(-1)
                    y = y + block.attn.proj((weights @ qkv[2]).transpose(0, 1).flatten(1))
                    new[inside] = y + block.mlp(block.norm2(y))
            x = new
        predictions.append(decoder.head(decoder.norm(x[-drop.shape[1] :])))
    return torch.stack(predictions)


def padding(grid, batch):
    """Pad the end of the last axis, each sample's by one more step than the one's before, but never all of it."""
    steps = torch.arange(grid[-1]) >= (grid[-1] - torch.arange(batch)[:, None]).clamp(min=1)
    return steps.view(batch, *[1] * (len(grid) - 1), -1).expand(batch, *grid).flatten(1)


@GRIDS
@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_local_attention_is_that_of_a_loop_over_windows(grid, window, padded):
    decoder, (latent, keep, drop) = make(grid, window=window), inputs(grid)
    pad = padding(grid, 3) if padded else torch.zeros(3, int(np.prod(grid)), dtype=torch.bool)
    scored = ~pad.gather(1, drop)
    results = []
    for predict in (
        lambda x: decoder(x, keep, drop, grid, pad if padded else None),
        lambda x: slow_twin(decoder, x, keep, drop, grid, pad, window),
    ):
        leaf = latent.clone().requires_grad_()
        prediction = predict(leaf)[scored]
        parameters = [leaf, *decoder.parameters()]
        results.append([prediction, *torch.autograd.grad(prediction.square().sum(), parameters)])
    for fast, slow in zip(*results, strict=True):
        scale = slow.abs().max().clamp(min=1)
        torch.testing.assert_close(fast / scale, slow / scale, **CLOSE)


@GRIDS
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_window_as_large_as_the_grid_is_full_attention(grid, padded):
    local, full = make(grid, window=max(grid)), make(grid, "global")
    full.load_state_dict(local.state_dict())
    latent, keep, drop = inputs(grid, prefix=0)
    pad = padding(grid, 3) if padded else None
    scored = torch.ones_like(drop, dtype=torch.bool) if pad is None else ~pad.gather(1, drop)
    expected = full(latent, keep, drop, grid, pad)
    torch.testing.assert_close(local(latent, keep, drop, grid, pad)[scored], expected[scored], **CLOSE)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prediction_depends_on_its_window_and_with_two_blocks_on_those_that_the_shifted_one_touches(depth):
    grid, window = (8, 9), 4
    decoder, (latent, keep, drop) = make(grid, depth=depth, window=window), inputs(grid, batch=1)
    latent.requires_grad_()
    visible = keep[0].tolist()
    for n, place in enumerate(drop[0].tolist()):
        prediction = decoder(latent, keep, drop, grid)[0, n].sum()
        (gradient,) = torch.autograd.grad(prediction, latent)
        moved = {visible[i] for i in gradient[0, 1:].abs().sum(-1).nonzero().flatten().tolist()}
        reached = {place}
        for shifted in (True, False)[-depth:]:  # backwards: the last block is the shifted one
            names = {window_of(p, grid, window, shifted) for p in reached}
            reached = {p for p in range(72) if window_of(p, grid, window, shifted) in names}
        assert moved == reached & set(visible)
        assert not gradient[0, 0].any(), "the class token has no place on the grid"


def test_windows_partition_the_grid_and_shifted_ones_start_half_a_window_earlier():
    assert cells((6,), 4, shifted=False).tolist() == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert cells((6,), 4, shifted=True).tolist() == [[6, 6, 0, 1], [2, 3, 4, 5]]
    assert cells((3,), 4, shifted=True).tolist() == [[0, 1, 2]]
    assert cells((2, 4), 2, shifted=True).tolist() == [[8, 0, 8, 4], [1, 2, 5, 6], [3, 8, 7, 8]]
    for grid, window, shifted in itertools.product([(5, 7), (2, 3, 4)], [2, 3], [False, True]):
        found = cells(grid, window, shifted)
        places = found[found < np.prod(grid)]
        assert sorted(places.tolist()) == list(range(int(np.prod(grid))))
        assert found.shape[1] == np.prod(np.minimum(grid, window))


@GRIDS
@pytest.mark.parametrize("attention", ["global", "local"])
def test_what_padding_holds_moves_no_other_prediction(attention, grid):
    decoder, (latent, keep, drop) = make(grid, attention, window=3), inputs(grid)
    pad = padding(grid, 3)
    pad[1] = True  # nothing but padding
    expected = decoder(latent, keep, drop, grid, pad)
    hidden = pad.gather(1, keep)
    latent[:, 1:][hidden] += 10 * torch.randn_like(latent[:, 1:][hidden])
    moved = decoder(latent, keep, drop, grid, pad)
    scored = ~pad.gather(1, drop)
    assert hidden[2].any()
    assert scored.any()
    assert torch.equal(moved[scored], expected[scored])
    unpadded = decoder(latent, keep, drop, grid)
    assert not torch.allclose(unpadded[2][scored[2]], moved[2][scored[2]])
    latent.requires_grad_()
    prediction = decoder(latent, keep, drop, grid, pad)
    assert prediction.isfinite().all()
    (gradient,) = torch.autograd.grad(prediction.sum(), latent)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("attention", ["global", "local"])
def test_a_padded_sound_is_decoded_as_the_short_one_is_by_itself(attention):
    """Positions go on along time, so the short grid's are the beginning of the long one's."""
    decoder = DecoderConfig(dim=16, depth=2, num_heads=4, attention=attention, window=2).build(12, 6, (4, 8), (1,))
    latent, keep, drop = inputs((4, 5), prefix=int(attention == "global"))
    alone = decoder(latent, keep, drop, (4, 5))
    in_long = [index // 5 * 8 + index % 5 for index in (keep, drop)]
    rest = torch.tensor([[f * 8 + t for f in range(4) for t in range(5, 8)]]).expand(3, -1)
    pad = torch.zeros(3, 32, dtype=torch.bool).scatter(1, rest, True)
    kept, dropped = torch.cat([in_long[0], rest[:, :6]], 1), torch.cat([in_long[1], rest[:, 6:]], 1)
    padded = decoder(torch.cat([latent, torch.randn(3, 6, 12)], 1), kept, dropped, None, pad)
    torch.testing.assert_close(padded[:, : drop.shape[1]], alone, **CLOSE)


@pytest.mark.parametrize("attention", ["global", "local"])
def test_tokens_that_are_not_decoded_are_seen_by_nobody_and_cost_nothing(attention):
    grid = (4, 4, 4)
    decoder = make(grid, attention, window=2, depth=2)
    latent, keep, drop = inputs(grid, ratio=0.75)
    _, same, few = inputs(grid, mask=RunningCell(RandomMask(0.75), 0.5))
    assert torch.equal(keep, same)
    flops = []
    for index in (drop, few):
        with attention_kernel("naive"), FlopCounterMode(display=False) as counter:
            prediction = decoder(latent, keep, index, grid)
        assert prediction.shape == (*index.shape, 6)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.7 * flops[0]
    assert drop.shape[1] == 2 * few.shape[1]
    if attention == "local":
        none = torch.zeros(3, 64, dtype=torch.bool)
        torch.testing.assert_close(prediction, slow_twin(decoder, latent, keep, few, grid, none, 2), **CLOSE)


@pytest.mark.parametrize("attention", ["global", "local"])
def test_the_order_of_tokens_means_nothing(attention):
    decoder, (latent, keep, drop) = make((5, 6), attention), inputs((5, 6))
    expected = decoder(latent, keep, drop)
    first, second = torch.randperm(keep.shape[1]), torch.randperm(drop.shape[1])
    latent = torch.cat([latent[:, :1], latent[:, 1:][:, first]], 1)
    moved = decoder(latent, keep[:, first], drop[:, second])
    torch.testing.assert_close(moved, expected[:, second], **CLOSE)


def test_the_config_says_which_decoder_and_refuses_what_is_none():
    assert DecoderConfig().attention == "global"
    with pytest.raises(ValueError, match="attention"):
        DecoderConfig(attention="windowed")
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        DecoderConfig(attention="local", window=1)
    extended = DecoderConfig(dim=16, depth=1, num_heads=4).build(12, 6, (2, 3), extend=(1,))
    assert torch.equal(extended.positions((2, 5)).view(2, 5, 16)[:, :3], extended.positions().view(2, 3, 16))
    assert make((4, 4)).state_dict().keys() == make((4, 4), "global").state_dict().keys()
