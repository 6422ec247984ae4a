"""Causal strided convolutions: torch's own convolution is the oracle; nothing later is seen; chunks are the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmssl.backbones.conv import CausalConv, StridedConvs

PAPER = (10, 8, 4, 4, 4), (5, 4, 2, 2, 2)
SHAPES = [PAPER, ((3, 5), (2, 3)), ((7,), (1,)), ((9, 4), (2, 1)), ((4, 3), (4, 3))]
"""Kernels and strides: the paper's, no multiples of the stride, stride 1, five blocks of taps, and no overlap."""


def kernel_of(conv: CausalConv, channels: int) -> torch.Tensor:
    """Return the weights as torch's convolutions have them, [D, I, kernel]."""
    taps = conv.weight.view(conv.blocks, conv.dim, conv.stride, channels).permute(1, 3, 0, 2).flatten(2)
    return taps[..., conv.blocks * conv.stride - conv.kernel :]


def plain(convs: StridedConvs, x: torch.Tensor) -> torch.Tensor:
    """The same network of torch's parts, over [B, L, I]: padded on the left so that nothing later is seen."""
    for conv, norm in zip(convs.convs, convs.norms, strict=True):
        padded = F.pad(x.transpose(1, 2), (conv.kernel - conv.stride, 0))
        x = F.conv1d(padded, kernel_of(conv, x.shape[2]), conv.bias, conv.stride).transpose(1, 2)
        x = F.relu(F.layer_norm(x, x.shape[2:], norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else x)
    return x


@pytest.mark.parametrize(("kernels", "strides"), SHAPES)
@pytest.mark.parametrize("norm", ["channel", "none"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_it_is_a_convolution_padded_on_the_left_and_so_are_its_gradients(kernels, strides, norm, tokens):
    convs = StridedConvs(2, 6, kernels, strides, norm).double()
    x = torch.randn(3, tokens * convs.hop, 2, dtype=torch.float64, requires_grad=True)
    found, wanted = convs(x), plain(convs, x)
    assert found.shape == (3, tokens, 6)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    inputs = [x, *convs.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kernels", "strides"), SHAPES)
@pytest.mark.parametrize("norm", ["channel", "none"])
def test_what_is_later_changes_nothing_to_the_bit_and_gets_no_gradient(kernels, strides, norm):
    convs = StridedConvs(1, 8, kernels, strides, norm)
    x, t = torch.randn(2, 12 * convs.hop, 1), 6
    changed = x.clone()
    changed[:, t * convs.hop :] = 100 * torch.randn_like(changed[:, t * convs.hop :])
    before, after = convs(x), convs(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])
    x.requires_grad_()
    convs(x)[:, :t].square().sum().backward()
    assert (x.grad[:, t * convs.hop :] == 0).all()
    assert x.grad[:, : t * convs.hop].abs().sum() > 0


@pytest.mark.parametrize(("kernels", "strides"), SHAPES)
def test_sees_is_the_receptive_field_to_the_sample(kernels, strides):
    convs = StridedConvs(1, 16, kernels, strides, "none").double()
    x = torch.randn(1, convs.hop * (2 + -(-convs.sees // convs.hop)), 1, dtype=torch.float64, requires_grad=True)
    for conv in convs.convs:  # every tap counts and no ReLU closes
        nn.init.uniform_(conv.weight, 0.1, 1.0)
        nn.init.constant_(conv.bias, 100.0)
    convs(x)[0, -1].sum().backward()
    seen = x.grad[0, :, 0].nonzero().flatten()
    assert seen.tolist() == list(range(x.shape[1] - convs.sees, x.shape[1]))


def test_the_papers_layers_see_465_samples_and_step_160():
    convs = StridedConvs(1, 4, *PAPER)
    assert (convs.sees, convs.hop) == (465, 160)


@pytest.mark.parametrize(("kernels", "strides"), SHAPES)
@pytest.mark.parametrize("chunks", [(1,) * 11, (11,), (3, 1, 7), (1, 10)])
def test_chunks_of_any_size_are_the_whole(kernels, strides, chunks):
    convs = StridedConvs(2, 8, kernels, strides)
    x, state, found = torch.randn(3, 11 * convs.hop, 2), None, []
    for chunk in x.split([n * convs.hop for n in chunks], 1):
        y, state = convs.step(chunk, state)
        assert all(len(part) == 3 for part in state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), convs(x), atol=1e-5, rtol=0)


def test_a_state_is_each_samples_own():
    convs = StridedConvs(1, 8, (5, 4), (2, 2))
    x = torch.randn(3, 24, 1)
    _, state = convs.step(x[:, :12])
    together, _ = convs.step(x[:, 12:], state)
    order = torch.tensor([2, 0])
    turned, _ = convs.step(x[order, 12:], tuple(part[order] for part in state))
    torch.testing.assert_close(turned, together[order])


def test_norms_keep_to_their_own_moment_and_sample():
    convs = StridedConvs(1, 8, (4, 3), (2, 3), "channel")
    x = torch.randn(4, 36, 1)
    torch.testing.assert_close(convs(x)[1:2], convs(x[1:2]))
    louder = x.clone()
    louder[0] *= 50
    assert torch.equal(convs(louder)[1:], convs(x)[1:])


def test_weights_that_stand_for_no_tap_have_no_effect_and_no_gradient():
    conv = CausalConv(2, 3, kernel=5, stride=3)
    x = torch.randn(2, 12, 2)
    before = conv(x)
    unused = (conv.taps == 0).nonzero(as_tuple=True)
    assert len(unused[0]) == 1 * 2 * 3
    before.sum().backward()
    assert (conv.weight.grad[unused] == 0).all()
    with torch.no_grad():
        conv.weight[unused] = 1e6
    assert torch.equal(conv(x), before)


def test_a_kernel_shorter_than_its_stride_and_uneven_lists_are_refused():
    with pytest.raises(ValueError, match="a kernel of 2 with stride 3 would leave inputs out"):
        CausalConv(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"as many kernels as strides.*\[4, 4\] and \[2\]"):
        StridedConvs(1, 4, (4, 4), (2,))
    with pytest.raises(ValueError, match="as many kernels as strides"):
        StridedConvs(1, 4, (), ())


def test_initial_weights_are_those_of_torchs_convolutions():
    conv, theirs = CausalConv(64, 128, 4, 2), nn.Conv1d(64, 128, 4, 2)
    for ours, other in ((conv.weight, theirs.weight), (conv.bias, theirs.bias)):
        torch.testing.assert_close(ours.std(), other.std(), rtol=0.15, atol=0)
        torch.testing.assert_close(ours.abs().max(), other.abs().max(), rtol=0.05, atol=0)
