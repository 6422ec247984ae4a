"""The Transformer's parts: attention kernels, the last-block shortcut, and randomness that belongs to the sample."""

import pytest
import torch
from scipy import stats

from mmssl.backbones.blocks import (
    Attention,
    Block,
    SlicedLinear,
    attend,
    attention_kernel,
    choose_kernel,
    drop_path,
    uniform,
)

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def randomised(module):
    """Give biases, norms and gains values that matter."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def padding(batch, tokens):
    """Rows padded by different amounts, none of them wholly."""
    return torch.arange(tokens) >= tokens - 1 - 2 * torch.arange(batch)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("queries", [11, 3])
def test_attention_kernels_agree_forward_and_backward(dtype, padded, queries):
    q = torch.randn(3, 2, queries, 8, dtype=dtype)
    k, v = torch.randn(2, 3, 2, 11, 8, dtype=dtype)
    pad = padding(3, 11) if padded else None
    results = []
    for kernel in ("naive", "sdpa"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with attention_kernel(kernel):
            out = attend(*leaves, pad)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for naive, sdpa in zip(*results, strict=True):
        scale = sdpa.abs().max().clamp(min=1)
        torch.testing.assert_close(naive / scale, sdpa / scale, **TOLERANCE[dtype])


def test_kernel_choice_is_by_device_dtype_and_length_and_is_put_back(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_kernel("cpu", torch.bfloat16, 50) == "sdpa"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_kernel("cpu", torch.float32, 50) == "sdpa"
    assert choose_kernel("cpu", torch.bfloat16, 50) == "naive"
    assert choose_kernel("cpu", torch.bfloat16, 500) == "sdpa"
    assert choose_kernel("cuda", torch.bfloat16, 50) == "sdpa"
    q = torch.randn(1, 1, 4, 8)
    before = attend(q, q, q)
    with pytest.raises(RuntimeError, match="stop"), attention_kernel("naive"):
        raise RuntimeError("stop")
    assert torch.equal(attend(q, q, q), before)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="does not divide"):
        Attention(10, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_sliced_linear_is_the_slice_of_the_whole(bias):
    layer, x = SlicedLinear(6, 9, bias=bias), torch.randn(2, 6)
    torch.testing.assert_close(layer(x, slice(3, 7)), layer(x)[:, 3:7])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"layer_scale": 0.5, "drop_path": 0.5, "stream": 3}])
def test_last_block_shortcut_equals_the_full_computation(padded, options):
    block = randomised(Block(16, 4, **options))
    x, seeds = torch.randn(6, 10, 16), torch.arange(6)
    pad = padding(6, 16)[:, :10] if padded else None
    results = []
    for shortcut in (True, False):
        leaf = x.clone().requires_grad_()
        out = block(leaf, pad, seeds, queries=4) if shortcut else block(leaf, pad, seeds)[:, -4:]
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])])
    for fast, slow in zip(*results, strict=True):
        scale = slow.abs().max().clamp(min=1)
        torch.testing.assert_close(fast / scale, slow / scale, **TOLERANCE[torch.float32])


def splitmix64(state, draws):
    """Yield the outputs of splitmix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195), in plain integers."""
    for _ in range(draws):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_uniform_is_splitmix64():
    seeds = [0, 1, 12345, 2**62 + 3, 2**63 - 1, -1, -(2**63)]
    expected = torch.tensor([[(z >> 40) / 2**24 for z in splitmix64(seed, 6)] for seed in seeds])
    drawn = torch.stack([uniform(torch.tensor(seeds), stream) for stream in range(6)], dim=1)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, expected)
    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF  # the published first output for seed 0


def test_uniform_is_uniform_over_samples_and_streams_and_streams_are_unrelated():
    table = torch.stack([uniform(torch.arange(4000), stream) for stream in range(8)])
    assert table.min() >= 0
    assert table.max() < 1
    assert stats.kstest(table.flatten().numpy(), "uniform").pvalue > 0.01
    off_diagonal = torch.corrcoef(table) - torch.eye(8)
    assert off_diagonal.abs().max() < 4 / 4000**0.5


def test_drop_path_drops_at_its_rate_and_keeps_the_expectation():
    seeds = torch.arange(20000)
    out = drop_path(torch.ones(20000, 1, 2), 0.3, seeds, stream=5)
    dropped = (out == 0).all(dim=(1, 2))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 20000) ** 0.5)
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 1 / 0.7))
    x = torch.randn(4, 1, 2)
    assert drop_path(x, 0.3, None, 0) is x
    assert drop_path(x, 0.0, seeds[:4], 0) is x


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_the_two_branches_of_a_block_draw_from_streams_of_their_own(stream):
    block = Block(8, 2, drop_path=0.5, stream=stream)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    block.attn.proj.bias.data.fill_(1.0)  # what each branch adds can now be told from the other
    block.mlp.fc2.bias.data.fill_(10.0)
    x, seeds = torch.randn(64, 3, 8), torch.arange(64)
    attention, mlp = ((uniform(seeds, 2 * stream + branch) >= 0.5).float() * 2 for branch in range(2))
    expected = x + (attention + 10 * mlp)[:, None, None]
    torch.testing.assert_close(block(x, None, seeds), expected)
    torch.testing.assert_close(block.eval()(x, None, seeds), x + 11)
