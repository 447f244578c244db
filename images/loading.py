"""From data sets to batches on the device.

Every image's random draws depend on (seed, epoch, rank, stream, place in the epoch's order) alone, so that the number
of workers never changes a batch.

Workers are started by Python's fork server, a process that has imported what they need and runs nothing else. They are
not forked from the training process, because a fork beside the threads of gloo or NCCL can hang.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import weakref
from array import array
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from samplers import Passes, evaluation_order
from utils import derived_seed, preserved_cpu_generators, seed_cpu

SHARED = 2**28  # bytes of shared memory for the finished batches of a loader; with evaluation a rank has three of them


class _Seeded:
    """A data set that is asked for keys (numbers, place, index): `dataset.load(index)`, drawn by (*numbers, place)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, keys):
        # Without workers this is the training process, whose own generators must not notice.
        with preserved_cpu_generators():
            return [self._load(*key) for key in keys]

    def _load(self, numbers, place, index):
        seed_cpu(*numbers, place)
        return self.dataset.load(index)


class _Plan:
    """The keys of an epoch's batches, as a DataLoader asks for them: its batch sampler.

    A batch is loaded in several parts where `image_bytes` and the number of workers say that whole ones could fill the
    shared memory. The parts are joined on the device.

    Args:
        numbers: seeds of the draws, together with an image's place.
        order: indices of all images of the epoch; the last batch may be smaller.
    """

    def __init__(self, numbers, order, batch_size, image_bytes=0, workers=0):
        self.numbers, self.order, self.batch_size = numbers, order, batch_size
        prefetched = 2 * workers * batch_size * image_bytes  # DataLoader's own depth: two batches a worker
        self.parts = min(batch_size, max(1, -(-prefetched // SHARED)))

    def batches(self):
        """[(first place, end)] of each part, for each batch."""
        for first in range(0, len(self.order), self.batch_size):
            size = min(self.batch_size, len(self.order) - first)
            parts = min(self.parts, size)
            ends = [first + size * i // parts for i in range(parts + 1)]
            yield list(zip(ends, ends[1:]))

    def __len__(self):
        return sum(map(len, self.batches()))

    def __iter__(self):
        for parts in self.batches():
            for start, end in parts:
                yield [(self.numbers, place, self.order[place]) for place in range(start, end)]


class _Plans:
    """A batch sampler that stands for the plan of the current epoch."""

    def __len__(self):
        return len(self.current)

    def __iter__(self):
        return iter(self.current)


class Parts(list):
    """The parts of a batch, each a list of tensors."""


def _collate(loaded):
    """[(item or None, unreadable)] -> (batch of the items, or None where one is missing, all that is unreadable)."""
    items, unreadable = zip(*loaded)
    batch = None if any(item is None for item in items) else default_collate(items)
    return batch, [pair for pairs in unreadable for pair in pairs]


def _loader(dataset, plan, num_workers, pin_memory, persistent):
    return DataLoader(
        _Seeded(dataset),
        batch_sampler=plan,
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        generator=torch.Generator(),  # from which the loader seeds its workers, instead of the global generator
        **by_workers(num_workers),
    )


class TrainingLoader:
    """The batches of a training set, epoch after epoch, by workers that live as long as it.

    Args:
        dataset: as datasets.MultiViewDataset: its `load(i)` returns (item or None, unreadable images).
        order: sampler with `set_epoch`; iterated again, reshuffled, where an epoch needs more images.
        seed, rank, stream: decide the random draws, with the epoch; the stream is 0 for the labelled and 1 for the
            unlabelled images.
        image_bytes: size of an item in memory.
    """

    def __init__(self, dataset, order, *, seed, rank, stream, image_bytes=0):
        self.dataset, self.order, self.seed, self.rank, self.stream = dataset, order, seed, rank, stream
        self.image_bytes, self._plans = image_bytes, _Plans()
        self._loader = self._started = self._batches = None

    def start(self, epoch, batch_size, steps, num_workers=0, pin_memory=False):
        """Let the workers begin with the `steps` batches of an epoch; nothing where they have begun with it.

        Without workers each batch is loaded when it is read.
        """
        if self._started == (epoch, batch_size, steps):
            return
        places = array("q", Passes(self.order, epoch, steps * batch_size))
        numbers = self.seed, epoch, self.rank, self.stream
        self._plans.current = _Plan(numbers, places, batch_size, self.image_bytes, num_workers)
        if self._loader is None or self._loader.num_workers != num_workers:
            self._loader = None  # ends its workers before others are started
            self._loader = _loader(self.dataset, self._plans, num_workers, pin_memory, persistent=True)
        self._batches, self._started = read_batches(self._loader), (epoch, batch_size, steps)

    def read(self):
        """The batches of the epoch that has been started, as `read_batches`."""
        batches, self._batches, self._started = self._batches, None, None  # the last batch is not kept
        return batches


def evaluation_loader(dataset, batch_size, *, world, rank, num_workers, pin_memory, image_bytes=0):
    """A loader that gives every image to exactly one rank, to be read by `read_batches`."""
    plan = _Plan((), evaluation_order(len(dataset), world, rank), batch_size, image_bytes, num_workers)
    return _loader(dataset, plan, num_workers, pin_memory, persistent=False)


def divided_workers(number, labelled, unlabelled):
    """(workers for the labelled images, for the unlabelled ones): by the views that a step needs, at least one each.

    Args:
        number: workers of the process; 0: none.
        labelled, unlabelled: images of a step; an unlabelled one has two views.
    """
    if not number or not unlabelled:
        return number, 0
    first = min(max(1, round(number * labelled / (labelled + 2 * unlabelled))), max(1, number - 1))
    return first, max(1, number - first)


# -------------------------------------------------------------------------------- errors


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
    "Pin memory thread exited": _KILLED,  # by the connection to a worker that has died
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


@contextmanager
def _explaining(flag):
    """Turn an error that means an exhausted machine into an OSError that says what to do."""
    try:
        yield
    except (ConnectionError, EOFError) as error:  # a worker has died while it handed over a batch
        raise _failure(_KILLED, flag) from error
    except (OSError, RuntimeError) as error:
        if told := _explained(error, flag):
            raise told from error
        raise


def raw_batches(loader, flag="--num_workers"):
    """Start the workers of a DataLoader made with `by_workers` and return the iterator over its batches.

    The workers leave the signals of a terminal and of Slurm to this process.

    Args:
        flag: the command-line flag that sets the number of workers, for the error message.
    Raises OSError, one sentence that says what to do, where the workers exhaust shared memory, open files or memory, or
    one is killed: here or in the iterator, within some seconds.
    """
    with _explaining(flag):
        _check_open_files(loader.num_workers)
        batches = _start(loader)
    return _to_the_last(batches, len(loader), flag)


def _to_the_last(batches, length, flag):
    with _explaining(flag):
        for number, batch in enumerate(batches, 1):
            if number == length:
                next(batches, None)  # ends the workers; while Python collects an iterator, it would lose a Ctrl-C
            yield batch


def _check_open_files(workers):
    """Raise OSError where there is no room for the files of so many workers.

    Where this process or a worker cannot open the files that a batch is shared by, the batch is lost, and the loader
    would wait for it forever.
    """
    with ExitStack() as files:
        for _ in range(workers and 40 + 8 * workers):
            files.enter_context(open(os.devnull))


# -------------------------------------------------------------------------------- workers


def by_workers(number):
    """The settings of a DataLoader whose workers the fork server starts; 0: it loads in this process."""
    return {"num_workers": number, "multiprocessing_context": _context() if number else None}


@cache
def _context():
    """The fork server, which has imported the data sets when it starts a worker."""
    ForkingPickler.register(np.ndarray, _reduce_array)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "images.loading"])
    return context


_in_shared_memory = {}  # {id of an array: (a weak reference to it, its bytes as a tensor in shared memory)}


def _reduce_array(values):
    """Pickle a large array as a handle: all workers share one copy of the lists of images."""
    if values.nbytes < 2**16 or values.dtype.hasobject:
        return values.__reduce__()
    key = id(values)
    if key not in _in_shared_memory:
        content = torch.from_numpy(np.array(values, order="C").reshape(-1).view(np.uint8)).share_memory_()
        _in_shared_memory[key] = weakref.ref(values, lambda _: _in_shared_memory.pop(key)), content
    return _array_in, (_in_shared_memory[key][1], values.dtype.str, values.shape)


def _array_in(content, dtype, shape):
    return content.numpy().view(dtype).reshape(shape)


def _start(loader):
    """The loader's iterator; its workers ignore SIGINT and SIGUSR2, and SIGTERM where this process handles that signal.

    Ctrl-C in a terminal and Slurm send a signal to all processes of a job, and a worker that ended would make its
    loader fail. The fork server inherits the mask of this process, and its workers that of the server. They end with
    their loader or with this process.
    """
    if not loader.num_workers:
        return iter(loader)
    handled = callable(signal.getsignal(signal.SIGTERM))  # as in a task of submitit, which ignores SIGTERM
    blocked = [signal.SIGINT, signal.SIGUSR2, *([signal.SIGTERM] if handled else [])]
    loader.worker_init_fn = partial(_prepare_worker, blocked)
    # The resource tracker removes what a killed process leaves behind, and would warn of it. It is started here,
    # because its start unblocks signals.
    with _environment(PYTHONWARNINGS="ignore:resource_tracker:UserWarning"):
        resource_tracker.ensure_running()
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        # The server imports our modules, whatever folder the program was started in.
        with _environment(PYTHONPATH=os.pathsep.join(path)):
            batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for worker in batches._workers:
        # Python ends the workers that are left at its exit by SIGTERM, which they may block, and waits for them.
        worker._popen.terminate = worker._popen.kill
    return batches


@contextmanager
def _environment(**variables):
    """Set environment variables for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _prepare_worker(blocked, _worker):
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    sys.excepthook = _worker_excepthook
    # PyTorch watches the worker's parent, which is the fork server; and that lives as long as its workers.
    if trainer := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=[trainer.sentinel], daemon=True).start()


def _end_with(sentinel):
    """End this process as soon as the process of the sentinel has ended."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # the other signals may be blocked


def _worker_excepthook(kind, error, trace):
    # A connection that breaks only says that the training process has ended before it took a batch.
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


# -------------------------------------------------------------------------------- reading


def read_batches(loader):
    """Start a loader of this module and return the iterator over its batches, lists of tensors or `Parts` of them.

    Unreadable images are recorded in the data set's `bad_images`. The iterator raises UnreadableImage, one sentence,
    where an image has no stand-in or more are unreadable than are tolerated, and OSError as `raw_batches` does.
    """
    plan = loader.batch_sampler
    groups = [len(parts) for parts in getattr(plan, "current", plan).batches()]
    return _recorded(raw_batches(loader), groups, loader.dataset.dataset.bad_images)


def _recorded(loaded, groups, bad_images):
    for number in groups:
        parts = Parts()
        for _ in range(number):
            part, unreadable = next(loaded)
            if part is None:
                bad_images.refuse(unreadable)
            bad_images.add(unreadable)
            parts.append(part)
        yield parts if number > 1 else parts[0]


def to_device(batches, device, finish=None, seed=()):
    """Yield batches with their tensors on the device; on CUDA each is copied while the one before it is in use.

    Args:
        finish: what the views left to the device, (seed, device) -> function of a batch, as
            fast_transforms.DeviceFinish; None: nothing.
        seed: the numbers that decide its draws.
    """
    finish = finish(derived_seed(*seed), device) if finish else tuple
    finished = (finish(_moved(batch, device)) for batch in batches)
    return _prefetch(finished, device) if device.type == "cuda" else finished


def _moved(batch, device):
    if isinstance(batch, Parts):
        return [torch.cat(column) for column in zip(*(_moved(part, device) for part in batch))]
    return [tensor.to(device, non_blocking=True) for tensor in batch]


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
