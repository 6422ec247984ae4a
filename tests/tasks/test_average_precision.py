"""mAP: parity with scikit-learn, ties and classes without a positive included, and intervals that mean something."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from tasks.metrics import Score, average_precision, average_precision_scores


def made(n=120, classes=4, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    target = (rng.random((n, classes)) < 0.3).astype(np.float32)
    scores = target + noise * rng.standard_normal((n, classes))
    return torch.from_numpy(scores).float(), torch.from_numpy(target)


@pytest.mark.parametrize("decimals", [8, 0])  # with 0, most scores are equal to others
def test_average_precision_is_scikit_learns(decimals):
    scores, target = made()
    scores = scores.round(decimals=decimals)
    expected = [average_precision_score(target[:, c], scores[:, c]) for c in range(4)]
    assert average_precision(scores, target).tolist() == pytest.approx(expected)
    mean, per_class = average_precision_scores(scores, target, resamples=20)
    assert mean.value == pytest.approx(average_precision_score(target, scores, average="macro"))
    assert [one.value for one in per_class] == pytest.approx(expected)


def test_a_class_without_a_positive_is_not_in_the_mean():
    scores, target = made()
    target[:, 2] = 0
    mean, per_class = average_precision_scores(scores, target, resamples=50)
    others = [0, 1, 3]
    assert mean.value == pytest.approx(average_precision(scores, target)[others].mean().item())
    assert np.isnan(per_class[2].value)
    assert mean.low < mean.value < mean.high


def test_order_is_all_that_counts_and_a_perfect_one_is_one():
    scores, target = made()
    assert torch.equal(average_precision(scores, target), average_precision(scores.exp() * 7, target))
    assert average_precision(target, target).tolist() == [1.0] * 4
    constant = average_precision(torch.zeros_like(target), target)
    assert constant.tolist() == pytest.approx(target.mean(0).tolist())


def test_intervals_are_those_of_a_bootstrap_of_files():
    scores, target = made(n=60, classes=2)
    mean, per_class = average_precision_scores(scores, target, resamples=200)
    assert mean == average_precision_scores(scores, target, resamples=200)[0]
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(150):
        rows = rng.integers(0, 60, 60)
        drawn.append([average_precision_score(target[rows, c], scores[rows, c]) for c in range(2)])
    low, high = np.quantile(np.mean(drawn, 1), [0.025, 0.975])
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=0.06)
    low, high = np.quantile(np.array(drawn)[:, 0], [0.025, 0.975])
    assert (per_class[0].low, per_class[0].high) == pytest.approx((low, high), abs=0.06)
    wide = average_precision_scores(*made(n=600, classes=2), resamples=200)[0]
    assert wide.high - wide.low < (mean.high - mean.low) / 2


@pytest.mark.parametrize(("n", "classes", "decimals", "resamples"), [(40, 5, 0, 60), (40, 5, 8, 60), (40000, 1, 2, 30)])
def test_a_resample_is_scored_as_the_files_it_holds(n, classes, decimals, resamples):
    """The slow twin scores each resample by itself; with 40000 files the resamples come in more than one chunk."""
    scores, target = made(n, classes)
    target[:, 1:2] = 0
    target[3:, 2:3] = 0  # few positives: many resamples have none
    scores = scores.round(decimals=decimals)
    mean, per_class = average_precision_scores(scores, target, seed=3, resamples=resamples)
    found = np.full((resamples, classes), np.nan)
    for r, counts in enumerate(np.random.default_rng(3).multinomial(n, np.full(n, 1 / n), size=resamples)):
        for c in np.flatnonzero((counts[:, None] * target.numpy()).any(0)):
            found[r, c] = average_precision_score(target[:, c], scores[:, c], sample_weight=counts)
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile(np.nanmean(found, 1), [0.025, 0.975])), abs=1e-12)
    for c, one in enumerate(per_class):
        bounds = [np.nan] * 2 if c == 1 else np.nanquantile(found[:, c], [0.025, 0.975])
        assert (one.low, one.high) == pytest.approx(tuple(bounds), abs=1e-12, nan_ok=True)


def test_what_is_not_defined_is_said_so():
    assert str(Score(*[float("nan")] * 3)) == "not measured"
    assert str(Score(0.5, 0.25, 0.75)) == "50.0% (25.0-75.0)"


def test_what_cannot_be_measured_is_refused():
    scores, target = made()
    with pytest.raises(ValueError, match=r"\[n, C\] are needed"):
        average_precision(scores, target[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        average_precision(scores.fill_(float("nan")), target)
