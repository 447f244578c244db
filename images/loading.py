"""From data sets to batches on the device.

Every image's random draws depend on (seed, epoch, rank, stream, place in the epoch's order) alone, so that the number
of workers never changes a batch.
"""

import os
import signal
import sys
import threading
import time
from array import array
from contextlib import ExitStack
from functools import cache, partial

import torch
from torch.utils.data import DataLoader, default_collate

from samplers import Passes, evaluation_order
from utils import derived_seed, preserved_cpu_generators, seed_cpu


class _Ordered:
    """A data set in the order of one epoch. Item k is `dataset.load(order[k])`, its draws seeded by (*seed, k)."""

    def __init__(self, dataset, order, seed):
        self.dataset, self.order, self.seed = dataset, order, seed

    def __len__(self):
        return len(self.order)

    def __getitems__(self, places):
        # Without workers this is the training process, whose own generators must not notice.
        with preserved_cpu_generators():
            return [self._load(place) for place in places]

    def _load(self, place):
        seed_cpu(*self.seed, place)
        return self.dataset.load(self.order[place])


def _collate(loaded):
    """[(item or None, unreadable)] -> (batch of the items, or None where one is missing, all that is unreadable)."""
    items, unreadable = zip(*loaded)
    batch = None if any(item is None for item in items) else default_collate(items)
    return batch, [pair for pairs in unreadable for pair in pairs]


def training_loader(dataset, order, batch_size, steps, *, seed, epoch, rank, num_workers, pin_memory, stream):
    """A loader of exactly `steps` batches for one epoch, to be read by `read_batches`.

    Args:
        dataset: as datasets.MultiViewDataset: its `load(i)` returns (item or None, unreadable images).
        order: sampler with `set_epoch`; iterated again, reshuffled, where `steps` batches need more images.
        seed, epoch, rank, stream: decide the random draws; the stream is 0 for the labelled and 1 for the unlabelled
            loader.
    """
    places = array("q", Passes(order, epoch, steps * batch_size))
    return DataLoader(
        _Ordered(dataset, places, (seed, epoch, rank, stream)),
        batch_size=batch_size,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # from which the loader seeds its workers, instead of the global generator
    )


def evaluation_loader(dataset, batch_size, *, world, rank, num_workers, pin_memory):
    """A loader that gives every image to exactly one rank, to be read by `read_batches`."""
    return DataLoader(
        _Ordered(dataset, evaluation_order(len(dataset), world, rank), ()),
        batch_size=batch_size,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


_OPEN_FILES = "too many files are open: raise the limit (ulimit -n 65536), or"
_SHARED_MEMORY = "shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=8g), or"
_KILLED = "a worker was killed, perhaps for lack of memory:"
# Words of an error where the machine is exhausted: what the user is told. The first that occur count.
_EXHAUSTED = {
    "Too many open files": _OPEN_FILES,
    "ancdata": _OPEN_FILES,  # "received 0 items of ancdata": a descriptor that did not arrive
    "Bus error": _SHARED_MEMORY,
    "shared memory": _SHARED_MEMORY,
    "No space left on device": _SHARED_MEMORY,
    "signal: Killed": _KILLED,
    "(pid(s) ": _KILLED,  # "DataLoader worker (pid(s) 7) exited unexpectedly", by a signal that nobody caught
}


def _texts(error):
    """The messages of an error and of those that it came from, one after the other."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _explained(error, flag):
    """The OSError that says what to do where `error` means an exhausted machine, else None."""
    found = "\n".join(_texts(error))
    advice = next((advice for words, advice in _EXHAUSTED.items() if words in found), None)
    return advice and _failure(advice, flag)


def _failure(advice, flag):
    return OSError(f"Loading images failed, because {advice} pass fewer {flag} (0: none).")


def raw_batches(loader, flag="--num_workers"):
    """Yield the batches of a DataLoader whose workers leave the signals of a terminal and of Slurm to this process.

    Args:
        flag: the command-line flag that sets the number of workers, for the error message.
    Raises OSError, one sentence that says what to do, where the workers exhaust shared memory, open files or memory:
    where one is killed, in whatever this process is doing.
    """
    try:
        _check_open_files(loader.num_workers)
        yield from _to_the_last(loader, flag)
    except (OSError, RuntimeError) as error:
        if told := _explained(error, flag):
            raise told from error
        raise


def _to_the_last(loader, flag):
    batches = _start(loader)
    _explain_deaths(flag)
    try:
        for number, batch in enumerate(batches, 1):
            if number == len(loader):
                next(batches, None)  # ends the workers; while Python collects an iterator, it would lose a Ctrl-C
            yield batch
    except (ConnectionError, EOFError) as error:  # a worker has died
        time.sleep(1)  # PyTorch raises what killed it in a moment, or has raised it where nobody could catch it
        raise _failure(_KILLED, flag) from error


def _explain_deaths(flag):
    """Let the error by which PyTorch interrupts this process when a worker dies say what to do."""
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "func", None) is _on_death:  # of the loader before
        handler, _ = handler.args
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, partial(_on_death, handler, flag))


def _on_death(handler, flag, number, frame):
    try:
        handler(number, frame)
    except RuntimeError as error:
        if told := _explained(error, flag):
            raise told from error
        raise


def _check_open_files(workers):
    """Raise OSError where there is no room for the files of so many workers.

    A worker inherits those of this process. Where it cannot open the files that a batch is shared by, it loses the
    batch, and the loader would wait for it forever.
    """
    with ExitStack() as files:
        for _ in range(workers and 40 + 8 * workers):
            files.enter_context(open(os.devnull))


def _prepare_worker(signals, _worker):
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    sys.excepthook = _worker_excepthook


def _worker_excepthook(kind, error, trace):
    # A connection that breaks only says that the training process has ended before it took a batch.
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _start(loader):
    """The loader's iterator; its workers ignore SIGINT and SIGUSR2, and SIGTERM where this process handles that signal.

    Ctrl-C in a terminal and Slurm send a signal to all processes of a job, and a worker that ended would make its
    loader fail. Workers inherit a signal mask however they are started, a handler only when they are forked. They end
    with their loader or with their parent.
    """
    # These are blocked in the worker, because Python unblocks them in a process that is not forked.
    handled = callable(signal.getsignal(signal.SIGTERM))  # as in a task of submitit, which ignores SIGTERM
    loader.worker_init_fn = partial(_prepare_worker, [signal.SIGINT, signal.SIGTERM] if handled else [signal.SIGINT])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR2])
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_batches(loader):
    """Yield the batches of a loader of this module, lists of tensors.

    Unreadable images are recorded in the data set's `bad_images`. Raises UnreadableImage, one sentence, where an
    image has no stand-in or more are unreadable than are tolerated, and OSError as `raw_batches` does.
    """
    bad_images = loader.dataset.dataset.bad_images
    for batch, unreadable in raw_batches(loader):
        if batch is None:
            bad_images.refuse(unreadable)
        bad_images.add(unreadable)
        yield batch


def to_device(batches, device, finish=None, seed=()):
    """Yield batches with their tensors on the device; on CUDA each is copied while the one before it is in use.

    Args:
        finish: what the views left to the device, (seed, device) -> function of a batch, as
            fast_transforms.DeviceFinish; None: nothing.
        seed: the numbers that decide its draws.
    """
    finish = finish(derived_seed(*seed), device) if finish else tuple
    finished = (finish([tensor.to(device, non_blocking=True) for tensor in batch]) for batch in batches)
    return _prefetch(finished, device) if device.type == "cuda" else finished


@cache
def _side_stream(device):
    """The stream on which batches are made: one for all loaders, as the memory of a stream serves no other one."""
    return torch.cuda.Stream(device)


def _prefetch(batches, device):
    """Yield the batches; each is made on a side stream while the one before it is in use."""
    side, using, ready = _side_stream(device), torch.cuda.current_stream(device), None
    side.wait_stream(using)  # for the tensors that `finish` holds
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            made = batch and (batch, side.record_event())
        if ready:
            yield _hand_over(*ready, using)
        if made is None:
            return
        ready = made


def _hand_over(batch, event, stream):
    """Return a batch, made on another stream, for use on this one."""
    stream.wait_event(event)
    for tensor in batch:
        tensor.record_stream(stream)  # or the allocator would reuse its memory while this stream still reads it
    return batch
