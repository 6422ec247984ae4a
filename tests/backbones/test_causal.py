"""The causal Transformer: nothing later is seen, only distances matter, and streaming is the whole sequence."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from mmssl.backbones.causal import CausalConfig, CausalTransformer, rotate
from mmssl.contracts import Streams

MEMORIES = [None, 1, 4, 64]


def make(memory=None, **options) -> CausalTransformer:
    return CausalConfig(dim=16, depth=2, num_heads=2, input_dim=6, memory=memory, **options).build()


def brute_force(model: CausalTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """The same network with loops over samples, heads, queries and keys."""
    x = model.reader(tokens)
    for block in model.blocks:
        heads, memory = block.num_heads, block.memory or tokens.shape[1]
        qkv = block.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1))
        attended = torch.zeros_like(x).unflatten(-1, (heads, -1))
        for b in range(len(x)):
            for h in range(heads):
                for t in range(x.shape[1]):
                    seen = range(max(0, t - memory + 1), t + 1)
                    query = rotate(qkv[b, t, 0, h].view(1, 1, 1, -1), torch.tensor([t])).flatten()
                    keys = [rotate(qkv[b, s, 1, h].view(1, 1, 1, -1), torch.tensor([s])).flatten() for s in seen]
                    scores = torch.stack([query @ key for key in keys]) * len(query) ** -0.5
                    weights = zip(scores.softmax(0), seen, strict=True)
                    attended[b, t, h] = sum(weight * qkv[b, s, 2, h] for weight, s in weights)
        x = x + block.proj(attended.flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


@pytest.mark.parametrize("memory", [None, 1, 3])
def test_it_is_attention_to_oneself_and_those_before(memory):
    model, x = make(memory), torch.randn(2, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), brute_force(model, x), atol=1e-5, rtol=0)


def test_rotations_tell_distances_and_nothing_else():
    q, k = torch.randn(2, 1, 2, 5, 8).double()
    place = torch.arange(5.0).double()
    scores = rotate(q, place) @ rotate(k, place).transpose(-1, -2)
    torch.testing.assert_close(rotate(q, place + 7) @ rotate(k, place + 7).transpose(-1, -2), scores)
    assert not torch.allclose(rotate(q, place + 7) @ rotate(k, place).transpose(-1, -2), scores)
    torch.testing.assert_close(rotate(q, place).norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_later_changes_nothing_to_the_bit_and_gets_no_gradient(memory):
    model, x, t = make(memory), torch.randn(3, 11, 6), 5
    changed = torch.cat([x[:, :t], 100 * torch.randn(3, 6, 6)], 1)
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])
    x.requires_grad_()
    model(x)[:, :t].square().sum().backward()
    assert (x.grad[:, t:] == 0).all()
    assert (x.grad[:, :t] != 0).any(-1).all()


def test_a_token_sees_as_far_as_the_memory_of_all_blocks_together():
    model, x = make(memory=4), torch.randn(1, 12, 6, requires_grad=True)
    model(x)[0, -1].square().sum().backward()
    seen = (x.grad[0] != 0).any(-1).nonzero().flatten()
    assert seen.tolist() == list(range(12 - 1 - 2 * 3, 12))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("chunks", [(1,) * 12, (12,), (5, 1, 6)])
def test_chunks_of_any_size_are_the_whole(memory, chunks):
    model, x, state, found = make(memory), torch.randn(3, 12, 6), None, []
    for chunk in x.split(chunks, 1):
        y, state = model.step(chunk, state)
        kept = state[0].shape[2]
        assert all(part.shape == (3, 2, kept, 8) for part in state)
        assert memory is None or kept <= memory - 1
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), model(x), atol=1e-5, rtol=0)


def test_a_long_stream_with_a_short_memory_is_the_whole():
    model, x, state, found = make(memory=8), torch.randn(1, 2000, 6), None, []
    for chunk in x.split(250, 1):
        y, state = model.step(chunk, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), model(x), atol=1e-4, rtol=0)


def test_a_state_is_each_samples_own():
    model, x = make(memory=4), torch.randn(3, 10, 6)
    _, state = model.step(x[:, :4])
    together, _ = model.step(x[:, 4:], state)
    order = torch.tensor([2, 0])
    turned, _ = model.step(x[order, 4:], tuple(part[order] for part in state))
    torch.testing.assert_close(turned, together[order])


def test_the_last_of_the_layers_is_the_output():
    model, x = make(), torch.randn(2, 5, 6)
    layers = model.layers(x)
    assert len(layers) == 2
    torch.testing.assert_close(layers[-1], model(x))


def test_stochastic_depth_is_for_training_and_a_samples_own():
    model, x, seeds = make(drop_path=0.9), torch.randn(16, 5, 6), torch.arange(16)
    whole = model(x)
    dropped = model.train()(x, None, seeds)
    assert not torch.allclose(dropped, whole)
    torch.testing.assert_close(model(x[3:7], None, seeds[3:7]), dropped[3:7])
    assert torch.equal(model.eval()(x, None, seeds), whole)
    for found, wanted in zip(model.layers(x, None, seeds), model.layers(x), strict=True):
        assert torch.equal(found, wanted)


def test_bf16_is_close():
    model, x = make(memory=4), torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert F.cosine_similarity(y.float(), model(x), dim=-1).min() > 0.99


def test_settings():
    assert isinstance(make(), Streams)
    assert CausalConfig(dim=16).reads == 16
    assert CausalConfig().causal
    with pytest.raises(ValidationError, match=r"dim 12 does not divide into num_heads 4 of an even width"):
        CausalConfig(dim=12, num_heads=4)
