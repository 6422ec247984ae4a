"""The stream of samples: every file once an epoch, the same for any world size, worker count and starting point."""

import numpy as np
import pytest
import torch

from mmssl.data.dataset import Key, Plan, Samples, collate, key_at, worker_count
from mmssl.data.guard import BrokenFile
from mmssl.distributed import World
from mmssl.masking import RandomMask

FILES = [f"{i}" for i in range(10)]


def decode(path):
    if path in ("3", "7"):
        raise BrokenFile("truncated")
    return float(path)


def transform(value, rng):
    return torch.tensor([[value, rng.random()]], dtype=torch.float32)


def samples(**more):
    return Samples(FILES, decode, transform, RandomMask((4, 4), 0.75), seed=5, timeout=9, **more)


def test_each_epoch_holds_each_file_once_in_an_order_of_its_own():
    keys = [key_at(position, 10, seed=1) for position in range(30)]
    epochs = [[key.sample for key in keys[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {key.epoch for key in keys[10:20]} == {1}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_steps(world, accumulate):
    whole = list(Plan(10, 8, 1, World(), seed=2, start=0, stop=4))
    parts = [list(Plan(10, 8, accumulate, World(r, world), 2, 0, 4)) for r in range(world)]
    for step in range(4):
        joined = [key for m in range(accumulate) for r in range(world) for key in parts[r][step * accumulate + m]]
        assert joined == whole[step]


def test_a_plan_can_begin_anywhere():
    assert list(Plan(10, 4, 2, World(1, 2), 0, 3, 6)) == list(Plan(10, 4, 2, World(1, 2), 0, 0, 6))[6:]


def test_a_sample_is_a_function_of_its_key_alone():
    a, b = samples()[Key(0, 2)], samples()[Key(0, 2)]
    assert all(np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    for other in (Key(1, 2), Key(0, 2, repeat=1)):
        changed = samples()[other]
        assert changed.tensors["seed"] != a.tensors["seed"]
        assert changed.tensors["signal"][0, 1] != a.tensors["signal"][0, 1]


def test_a_broken_file_is_replaced_and_told():
    sample = samples()[Key(0, 3)]
    assert sample.broken[0] == (3, "truncated")
    assert sample.tensors["index"] not in (3, 7)
    assert sample.tensors["signal"][0, 0] == sample.tensors["index"]
    assert samples()[Key(0, 3)].tensors["index"] == sample.tensors["index"]


def test_targets_follow_the_file_that_was_read():
    targets = list(range(100, 110))
    for i in range(10):
        sample = samples(targets=targets)[Key(0, i)]
        assert sample.tensors["target"] == 100 + sample.tensors["index"]


def test_collate_stacks_and_keeps_the_types():
    batch, broken = collate([samples()[Key(0, i)] for i in (0, 3, 5)])
    assert batch["signal"].shape == (3, 1, 2)
    assert batch["keep"].shape == (3, 4)
    assert batch["drop"].shape == (3, 12)
    assert {batch[name].dtype for name in ("index", "seed", "keep", "drop")} == {torch.int64}
    assert broken[0] == (3, "truncated")


def test_the_number_of_workers():
    assert worker_count(3, World()) == 3
    assert worker_count("auto", World(local_size=10_000)) == 0
    assert 0 <= worker_count("auto", World()) <= 8
