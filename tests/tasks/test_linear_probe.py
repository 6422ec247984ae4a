"""The linear probe against plain scikit-learn, its choice of regularisation and the task around it."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tasks.linear_probe
from mmssl.data.listing import list_files
from mmssl.errors import UserError
from modalities.encoder import MODALITIES
from tasks.linear_probe import GRID, LogisticProbe, choose, fit_probe, linear_probe


def overlapping(classes: int, count: int, seed: int = 0):
    """Vectors of classes that overlap, with features of very different scale."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, 10))
    labels = np.arange(count) % classes
    vectors = (centres[labels] + 1.2 * rng.normal(size=(count, 10))) * np.logspace(-2, 2, 10) + 3
    return torch.from_numpy(vectors).float(), torch.from_numpy(labels)


def plain(c: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=10_000))


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_equal_a_plain_pipeline(classes):
    train, labels = overlapping(classes, 300)
    test, _ = overlapping(classes, 100, seed=1)
    probe, choice = fit_probe(train, labels)
    expected = plain(choice.c).fit(train.double(), labels).predict_log_proba(test.double())
    got = probe.scores(test, classes).numpy()
    if classes == 2:
        got = got / 2  # the two columns are -d and d, where log p has a difference of d
    got = got - np.log(np.exp(got).sum(1, keepdims=True))
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_choice_equals_one_that_fits_every_strength_from_nothing():
    train, labels = overlapping(4, 240)
    fit, out = train_test_split(np.arange(240), test_size=48, stratify=labels, random_state=3)
    expected = [plain(c).fit(train[fit].double(), labels[fit]).score(train[out].double(), labels[out]) for c in GRID]
    choice = choose(train, labels, seed=3)
    assert [choice.accuracy[c] for c in GRID] == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert choice.c == GRID[int(np.argmax(expected))]
    assert choice.stratified
    assert choice.hold_out == 48


def test_of_equal_strengths_the_strongest_is_chosen():
    train, labels = torch.eye(3).repeat(20, 1), torch.arange(3).repeat(20)
    choice = choose(train, labels)
    assert set(choice.accuracy.values()) == {1.0}
    assert choice.c == GRID[0]


def test_few_samples_per_class_still_hold_out_one_of_each():
    train, labels = overlapping(5, 10)
    choice = choose(train, labels)
    assert choice.stratified
    assert choice.hold_out == 5


def test_a_class_with_one_sample_gives_up_stratification():
    train, labels = overlapping(3, 40)
    labels[0] = 3
    choice = choose(train, labels)
    assert not choice.stratified
    assert choice.hold_out == 8


def test_seed_decides_what_is_held_out():
    train, labels = overlapping(4, 60)
    assert choose(train, labels, seed=1).accuracy == choose(train, labels, seed=1).accuracy
    assert choose(train, labels, seed=1).accuracy != choose(train, labels, seed=2).accuracy


def test_a_sample_is_scored_without_its_neighbours_in_the_test_set():
    train, labels = overlapping(3, 90)
    test, _ = overlapping(3, 30, seed=1)
    probe, _ = fit_probe(train, labels)
    torch.testing.assert_close(probe.scores(test, 3)[:1], probe.scores(test[:1], 3))


def test_a_class_without_samples_is_never_chosen():
    train, labels = overlapping(3, 90)
    probe, _ = fit_probe(train, labels + (labels > 0).long())
    scores = probe.scores(train, 5)
    assert scores[:, [1, 4]].isneginf().all()
    assert scores[:, [0, 2, 3]].isfinite().all()
    assert ((scores.argmax(1) == labels + (labels > 0).long()).float().mean()) > 0.8


def test_constant_features_do_no_harm():
    train, labels = overlapping(3, 90)
    probe, _ = fit_probe(torch.cat([train, torch.full((90, 1), 1e4)], dim=1), labels)
    same, _ = fit_probe(train, labels)
    test = torch.cat([train, torch.full((90, 1), 1e4)], dim=1)
    torch.testing.assert_close(probe.scores(test, 3), same.scores(train, 3), atol=1e-3, rtol=0)


def test_too_little_to_fit_is_refused():
    with pytest.raises(UserError, match="3 training samples"):
        fit_probe(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="2 classes"):
        fit_probe(torch.randn(20, 4), torch.zeros(20, dtype=torch.int64))


def test_a_fit_that_stops_early_is_reported(monkeypatch, encoder, pictures):
    monkeypatch.setattr(tasks.linear_probe, "MAX_ITER", 1)
    train, labels = overlapping(3, 60)
    probe = LogisticProbe(train, labels)
    probe.fit(1.0)
    assert not probe.converged
    result = linear_probe(encoder, pictures("train", 6, noise=90), pictures("test", 2))
    assert not result.as_dict()["protocol"]["converged"]
    assert "not converged" in result.notes[0]


def test_task_states_its_protocol(encoder, pictures):
    result = linear_probe(encoder, pictures("train", 10), pictures("test", 5), seed=4)
    assert result.scores["top1"].value > 0.9
    report = json.loads(json.dumps(result.as_dict()))
    protocol = report["protocol"]
    assert protocol["name"] == "logistic"
    assert protocol["grid"] == list(GRID)
    assert protocol["c"] in GRID
    assert (protocol["hold_out_fraction"], protocol["hold_out"], protocol["seed"]) == (0.2, 6, 4)
    assert protocol["converged"]
    assert set(report["scores"]["top1"]) == {"value", "low", "high"}
    screen = io.StringIO()
    result.render(Console(file=screen, width=100))
    assert "30 training and 15 test samples, 3 classes" in screen.getvalue()
    assert "protocol logistic: L-BFGS on standardised features, C chosen from 0.0001" in screen.getvalue()


def test_the_test_set_never_influences_the_choice(encoder, pictures, tmp_path):
    """Two test sets, one of them random colours under a shuffled name: other scores, but the same choice and fit."""
    train = pictures("train", 12, noise=60)
    easy = pictures("easy", 6, noise=1)
    for label in ("blue", "green", "red"):
        (tmp_path / "hard" / label).mkdir(parents=True)
        for i, level in enumerate((0, 128, 255)):
            Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / "hard" / label / f"{i}.png")
    hard = list_files(tmp_path / "hard", MODALITIES["image"])
    one, two = linear_probe(encoder, train, easy), linear_probe(encoder, train, hard)
    assert one.scores["top1"].value > 0.8
    assert two.scores["top1"].value == pytest.approx(1 / 3)
    assert one.as_dict()["protocol"] == two.as_dict()["protocol"]
    np.testing.assert_array_equal(one.choice.model.coef_, two.choice.model.coef_)
