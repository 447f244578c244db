"""Orders only: which index comes when, on which rank. Nothing here knows an image."""

import math

import torch
from torch.utils.data import DistributedSampler, Sampler


class RASampler(Sampler):
    """Repeated augmentation: every image three times in a row, spread over the ranks.

    Source: DeiT's RASampler (facebookresearch/deit, samplers.py), after Berman et al., 2019. The epoch's order
    is a permutation seeded by seed + epoch; a rank takes every world-th index and keeps
    floor(len // 256 * 256 / world) of them.
    """

    def __init__(self, length, world=1, rank=0, seed=0, repeats=3):
        self.length, self.world, self.rank, self.seed, self.repeats = length, world, rank, seed, repeats
        self.epoch = 0
        # ours: the published rounding to 256 leaves nothing of a smaller set; that one is taken whole.
        rounded = length // 256 * 256 / world if length >= 256 else length / world
        self.kept = math.floor(rounded) if length >= 256 else math.ceil(rounded)

    def set_epoch(self, epoch):
        """Choose the permutation of the next iteration."""
        self.epoch = epoch

    def __len__(self):
        return self.kept

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)
        per_rank = math.ceil(self.length * self.repeats / self.world)
        # Padded from the front; modulo, because a few images on many ranks go round more than once.
        places = torch.arange(self.rank, per_rank * self.world, self.world)[: self.kept] % len(order)
        return iter(order[places].tolist())


def training_order(length, world=1, rank=0, seed=0, repeated_aug=False):
    """The order of a training set: RASampler or PyTorch's DistributedSampler, both seeded by seed + epoch."""
    if repeated_aug:
        return RASampler(length, world, rank, seed)
    return DistributedSampler(range(length), num_replicas=world, rank=rank, seed=seed)


class Passes(Sampler):
    """Exactly `length` indices of an order, going through it again, reshuffled, as often as that takes.

    # ours: the released loop starts the unlabelled loader again in the same order when it runs out, which
    drops its last partial batch and restarts the workers.
    """

    BETWEEN_PASSES = 1_000_003  # far from any number of epochs, so no pass repeats another epoch's order

    def __init__(self, order, epoch, length):
        if len(order) == 0:
            raise ValueError("There are no images to draw batches from.")
        self.order, self.epoch, self.length = order, epoch, length

    def __len__(self):
        return self.length

    def __iter__(self):
        left, n = self.length, 0
        while left > 0:
            self.order.set_epoch(self.epoch + n * self.BETWEEN_PASSES)
            for index in self.order:
                if left == 0:
                    break
                yield index
                left -= 1
            n += 1


def evaluation_order(length, world=1, rank=0):
    """Every index exactly once over all ranks: no padding, so shards differ by one image at most."""
    return range(rank, length, world)
