"""Exact search: against plain sorting in float64, ties, crowds, blocks of uneven size, and what is no number.

Planted bugs that fail here: no allowance for the rough scores' rounding, a later row first among equals, rows counted
anew in every block, best of a block taken for best of all.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmssl.errors import UnusableData
from tasks import search_rank
from tasks.search_rank import ROUGH, nearest, nearest_plain


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sorted_all(vectors, query, k):
    """Return the scores and rows of sorting everything, in float64; what is equal in float32 is equal."""
    scores = (vectors.double() @ query.double()).float().numpy()
    order = np.lexsort((np.arange(len(scores)), -scores))[:k]
    return scores[order], order


@pytest.mark.parametrize(
    ("sizes", "k"), [([1], 1), ([7], 3), ([5, 5, 2], 4), ([64, 1, 300], 20), ([3, 4], 50), ([], 5)]
)
@pytest.mark.parametrize("dim", [3, 64, 513])
def test_the_best_are_those_of_sorting_everything(sizes, k, dim):
    vectors, query = units(sum(sizes), dim).half(), units(dim, seed=1)
    scores, rows = nearest(vectors.split(sizes) if sizes else [], query, k)
    expected, order = sorted_all(vectors, query, k)
    assert rows.tolist() == order.tolist()
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_equal_scores_are_in_the_order_of_rows_across_blocks():
    some = units(5, 16).half()
    vectors = some.repeat(40, 1)
    query = some[3].float()
    for k in (1, 7, 40, 41, 120):
        assert (
            nearest(vectors.split([70, 1, 9, 120]), query, k)[1].tolist() == sorted_all(vectors, query, k)[1].tolist()
        )


def test_a_crowd_closer_than_the_rough_scores_tell_apart_is_told_apart():
    query, others = units(16, seed=2), units(4000, 16)
    others = F.normalize(others - (others @ query)[:, None] * query, dim=1)
    near = 0.375 + 1e-3 * torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    vectors = (near * query + (1 - near**2).sqrt() * others).half()
    rough = torch.mv(vectors, query.half()).float()
    lost = 0
    for k in (5, 60, 200, 777, 1500, 3999):
        rows = sorted_all(vectors, query, k)[1]
        for size in (4000, 700):
            assert nearest(vectors.split(size), query, k)[1].tolist() == rows.tolist()
        lost += int((rough[rows] < rough.topk(k).values[-1]).sum())
    assert len(rough.unique()) < 20
    assert lost > 0  # by the rough scores alone


@pytest.mark.parametrize("dim", [16, 512, 4096])
def test_rough_scores_are_as_near_as_they_are_said_to_be(dim):
    vectors = torch.cat([units(500, dim), units(1, dim, seed=1).expand(20, -1)]).half()
    for query in (units(dim, seed=1), units(dim, seed=3), F.one_hot(torch.tensor(0), dim).float()):
        exact = vectors.double() @ query.double()
        assert (torch.mv(vectors, query.half()).double() - exact).abs().max() < ROUGH


def test_a_processor_that_rounds_more_gets_the_same_answer(monkeypatch):
    vectors, query = units(400, 32).half(), units(32, seed=1)
    expected, product = nearest_plain(vectors.split(150), query, 10), torch.mv
    monkeypatch.setattr(search_rank.torch, "mv", lambda a, b: product(a, b).sub(0.3).mul(4).round().div(4))
    found = nearest(vectors.split(150), query, 10)
    assert found[1].tolist() == expected[1].tolist() == sorted_all(vectors, query, 10)[1].tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error_and_no_result(bad):
    vectors = units(50, 8).half()
    vectors[30, 2] = bad
    with pytest.raises(UnusableData, match="NaN or infinite"):
        nearest(vectors.split(20), units(8, seed=1), 5)


def test_a_number_of_results_that_is_none_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        nearest([units(3, 4).half()], units(4), 0)
