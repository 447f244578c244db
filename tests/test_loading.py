"""Loaders: exactly the steps asked for, draws that workers never change, each image evaluated once."""

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

import utils
from images import loading
from images.bad_images import BadImages
from images.loading import TrainingLoader, divided_workers, evaluation_loader, raw_batches, read_batches, to_device
from samplers import training_order
from tests.trees import FORKSERVER, training_batches
from utils import derived_seed, is_ours, seed_everything

torch.set_num_threads(1)


class Drawing:
    """`(image index, draws of Python, NumPy and torch)` where a data set would augment."""

    def __init__(self, n):
        self.n, self.bad_images = n, BadImages(None, n, 0)

    def __len__(self):
        return self.n

    def load(self, i):
        return (i, random.random(), np.random.rand(), torch.rand(()).item()), []


def batches(n=20, batch=4, steps=3, workers=0, *, seed=0, epoch=0, rank=0, stream=0, world=2, repeated=False):
    order = training_order(n, world, rank, seed, repeated)
    numbers = {"seed": seed, "epoch": epoch, "rank": rank, "stream": stream}
    seen = list(training_batches(Drawing(n), order, batch, steps, **numbers, workers=workers))
    assert len(seen) == steps
    return [[column.tolist() for column in each] for each in seen]


def column(seen, i):
    return [value for batch in seen for value in batch[i]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n, batch, steps", [(20, 4, 5), (20, 4, 2), (7, 4, 6), (3, 8, 2), (1, 2, 3)])
def test_exactly_the_steps_of_exactly_the_batch(n, batch, steps, workers):
    seen = batches(n, batch, steps, workers, world=1)
    assert [len(each[0]) for each in seen] == [batch] * steps
    indices = column(seen, 0)
    for start in range(0, len(indices) - n + 1, n):  # each pass goes through the whole set
        assert sorted(indices[start : start + n]) == list(range(n))


def test_repeated_augmentation_of_a_small_set_fills_its_batches():
    seen = batches(5, 4, 4, world=2, repeated=True)
    assert [len(each[0]) for each in seen] == [4] * 4
    assert set(column(seen, 0)) <= set(range(5))


@pytest.mark.parametrize("repeated", [True, False])
def test_workers_and_other_draws_never_change_a_batch(repeated):
    def run(workers, noise):
        random.seed(noise), np.random.seed(noise), torch.manual_seed(noise)
        return batches(workers=workers, epoch=3, rank=1, repeated=repeated)

    expected = run(0, noise=1)
    assert run(0, noise=2) == run(1, noise=3) == run(2, noise=4) == expected


def test_an_image_draws_by_the_seed_and_its_place_alone():
    seen = batches(n=5, batch=5, steps=2, epoch=7, stream=1, world=1)
    for place in range(10):
        utils.seed_cpu(0, 7, 0, 1, place)
        expected = random.random(), np.random.rand(), torch.rand(()).item()
        assert tuple(column(seen, i)[place] for i in (1, 2, 3)) == pytest.approx(expected, abs=0)
    assert batches(n=5, batch=2, steps=5, epoch=7, stream=1, world=1)[0][1] == seen[0][1][:2]  # not by the batch


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_draws_of_the_training_process_alone(workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_everything(1)
    expected = draws()
    seed_everything(1)
    assert len(list(training_batches(Drawing(8), training_order(8), 4, 2, workers=workers))) == 2
    assert draws() == expected


@pytest.mark.parametrize("change", [{"epoch": 1}, {"rank": 1}, {"stream": 1}, {"seed": 1}])
def test_other_numbers_draw_something_else(change):
    first, second = batches(), batches(**change)
    for library in (1, 2, 3):  # Python, NumPy, torch
        assert not set(column(first, library)) & set(column(second, library))


def test_images_and_libraries_draw_independently():
    seen = batches(workers=2, batch=4, steps=4)
    for library in (1, 2, 3):
        draws = column(seen, library)
        assert len(set(draws)) == 16  # also across the two workers
    torch.testing.assert_close(np.mean([column(seen, i) for i in (1, 2, 3)]), 0.5, atol=0.2, rtol=0)
    assert not set(column(seen, 1)) & set(column(seen, 2))


def test_order_of_an_epoch():
    assert column(batches(epoch=0), 0) != column(batches(epoch=1), 0)
    assert column(batches(seed=0), 0) != column(batches(seed=5), 0)
    assert column(batches(stream=0), 0) == column(batches(stream=1), 0)
    ranks = [column(batches(20, 5, 2, rank=rank), 0) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_image_once(world, workers):
    ranks = []
    for rank in range(world):
        shard = {"world": world, "rank": rank}
        loader = evaluation_loader(Drawing(10), 4, **shard, num_workers=workers, pin_memory=False)
        seen = [[c.tolist() for c in batch] for batch in read_batches(loader)]
        assert all(len(batch[0]) == 4 for batch in seen[:-1])  # the short batch comes last
        ranks.append(column(seen, 0))
    assert sorted(index for rank in ranks for index in rank) == list(range(10))
    assert [len(rank) for rank in ranks] == {1: [10], 2: [5, 5], 3: [4, 3, 3]}[world]


def test_pinning_is_asked_for_or_not():
    for pin in (False, True):
        training = TrainingLoader(Drawing(4), training_order(4), seed=0, rank=0, stream=0)
        training.start(0, 2, 1, pin_memory=pin)
        evaluation = evaluation_loader(Drawing(4), 2, world=1, rank=0, num_workers=0, pin_memory=pin)
        assert training._loader.pin_memory is evaluation.pin_memory is pin
    unpinned = next(read_batches(evaluation_loader(Drawing(4), 2, world=1, rank=0, num_workers=0, pin_memory=False)))
    assert not any(tensor.is_pinned() for tensor in unpinned)


def test_to_device_moves_every_tensor():
    loader = [(torch.zeros(2, 3), torch.tensor([1, 2])), [torch.ones(1, 3), torch.tensor([3])]]
    moved = list(to_device(loader, torch.device("meta")))
    assert [[tuple(tensor.shape) for tensor in batch] for batch in moved] == [[(2, 3), (2,)], [(1, 3), (1,)]]
    assert all(type(batch) is tuple and tensor.device.type == "meta" for batch in moved for tensor in batch)
    (stay, *_) = to_device(loader, torch.device("cpu"))
    assert torch.equal(stay[1], torch.tensor([1, 2])) and stay[0].dtype == torch.float32


def test_batches_are_finished_on_the_device_in_their_order():
    seeds = []

    def finish(seed, device):
        seeds.append((seed, device))
        return lambda batch: (batch[0] + 1, batch[1])

    loader = [[torch.full((2,), i), torch.tensor([i])] for i in range(3)]
    finished = list(to_device(loader, torch.device("cpu"), finish, (0, 1, 2)))
    assert [[x.tolist() for x in batch] for batch in finished] == [[[i + 1] * 2, [i]] for i in range(3)]
    assert seeds == [(derived_seed(0, 1, 2), torch.device("cpu"))]


# -------------------------------------------------------------------------------- signals and exhausted machines


def blocks(pid, number):
    """Whether a process blocks a signal."""
    mask = re.search(r"^SigBlk:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_ctrl_c_does_not_reach_the_workers(capfd):
    reading = training_batches(Drawing(40), training_order(40), 4, 10, workers=2)
    seen = [next(reading)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    # The fork server of a run blocks the signals; that of the tests does not, so a worker has to begin first.
    until = time.monotonic() + 60
    while not all(blocks(worker.pid, signal.SIGINT) for worker in workers):
        assert time.monotonic() < until
    for _ in range(3):
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
        seen.append(next(reading))
    seen += reading
    assert sorted(index for batch in seen for index in batch[0].tolist()) == list(range(40))
    for worker in workers:
        worker.join()
    assert capfd.readouterr().err == ""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def fail_in_a_task():
    """An error leaves the workers to Python's exit, where this process handles SIGTERM, as submitit does."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    reading = training_batches(Drawing(40), training_order(40), 4, 1000, workers=2)
    next(reading)
    sys.last_value = reading  # as a traceback keeps the frame of the loop
    raise LookupError("the reason")


def test_a_task_that_fails_ends_though_its_workers_block_sigterm():
    process = FORKSERVER.Process(target=fail_in_a_task)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 1


def train_for_ever(told):
    reading = training_batches(Drawing(40), training_order(40), 4, 1000, workers=2)
    next(reading)
    workers = [worker.pid for worker in multiprocessing.active_children()]
    server = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    Path(f"{told}.new").write_text(" ".join(map(str, [*workers, server])))
    os.rename(f"{told}.new", told)
    time.sleep(600)


def test_workers_and_their_server_end_with_a_process_that_is_killed(tmp_path):
    process = FORKSERVER.Process(target=train_for_ever, args=(tmp_path / "told",))
    process.start()
    until = time.monotonic() + 120
    while not (tmp_path / "told").exists():
        assert time.monotonic() < until and process.is_alive()
        time.sleep(0.1)
    started = [Path("/proc", pid, "stat") for pid in (tmp_path / "told").read_text().split()]
    assert len(started) == 3 and all(path.exists() for path in started)
    process.kill()
    until = time.monotonic() + 20
    while any(path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z" for path in started):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_workers_live_as_long_as_their_loader_and_begin_before_they_are_asked():
    loader = TrainingLoader(Drawing(40), training_order(40), seed=0, rank=0, stream=1)
    pids = []
    for epoch, size, steps, number in ((0, 4, 10, 2), (1, 4, 10, 2), (2, 8, 3, 2), (3, 4, 5, 1)):
        loader.start(epoch, size, steps, number)
        loader.start(epoch, size, steps, number)  # begun already: nothing
        pids.append({each.pid for each in multiprocessing.active_children()})
        seen = [[column.tolist() for column in batch] for batch in loader.read()]
        assert seen == batches(40, size, steps, epoch=epoch, stream=1, world=1)
    assert pids[0] == pids[1] == pids[2] and [len(each) for each in pids] == [2, 2, 2, 1] and not pids[0] & pids[3]
    del loader
    assert multiprocessing.active_children() == []


class Large(Drawing):
    """Its images are its index, a hundred bytes each."""

    def load(self, i):
        return (torch.full((100,), i, dtype=torch.uint8), i), []


@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_are_loaded_in_parts_and_joined_on_the_device(monkeypatch, workers):
    """2 workers x 2 prefetched batches of 7 images are 2,800 bytes: three parts of less than 1,000 bytes."""
    monkeypatch.setattr(loading, "SHARED", 1000)
    order = training_order(20)
    loaded = list(training_batches(Large(20), order, 7, 3, workers=workers, image_bytes=100))
    assert [[len(part[0]) for part in batch] if workers else len(batch[0]) for batch in loaded] == (
        [[2, 2, 3]] * 3 if workers else [7] * 3
    )
    whole = [[column.tolist() for column in batch] for batch in to_device(loaded, torch.device("cpu"))]
    plain = to_device(training_batches(Large(20), order, 7, 3), torch.device("cpu"))
    assert whole == [[column.tolist() for column in batch] for batch in plain]
    evaluation = evaluation_loader(Large(8), 7, world=1, rank=0, num_workers=workers, pin_memory=False, image_bytes=100)
    seen = [batch[1].tolist() for batch in to_device(read_batches(evaluation), torch.device("cpu"))]
    assert seen == [list(range(7)), [7]]


@pytest.mark.parametrize("number, labelled, unlabelled, expected", [
    (10, 13, 95, (1, 9)), (10, 108, 0, (10, 0)), (10, 54, 54, (3, 7)), (2, 4, 12, (1, 1)), (1, 4, 12, (1, 1)),
    (0, 4, 12, (0, 0)), (10, 1000, 1, (9, 1))])  # fmt: skip
def test_workers_are_divided_by_views(number, labelled, unlabelled, expected):
    assert divided_workers(number, labelled, unlabelled) == expected


def test_the_batches_of_eight_ranks_fit_into_8_gb():
    """108 images of 224 pixels in float32, 10 workers; the next epoch is loaded while the evaluation is."""
    image = 4 * 3 * 224**2
    plans = [
        loading._Plan((), range(1000), 13, image, 1), loading._Plan((), range(1000), 95, 2 * image, 9),
        loading._Plan((), range(1000), 324, image, 10)]  # fmt: skip
    workers, images = (1, 9, 10), (image, 2 * image, image)
    largest = [max(end - start for parts in plan.batches() for start, end in parts) for plan in plans]
    assert 8 * sum(2 * n * size * bytes_ for n, size, bytes_ in zip(workers, largest, images)) < 8e9
    assert largest[0] == 13  # nothing is divided needlessly


def test_large_arrays_are_shared_by_all_workers():
    context = loading._context()
    values, small = np.arange(100_000).reshape(100, 1000), np.arange(10)
    sent = [context.reducer.ForkingPickler.dumps(x) for x in (values, values, values[::2, ::3], small, values.view())]
    got = [context.reducer.ForkingPickler.loads(x) for x in sent]
    for one, other in zip((values, values, values[::2, ::3], small, values), got):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert max(map(len, sent)) < 1000
    got[0].flags.writeable = True
    got[0][0, 0] = 7
    assert got[1][0, 0] == 7 and values[0, 0] == 0
    key = id(values)
    assert key in loading._in_shared_memory
    del values, one
    assert key not in loading._in_shared_memory


class Killing(Drawing):
    """Its worker is killed in the second batch."""

    def load(self, i):
        if multiprocessing.parent_process() and i >= 4:
            time.sleep(0.5)  # when the first batch has been taken
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(i)


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_is_killed_is_one_sentence_in_whatever_the_process_does(busy):
    loader = loading._loader(Killing(12), loading._Plan((0,), range(12), 4), 1, False, persistent=False)
    told = "^Loading images failed, because a worker was killed, perhaps for lack of memory: pass fewer --w .0: none.*$"
    reading = raw_batches(loader, "--w")
    with pytest.raises(OSError, match=told) as caught:
        next(reading)
        if busy:
            time.sleep(2)
        next(reading)
    assert is_ours(caught.value)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_one_sentence(monkeypatch, error):
    def broken(_):
        yield "a batch"
        raise error

    monkeypatch.setattr(loading, "_start", broken)
    reading = raw_batches(DataLoader([0, 0]), "--w")
    assert next(reading) == "a batch"
    with pytest.raises(OSError, match="a worker was killed, perhaps for lack of memory: pass fewer --w"):
        next(reading)


def test_a_worker_is_silent_about_a_process_that_has_ended(capsys):
    for error in (ConnectionResetError(), EOFError(), BrokenPipeError()):
        loading._worker_excepthook(type(error), error, None)
    assert capsys.readouterr().err == ""
    loading._worker_excepthook(ValueError, ValueError("x"), None)
    assert "ValueError: x" in capsys.readouterr().err


MANY_FILES = "too many files are open: raise the limit (ulimit -n 65536), or"
FULL_MEMORY = "shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=8g), or"


def load_with_few_files(limit, workers, told):
    """Read batches, and keep them, where only so many files may be open; writes down the error."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        words = f"{len(batches(n=400, steps=100, workers=workers))} batches"
    except OSError as error:
        words = str(error)
    Path(told).write_text(words)


@pytest.mark.parametrize("limit", [20, 90])  # with 20 PyTorch would wait forever, with 90 it would fail in time
def test_few_open_files_are_one_sentence(tmp_path, limit):
    process = FORKSERVER.Process(target=load_with_few_files, args=(limit, 2, str(tmp_path / "told")))
    process.start()
    process.join(60)
    process.kill()
    told = (tmp_path / "told").read_text()
    assert told == f"Loading images failed, because {MANY_FILES} pass fewer --num_workers (0: none)."


def failing(error, workers=2):
    """(a loader, what `_start` is to do: one batch, then the error, as a worker's or as this process's own)."""

    def start(_):
        yield "a batch"
        try:
            raise error
        except type(error):
            if not workers:
                raise
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    return DataLoader([0, 0], num_workers=workers), start


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error, words", [
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.jpg"), MANY_FILES),
    (RuntimeError("received 0 items of ancdata"), MANY_FILES),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
     MANY_FILES),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"), FULL_MEMORY),
    (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), FULL_MEMORY),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), FULL_MEMORY),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
     "a worker was killed, perhaps for lack of memory:"),
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
     "a worker was killed, perhaps for lack of memory:"),
])  # fmt: skip
def test_an_exhausted_machine_is_one_sentence(monkeypatch, workers, error, words):
    loader, start = failing(error, workers)
    monkeypatch.setattr(loading, "_start", start)
    for flag in ("--num_workers", "--workers"):
        reading = raw_batches(loader, flag)
        assert next(reading) == "a batch"
        with pytest.raises(OSError) as told:
            next(reading)
        assert str(told.value) == f"Loading images failed, because {words} pass fewer {flag} (0: none)."
        assert is_ours(told.value)


def test_a_worker_that_was_killed_while_a_batch_was_waited_for_is_one_sentence(monkeypatch):
    def start(_):
        try:  # as PyTorch: its handler of SIGCHLD interrupts the wait
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from error
        yield

    monkeypatch.setattr(loading, "_start", start)
    with pytest.raises(OSError, match="^Loading images failed, because shared memory ./dev/shm. is full"):
        next(raw_batches(failing(None)[0]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("something else"), OSError(errno.ESTALE, "Stale file handle")])
def test_other_errors_of_a_loader_stay_as_they_are(monkeypatch, workers, error):
    loader, start = failing(error, workers)
    monkeypatch.setattr(loading, "_start", start)
    with pytest.raises(type(error), match=str(error.args[-1])) as told:
        list(raw_batches(loader))
    assert "Loading images failed" not in str(told.value)


class Stream:
    """A CUDA stream that only writes down what it is asked."""

    def __init__(self, name, done):
        self.name, self.done, self.made = name, done, 0

    def wait_stream(self, other):
        self.done.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.made += 1
        return self.made - 1

    def wait_event(self, event):
        self.done.append(f"{self.name} waits for {event}")


class OnDevice:
    """A tensor on the device, as far as streams are concerned."""

    def __init__(self, name, done):
        self.name, self.done = name, done

    def record_stream(self, stream):
        self.done.append(f"{stream.name} holds {self.name}")


def test_all_loaders_of_a_device_share_a_side_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(str(device), []))
    loading._side_stream.cache_clear()
    first, again, other = (loading._side_stream(torch.device(name)) for name in ("cuda:0", "cuda:0", "cuda:1"))
    loading._side_stream.cache_clear()
    assert first is again and (first.name, other.name) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_batch_is_made_while_the_one_before_is_used(monkeypatch, n):
    done, current = [], ["using"]

    @contextmanager
    def stream(side):
        current.append(side.name)
        yield
        current.pop()

    monkeypatch.setattr(loading, "_side_stream", lambda device: Stream("side", done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("using", done))
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def made():
        for i in range(n):
            done.append(f"{current[-1]} makes {i}")
            yield (OnDevice(i, done),)

    for i, (tensor,) in enumerate(loading._prefetch(made(), torch.device("cuda"))):
        assert tensor.name == i and current == ["using"]
        done.append(f"step {i}")
    expected = ["side waits for using"] + ["side makes 0"][:n]
    for i in range(n):
        expected += [f"side makes {i + 1}"] if i + 1 < n else []
        expected += [f"using waits for {i}", f"using holds {i}", f"step {i}"]
    assert done == expected
