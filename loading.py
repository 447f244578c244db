"""From data sets to batches on the device."""

import signal

import torch
from torch.utils.data import DataLoader

from samplers import Passes, evaluation_order
from utils import derived_seed


def training_loader(views, order, batch_size, steps, *, seed, epoch, rank, num_workers, pin_memory, stream):
    """A loader of exactly `steps` batches for one epoch, decided by (seed, epoch, rank, stream) alone.

    Args:
        views: data set.
        order: sampler with `set_epoch`; gone through again, reshuffled, where `steps` batches take more.
        stream: a number that tells the labelled (0) from the unlabelled (1) loader's random draws.
    """
    return DataLoader(
        views,
        batch_size=batch_size,
        sampler=Passes(order, epoch, steps * batch_size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(derived_seed(seed, epoch, rank, stream)),
    )


def evaluation_loader(views, batch_size, *, world, rank, num_workers, pin_memory):
    """A loader that gives every image to exactly one rank."""
    return DataLoader(
        views,
        batch_size=batch_size,
        sampler=evaluation_order(len(views), world, rank),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def to_device(loader, device):
    """The loader's batches, their tensors on the device."""
    # Slurm signals all processes of a job. Workers inherit the mask however they start; a handler would be forked only.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    batches = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for batch in batches:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)
