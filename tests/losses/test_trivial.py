"""What knowing nothing scores: against every constant that could be tried, and the same on any number of ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor

from mmssl.heads.prediction import ContrastivePrediction, NegativesConfig
from mmssl.losses.contrastive import pairwise_sigmoid, symmetric_info_nce
from mmssl.losses.reconstruction import constant_mse, patch_mse
from mmssl.objectives.clip import guessing

B, M, P = 8, 6, 5


def targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scored = torch.rand(B, M, generator=generator) > 0.4
    scored[:, 0] = True
    return 3 + torch.randn(B, M, P, generator=generator), scored


@pytest.mark.parametrize("padded", [False, True])
def test_no_constant_patch_scores_less(padded):
    target, scored = targets()
    scored = scored if padded else None
    constant = torch.zeros(P, requires_grad=True)
    optimizer = torch.optim.LBFGS([constant], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = patch_mse(constant.expand(B, M, P), target, scored).mean()
        value.backward()
        return value

    optimizer.step(loss)
    best = loss().detach()
    torch.testing.assert_close(constant_mse(target, scored), best, rtol=1e-4, atol=1e-5)
    assert not constant_mse(target, scored).requires_grad


def walk(rank: int, size: int) -> dict[str, Tensor]:
    """Return the means over the ranks of what each says of its part."""
    target, scored = targets()
    mine = slice(rank * B // size, (rank + 1) * B // size)
    found = {"plain": constant_mse(target[mine]), "padded": constant_mse(target[mine], scored[mine])}
    if size > 1:
        for value in found.values():
            torch.distributed.all_reduce(value)
            value /= size
    return found


@pytest.mark.distributed
def test_two_ranks_know_as_little_as_one():
    alone = walk(0, 1)
    for found in on_ranks(walk):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_pairs_that_are_all_alike_score_no_less_than_guessing(count):
    alike = F.normalize(torch.ones(count, 4), dim=1)
    softmax = symmetric_info_nce(alike, alike, torch.tensor(3.0)).losses.mean()
    torch.testing.assert_close(guessing(torch.tensor(float(count)), "softmax"), softmax, atol=1e-5, rtol=1e-5)
    biases = torch.linspace(-6, 6, 601)
    sums = [pairwise_sigmoid(alike, alike, torch.tensor(0.0), bias).losses.mean() for bias in biases]
    assert float(guessing(torch.tensor(float(count)), "sigmoid")) == pytest.approx(float(min(sums)), abs=3e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_a_head_that_knows_nothing_scores_what_it_calls_trivial(padded):
    """Its matrices start at zero, so that all candidates are alike."""
    head = ContrastivePrediction(4, 3, steps=2, negatives=NegativesConfig(count=None))
    present = torch.ones(3, 9, dtype=torch.bool)
    if padded:
        present[1, 5:] = present[2, 1:] = False  # of the last sample nothing can be predicted
    step = head(torch.randn(3, 9, 4), torch.randn(3, 9, 3), torch.arange(3), present)
    torch.testing.assert_close(step.metrics["trivial"], step.loss.detach())
    assert step.loss.item() > math.log(5)
