"""From data sets to batches on the device."""

import signal
from array import array

import torch
from torch.utils.data import DataLoader

from images.decoding import UnreadableImage
from samplers import Passes, evaluation_order
from utils import derived_seed, gather, print_main, print_rank


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
        # Kept: `watched` goes through it beside the loader, and the order has only one place to be at.
        sampler=array("q", Passes(order, epoch, steps * batch_size)),
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


def _block_sigterm(_worker):
    # In the worker, because Python opens SIGTERM again on the way to one that is not forked.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _started(loader):
    """The loader's iterator, its workers deaf to SIGUSR2, and to SIGTERM where this process handles that.

    Slurm signals all processes of a job, and a worker that ends makes its loader fail. Workers inherit the mask however
    they start; a handler would be forked only. They end when their loader does, or their parent.
    """
    if callable(signal.getsignal(signal.SIGTERM)):  # as in a task of submitit, which lets SIGTERM pass
        loader.worker_init_fn = _block_sigterm
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watched(loader):
    """The batches of a loader of Views; an unreadable image is told of the first time another one stands in for it.

    The index asked for and the one in the batch tell, so nothing else travels and the device is not asked. Raises
    UnreadableImage, one sentence, for what Views cannot replace and for more unreadable images than they tolerate:
    counted on this process, and on all those of epochs before.
    """
    views, batches = loader.dataset, _started(loader)
    try:
        for batch, places in zip(batches, loader.batch_sampler):
            if replaced := views.replaced(places, batch[-1]):
                for index in replaced:
                    if index not in views.met | views.unreadable:
                        print_rank(f"{views.why(index)}; the next readable image stands in for it.")
                    views.met.add(index)
                views.check(views.met | views.unreadable)
            yield batch
    except UnreadableImage as error:
        # What a worker raised arrives as text, its traceback first.
        raise UnreadableImage(str(error).rsplit("UnreadableImage: ", 1)[-1].strip()) from error


def count_unreadable(*sets):
    """How many different images were unreadable in the epoch that ends, over all ranks, which must all call it.

    Args:
        sets: training sets, Views or None.
    Raises UnreadableImage on all ranks together where more were since the start of these processes than a set
    tolerates. A run that goes on from a checkpoint counts anew against the limit; an epoch's own count is the same.
    """
    count = 0
    for views in sets:
        if views is not None:
            met = set().union(*gather(views.met))
            views.met, views.unreadable = set(), views.unreadable | met
            views.check(views.unreadable)
            count += len(met)
    if count:
        print_main(f"Unreadable images in this epoch: {count}.")
    return count


def to_device(loader, device, finish=None, seed=()):
    """The loader's batches, their tensors on the device, finished there; on CUDA ahead of their use.

    Args:
        finish: (seed, device) -> function of a batch, as `transforms.DeviceFinish`; None: nothing is left.
        seed: the numbers that decide what it draws.
    """
    finish = finish(derived_seed(*seed), device) if finish else tuple
    finished = (finish([tensor.to(device, non_blocking=True) for tensor in batch]) for batch in loader)
    return _prefetch(finished, device) if device.type == "cuda" else finished


def _prefetch(batches, device):
    """The batches, each made on a stream of its own while the one before it is in use."""
    side, using, ready = torch.cuda.Stream(device), torch.cuda.current_stream(device), None
    side.wait_stream(using)  # for what the finish holds
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            made = batch and (batch, side.record_event())
        if ready:
            yield _handed_over(*ready, using)
        if made is None:
            return
        ready = made


def _handed_over(batch, event, stream):
    """The batch, for use on another stream than the one it was made on."""
    stream.wait_event(event)
    for tensor in batch:
        tensor.record_stream(stream)  # or its memory would be used anew while the stream still reads it
    return batch
