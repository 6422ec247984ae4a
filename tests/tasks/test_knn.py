"""k-NN against scikit-learn, its ties, its chunks and the task around it."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier

from mmssl.errors import UserError
from tasks.knn import knn, knn_scores, neighbours


@pytest.fixture
def clusters():
    """400 training and 90 test vectors of 5 classes that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 490)
    vectors = rng.normal(size=(5, 12))[labels] + 1.5 * rng.normal(size=(490, 12))
    vectors = torch.from_numpy(vectors).float()
    return vectors[:400], torch.from_numpy(labels[:400]), vectors[400:], labels[400:]


@pytest.mark.parametrize("chunk", [7, 64, 1024])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_scores_equal_scikit_learn(clusters, chunk, temperature):
    train, labels, test, _ = clusters
    got = knn_scores(train, labels, test, 5, (1, 10, 20, 100, 400), temperature=temperature, chunk=chunk)

    def weights(distance):
        return np.exp((1 - distance) / temperature)

    for k, scores in got.items():
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        expected = model.fit(train.double(), labels).predict_proba(test.double())
        np.testing.assert_allclose(scores, expected, atol=2e-5, err_msg=f"k = {k}")


@pytest.mark.parametrize("chunk", [23, 150, 1024])
@pytest.mark.parametrize("k", [30, 400])
def test_neighbours_equal_the_full_similarity_matrix(clusters, chunk, k):
    train, _, test, _ = clusters
    similarity, index = neighbours(train, test, k, chunk)
    full = test @ train.T
    torch.testing.assert_close(similarity, full.topk(k).values)
    torch.testing.assert_close(full.gather(1, index), similarity)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_equal_similarities_go_to_the_lower_training_index(chunk):
    east, north = [1.0, 0.0], [0.0, 1.0]
    train = torch.tensor([north, east, east, [-1.0, 0.0], north, east, [-0.0, 1.0], east])
    similarity, index = neighbours(train, torch.tensor([east, [-1.0, 0.0]]), 8, chunk)
    assert index.tolist() == [[1, 2, 5, 7, 0, 4, 6, 3], [3, 0, 4, 6, 1, 2, 5, 7]]
    assert similarity.tolist() == [[1, 1, 1, 1, 0, 0, 0, -1], [1, 0, 0, 0, -1, -1, -1, -1]]
    for k in range(1, 8):  # a k that cuts through equal ones
        assert neighbours(train, torch.tensor([east]), k, chunk)[1].tolist() == [[1, 2, 5, 7, 0, 4, 6, 3][:k]]


def test_minus_zero_is_zero():
    # In one dimension nothing is added to a product, so that 1 x -0.0 stays -0.0.
    train = torch.zeros(9, 1)
    train[::2] = -0.0
    assert neighbours(train, torch.ones(5, 1), 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 5


def test_votes_do_not_overflow_and_are_probabilities(clusters):
    train, labels, test, _ = clusters
    (scores,) = knn_scores(train, labels, test, 7, (50,), temperature=1e-4).values()
    nearest = neighbours(F.normalize(train, dim=1), F.normalize(test, dim=1), 1)[1][:, 0]
    assert torch.equal(scores.argmax(1), labels[nearest])
    torch.testing.assert_close(scores.sum(1), torch.ones(len(test)))
    assert not scores[:, 5:].any()


def test_length_of_vectors_means_nothing(clusters):
    train, labels, test, _ = clusters
    scale = torch.rand(len(train), 1) + 0.1
    expected = knn_scores(train, labels, test, 5, (20,))[20]
    torch.testing.assert_close(knn_scores(train * scale, labels, test * 9, 5, (20,))[20], expected, atol=1e-4, rtol=0)


def test_more_neighbours_than_there_are_is_an_error(clusters):
    train, labels, test, _ = clusters
    with pytest.raises(ValueError, match="401"):
        knn_scores(train, labels, test, 5, (10, 401))


def test_task_measures_each_k(encoder, pictures):
    result = knn(encoder, pictures("train", 8), pictures("test", 5), k=(3, 20, 1))
    assert list(result.scores) == [1, 3, 20]
    assert result.scores[3]["top1"].value > 0.9
    assert not result.notes
    report = json.loads(json.dumps(result.as_dict()))
    assert (report["train"], report["test"], report["classes"]) == (24, 15, ["blue", "green", "red"])
    assert set(report["scores"]["3"]["top1"]) == {"value", "low", "high"}


def test_task_leaves_out_a_k_that_does_not_fit_and_says_so(encoder, pictures):
    train, test = pictures("train", 4), pictures("test", 2)
    result = knn(encoder, train, test, k=(10, 20, 100))
    assert list(result.scores) == [10]
    assert result.notes == ["left out k = 20, 100: there are 12 training samples"]
    everyone = knn(encoder, train, test, k=(20,))
    assert list(everyone.scores) == [12]
    screen = io.StringIO()
    everyone.render(Console(file=screen, width=100))
    assert "k = 12" in screen.getvalue()
    assert everyone.notes[-1] in screen.getvalue()


def test_task_refuses_test_labels_that_training_never_saw(encoder, pictures):
    train = pictures("train", 2)
    test = pictures("test", 2, colours=["black", "red", "gold", "pink", "grey", "teal"])
    with pytest.raises(UserError, match="'black', 'gold', 'grey' and 2 more"):
        knn(encoder, train, test)
    assert encoder.seen == 0


@pytest.mark.parametrize("settings", [{"k": ()}, {"k": (5, 0)}, {"temperature": 0.0}])
def test_task_refuses_settings_that_mean_nothing(encoder, pictures, settings):
    train = pictures("train", 2)
    with pytest.raises(UserError, match="positive"):
        knn(encoder, train, train, **settings)
