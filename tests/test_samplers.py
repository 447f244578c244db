"""Samplers: the published numbers, an obvious slow version, shards that cover, orders that differ."""

import math
import re

import pytest
import torch

from samplers import Passes, RASampler, evaluation_order, training_order
from tests.reference import load

REFERENCE = load("ra_sampler.json")


def order_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def slow_repeated(length, world, rank, epoch, seed=0):
    """DeiT's sampler one index at a time; a set below 256 is not cut to a multiple of 256."""
    permutation = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    line = []
    for index in permutation:
        line += [index, index, index]
    place = 0
    while len(line) % world:
        line.append(line[place])
        place += 1
    mine = [index for place, index in enumerate(line) if place % world == rank]
    kept = math.floor(length // 256 * 256 / world) if length >= 256 else math.ceil(length / world)
    return mine[:kept]


@pytest.mark.parametrize("case", REFERENCE)
def test_repeated_augmentation_is_the_published_one(case):
    length, world, rank, epoch = map(int, re.findall(r"\d+", case))
    sampler = RASampler(length, world, rank, seed=0)
    order, expected = order_of(sampler, epoch), REFERENCE[case]
    assert len(sampler) == len(order) == expected["n"]
    assert order[:12] == expected["first"]
    assert order[-6:] == expected["last"]
    assert sum(order) == expected["sum"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 10, 100, 255, 256, 300, 511, 512, 777])
def test_repeated_augmentation_equals_the_slow_version(length, world):
    for rank in range(world):
        for epoch in (0, 5):
            expected = slow_repeated(length, world, rank, epoch)
            assert order_of(RASampler(length, world, rank), epoch) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "length, kept", [(1, (1, 1, 1)), (10, (10, 5, 4)), (100, (100, 50, 34)), (255, (255, 128, 85))]
)
def test_a_set_below_256_images_is_not_empty(length, kept, world):
    orders = [order_of(RASampler(length, world, rank), 0) for rank in range(world)]
    assert [len(order) for order in orders] == [kept[world - 1]] * world
    assert all(0 <= index < length for order in orders for index in order)


def test_a_few_images_reach_every_one_of_many_ranks():
    for rank in range(16):  # 3 places of one image for 16 ranks: the padding goes round more than once
        assert order_of(RASampler(1, 16, rank), 0) == [0]
    assert [order_of(RASampler(2, 16, rank), 0)[0] for rank in range(16)].count(0) in (7, 9)


def test_three_ranks_see_each_image_together():
    """The purpose of the sampler: the three copies of an image meet in one step on different ranks."""
    shards = [order_of(RASampler(777, 3, rank), 2) for rank in range(3)]
    assert shards[0] == shards[1] == shards[2]
    assert len(set(shards[0])) == 256


@pytest.mark.parametrize("repeated", [True, False])
def test_seed_plus_epoch_is_what_decides_the_order(repeated):
    def order(seed, epoch):
        return order_of(training_order(300, 2, 1, seed, repeated), epoch)

    assert order(1, 2) == order(0, 3)
    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(0, 2), order(7, 0), order(8, 0)]
    assert len({tuple(each) for each in orders}) == 5


def test_training_order_chooses_the_sampler():
    assert order_of(training_order(777, 3, 1, 0, repeated_aug=True), 3) == slow_repeated(777, 3, 1, 3)
    assert sorted(order_of(training_order(777, 1, 0, 0, repeated_aug=False), 3)) == list(range(777))
    assert not torch.distributed.is_initialized()  # so the orders here are those of a plain process


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 12, 100])
def test_shards_cover_the_set(length, world):
    for epoch in (0, 1):
        shards = [order_of(training_order(length, world, rank), epoch) for rank in range(world)]
        assert {len(shard) for shard in shards} == {math.ceil(length / world)}
        together = [index for shard in shards for index in shard]
        assert set(together) == set(range(length))
        assert len(together) - length == -length % world <= world - 1  # no repeats where the world divides it


@pytest.mark.parametrize("length", [1, 9, 10, 11, 37])
def test_passes_have_exactly_the_length(length):
    passes = Passes(training_order(10), epoch=4, length=length)
    indices = list(passes)
    assert len(passes) == len(indices) == length
    for start in range(0, length - 9, 10):
        assert sorted(indices[start : start + 10]) == list(range(10))
    tail = indices[length // 10 * 10 :]
    assert len(set(tail)) == len(tail) == length % 10


def test_passes_are_reshuffled_and_unlike_other_epochs():
    def passes(epoch, seed=0):
        indices = list(Passes(training_order(50, seed=seed), epoch, 150))
        return [tuple(indices[start : start + 50]) for start in (0, 50, 100)]

    every = passes(0) + passes(1) + passes(2)
    assert len(set(every)) == 9
    assert passes(1) == passes(1) != passes(1, seed=5)
    assert passes(3)[0] == tuple(order_of(training_order(50), 3))  # the first pass is the epoch's own order


def test_passes_deal_every_pass_over_the_ranks():
    ranks = [list(Passes(training_order(12, 3, rank), 0, 8)) for rank in range(3)]
    for start in (0, 4):
        assert sorted(index for indices in ranks for index in indices[start : start + 4]) == list(range(12))


@pytest.mark.parametrize("repeated", [True, False])
def test_an_empty_set_is_refused(repeated):
    with pytest.raises(ValueError, match="no images"):
        Passes(training_order(0, repeated_aug=repeated), 0, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 4, 10, 13])
def test_evaluation_gives_every_index_to_one_rank(length, world):
    shards = [list(evaluation_order(length, world, rank)) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
