"""Samplers: the order in which each rank visits the indices of a data set."""

import math

import torch
from torch.utils.data import DistributedSampler, Sampler


class RASampler(Sampler):
    """Repeated augmentation: every image `repeats` times in a row, dealt out to the ranks in turn.

    The images are permuted by seed + epoch and repeated; rank r takes every world-th index from the r-th on, and keeps
    the first floor(length // 256 * 256 / world). Source: DeiT's RASampler (facebookresearch/deit, samplers.py), after
    Berman et al., 2019.
    """

    def __init__(self, length, world=1, rank=0, seed=0, repeats=3):
        self.length, self.world, self.rank, self.seed, self.repeats = length, world, rank, seed, repeats
        self.epoch = 0
        # ours: rounded down to a multiple of 256 as published, a smaller set would be empty. It is not rounded.
        rounded = length // 256 * 256 / world if length >= 256 else length / world
        self.kept = math.floor(rounded) if length >= 256 else math.ceil(rounded)

    def set_epoch(self, epoch):
        """Set the epoch whose permutation the next iteration uses."""
        self.epoch = epoch

    def __len__(self):
        return self.kept

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)
        per_rank = math.ceil(self.length * self.repeats / self.world)
        # The order is padded with its own beginning. A small set on many ranks may need it several times: modulo.
        positions = torch.arange(self.rank, per_rank * self.world, self.world)[: self.kept] % len(order)
        return iter(order[positions].tolist())


def training_order(length, world=1, rank=0, seed=0, repeated_aug=False):
    """Return a rank's sampler of a training set: RASampler or PyTorch's DistributedSampler, seeded by seed + epoch."""
    if repeated_aug:
        return RASampler(length, world, rank, seed)
    return DistributedSampler(range(length), num_replicas=world, rank=rank, seed=seed)


class Passes(Sampler):
    """Exactly `length` indices per epoch from a training order, which is repeated, reshuffled for every pass.

    # ours: the released loop restarts the unlabelled loader when it runs out, which repeats the same order, drops the
    last partial batch and restarts the workers.
    """

    BETWEEN_PASSES = 1_000_003  # more than any number of epochs, so that no pass has the order of another epoch

    def __init__(self, order, epoch, length):
        if len(order) == 0:
            raise ValueError("There are no images to draw batches from.")
        self.order, self.epoch, self.length = order, epoch, length

    def __len__(self):
        return self.length

    def __iter__(self):
        left, finished_passes = self.length, 0
        while left > 0:
            self.order.set_epoch(self.epoch + finished_passes * self.BETWEEN_PASSES)
            for index in self.order:
                if left == 0:
                    break
                yield index
                left -= 1
            finished_passes += 1


def evaluation_order(length, world=1, rank=0):
    """Return a rank's share of the indices 0..length-1, each of which exactly one rank gets.

    Unlike in training nothing is padded, so the shares may differ by one index.
    """
    return range(rank, length, world)
