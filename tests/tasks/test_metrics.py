"""Classification scores against scikit-learn, and intervals against the plain bootstrap that they stand for."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from tasks.metrics import Score, accuracy, classification_scores, score_table, scores_as_dict, target_rank


@pytest.fixture
def guesses():
    """Scores of 9 classes of very different sizes, right about half the time."""
    rng = np.random.default_rng(0)
    target = rng.choice(9, 400, p=np.arange(1, 10) / 45)
    scores = rng.normal(size=(400, 9)) + 1.5 * np.eye(9)[target]
    return torch.from_numpy(scores), torch.from_numpy(target)


def test_values_equal_scikit_learn(guesses):
    scores, target = guesses
    got = classification_scores(scores, target, resamples=10)
    assert got["top1"].value == pytest.approx(accuracy_score(target, scores.argmax(1)))
    assert got["top5"].value == pytest.approx(top_k_accuracy_score(target, scores, k=5))
    assert got["mean_per_class"].value == pytest.approx(balanced_accuracy_score(target, scores.argmax(1)))


def test_intervals_equal_those_of_resampled_samples(guesses):
    scores, target = guesses
    got = classification_scores(scores, target, resamples=20_000)
    rng, best, rank = np.random.default_rng(1), scores.argmax(1).numpy(), target_rank(scores, target).numpy()
    truth = target.numpy()
    drawn = {"top1": [], "top5": [], "mean_per_class": []}
    for _ in range(4000):
        rows = rng.integers(0, len(truth), len(truth))
        hit = best[rows] == truth[rows]
        size = np.bincount(truth[rows], minlength=9)
        recall = np.bincount(truth[rows], hit, minlength=9)[size > 0] / size[size > 0]
        drawn["top1"].append(hit.mean())
        drawn["top5"].append((rank[rows] < 5).mean())
        drawn["mean_per_class"].append(recall.mean())
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert got[name].low == pytest.approx(low, abs=0.006), name
        assert got[name].high == pytest.approx(high, abs=0.006), name


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    scores = [accuracy(torch.from_numpy(rng.random(150) < 0.7)) for _ in range(300)]
    assert 0.91 < np.mean([score.low <= 0.7 <= score.high for score in scores]) < 0.98


def test_none_or_all_of_a_few_still_has_an_interval():
    """Wilson's for 0 of 18 ends at z^2 / (n + z^2)."""
    none, every = accuracy(torch.zeros(18, dtype=torch.bool)), accuracy(torch.ones(18, dtype=torch.bool))
    assert none == pytest.approx((0.0, 0.0, 1.959964**2 / (18 + 1.959964**2)), abs=1e-6)
    assert every == pytest.approx((1.0, 1 - none.high, 1.0))


def test_narrower_confidence_is_a_narrower_interval():
    correct = torch.arange(200) % 3 > 0
    wide, narrow = accuracy(correct), accuracy(correct, confidence=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_accuracy_is_the_top1_of_the_same_answers(guesses):
    scores, target = guesses
    top1 = classification_scores(scores, target, resamples=4000)["top1"]
    got = accuracy(scores.argmax(1) == target)
    assert got.value == pytest.approx(top1.value)
    assert (got.low, got.high) == pytest.approx((top1.low, top1.high), abs=0.01)


def test_constant_scores_are_worth_no_more_than_guessing_the_first_classes():
    target = torch.arange(100) % 10
    got = classification_scores(torch.zeros(100, 10), target)
    assert got["top1"].value == pytest.approx(0.1)
    assert got["top5"].value == pytest.approx(0.5)
    assert got["mean_per_class"].value == pytest.approx(0.1)
    last = classification_scores(torch.zeros(100, 10), torch.full((100,), 9))
    assert last["top5"] == Score(0.0, 0.0, 0.0)


def test_order_of_samples_and_size_of_chunks_change_nothing(guesses):
    scores, target = guesses
    order = torch.randperm(len(target))
    assert classification_scores(scores, target) == classification_scores(scores[order], target[order])
    assert torch.equal(target_rank(scores, target, chunk=7), target_rank(scores, target))


def test_top5_needs_more_than_five_classes(guesses):
    scores, target = guesses
    assert "top5" not in classification_scores(scores[:, :5], target.clamp(max=4))
    assert "top5" in classification_scores(scores[:, :6], target.clamp(max=5))


def test_perfect_scores_have_a_sharp_interval_and_absent_classes_do_not_count():
    got = classification_scores(torch.eye(8)[[2, 5, 5]], torch.tensor([2, 5, 5]))
    assert set(got.values()) == {Score(1.0, 1.0, 1.0)}


def test_many_classes_are_resampled_in_parts():
    classes = 3000
    got = classification_scores(torch.eye(classes)[torch.arange(classes) // 2 * 2], torch.arange(classes))
    assert got["top1"].value == 0.5
    assert 0.47 < got["top1"].low < 0.49 < 0.51 < got["top1"].high < 0.53


@pytest.mark.parametrize(
    ("scores", "target"),
    [
        (torch.tensor([[0.0, float("nan")]]), torch.tensor([0])),
        (torch.tensor([[float("nan"), float("nan")]]), torch.tensor([1])),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_what_has_no_score_is_refused(scores, target):
    with pytest.raises(ValueError):
        classification_scores(scores, target)
    with pytest.raises(ValueError):
        accuracy(torch.zeros(0, dtype=torch.bool))


def test_json_and_table(guesses):
    scores = classification_scores(*guesses)
    assert str(Score(0.5, 0.461, 1.0)) == "50.0% (46.1-100.0)"
    assert set(scores_as_dict(scores)["top1"]) == {"value", "low", "high"}
    table = score_table("Title", {"one": scores, "two [a, b]": scores})
    screen = io.StringIO()
    Console(file=screen, width=80).print(table)
    assert all(str(score) in screen.getvalue() for score in scores.values())
    assert "two [a, b]" in screen.getvalue()
    assert table.row_count == 2
    assert [column.header for column in table.columns[1:]] == ["top1", "top5", "mean per class"]
