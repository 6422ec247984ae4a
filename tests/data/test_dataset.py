"""The stream of samples: every file once an epoch, the same for any world size, worker count and starting point."""

import numpy as np
import pytest
import torch

from mmssl.data.dataset import Bucket, Key, Plan, Samples, Stream, collate, turns, worker_count
from mmssl.data.guard import BrokenFile
from mmssl.distributed import World
from mmssl.masking import RandomMask

FILES = [f"{i}" for i in range(10)]


BUCKETS = [Bucket((1, 2), (4, 4), range(10))]


class Views:
    """A signal [1, 2] of the file's number and a random one; counts how often a file is opened."""

    def __init__(self):
        self.opened = 0

    def __call__(self, path, rngs, size):
        self.opened += 1
        if path in ("3", "7"):
            raise BrokenFile("truncated")
        return [{"signal": torch.tensor([[float(path), rng.random()]]).expand(size)} for rng in rngs]


def samples(views=None, buckets=BUCKETS, **more):
    return Samples(FILES, views or Views(), buckets, RandomMask(0.75), seed=5, timeout=9, **more)


def plan(files, batch_size, accumulate, world, seed, start, stop, repeats=1):
    return Plan([Stream(range(files), seed, 0, repeats)], batch_size, accumulate, world, start, stop)


def test_each_epoch_holds_each_file_once_in_an_order_of_its_own():
    stream = Stream(range(10), seed=1)
    keys = [stream[position] for position in range(30)]
    epochs = [[key.sample for key in keys[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {key.epoch for key in keys[10:20]} == {1}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_steps(world, accumulate):
    whole = list(plan(10, 8, 1, World(), seed=2, start=0, stop=4))
    parts = [list(plan(10, 8, accumulate, World(r, world), 2, 0, 4)) for r in range(world)]
    for step in range(4):
        joined = [key for m in range(accumulate) for r in range(world) for key in parts[r][step * accumulate + m]]
        assert joined == whole[step]


def test_a_plan_can_begin_anywhere():
    assert list(plan(10, 4, 2, World(1, 2), 0, 3, 6)) == list(plan(10, 4, 2, World(1, 2), 0, 0, 6))[6:]


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
    targets = np.arange(100, 110)
    for i in range(10):
        sample = samples(targets=targets)[Key(0, i)]
        assert sample.tensors["target"] == 100 + sample.tensors["index"]


def test_repeated_samples_share_one_reading_and_differ():
    keys = next(iter(plan(10, 6, 1, World(), seed=2, start=0, stop=1, repeats=3)))
    assert [key.repeat for key in keys] == [0, 1, 2, 0, 1, 2]
    assert keys[0].sample == keys[2].sample != keys[3].sample
    views = Views()
    together = samples(views).__getitems__([key._replace(sample=key.sample % 3) for key in keys])
    assert views.opened == 2
    alone = [samples()[key._replace(sample=key.sample % 3)] for key in keys]
    for a, b in zip(together, alone, strict=True):
        assert all(np.array_equal(a.tensors[name], b.tensors[name]) for name in b.tensors)
    assert len({float(sample.tensors["signal"][0, 1]) for sample in together}) == 6


def test_a_broken_file_is_replaced_by_one_that_its_batch_agrees_with():
    # Of one speaker, say; where there is none, any file is better than the end of training.
    halves = [Bucket((1, 2), (4, 4), part, part) for part in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])]
    made = samples(buckets=halves)
    for epoch in range(20):
        for broken, members in ((3, halves[0].members), (7, halves[1].members)):
            sample = made[Key(epoch, broken, bucket=int(broken == 7))]
            assert sample.broken[0] == (broken, "truncated")
            assert sample.tensors["index"] in members
    alone = samples(buckets=[Bucket((1, 2), (4, 4), [3], [3])])[Key(0, 3)]
    assert {entry[0] for entry in alone.broken} <= {3, 7}
    assert alone.tensors["index"] not in (3, 7)


def test_a_broken_file_is_replaced_by_the_same_one_for_all_its_samples():
    keys = [Key(0, 3, repeat) for repeat in range(3)]
    together, alone = samples().__getitems__(keys), [samples()[key] for key in keys]
    assert len({sample.tensors["index"] for sample in [*together, *alone]}) == 1
    assert [len(sample.broken) for sample in together] == [len(together[0].broken), 0, 0]
    assert together[0].broken[0] == (3, "truncated")
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.tensors["signal"], b.tensors["signal"])


@pytest.mark.parametrize("sizes", [[10], [7, 2, 1], [1, 0, 5], [3, 3], [1000, 1]])
def test_buckets_take_turns_in_proportion_to_their_files(sizes):
    steps, given = 200, np.zeros(len(sizes))
    for step, (bucket, before) in enumerate(turns(sizes, steps), start=1):
        assert before == given[bucket]
        given[bucket] += 1
        assert np.abs(given - step * np.array(sizes) / sum(sizes)).max() <= 1
    assert given.sum() == steps


def test_a_batch_comes_from_one_bucket_and_has_its_size():
    members = [[0, 1, 2, 4, 5, 6], [8, 9]]
    buckets = [Bucket((1, 2), (4, 4), members[0]), Bucket((3, 2), (2, 4), members[1])]
    streams = [Stream(files, 5, b) for b, files in enumerate(members)]
    seen = []
    for step, keys in enumerate(Plan(streams, 4, 1, World(), 0, 8)):
        bucket = keys[0].bucket
        assert {key.sample for key in keys} <= set(members[bucket])
        batch, _ = collate(samples(buckets=buckets).__getitems__(keys))
        assert batch["signal"].shape == (4, *buckets[bucket].size)
        assert batch["keep"].shape == (4, np.prod(buckets[bucket].grid) // 4)
        seen += [key.sample for key in keys]
        assert next(iter(Plan(streams, 4, 1, World(), step, 8))) == keys
    assert sorted(seen) == sorted(4 * [*members[0], *members[1]])


def test_a_replacement_takes_the_size_of_its_batch():
    buckets = [Bucket((1, 2), (4, 4), [0, 1]), Bucket((5, 2), (2, 2), [3])]
    sample = samples(buckets=buckets)[Key(0, 3, bucket=1)]
    assert sample.broken
    assert sample.tensors["signal"].shape == (5, 2)
    assert len(sample.tensors["keep"]) == 1


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
