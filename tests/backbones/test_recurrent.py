"""Recurrent backbones: torch's own layers are the oracle; nothing later is seen; a carried state is the whole."""

import pytest
import torch
from torch import nn

from mmssl.backbones.gru import GRUConfig, LSTMConfig, Recurrent
from mmssl.contracts import Streams

CONFIGS = [GRUConfig, LSTMConfig]


@pytest.fixture(params=CONFIGS, ids=["gru", "lstm"])
def backbone(request) -> Recurrent:
    return request.param(dim=8, depth=2, input_dim=6).build()


def test_two_layers_are_torchs_two_layers(backbone):
    theirs = type(backbone.blocks[0])(6, 8, num_layers=2, batch_first=True)
    for layer, block in enumerate(backbone.blocks):
        for name, weight in block.named_parameters():
            getattr(theirs, name.replace("_l0", f"_l{layer}")).data.copy_(weight.data)
    x = torch.randn(3, 9, 6)
    torch.testing.assert_close(backbone(x), theirs(x)[0])
    assert isinstance(backbone, Streams)


def test_what_is_later_changes_nothing_to_the_bit_and_gets_no_gradient(backbone):
    x, t = torch.randn(3, 11, 6), 5
    changed = torch.cat([x[:, :t], 100 * torch.randn(3, 6, 6)], 1)
    before, after = backbone(x), backbone(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])
    x.requires_grad_()
    backbone(x)[:, :t].square().sum().backward()
    assert (x.grad[:, t:] == 0).all()
    assert (x.grad[:, :t] != 0).any(-1).all()


@pytest.mark.parametrize("chunks", [(1,) * 10, (10,), (4, 1, 5)])
def test_chunks_of_any_size_are_the_whole(backbone, chunks):
    x, state, found = torch.randn(3, 10, 6), None, []
    for chunk in x.split(chunks, 1):
        y, state = backbone.step(chunk, state)
        assert {part.shape for part in state} == {(3, 8)}
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), backbone(x), atol=1e-5, rtol=0)


def test_a_state_is_each_samples_own(backbone):
    x = torch.randn(3, 10, 6)
    _, state = backbone.step(x[:, :4])
    together, _ = backbone.step(x[:, 4:], state)
    order = torch.tensor([2, 0])
    turned, _ = backbone.step(x[order, 4:], tuple(part[order] for part in state))
    torch.testing.assert_close(turned, together[order])
    torch.testing.assert_close(backbone(x)[1:2], backbone(x[1:2]))


def test_the_last_of_the_layers_is_the_output(backbone):
    x = torch.randn(2, 5, 6)
    first, last = backbone.layers(x)
    assert torch.equal(last, backbone(x))
    torch.testing.assert_close(backbone.blocks[1](first)[0], last)


def test_the_state_stays_fp32_under_bf16(backbone):
    x = torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = backbone.step(x.bfloat16())
    assert {y.dtype, *(part.dtype for part in state)} == {torch.float32}
    torch.testing.assert_close(y, backbone(x.bfloat16().float()))


@pytest.mark.parametrize("config", CONFIGS)
def test_settings(config):
    settings = config(dim=8)
    assert settings.reads == 8
    assert settings.causal
    assert config(dim=8, input_dim=3).reads == 3
    assert isinstance(config(dim=8, input_dim=3).build().blocks[0], {"gru": nn.GRU, "lstm": nn.LSTM}[settings.name])
