"""CLIP on rows that are in a batch twice, seeds of its towers, and the plan of a batch in chunks.

Planted bugs that fail here: indices compared on a rank alone, the last instead of the first look, one seed for all.
"""

import pytest
import torch
from clip_ranks import draw, make
from clip_repeated import ROWS, repeated, walk, walk_on_ranks
from ranks import on_ranks

from mmssl.cost import footprint
from mmssl.errors import UserError
from mmssl.objectives import clip
from mmssl.objectives.clip import first

PAIR = ("image", "text")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def once():
    """What there is of the batch without what repeats."""
    firsts = [i for i, row in enumerate(ROWS) if row not in ROWS[:i]]
    return walk({key: value[firsts] for key, value in repeated().items()})


def test_the_first_of_each_is_found():
    assert first(torch.tensor([7, 3, 7, 7, 0, 3])).tolist() == [True, True, False, False, True, False]
    assert first(torch.arange(5)).all()


def test_a_row_that_is_there_twice_is_no_mismatch_of_itself(once):
    assert_same(walk(repeated()), once)


@pytest.mark.distributed
def test_nor_is_one_that_is_on_two_ranks(once):
    for found in on_ranks(walk_on_ranks):
        assert_same(found, once)


def test_towers_drop_on_their_own(monkeypatch):
    seeds = {}
    objective, batch = make(*PAIR, drop_path=0.5), draw(*PAIR)
    for name in PAIR:
        monkeypatch.setattr(objective, "_embed", lambda name, part: seeds.setdefault(name, part["seed"]))
        objective.features(name, batch)
    assert not (seeds["image"] == seeds["text"]).any()
    assert all((found >= 0).all() for found in seeds.values())


def test_few_chunks_are_planned_as_all_of_them(monkeypatch):
    one = {key: value[:1] for key, value in draw(*PAIR).items()}
    feet = []
    for planned in (clip.CHUNKS_PLANNED, 1000):
        monkeypatch.setattr(clip, "CHUNKS_PLANNED", planned)
        feet.append(footprint(make(*PAIR, chunk=4), one, 22))
    few, all_ = feet
    assert few.activations == pytest.approx(all_.activations, rel=0.01)
    assert few.peak() == pytest.approx(all_.peak(), rel=0.01)
    assert len(few.timeline) < len(all_.timeline) / 1.5


@pytest.mark.parametrize("temperature", [1e-9, 0.0099, 101.0])
def test_a_temperature_that_would_not_be_what_it_says_is_refused(temperature):
    with pytest.raises(UserError, match=r"objective\.temperature"):
        make(*PAIR, temperature=temperature)
    assert make(*PAIR, temperature=0.01).temperature.scale().item() == pytest.approx(100)
