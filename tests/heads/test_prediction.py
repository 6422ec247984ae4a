"""Contrastive prediction: a loop is the oracle; which candidates are taken; two ranks; in a model of one's own.

Legend: B samples, L lines, T moments; a place is a moment of the whole batch, (sample * L + line) * T + moment.
"""

import math
import sys
from collections import Counter

import pytest
import torch
from prediction_ranks import SETTINGS, walk
from predictors import roused
from pydantic import ValidationError
from ranks import on_ranks
from torch import nn

from mmssl.backbones.blocks import uniform
from mmssl.heads import prediction
from mmssl.heads.prediction import ContrastivePrediction, NegativesConfig, TransformerSteps

B, L, T = 4, 2, 7
LENGTHS = torch.tensor([7, 3, 1, 5])
CHOICES = {
    "mixed": {"count": 9},
    "mixed, all": {"count": None},
    "mixed, more than there is": {"count": 100},
    "mixed, all but one": {"count": B * L * T - 2},
    "excl.": {"current": False, "count": 9},
    "excl., all": {"current": False, "count": None},
    "excl., more than others have": {"current": False, "count": 45},
    "speaker": {"source": "speaker", "count": 5},
    "sequence": {"source": "sequence", "count": 4},
    "sequence, all": {"source": "sequence", "count": None},
    "sequence, all but one": {"source": "sequence", "count": L * T - 2},
}
choices = pytest.mark.parametrize("negatives", [NegativesConfig(**choice) for choice in CHOICES.values()], ids=CHOICES)
padding = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


def presence(padded: bool) -> torch.Tensor:
    lengths = LENGTHS if padded else torch.full((B,), T)
    return (torch.arange(T) < lengths.view(B, 1, 1)).expand(B, L, T)


def candidates_of(place: int, seed: int, present: torch.Tensor, settings: NegativesConfig) -> list[int]:
    """Return the places that the moment at ``place`` is to be told from, one by one."""
    sample, found = place // (L * T), []
    lots = uniform(torch.tensor(seed), torch.arange(B * L * T)).tolist()
    for other, there in enumerate(present.flatten().tolist()):
        mine = other // (L * T) == sample
        if not there or other == place or (settings.source == "sequence" and not mine):
            continue
        if mine and not settings.current:
            continue
        found.append(other)
    # Of those that are there, the ones with the lowest lots are taken.
    return sorted(found, key=lots.__getitem__)[: settings.count]


def brute_force(head, z, c, seeds, present):
    """Return the loss and the metrics by loops over samples, steps, lines, moments and candidates."""
    weights = head.predictor.project.weight.view(head.steps, z.shape[-1], c.shape[-1])
    flat = z.flatten(0, 2)
    losses, metrics, log_ns = torch.zeros(B), {}, []
    steps_of, guesses = Counter(), {}
    for i in range(head.steps):
        k, bounds, accuracies, limits = i + head.skip + 1, [], [], []
        for b in range(B):
            parts, hits, n = [], [], 1
            for line in range(L):
                for t in range(T - k):
                    if not present[b, line, t + k]:
                        continue
                    place = (b * L + line) * T + t + k
                    others = candidates_of(place, int(seeds[b]), present, head.negatives)
                    n = len(others) + 1
                    guess = weights[i] @ c[b, line, t]
                    scores = torch.stack([guess @ flat[p] for p in [place, *others]])
                    parts.append(-scores.log_softmax(0)[0])
                    hits.append(float(n == 1 or scores[0] > scores[1:].max()))
            if not parts or n == 1:
                continue
            losses[b] += torch.stack(parts).mean()
            steps_of[b] += 1
            bounds.append(math.log(n) - float(torch.stack(parts).mean()))
            accuracies.append(sum(hits) / len(hits))
            limits.append(math.log(n))
            guesses[b] = math.log(n)
        metrics[f"bound_{k}"] = sum(bounds) / max(1, len(bounds))
        metrics[f"accuracy_{k}"] = sum(accuracies) / max(1, len(bounds))
        log_ns.append(sum(limits) / max(1, len(bounds)))
    metrics["bound"] = sum(metrics[f"bound_{i + head.skip + 1}"] for i in range(head.steps)) / head.steps
    metrics["log_n"] = sum(log_ns) / head.steps
    metrics["trivial"] = sum(guesses.values()) / len(guesses)
    return sum(losses[b] / steps_of[b] for b in steps_of) / len(steps_of), metrics


def example(width=5, context=3):
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(B, L, T, width, generator=generator)
    return z, torch.randn(B, L, T, context, generator=generator), torch.tensor([3, 2**62 + 1, 0, -5])


@choices
@padding
@pytest.mark.parametrize("skip", [0, 1])
def test_it_is_infonce_by_loops(negatives, padded, skip):
    head = roused(ContrastivePrediction(5, 3, steps=2, skip=skip, negatives=negatives))
    z, c, seeds = example()
    present = presence(padded)
    loss, metrics = head(z, c, seeds, present)
    with torch.no_grad():
        wanted, report = brute_force(head, z, c, seeds, present)
    torch.testing.assert_close(loss, wanted)
    assert metrics.keys() == report.keys()
    for name, value in report.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
        assert not metrics[name].requires_grad


@choices
@padding
def test_constant_scores_give_log_n_to_rounding_and_no_hit(negatives, padded):
    head = roused(ContrastivePrediction(5, 3, steps=2, negatives=negatives))
    nn.init.zeros_(head.predictor.project.weight)
    z, c, seeds = example()
    present = presence(padded)
    loss, metrics = head(z, c, seeds, present)
    wanted = []
    for b in range(B):
        lengths = int(present[b, 0].sum())
        n = len(candidates_of(b * L * T + lengths - 1, int(seeds[b]), present, negatives)) + 1
        wanted += [math.log(n)] * (lengths > 1)
    assert float(loss.detach()) == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert float(metrics["bound"]) == pytest.approx(0, abs=1e-6)
    assert metrics["accuracy_1"] == metrics["accuracy_2"] == 0
    if not padded:
        assert float(metrics["log_n"]) == pytest.approx(wanted[0], abs=1e-6)


@choices
@padding
def test_the_bound_is_at_most_log_n(negatives, padded):
    """A perfect predictor among vectors far apart: the loss is 0, so the bound is log N, of the same samples."""
    places = B * L * T
    head = ContrastivePrediction(places, places, steps=1, negatives=negatives)
    head.predictor.project.weight.data = torch.eye(places)
    z = torch.eye(places).view(B, L, T, places)
    c = 100 * torch.cat([z[:, :, 1:], z[:, :, :1]], 2)
    _, metrics = head(z, c, torch.arange(B), presence(padded))
    torch.testing.assert_close(metrics["bound"], metrics["log_n"], atol=1e-5, rtol=0)
    assert float(metrics["accuracy_1"]) == pytest.approx(1)


@pytest.fixture
def taken(monkeypatch):
    """Return per anchor of a head's step 1 its own place and those of its candidates: vectors are places here."""

    def look(negatives, seeds, present=None, files=None):
        seen, ours = [], prediction.info_nce

        def spy(positive, others, there):
            rows = zip(positive.flatten().tolist(), others.flatten(0, 1), there.flatten(0, 1), strict=True)
            seen.extend((int(place), sorted(map(int, row[mask].tolist()))) for place, row, mask in rows)
            return ours(positive, others, there)

        head = ContrastivePrediction(1, 1, steps=1, negatives=negatives)
        head.predictor.project.weight.data = torch.ones(1, 1)
        samples = len(seeds)
        z = torch.arange(samples * L * T).float().view(samples, L, T, 1)
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "info_nce", spy)
            head(z, torch.ones(samples, L, T, 1), seeds, present, files)
        return seen

    return look


@choices
@padding
def test_which_candidates_are_taken(taken, negatives, padded):
    present = presence(padded)
    there = set(present.flatten().nonzero().flatten().tolist())
    for place, others in taken(negatives, torch.tensor([5, 6, 7, 8]), present):
        if place not in there:
            continue
        own = {p for p in there if p // (L * T) == place // (L * T)}
        pool = there
        if negatives.source == "sequence":
            pool = own
        elif not negatives.current:
            pool = there - own
        assert place not in others
        assert set(others) <= pool
        assert len(set(others)) == len(others) == min(negatives.count or 10**9, len(pool - {place}))


@pytest.mark.parametrize("count", [9, None, 100])
def test_other_looks_at_a_file_are_out_with_the_current_one(taken, count):
    files, seeds, present = torch.tensor([7, 3, 7, 5]), torch.tensor([5, 6, 7, 8]), presence(padded=True)
    there = set(present.flatten().nonzero().flatten().tolist())
    settings = NegativesConfig(current=False, count=count)
    for place, others in taken(settings, seeds, present, files):
        pool = {p for p in there if files[p // (L * T)] != files[place // (L * T)]}
        assert place not in there or set(others) <= pool
        assert place not in there or len(others) == min(count or 10**9, len(pool))
    with_current = NegativesConfig(count=count)
    assert taken(with_current, seeds, present, files) == taken(with_current, seeds, present)


@pytest.mark.parametrize("first", [0, 1])
def test_looks_at_a_file_on_another_rank_are_out_too(monkeypatch, first):
    files, seeds, present = torch.tensor([7, 3, 7, 5]), torch.tensor([5, 6, 7, 8]), presence(padded=True)
    z, settings, mine = torch.randn(B, L, T, 3), NegativesConfig(current=False), slice(2 * first, 2 * first + 2)
    whole = prediction.draw_candidates(z, present, seeds, settings, files)
    of_all = {part.dtype: part for part in (z, present.to(torch.uint8), files)}
    monkeypatch.setattr(prediction, "all_gather", lambda part: of_all[part.dtype])
    monkeypatch.setattr(prediction, "rank", lambda: first)
    half = prediction.draw_candidates(z[mine], present[mine], seeds[mine], settings, files[mine])
    for name in ("places", "present", "most", "own"):
        assert torch.equal(getattr(half, name), getattr(whole, name)[mine])


@pytest.mark.parametrize(("z", "c", "words"), [
    ((4, 7, 5), (3, 7, 3), r"z \[4, 7, 5\] and c \[3, 7, 3\] do not go together: both need axes"),
    ((4, 7, 5), (4, 6, 3), "do not go together"),
    ((4, 2, 7, 5), (4, 7, 3), "do not go together"),
    ((4, 2, 7, 5), (4, 1, 7, 3), "do not go together"),
    ((7, 5), (7, 3), "do not go together"),
    ((4, 7, 5), (4, 7, 5), "z and c have widths 5 and 5, but the head was made for 5 and 3"),
    ((4, 7, 3), (4, 7, 3), "z and c have widths 3 and 3"),
])  # fmt: skip
def test_sequences_that_do_not_go_together_are_told(z, c, words):
    with pytest.raises(ValueError, match=words):
        ContrastivePrediction(5, 3, steps=2)(torch.zeros(z), torch.zeros(c))


def test_what_a_sample_draws_is_its_own_seeds_doing(taken):
    settings = NegativesConfig(count=6)
    first = taken(settings, torch.tensor([5, 6, 7, 8]))
    again = taken(settings, torch.tensor([5, 1, 2, 3]))
    mine = L * (T - 1)
    assert first[:mine] == again[:mine]
    assert all(a != b for a, b in zip(first[mine:], again[mine:], strict=True))
    assert taken(settings, torch.tensor([5, 6, 7, 8])) == first
    alike = taken(settings, torch.tensor([5, 5, 5, 5]))
    assert len({tuple(others) for _, others in alike[::mine]}) == 1


@pytest.mark.parametrize("choice", [{"source": "sequence"}, {"source": "mixed"}, {"current": False}], ids=str)
def test_every_set_of_candidates_is_equally_likely(monkeypatch, choice):
    """By chi-square, for one moment among candidates few enough to list: 15 or 6 sets of 2."""
    monkeypatch.setattr(sys.modules[__name__], "L", 1)
    samples, moments, count = 2, 4, 2
    settings = NegativesConfig(count=count, **choice)
    z = torch.arange(samples * moments).float().view(samples, 1, moments, 1)
    present = torch.ones(samples, 1, moments, dtype=torch.bool)
    present[1, 0, 3] = False  # seven are left
    pool = {"sequence": 3, "mixed": 6}[settings.source] - 3 * (not settings.current)
    found, rounds = Counter(), 1500
    for seed in range(rounds):
        drawn = prediction.draw_candidates(z, present, torch.tensor([seed, seed]), settings)
        places = drawn.places[0].tolist()
        assert drawn.present[0].all()
        positive = 1
        others = [p for p in places if p != positive]
        found[tuple(sorted(others[:count]))] += 1
        assert int(drawn.most[0]) == count
    sets = math.comb(pool, count)
    assert len(found) == sets
    expected = rounds / sets
    chi_square = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_square < sets + 5 * (2 * sets) ** 0.5


@choices
def test_the_same_bits_every_time(negatives):
    z, c, seeds = example()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        head = roused(ContrastivePrediction(5, 3, steps=2, negatives=negatives))
        loss, metrics = head(z.requires_grad_(), c, seeds)
        (grad,) = torch.autograd.grad(loss, z)
        found.append([loss, grad, *metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_padding_is_neither_scored_nor_taken_nor_trained():
    head = roused(ContrastivePrediction(5, 3, steps=2, negatives=NegativesConfig(count=9)))
    present = presence(padded=True)
    z, c, seeds = example()
    z.requires_grad_()
    loss, metrics = head(z, c, seeds, present)
    loss.backward()
    assert (z.grad[~present] == 0).all()
    noisy = torch.where(present.unsqueeze(-1), z, 1e3 * torch.randn_like(z))
    changed, report = head(noisy, torch.where(present.unsqueeze(-1), c, torch.randn_like(c)), seeds, present)
    assert torch.equal(changed, loss)
    assert all(torch.equal(report[name], metrics[name]) for name in metrics)


def test_a_sequence_is_one_line_and_seeds_may_be_left_out():
    head = roused(ContrastivePrediction(5, 3, steps=2))
    z, c, seeds = example()
    present = presence(padded=True)[:, 0]
    loss, _ = head(z[:, 0], c[:, 0], seeds, present)
    torch.testing.assert_close(loss, head(z[:, :1], c[:, :1], seeds, present.unsqueeze(1))[0])
    unseeded = [head(z[:, 0], c[:, 0])[0] for _ in range(2)]
    assert torch.equal(*unseeded)
    with pytest.raises(ValueError, match="7 moments are too few to predict 7 ahead of the first"):
        ContrastivePrediction(5, 3, steps=4, skip=3)(z, c)


def test_alone_without_its_own_sequence_there_is_nothing_to_learn():
    head = roused(ContrastivePrediction(5, 3, steps=2, negatives=NegativesConfig(current=False)))
    z, c, seeds = example()
    loss, metrics = head(z[:1], c[:1], seeds[:1])
    loss.backward()
    assert loss == metrics["log_n"] == metrics["bound"] == metrics["accuracy_1"] == 0
    assert (head.predictor.project.weight.grad == 0).all()


def test_vectors_that_are_all_the_same_are_never_hit():
    """Scores differ by rounding alone; a collapsed encoder must not look as if it had learned something."""
    head = roused(ContrastivePrediction(512, 16, steps=2, negatives=NegativesConfig(count=8)))
    z = torch.randn(512).expand(4, 20, 512).contiguous()
    _, metrics = head(z, torch.randn(4, 20, 16))
    assert metrics["accuracy_1"] < 0.03


@pytest.mark.parametrize("predictor", ["linear", "transformer"])
def test_bf16_vectors_are_scored_in_fp32(predictor):
    head = roused(ContrastivePrediction(5, 4, steps=2, predictor=predictor))
    z, c, seeds = example(context=4)
    z, c = z.bfloat16(), c.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head(z, c, seeds)
    assert torch.equal(loss, head(z.float(), c.float(), seeds)[0])


def test_a_transformer_predicts_a_line_from_what_came_before_in_it():
    steps = roused(TransformerSteps(5, 4, 3))
    c = torch.randn(B, L, T, 4)
    changed = c.clone()
    changed[:, :, 4:] += 1
    changed[:, 1] += 1
    for before, after in zip(steps(c), steps(changed), strict=True):
        assert before.shape == (B, L, T, 5)
        assert torch.equal(before[:, 0, :4], after[:, 0, :4])
        assert not torch.equal(before[:, 0, 4:], after[:, 0, 4:])
    earlier = c.clone()
    earlier[:, :, 0] += 1
    for before, after in zip(steps(c), steps(earlier), strict=True):
        assert not torch.equal(before[:, :, 3], after[:, :, 3])
    with pytest.raises(ValueError, match="even width, but theirs is 15"):
        ContrastivePrediction(5, 15, predictor="transformer")


def test_settings_that_leave_nothing_are_refused():
    with pytest.raises(ValidationError, match="'sequence' takes the current sequence alone"):
        NegativesConfig(source="sequence", current=False)
    with pytest.raises(ValidationError, match="greater than 0"):
        NegativesConfig(count=0)


@pytest.mark.distributed
def test_two_ranks_equal_one_process():
    one, two = on_ranks(walk)
    whole = walk(0, 1)
    assert {name.partition("/")[0].removesuffix("-padded") for name in whole} == SETTINGS.keys()
    for name, value in whole.items():
        assert torch.allclose(one[name], value, atol=1e-6, rtol=1e-4), name
        assert torch.equal(one[name], two[name]), name
        assert not name.endswith("see.weight") or value.abs().sum() > 0.01, name


class Agent(nn.Module):
    """A recurrent policy as people have them: observations in, a state, and action values of it."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.remember, self.act = nn.Linear(6, 8), nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, observations):
        z = self.see(observations)
        c, _ = self.remember(z)
        return self.act(c), z, c


def test_it_attaches_to_a_recurrent_model_of_ones_own():
    """Six places on a ring, left or right by turns of three: what comes next is told by what was before."""
    agent, head = Agent(), roused(ContrastivePrediction(8, 16, steps=3, negatives=NegativesConfig(count=32)))
    optimizer = torch.optim.Adam([*agent.parameters(), *head.parameters()], 1e-2)
    generator = torch.Generator().manual_seed(0)
    bounds = []
    for _ in range(60):
        start, way = torch.randint(6, (16, 1), generator=generator), torch.randint(2, (16, 1), generator=generator)
        places = (start + (2 * way - 1) * torch.arange(12)) % 6
        values, z, c = agent(nn.functional.one_hot(places, 6).float())
        step = head(z, c)
        loss = step.loss + 0.1 * values.square().mean()
        optimizer.zero_grad()
        loss.backward()
        bounds.append(float(step.metrics["bound_2"]))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*agent.parameters(), *head.parameters()])
        optimizer.step()
    # Of six places in equal number, knowing the place is worth log 6 = 1.79 nats.
    assert bounds[0] < 0.3
    assert 1.2 < bounds[-1] < math.log(6) + 0.2
