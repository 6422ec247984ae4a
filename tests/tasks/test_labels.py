"""Subsets and validation parts: fixed by (labels, seed), stratified, disjoint; several labels per file."""

import numpy as np
import pytest

from mmssl.data.listing import list_files
from mmssl.errors import UserError
from modalities.encoder import MODALITIES
from tasks.features import check_disjoint
from tasks.labels import (
    balanced_weights,
    blind_score,
    check_positive,
    file_targets,
    held_out,
    label_sets,
    more_targets,
    subset,
)

TARGETS = np.array([0] * 40 + [1] * 20 + [2] * 4)
SEVERAL = (np.random.default_rng(0).random((60, 5)) < [0.5, 0.3, 0.1, 0.05, 0.0]).astype(np.float32)
SEVERAL[7, 4] = 1  # one file alone has the last class


def held(targets, part, seed):
    """Hold out of files that are all different."""
    return held_out(targets, part, seed, [f"{i}.png" for i in range(len(targets))])


def counts(indices):
    return np.bincount(TARGETS[indices], minlength=3).tolist()


@pytest.mark.parametrize(
    ("labels", "shots", "expected"), [("10%", None, [4, 2, 1]), ("1%", None, [1, 1, 1]), (None, 3, [3, 3, 3])]
)
def test_a_part_of_the_labels_has_its_share_of_each_class_and_belongs_to_its_seed(labels, shots, expected):
    chosen = subset(TARGETS, labels, shots, seed=0)
    assert counts(chosen) == expected
    assert chosen == sorted(set(chosen))
    assert chosen == subset(TARGETS.tolist(), labels, shots, seed=0)
    assert len({tuple(subset(TARGETS, labels, shots, seed=seed)) for seed in range(5)}) > 1


def test_all_labels_are_all_labels():
    assert subset(TARGETS, None, None, 0) is None
    assert subset(TARGETS, "100%", None, 0) == list(range(len(TARGETS)))


def test_a_part_of_files_with_several_labels_keeps_every_class():
    for seed in range(20):
        chosen = subset(SEVERAL, "10%", None, seed)
        assert len(chosen) == 6
        assert SEVERAL[chosen].any(0).all()
    assert len({tuple(subset(SEVERAL, "10%", None, seed)) for seed in range(5)}) > 1
    assert len(subset(SEVERAL, "1%", None, 0)) == 1  # five classes do not fit into one file


@pytest.mark.parametrize("seed", range(5))
def test_a_validation_part_is_stratified_and_leaves_something_of_each_class(seed):
    part = held(TARGETS, "10%", seed)
    assert counts(part) == [4, 2, 1]
    assert part == held(TARGETS, "10%", seed)
    assert counts(held(TARGETS, "100%", seed)) == [39, 19, 3]
    single = np.array([0, 1, 1])
    assert held(single, "50%", seed) in ([1], [2])
    part = held(SEVERAL, "50%", seed)
    assert len(part) == 30
    assert np.delete(SEVERAL, part, axis=0).any(0).all()


@pytest.mark.parametrize("targets", [TARGETS, SEVERAL])
def test_all_rows_of_a_file_are_on_one_side_whatever_they_are_called(tmp_path, targets):
    """Planted bug that fails here: a copy of a validation file trained on."""
    (tmp_path / "link").symlink_to(tmp_path)
    once = [str(tmp_path / f"{i}.png") for i in range(len(targets))]
    paths = [*once, *once, *(str(tmp_path / "link" / f"{i}.png") for i in range(len(targets)))]
    for seed in range(3):
        part = held_out(np.concatenate([targets] * 3), "20%", seed, paths)
        files = [{row % len(targets) for row in rows} for rows in (part, set(range(len(paths))) - set(part))]
        assert files[0].isdisjoint(files[1])
        assert len(part) == 3 * len(files[0])
        assert sorted(files[0]) == held(targets, "20%", seed)


def test_rows_that_contradict_each_other_are_not_held_out_and_cost_no_class_its_last_file():
    targets, paths = np.array([0, 1, 0, 0, 2, 2, 2]), ["a", "a", "b", "c", "d", "d", "e"]
    for seed in range(10):
        part = held_out(targets, "99%", seed, paths)
        assert {0, 1}.isdisjoint(part)
        assert set(np.delete(targets, part)) == {0, 1, 2}
        assert (4 in part) == (5 in part)
    with pytest.raises(UserError, match="too few"):
        held_out(targets[:2], "50%", 0, paths[:2])
    several = np.eye(3, dtype=np.float32)[[1, 0, 2, 1, 2]]
    for seed in range(10):  # the file of the first two rows has the first class alone
        assert {0, 1}.isdisjoint(held_out(several, "25%", seed, ["a", "a", "b", "c", "d"]))


def test_nothing_to_hold_out_is_said():
    for targets in (np.array([0, 1, 2]), np.ones((1, 2), np.float32)):
        with pytest.raises(UserError, match="too few training files"):
            held(targets, "10%", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((TARGETS, "10%", 5), "exclude each other"),
        ((TARGETS, "10", None), "--labels 10: give a percentage"),
        ((TARGETS, "0%", None), "--labels 0%: give a percentage"),
        ((TARGETS, "nan%", None), "--labels nan%: give a percentage"),
        ((TARGETS, "101%", None), "--labels 101%"),
        ((TARGETS, None, 5), "from 1 to 4, the size of the smallest class"),
        ((TARGETS, None, 0), "from 1 to 4"),
        ((SEVERAL, None, 2), "no number per class; use --labels"),
    ],
)
def test_impossible_parts_are_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        subset(*arguments, 0)


def test_balanced_weights_have_mean_one_over_the_files_and_equal_shares_of_the_loss():
    weights = np.array(balanced_weights(TARGETS, 3))
    assert weights[TARGETS].mean() == pytest.approx(1)
    assert np.bincount(TARGETS) * weights == pytest.approx([64 / 3] * 3)


def test_blind_scores():
    assert blind_score(TARGETS, np.array([0, 0, 1, 2])) == 0.5
    assert blind_score(SEVERAL, np.array([[1, 0, 0], [1, 1, 0]], np.float32)) == 0.75


@pytest.fixture
def manifest(tmp_path):
    """Make a manifest of files that need not exist."""

    def make(name, *cells):
        rows = [f"{name}{i}.png,{cell}" for i, cell in enumerate(cells)]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["path,tags", *rows]) + "\n")
        return list_files(path, MODALITIES["image"])

    return make


def test_several_labels_per_file_become_zeros_and_ones(manifest):
    train, test = manifest("a", "cat|dog", " dog ", "", "cow|cat|cat"), manifest("b", "cow", "dog|cat")
    classes, targets, test_targets = file_targets(train, test, "tags", "|")
    assert classes == ["cat", "cow", "dog"]
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert test_targets.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert more_targets(manifest("c", "cow|dog"), classes, train, "tags", "|").tolist() == [[0, 1, 1]]
    assert more_targets(manifest("d", "cow", "cat"), classes, train, "tags").tolist() == [1, 0]


def test_mistakes_in_labels_are_one_sentence(manifest, photos):
    train = manifest("a", "cat|dog", "cow")
    with pytest.raises(UserError, match=r"no training sample in .* has the label 'bird', 'horse'"):
        file_targets(train, manifest("b", "horse|bird"), "tags", "|")
    with pytest.raises(UserError, match="has the label 'bird'"):
        more_targets(manifest("c", "bird"), ["cat", "dog"], train, "tags")
    with pytest.raises(
        UserError,
        match=r"in both the training and the test set; give two folders, or .* \(--train-split, --test-split\)",
    ):
        file_targets(train, train, "tags", "|")
    with pytest.raises(UserError, match="are in the pantry"):
        check_disjoint(train, train, "the pantry")
    with pytest.raises(UserError, match="none of the 2 test files has a label, and mAP needs"):
        check_positive(np.zeros((2, 2), np.float32), train, "test files")
    check_positive(np.array([0, 0]), train, "test files")
    with pytest.raises(UserError, match="at least two classes"):
        file_targets(manifest("e", "cat", "cat"), manifest("f", "cat"), "tags", "|")
    with pytest.raises(UserError, match="no 'tag' column; did you mean 'tags'"):
        label_sets(train, "tag", "|")
    with pytest.raises(UserError, match="--separator is empty"):
        label_sets(train, "tags", "")
    with pytest.raises(UserError, match="needs a manifest"):
        label_sets(list_files(photos, MODALITIES["image"]), "label", "|")
