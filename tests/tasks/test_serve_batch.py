"""Micro-batches: what goes through together is what went through alone, and one that fails fails alone.

Planted bugs that fail here: rows handed to the wrong request, a batch of different models, an error for all, class
names that are embedded though nobody waits for them, or all at a stretch.
"""

import asyncio
import threading

import pytest
import torch
from serving import picture, posting, serving
from towers import untrained

from mmssl import ZeroShotClassifier
from tasks.serve_batch import Batcher
from tasks.serve_models import Upload

CLOSE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run") / "clip", "image", "text")


class Doubling:
    """A model that keeps the sizes of what it was given, and refuses what is negative."""

    def __init__(self, factor=2.0):
        self.factor, self.sizes = factor, []

    def features(self, signal):
        if (signal < 0).any():
            raise ValueError("negative")
        self.sizes.append(len(signal))
        return self.factor * signal


@pytest.fixture
def batcher():
    made = Batcher(window=5.0, most=4)
    yield made
    made.close()


def behind_a_wall(batcher, *work):
    """Start all of ``work`` while the models' thread waits, so that all of it is there when it goes on."""

    async def run():
        gate = threading.Event()
        wall = asyncio.ensure_future(batcher.call(gate.wait))
        tasks = [asyncio.ensure_future(one) for one in work]
        await asyncio.sleep(0)
        gate.set()
        await wall
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_what_waits_goes_together_up_to_the_most(batcher):
    model = Doubling()
    rows = behind_a_wall(batcher, *(batcher.features(model, torch.tensor([float(i)])) for i in range(10)))
    assert [row.item() for row in rows] == [2.0 * i for i in range(10)]
    assert model.sizes == [4, 4, 2]


def test_models_and_sizes_do_not_mix(batcher):
    one, other = Doubling(2.0), Doubling(3.0)
    work = [batcher.features(one, torch.ones(3)), batcher.features(other, torch.ones(3)),
            batcher.features(one, torch.ones(5)), batcher.features(one, torch.ones(3))]  # fmt: skip
    rows = behind_a_wall(batcher, *work)
    assert [row.tolist() for row in rows] == [[2.0] * 3, [3.0] * 3, [2.0] * 5, [2.0] * 3]
    assert sorted(one.sizes) == [1, 2]


def test_one_that_fails_fails_alone(batcher):
    work = [batcher.features(Doubling(), torch.tensor([value])) for value in (1.0, -1.0)]
    model = Doubling()
    work += [batcher.features(model, torch.tensor([value])) for value in (1.0, -1.0, 3.0)]
    first, failed, *rest = behind_a_wall(batcher, *work)
    assert first.item() == 2.0
    assert isinstance(failed, ValueError)
    assert rest[0].item() == 2.0
    assert isinstance(rest[1], ValueError)
    assert rest[2].item() == 6.0


def test_nobody_waits_where_nobody_comes_and_all_do_where_somebody_does(batcher):
    async def alone():
        # The window is 5 s, and the test ends long before.
        return await asyncio.wait_for(batcher.features(Doubling(), torch.ones(1)), timeout=4)

    assert asyncio.run(alone()).item() == 2.0
    model, pairs = Doubling(), Batcher(window=60.0, most=2)

    async def two():
        with pairs.coming():
            first = asyncio.ensure_future(pairs.features(model, torch.ones(1)))
            await asyncio.to_thread(lambda: None)
            await asyncio.gather(first, pairs.features(model, torch.ones(1)))

    asyncio.run(two())
    pairs.close()
    assert model.sizes == [2]


def test_calls_and_errors_of_calls_come_back(batcher):
    async def run():
        assert await batcher.call(lambda: threading.current_thread().name) == "models"
        with pytest.raises(ZeroDivisionError):
            await batcher.call(lambda: 1 / 0)
        return await batcher.features(Doubling(), torch.ones(1))

    assert asyncio.run(run()).item() == 2.0


def test_who_has_gone_costs_nothing(batcher):
    model = Doubling()

    async def run():
        gate = threading.Event()
        wall = asyncio.ensure_future(batcher.call(gate.wait))
        tasks = [asyncio.ensure_future(batcher.features(model, torch.ones(1))) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        gate.set()
        await wall
        await asyncio.gather(tasks[0], tasks[2])

    asyncio.run(run())
    assert model.sizes == [2]


def test_closing_finishes_what_is_there():
    batcher, model = Batcher(0.0, 4), Doubling()

    async def run():
        gate = threading.Event()
        wall = asyncio.ensure_future(batcher.call(gate.wait))
        tasks = [asyncio.ensure_future(batcher.features(model, torch.ones(1))) for _ in range(6)]
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
        gate.set()
        await asyncio.gather(wall, closing, *tasks)

    asyncio.run(run())
    assert sum(model.sizes) == 6


def test_requests_of_many_are_answered_as_if_alone(run):
    """Bits may differ with the size of a batch, not more than rounding does."""
    with serving(run, window=0.5, batch=8) as service:
        requests = [posting("/v1/embed", ("a.png", picture(i, (16 + i % 3, 20)))) for i in range(16)]
        requests += [posting("/v1/zero-shot", ("a.png", picture(i)), classes="cat,dog,cow") for i in range(8)]
        together = service.together(*requests)
        assert all(answer.status_code == 200 for answer in together)
        sizes = service.metrics.text().decode()
        batches = float(next(line for line in sizes.splitlines() if "batch_size_count" in line).split()[-1])
        assert batches <= 12
        for answer, request in zip(together, requests, strict=True):
            alone = service.together(request)[0].json()
            if isinstance(alone, dict):
                assert answer.json()["vector"] == pytest.approx(alone["vector"], abs=CLOSE)
            else:
                assert [one["label"] for one in answer.json()] == [one["label"] for one in alone]
                assert [one["score"] for one in answer.json()] == pytest.approx([o["score"] for o in alone], abs=CLOSE)


def test_vectors_of_classes_are_kept_and_the_oldest_forgotten(run, monkeypatch):
    made = []
    with serving(run, kept_classes=2) as service:
        text = service.models.joint["text"]
        features = text.features
        monkeypatch.setattr(text, "features", lambda signal: made.append(len(signal)) or features(signal))

        def ask(classes, templates=()):
            assert service.post("/v1/zero-shot", ("a.png", picture()), classes=classes, templates=templates).is_success
            return len(made)

        assert ask("a,b") == 1
        assert ask("a,b") == 1
        assert ask("b,a") == 2  # another order, another answer among equals
        assert ask("a,b", ["x {}"]) == 3  # and the first is forgotten
        assert ask("b,a") == 3
        assert ask("a,b") == 4
        assert 'mmssl_class_vectors_total{known="true"} 2.0' in service.get("/metrics").text


def test_many_that_ask_for_new_classes_at_once_have_them_computed_once(run):
    with serving(run) as service:
        sizes, text = [], service.models.joint["text"]
        features = text.features
        text.features = lambda signal: sizes.append(len(signal)) or features(signal)
        requests = [posting("/v1/zero-shot", ("a.png", picture(i)), classes="cat,dog") for i in range(6)]
        assert all(answer.is_success for answer in service.together(*requests))
        assert sizes == [2]
        assert service.models._making == {}


MANY = tuple(f"{word} {i}" for word in ("cat", "dog") for i in range(50))


def noted(service, monkeypatch, *names):
    """Return a list that gets the modality and the size of what goes through these towers."""
    seen = []
    for name in names:
        tower = service.models.joint[name]

        def features(signal, name=name, features=tower.features):
            seen.append((name, len(signal)))
            return features(signal)

        monkeypatch.setattr(tower, "features", features)
    return seen


async def walled(batcher):
    """Stop the models' thread; returns what lets it go on and what ends when it does."""
    there, gate = threading.Event(), threading.Event()
    wall = asyncio.ensure_future(batcher.call(lambda: there.set() or gate.wait()))
    await asyncio.to_thread(there.wait)
    return gate, wall


async def queued(models, count):
    """Wait until so many jobs wait for the models."""
    while models.batcher._jobs.qsize() < count:
        await asyncio.sleep(0)


def test_class_names_that_nobody_waits_for_any_more_are_dropped(run, monkeypatch):
    with serving(run) as service:
        models, seen = service.models, noted(service, monkeypatch, "text")
        key = ("image", MANY, ())

        async def ask(stay):
            gate, wall = await walled(models.batcher)
            asking = [asyncio.ensure_future(models._classifier(key)) for _ in range(3)]
            await queued(models, 1)
            for one in asking[stay:]:
                one.cancel()
            await asyncio.gather(*asking[stay:], return_exceptions=True)
            gate.set()
            await wall
            await models.batcher.call(lambda: None)
            return await asyncio.gather(*asking[:stay])

        asyncio.run(ask(stay=0))
        assert seen == []
        assert models._making == {}
        assert key not in models._known
        # One is enough; and in pieces the vectors are what they are as a whole.
        (made,) = asyncio.run(ask(stay=1))
        assert seen == [("text", 33), ("text", 33), ("text", 34)]
        assert key in models._known
        direct = ZeroShotClassifier(run, MANY, cache=None)
        torch.testing.assert_close(made.class_vectors, direct.class_vectors, rtol=0, atol=CLOSE)


def test_others_are_answered_between_the_pieces_of_many_class_names(run, monkeypatch):
    with serving(run, window=0.0) as service:
        models, upload = service.models, Upload(picture(), "a.png", "")
        assert service.post("/v1/zero-shot", ("a.png", picture()), classes="cat,dog").is_success
        seen = noted(service, monkeypatch, "text", "image")

        async def ask():
            gate, wall = await walled(models.batcher)
            heavy = [asyncio.ensure_future(models._classifier(("image", MANY, (one,)))) for one in ("a {}", "b {}")]
            await queued(models, 2)
            light = asyncio.ensure_future(models.zero_shot(upload, ("cat", "dog"), (), None, None))
            await queued(models, 3)
            gate.set()
            await asyncio.gather(wall, light, *heavy)

        asyncio.run(ask())
        assert [name for name, _ in seen] == ["text", "text", "image", "text", "text", "text", "text"]
