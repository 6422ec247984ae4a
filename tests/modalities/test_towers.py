"""Training samples of several modalities: keys, what is missing, broken files, and that workers change nothing.

A planted bug that fails here: ``present`` is always true.
"""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmssl.data import inline
from mmssl.data.dataset import Bucket, Plan, Samples, Stream, collate
from mmssl.data.guard import BrokenFile
from mmssl.distributed import World
from modalities.encoder import MODALITIES
from modalities.towers import TowerViews, blank


class Views:
    """A signal [1, n] of the file's number and random ones; of a sound also its length."""

    def __init__(self, length=None):
        self.length = length

    def __call__(self, path, rngs, size):
        if path == "broken":
            raise BrokenFile("truncated")
        signals = [torch.tensor([[float(path), *rng.random(size[0] - 1)]]) for rng in rngs]
        extra = {} if self.length is None else {"length": torch.tensor(self.length)}
        return [{"signal": signal, **extra} for signal in signals]


VIEWS = {"image": Views(), "audio": Views(length=2)}
SIZES = {"image": (4,), "audio": (3,)}
NOTHING = {"signal": torch.zeros(1, 3), "length": torch.tensor(0)}


def rngs(count=1, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def test_every_key_has_its_modality_in_front():
    (sample,) = TowerViews(VIEWS, SIZES, {})(("1", "2"), rngs(), (9, 9))
    assert sample.keys() == {"image.signal", "audio.signal", "audio.length"}
    assert sample["image.signal"].shape == (1, 4)
    assert sample["audio.signal"].shape == (1, 3)
    assert (sample["image.signal"][0, 0], sample["audio.signal"][0, 0]) == (1, 2)


def test_several_looks_at_a_row_differ_and_are_those_of_their_generators():
    both = TowerViews(VIEWS, SIZES, {})(("1", "2"), rngs(2), ())
    assert not torch.equal(both[0]["image.signal"], both[1]["image.signal"])
    (second,) = TowerViews(VIEWS, SIZES, {})(("1", "2"), [rngs(2)[1]], ())
    assert all(torch.equal(second[key], both[1][key]) for key in second)


def test_what_a_row_lacks_is_zeros_and_said():
    views = TowerViews(VIEWS, SIZES, {"audio": NOTHING})
    there, not_there = (views(row, rngs(), ())[0] for row in (("1", "2"), ("1", None)))
    assert there.keys() == not_there.keys() == {"image.signal", "audio.signal", "audio.length", "audio.present"}
    assert there["audio.present"].dtype == torch.bool
    assert there["audio.present"].item() is True
    assert not_there["audio.present"].item() is False
    assert not not_there["audio.signal"].any()
    assert torch.equal(there["image.signal"], not_there["image.signal"])
    collate_both = {key: torch.stack([there[key], not_there[key]]) for key in there}
    assert collate_both["audio.length"].tolist() == [2, 0]


def test_a_blank_is_like_a_file_that_can_be_read():
    found = blank(VIEWS["audio"], [None, "broken", "7"], SIZES["audio"])
    assert found.keys() == NOTHING.keys()
    assert all(torch.equal(found[key], NOTHING[key]) for key in found)
    for paths, reason in ((["broken"], "truncated"), ([None], "there is none")):
        with pytest.raises(BrokenFile, match=reason):
            blank(VIEWS["audio"], paths, SIZES["audio"])


def test_a_broken_file_names_its_modality():
    with pytest.raises(BrokenFile) as caught:
        TowerViews(VIEWS, SIZES, {})(("1", "broken"), rngs(), ())
    assert caught.value.reason == "its audio: truncated"


def real_views():
    """Views of pictures and of texts by bytes, as a recipe would have them."""
    kinds = {name: MODALITIES[name] for name in ("image", "text")}
    signals = {"image": {"size": (16, 16)}, "text": {"bytes": 16}}
    tokenizers = {"image": {"patch_size": (8, 8)}, "text": {}}
    views, sizes = {}, {}
    for name, kind in kinds.items():
        signal = kind.signal_type(**signals[name])
        tokenizer = kind.tokenizer_types[name == "text"](**tokenizers[name])
        views[name], sizes[name] = kind.views(signal, tokenizer), kind.sizes(signal, tokenizer)[0]
    return views, sizes


@pytest.fixture(scope="module")
def rows(photos):
    """Rows of a picture and a text, every third without."""
    paths = sorted(map(str, photos.rglob("*.png")))[:10]
    return [(path, None if i % 3 == 2 else inline.join(f"picture {i} " * (i + 1))) for i, path in enumerate(paths)]


def test_views_of_towers_go_to_workers(rows):
    views, sizes = real_views()
    texts = [row[1] for row in rows]
    towers = TowerViews(views, sizes, {"text": blank(views["text"], texts[::-1], sizes["text"])})
    again = pickle.loads(pickle.dumps(towers))
    for row in rows[1:3]:
        (here,), (there,) = towers(row, rngs(), ()), again(row, rngs(), ())
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_workers_change_nothing(rows):
    views, sizes = real_views()
    towers = TowerViews(views, sizes, {"text": blank(views["text"], [rows[1][1]], sizes["text"])})
    samples = Samples(rows, towers, [Bucket(sizes["image"], (2, 2), range(len(rows)))], None, seed=3, timeout=20)
    plan = Plan([Stream(range(len(rows)), seed=3)], 4, 1, World(), 0, 3)
    runs = [
        list(DataLoader(samples, batch_sampler=plan, num_workers=workers, collate_fn=collate)) for workers in (0, 2)
    ]
    seen = []
    for (one, none), (other, _) in zip(*runs, strict=True):
        assert not none
        assert one.keys() == other.keys() == {"index", "place", "seed", "image.signal", "text.signal", "text.present"}
        assert all(torch.equal(one[key], other[key]) for key in one)
        for index, present, signal in zip(one["index"], one["text.present"], one["text.signal"], strict=True):
            assert present == (rows[index][1] is not None) == bool(signal.any())
            seen.append(int(index))
    assert len(seen) == 12
    assert set(seen) == set(range(10))


def test_another_row_takes_the_place_of_a_broken_one():
    items = [("1", "2"), ("3", "broken"), ("5", "6")]
    samples = Samples(items, TowerViews(VIEWS, SIZES, {}), [Bucket((4,), (4,), range(3))], None, seed=0, timeout=9)
    (sample,) = samples.__getitems__([Stream([1], seed=0)[0]])
    assert sample.broken[0] == (1, "its audio: truncated")
    index = sample.tensors["index"]
    assert index != 1
    assert sample.tensors["image.signal"][0, 0] == float(items[index][0])
    assert sample.tensors["audio.signal"][0, 0] == float(items[index][1])
