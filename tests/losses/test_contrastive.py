"""Losses of pairs in tiles: the whole matrix in float64 is the slow twin, and other people's losses agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_ranks import LOSSES, PRESENT, walk
from ranks import on_ranks

from mmssl.cost import Live
from mmssl.losses.contrastive import pairwise_sigmoid, symmetric_info_nce

SHAPES = {"one pair": (1, 4), "divides": (8, 4), "does not": (7, 3), "one tile": (6, 6), "more than there is": (5, 99)}
PRESENCE = {"all": None, "some": 0.6, "none": 0.0}


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def tiled(loss, a, b, scale, bias, present=None, tile=3):
    if loss == "softmax":
        return symmetric_info_nce(a, b, scale, present, tile)
    return pairwise_sigmoid(a, b, scale, bias, present, tile)


def whole(loss, a, b, scale, bias, present=None):
    """Return losses [B] and matches [B, 2] from the matrix of those present."""
    there = torch.arange(len(a)) if present is None else present.nonzero().squeeze(1)
    logits = scale * a[there] @ b[there].T
    labels = torch.arange(len(there))
    if loss == "softmax":
        both = [F.cross_entropy(side, labels, reduction="none") for side in (logits, logits.T)]
        values = (both[0] + both[1]) / 2
    else:
        values = -F.logsigmoid((2 * torch.eye(len(there)) - 1) * (logits + bias)).sum(1)
    found = torch.zeros(len(a), 2, dtype=torch.bool)
    if len(there):
        found[there] = torch.stack([logits.argmax(dim) == labels for dim in (1, 0)], 1)
    return torch.zeros(len(a), dtype=a.dtype).index_put((there,), values), found


def outcome(run, loss, a, b, scale, bias, present, weights, **options):
    """Return the losses, the matches, and the gradients of a, b, scale (and bias) for weighted losses."""
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, scale, bias)]
    losses, found = run(loss, *leaves, present, **options)
    (losses * weights).sum().backward()
    grads = [leaf.grad for leaf in leaves[: 4 if loss == "sigmoid" else 3]]
    return losses.detach(), found, grads


def compare(loss, a, b, scale, bias, present, tile, tolerance):
    """Check ours in fp32 against the whole matrix in fp64, up to a part of what matters in size."""
    weights = torch.rand(len(a)) - 0.3
    losses, found, grads = outcome(tiled, loss, a, b, scale, bias, present, weights, tile=tile)
    doubles = [x.double() for x in (a, b, scale, bias)]
    wanted, wanted_found, wanted_grads = outcome(whole, loss, *doubles, present, weights.double())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=tolerance, atol=tolerance)
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert (grad.double() - want).norm() <= tolerance * max(1, want.norm())
    return found, wanted_found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("presence", PRESENCE)
def test_tiles_equal_the_whole_matrix(loss, shape, presence):
    pairs, tile = SHAPES[shape]
    share = PRESENCE[presence]
    present = None if share is None else torch.rand(pairs) < share
    for scale in (1.0, 14.0, 100.0):
        a = unit(pairs, 6)
        b = F.normalize(a + unit(pairs, 6), dim=1)
        found, wanted = compare(loss, a, b, torch.tensor(scale), torch.tensor(-4.0), present, tile, 2e-5)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_are_nearly_the_same_or_opposite_stay_exact(loss):
    base = unit(1, 16)
    for a, b in (
        (F.normalize(base + 1e-4 * unit(12, 16), dim=1), F.normalize(base + 1e-4 * unit(12, 16), dim=1)),
        (base.expand(12, 16), -base.expand(12, 16)),  # every logit is -100
        (torch.eye(12, 16), torch.eye(12, 16)),  # rows whose mismatches are 100 below
        (torch.eye(12, 16), -torch.eye(12, 16)),  # and 100 above
        (torch.eye(12, 16), torch.eye(12, 16)[:1].expand(12, 16)),  # a row's greatest is not its columns'
    ):
        # Logits of 100 are rounded by up to 1e-5.
        compare(loss, a, b, torch.tensor(100.0), torch.tensor(-10.0), None, 5, 5e-5)


def test_what_is_all_but_certain_keeps_its_small_loss_and_gradient():
    """The whole matrix in fp32 has lost them: 30 - log(e^30 + 3) is 0 there."""
    a = torch.eye(4).requires_grad_()
    losses = symmetric_info_nce(a, torch.eye(4), torch.tensor(30.0), tile=2).losses
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.full((4,), 3 * math.exp(-30)), rtol=1e-5, atol=0)
    # Rows and columns, which are alike: minus 3 for the pair, and 1 for each of the others.
    wanted = 30 * math.exp(-30) * (torch.ones(4, 4) - 4 * torch.eye(4))
    torch.testing.assert_close(a.grad, wanted, rtol=1e-5, atol=0)
    assert F.cross_entropy(30 * torch.eye(4), torch.arange(4)) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences(loss):
    leaves = [unit(5, 3).double().requires_grad_() for _ in range(2)]
    leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -1.5)]
    present = torch.tensor([True, True, False, True, True])
    assert tiled(loss, *leaves).losses.dtype == torch.float64
    for where in (None, present):
        assert torch.autograd.gradcheck(lambda *x, where=where: tiled(loss, *x, where, tile=2).losses, leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_absent_pairs_count_for_nothing_whatever_is_there(loss):
    a, b, scale, bias = unit(9, 5), unit(9, 5), torch.tensor(20.0), torch.tensor(-2.0)
    present = torch.tensor([False, True, True, False, True, True, True, True, False])
    weights = torch.rand(9)
    wanted = outcome(tiled, loss, a[present], b[present], scale, bias, None, weights[present])
    a[~present], b[~present] = torch.nan, torch.inf
    losses, found, grads = outcome(tiled, loss, a, b, scale, bias, present, weights)
    torch.testing.assert_close(losses[present], wanted[0])
    assert torch.equal(found[present], wanted[1])
    assert not losses[~present].any()
    assert not found[~present].any()
    for grad, want in zip(grads[:2], wanted[2][:2], strict=True):
        torch.testing.assert_close(grad[present], want)
        assert not grad[~present].any()
    torch.testing.assert_close(grads[2:], wanted[2][2:])


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_and_autocast_compute_in_fp32(loss):
    a, b, scale, bias = unit(7, 64), unit(7, 64), torch.tensor(50.0), torch.tensor(-5.0)
    weights = torch.ones(7)
    wanted = outcome(tiled, loss, a.bfloat16().float(), b.bfloat16().float(), scale, bias, None, weights)
    halves = outcome(tiled, loss, a.bfloat16(), b.bfloat16(), scale, bias, None, weights)
    assert torch.equal(halves[0], wanted[0])
    assert halves[2][0].dtype == torch.bfloat16
    wanted = outcome(tiled, loss, a, b, scale, bias, None, weights)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass, too
        within = outcome(tiled, loss, a, b, scale, bias, None, weights)
    assert torch.equal(within[0], wanted[0])
    for grad, want in zip(within[2], wanted[2], strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_pairs_changes_nothing(loss):
    a, b, scale, bias = unit(11, 8), unit(11, 8), torch.tensor(10.0), torch.tensor(-3.0)
    weights, order = torch.rand(11), torch.randperm(11)
    losses, found, grads = outcome(tiled, loss, a, b, scale, bias, None, weights, tile=4)
    mixed = outcome(tiled, loss, a[order], b[order], scale, bias, None, weights[order], tile=4)
    torch.testing.assert_close(mixed[0], losses[order])
    assert torch.equal(mixed[1], found[order])
    torch.testing.assert_close(mixed[2][:2], [grad[order] for grad in grads[:2]])
    torch.testing.assert_close(mixed[2][2:], grads[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tie_is_no_match(loss):
    same = unit(1, 32).expand(6, 32)
    assert not tiled(loss, same, same, torch.tensor(30.0), torch.tensor(-9.0)).found.any()
    a = torch.eye(6)
    b = a.clone()
    b[4] = b[1]  # of a_1 it is as good; of a_4 it is none
    found = tiled(loss, a, b, torch.tensor(30.0), torch.tensor(-9.0)).found
    assert found[:, 0].tolist() == [True, False, True, True, False, True]
    assert found[:, 1].tolist() == [True, True, True, True, False, True]


def test_it_is_the_loss_of_clip_in_transformers():
    modeling = pytest.importorskip("transformers.models.clip.modeling_clip")
    theirs = next(
        getattr(modeling, name) for name in ("clip_loss", "image_text_contrastive_loss") if hasattr(modeling, name)
    )
    a, b, scale = unit(13, 8), unit(13, 8), torch.tensor(100 / 7)
    leaves = [x.clone().requires_grad_() for x in (a, b, scale)]
    wanted = theirs(leaves[2] * leaves[1] @ leaves[0].T)
    wanted.backward()
    losses, _, grads = outcome(tiled, "softmax", a, b, scale, scale, None, torch.full((13,), 1 / 13), tile=5)
    torch.testing.assert_close(losses.mean(), wanted.detach())
    torch.testing.assert_close(grads, [leaf.grad for leaf in leaves])


def test_it_is_the_loss_of_siglip_in_transformers():
    """Their model on embeddings that are given: towers that pass them through, and its own parameters."""
    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Through(torch.nn.Module):
        def forward(self, pixel_values=None, input_ids=None, **_):
            return outputs.BaseModelOutputWithPooling(pooler_output=input_ids if pixel_values is None else pixel_values)

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = siglip.SiglipConfig(text_config=small, vision_config={**small, "image_size": 16, "patch_size": 16})
    model = siglip.SiglipModel(config)
    model.vision_model, model.text_model = Through(), Through()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(7.0))
        model.logit_bias.fill_(-4.0)
    a, b = (unit(13, 8).requires_grad_() for _ in range(2))
    wanted = model(input_ids=b, pixel_values=a, return_loss=True).loss
    wanted.backward()
    # Their rows are texts.
    args = "sigmoid", b, a, torch.tensor(7.0), torch.tensor(-4.0), None, torch.full((13,), 1 / 13)
    losses, _, grads = outcome(tiled, *args, tile=5)
    torch.testing.assert_close(losses.mean(), wanted.detach())
    # Theirs normalises once more, whose gradient has no part along the vector.
    for vector, grad, want in ((b, grads[0], b.grad), (a, grads[1], a.grad)):
        across = grad - (grad * vector).sum(1, keepdim=True) * vector
        torch.testing.assert_close(across.detach(), want)
    torch.testing.assert_close(grads[2] * 7, model.logit_scale.grad.squeeze(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[3], model.logit_bias.grad.squeeze())


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_is_linear_in_the_batch(loss):
    tile, width, peaks = 32, 4, []
    for pairs in (256, 512):
        leaves = [x.requires_grad_() for x in (unit(pairs, width), unit(pairs, width))]
        leaves += [torch.tensor(x, requires_grad=True) for x in (10.0, -5.0)]
        with Live(leaves) as live:
            tiled(loss, *leaves, tile=tile).losses.mean().backward()
        peaks.append(max(others for _, others in live.timeline))
        tiles = 4 * 2 * tile**2
        assert tiles < peaks[-1] < tiles + 4 * pairs * (3 * width + 16)  # of [B] at most 16
        assert peaks[-1] < 4 * pairs**2 / 4
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.distributed
def test_two_ranks_equal_one_process():
    one, two = on_ranks(walk)
    single = walk(0, 1)
    assert {name.rpartition("/")[0] for name in single} == {f"{loss}/{name}" for loss in LOSSES for name in PRESENT}
    assert one.keys() == two.keys() == single.keys()
    for name, value in single.items():
        assert torch.equal(one[name], two[name]), name
        assert (one[name] - value).norm() <= 1e-6 * value.norm(), name
        assert name.split("/")[1] == "none" or value.norm() > 1e-3, name
