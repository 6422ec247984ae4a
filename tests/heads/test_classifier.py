"""The classifier's head against formulas written out, and its batch norm against torch's and over two ranks.

Planted bugs that fail here: a backward pass that does not sum over the ranks, the biased variance in the running
statistics, the class token among the attended tokens, values and keys exchanged, the last blocks in reverse order.
"""

import pytest
import torch
import torch.nn.functional as F
from batch_norm_ranks import BATCH, DIM, STEPS, batches, walk
from ranks import on_ranks

from mmssl.config import validate
from mmssl.errors import UserError
from mmssl.heads.batch_norm import BatchNorm
from mmssl.heads.classifier import AttentivePool, HeadConfig


def latents(count=1, dim=6):
    return [torch.randn(3, 1 + 5, dim) for _ in range(count)]


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("mean", lambda x: x[:, 1:].mean(1)),
        ("cls", lambda x: x[:, 0]),
        ("cls+mean", lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)),
    ],
)
def test_scores_are_linear_in_what_is_pooled(pool, expected):
    (latent,) = latents()
    module = HeadConfig(pool=pool).build(6, 1, "mean", 4)
    torch.testing.assert_close(module([latent]), F.linear(expected(latent), module.linear.weight, module.linear.bias))


def test_without_a_pool_of_its_own_the_head_pools_as_the_encoder():
    assert HeadConfig().build(6, 1, "cls", 2).pool == "cls"
    assert HeadConfig(pool="mean").build(6, 1, "cls", 2).pool == "mean"


def test_several_blocks_are_concatenated_with_the_last_one_last():
    first, second = latents(2)
    module = HeadConfig(pool="cls", layers=2).build(6, 1, "mean", 4)
    expected = module.linear(torch.cat([first[:, 0], second[:, 0]], 1))
    torch.testing.assert_close(module([first, second]), expected)
    with pytest.raises(UserError, match="layers is 2, but the encoder has 1 blocks"):
        module([first])


@pytest.mark.parametrize("num_heads", [1, 3])
def test_attentive_pooling_equals_attention_written_out(num_heads):
    dim, pool = 6, AttentivePool(6, num_heads)
    torch.nn.init.normal_(pool.query)
    tokens = torch.randn(2, 5, dim)
    normed = F.layer_norm(tokens, (dim,))
    query = pool.to_query(pool.query)
    key, value = pool.to_key_value(normed).split(dim, -1)
    heads = []
    for part in torch.arange(dim).chunk(num_heads):
        scores = (key[..., part] @ query[part]) / len(part) ** 0.5
        heads.append((scores.softmax(1)[..., None] * value[..., part]).sum(1))
    x = pool.query + pool.proj(torch.cat(heads, 1))
    x = x + pool.mlp(F.layer_norm(x, (dim,)))
    torch.testing.assert_close(pool(tokens), x)


def test_attentive_pooling_ignores_the_order_of_tokens_and_the_class_token():
    (latent,) = latents()
    module = HeadConfig(pool="attentive", num_heads=2).build(6, 1, "mean", 4)
    other = torch.cat([torch.randn(3, 1, 6), latent[:, 1:].flip(1)], 1)
    torch.testing.assert_close(module([other]), module([latent]))


def test_every_parameter_of_an_attentive_head_learns():
    module = HeadConfig(pool="attentive", layers=2, batch_norm=True).build(6, 1, "mean", 4)
    F.cross_entropy(module(latents(2)), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "key" not in n)


def test_settings_that_do_not_fit_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="'cls' needs a class token"):
        HeadConfig(pool="cls").build(6, 0, "mean", 4)
    with pytest.raises(ValueError, match="num_heads 4 does not divide the encoder's width 6"):
        HeadConfig(pool="attentive", num_heads=4).build(6, 0, "mean", 4)
    with pytest.raises(UserError, match="pool: 'attentif' is not valid; did you mean 'attentive'"):
        validate(HeadConfig, {"pool": "attentif"}, "recipe")


def test_batch_norm_normalises_and_backpropagates_as_torch_does():
    ours, theirs = BatchNorm(DIM), torch.nn.BatchNorm1d(DIM, eps=1e-6, affine=False)
    x = batches()[0][0]
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(one), theirs(two), rtol=1e-5, atol=1e-5)
    ours(one).pow(3).sum().backward()
    theirs(two).pow(3).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_running_statistics_are_the_mean_of_the_first_batches_then_torchs_average():
    norm, x = BatchNorm(1), torch.randn(30, 4, 1)
    for batch in x[:6]:
        norm(batch)
    torch.testing.assert_close(norm.running_mean, x[:6].mean((0, 1)))
    torch.testing.assert_close(norm.running_var, x[:6].var(1).mean(0))
    for batch in x[6:10]:
        norm(batch)
    theirs = torch.nn.BatchNorm1d(1, affine=False)
    theirs.load_state_dict({"running_mean": norm.running_mean, "running_var": norm.running_var}, strict=False)
    for batch in x[10:]:
        norm(batch)
        theirs(batch)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(norm.running_var, theirs.running_var)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    norm, x = BatchNorm(DIM), batches()[0]
    norm(x[0])
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    alone = norm.eval()(x[1])
    torch.testing.assert_close(norm(x[1, :1]), alone[:1])
    torch.testing.assert_close(alone, (x[1] - before["running_mean"]) / (before["running_var"] + 1e-6).sqrt())
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_one_sample_has_no_batch_statistics():
    with pytest.raises(UserError, match="2 samples or more"):
        BatchNorm(DIM)(torch.randn(1, DIM))


@pytest.mark.distributed
def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch():
    one, two = on_ranks(walk)
    whole = walk(0, 1)
    for name in ("y", "x.grad"):
        torch.testing.assert_close(torch.cat([one[name], two[name]], 1), whole[name], rtol=1e-4, atol=1e-6)
        assert whole[name].shape == (STEPS, BATCH, DIM)
    for name in whole.keys() - {"y", "x.grad"}:
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], whole[name], rtol=1e-4, atol=1e-6)
