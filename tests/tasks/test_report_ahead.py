"""Curves of steps ahead: which lines of metrics are averaged, what is said of them, and when."""

import numpy as np
import pytest

from tasks.report_ahead import ahead_sections


def metrics(lines, every=50):
    """Line i, at step i * every (the first at step 1), has the accuracy i / 100; at the start all are misses."""
    return [
        {"step": i * every or 1, "log_n": np.log(8), "bound": 0.1 * i - 0.2, "loss": 2.0}
        | {f"{name}_{k}": value for k in (1, 2) for name, value in (("accuracy", i / 100), ("bound", 0.1 * i))}
        for i in range(lines)
    ]


@pytest.mark.parametrize(
    ("lines", "expected", "said"),
    [
        (101, {500: 0.08, 1500: 0.28, 5000: 0.98}, "mean of 5 lines"),
        (11, {50: 0.01, 150: 0.02, 500: 0.08}, "mean of 1 to 5 lines"),
        (3, {50: 0.01, 100: 0.015}, "mean of 1 to 2 lines"),
        (2, {50: 0.01}, "mean of 1 line of"),
        (1, {1: 0.0}, "mean of 1 line of"),
    ],
)
def test_the_first_line_is_in_no_mean_and_snapshots_are_apart(lines, expected, said):
    accuracy, _ = ahead_sections(metrics(lines))
    *snapshots, (last, chance) = accuracy.series.items()
    names = [f"after {step:,} training step{'' if step == 1 else 's'}" for step in expected]
    assert [name for name, _ in snapshots] == names
    for (_, (steps, values)), value in zip(snapshots, expected.values(), strict=True):
        assert steps == [1, 2]
        assert values == pytest.approx([value] * 2)
    assert last == "by chance"
    assert chance == ([1, 2], pytest.approx([1 / 8] * 2))
    assert said in accuracy.note


def test_the_bound_has_every_line_once_and_says_what_nothing_is():
    _, bound = ahead_sections(metrics(4))
    assert list(bound.series) == ["1 ahead", "2 ahead", "log N, the most it can be", "mean over steps"]
    assert bound.series["2 ahead"] == ([1, 50, 100, 150], pytest.approx([0.0, 0.1, 0.2, 0.3]))
    assert "0 or less means that nothing is known yet" in bound.note


def test_objectives_that_do_not_predict_ahead_have_none():
    assert ahead_sections([{"step": 1, "accuracy": 0.5, "log_n": 1.0}]) == []
