"""InfoNCE: a loop is the oracle; chance is log N; the bound keeps below what there is to know and tightens with N."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmssl.losses.info_nce import chosen, info_nce


def test_it_is_the_cross_entropy_of_the_positive_among_those_present():
    positive, negatives = 3 * torch.randn(4, 5), 3 * torch.randn(4, 5, 7)
    present = torch.rand(4, 5, 7) < 0.6
    loss, hits = info_nce(positive, negatives, present), chosen(positive, negatives, present)
    for i in range(4):
        for j in range(5):
            scores = [float(positive[i, j])]
            scores += [float(s) for s, there in zip(negatives[i, j], present[i, j], strict=True) if there]
            wanted = -scores[0] + math.log(sum(math.exp(s) for s in scores))
            assert loss[i, j] == pytest.approx(wanted, abs=1e-5)
            assert bool(hits[i, j]) == all(scores[0] > s for s in scores[1:])
    logits = torch.cat([positive.unsqueeze(-1), negatives], -1).flatten(0, 1)
    whole = F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(info_nce(positive, negatives).flatten(), whole)


@pytest.mark.parametrize("n", [1, 2, 129, 8192])
def test_constant_scores_give_log_n(n):
    for value in (0.0, -37.5):
        loss = info_nce(torch.full((3,), value), torch.full((3, n - 1), value))
        torch.testing.assert_close(loss, torch.full((3,), math.log(n)), atol=1e-5, rtol=0)
    assert not chosen(torch.zeros(3), torch.zeros(3, max(1, n - 1))).any()


def test_a_constant_added_to_all_scores_changes_nothing():
    positive, negatives = torch.randn(6), torch.randn(6, 9)
    torch.testing.assert_close(
        info_nce(positive + 80, negatives + 80), info_nce(positive, negatives), atol=1e-5, rtol=0
    )
    assert torch.equal(chosen(positive + 80, negatives + 80), chosen(positive, negatives))


def test_without_negatives_there_is_no_loss_and_no_gradient():
    positive, negatives = torch.randn(3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    info_nce(positive, negatives, torch.zeros(3, 4, dtype=torch.bool)).sum().backward()
    assert (positive.grad == 0).all()
    assert (negatives.grad == 0).all()


def test_great_and_bf16_scores_stay_finite():
    positive, negatives = torch.tensor([-1e4, 1e4]), torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    torch.testing.assert_close(info_nce(positive, negatives), torch.tensor([2e4, 0.0]))
    assert info_nce(positive.bfloat16(), negatives.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dim", [16, 512])
def test_a_tie_to_rounding_is_a_miss(dim):
    prediction, z = torch.randn(200, dim), torch.randn(dim).relu()
    positive, negatives = (prediction * z).sum(-1), prediction @ z.expand(9, dim).T
    assert chosen(positive, negatives).float().mean() < 0.02  # sums that all but cancel out may be rounded by more
    assert chosen(positive + 1e-3 * positive.abs(), negatives).all()


def gaussian_bound(dim: int, rho: float, n: int, samples: int) -> tuple[float, float]:
    """Return log N - InfoNCE of correlated normal vectors under the best scores, log p(x|c) / p(x), and its deviation.

    Of each coordinate, x given c is normal around rho c with variance 1 - rho^2. The deviation is that of the mean.
    """
    generator = torch.Generator().manual_seed(0)  # more candidates are the fewer and others
    c, noise = torch.randn(2, samples, 1, dim, generator=generator, dtype=torch.float64)
    others = torch.randn(n - 1, samples, dim, generator=generator, dtype=torch.float64).transpose(0, 1)
    variance = 1 - rho**2

    def score(x: torch.Tensor) -> torch.Tensor:
        return (x.square() / 2 - (x - rho * c).square() / (2 * variance)).sum(-1) - dim / 2 * math.log(variance)

    bound = math.log(n) - info_nce(score(rho * c + variance**0.5 * noise).squeeze(1), score(others))
    return float(bound.mean()), float(bound.std() / samples**0.5)


@pytest.mark.parametrize(("dim", "rho"), [(2, 0.5), (4, 0.8), (10, 0.9)])
def test_the_bound_of_gaussians_keeps_below_their_information_and_tightens(dim, rho):
    known = -dim / 2 * math.log(1 - rho**2)
    found = []
    for n in (2, 8, 64, 512):
        bound, deviation = gaussian_bound(dim, rho, n, samples=2000)
        assert bound <= known + 4 * deviation
        assert bound <= math.log(n)
        found.append(bound)
    assert found == sorted(found)
    if math.log(512) > 2 * known:  # with candidates enough, it is all but reached
        assert found[-1] > 0.95 * known
    assert found[0] < 0.75 * known
