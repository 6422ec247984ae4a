from collections import Counter
from itertools import chain

import numpy as np
import pytest
from sharding import read, write_tar
from torch import tensor

from mmssl.config import DataConfig, validate
from mmssl.data.blocks import Blocks, blocks_of
from mmssl.data.dataset import Bucket, Plan, Samples, Stream, loader
from mmssl.data.tars import TarMember, scan
from mmssl.distributed import World
from mmssl.errors import UserError

OF = [0] * 5 + [1] * 2 + [2] * 9 + [3] + [4] * 4
"""Blocks as uneven as shards may be."""


def test_a_window_that_is_none_is_told_what_it_may_be():
    for window in ("auto", None, 3):
        assert validate(DataConfig, {"window": window}, "here").window == window
    with pytest.raises(UserError, match="window: takes auto, null or a number of shards or row groups, but got 'foo'"):
        validate(DataConfig, {"window": "foo"}, "here")


@pytest.mark.parametrize("window", [1, 2, 3, 99])
def test_an_order_has_every_file_once_and_few_blocks_at_a_time(window):
    order = Blocks(OF, window).order(np.random.default_rng(0))
    assert sorted(order) == [*range(len(OF))]
    seen = [OF[i] for i in order]
    turns, sizes = list(dict.fromkeys(seen)), Counter(OF)
    while seen:
        inside = set(turns[:window])
        count = sum(sizes[block] for block in inside)
        assert set(seen[:count]) == inside
        seen, turns = seen[count:], [block for block in turns if block not in inside]


def test_an_order_depends_on_seed_and_epoch_alone_and_is_shuffled():
    def epochs(seed):
        stream = Stream(range(len(OF)), seed, blocks=Blocks(OF, 2))
        return [[stream[epoch * len(OF) + i].sample for i in range(len(OF))] for epoch in range(2)]

    first, second = epochs(0)
    assert [first, second] == epochs(0)
    assert first != second
    assert epochs(1)[0] != first
    assert [i for i in first if OF[i] == 2] != sorted(i for i in first if OF[i] == 2)


def test_blocks_come_in_another_order_each_time():
    orders = (Blocks(OF, 1).order(np.random.default_rng(seed)) for seed in range(8))
    assert len({tuple(dict.fromkeys(OF[i] for i in order)) for order in orders}) > 4


def test_loose_files_have_no_order_of_blocks_and_tars_have_one_if_asked():
    loose = [f"/a/{i}.png" for i in range(5)]
    assert blocks_of(loose, 2) is None
    shards = [f"/a/{i // 2}.tar@{512 * i}+1/{i}.png" for i in range(5)]
    assert blocks_of(shards, "auto") is None
    assert blocks_of(shards, 1) == Blocks([0, 0, 1, 1, 2], 1)
    assert blocks_of([f"{path}#t=0,1" for path in shards], 1) == Blocks([0, 0, 1, 1, 2], 1)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """21 files in shards of 5, 2, 9, 1 and 4, each holding its number."""
    folder, paths = tmp_path_factory.mktemp("uneven"), []
    for block in range(5):
        files = [(f"{i}.txt", str(i).encode()) for i in range(len(OF)) if OF[i] == block]
        shard = str(write_tar(folder / f"{block}.tar", files))
        paths += [str(TarMember(shard, *entry[1:3], entry[0])) for entry in scan(shard)]
    return paths


def views(path, rngs, size):
    return [{"signal": tensor(float(read(path)))} for _ in rngs]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_read_each_file_of_uneven_shards_once_an_epoch(members, window, ranks, workers):
    bucket = Bucket((1,), (1,), range(len(members)))
    samples = Samples(members, views, [bucket], None, seed=0, timeout=9)
    streams = [Stream(bucket.members, 0, blocks=blocks_of(members, window))]

    def steps(size, start=0):
        found = []
        for rank in range(size):
            plan = Plan(streams, 6, 1, World(rank, size, rank, size), start, 7)
            found.append([batch["signal"].int().tolist() for batch, _ in loader(samples, plan, workers, False)])
        return [list(chain(*parts)) for parts in zip(*found, strict=True)]

    batches = steps(ranks)
    read_ = list(chain(*batches))
    assert sorted(read_[: len(OF)]) == sorted(read_[len(OF) :]) == [*range(len(OF))]
    assert read_[: len(OF)] != read_[len(OF) :]
    # Resumed in the middle of an epoch, on another number of ranks.
    assert steps(1, start=2) == batches[2:]
