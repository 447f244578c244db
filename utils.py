"""Process group, seeds, meters, logs: what every room leans on. The only room that prints."""

import atexit
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------- process group


def _slurm_environment():
    """RANK and friends from a Slurm step of several tasks; {} outside one."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:
        return {}
    first = env.get("MASTER_ADDR")
    if first is None:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
        )
        first = hosts.stdout.split()[0]
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": first,
        "MASTER_PORT": env.get("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000)),
    }


def init_distributed(device, dist_url="env://", world_size=1, from_slurm=False):
    """Join the process group torchrun or Slurm describes; a plain process stays alone.

    Args:
        device: 'cuda' or 'cpu'; the group is NCCL or gloo accordingly.
        dist_url: where the processes meet.
        world_size: number of processes the user says there are; 1 = whatever the launcher started.
        from_slurm: insist on Slurm's environment (`--use_submitit true`).
    Returns this process's torch.device.
    Raises ValueError where the environment is not what the flags say.
    """
    env = {} if "RANK" in os.environ else _slurm_environment()
    if from_slurm and not env and "SLURM_PROCID" not in os.environ:
        raise ValueError(
            "--use_submitit true needs Slurm's environment: start with run_with_submitit.py, or pass false."
        )
    os.environ.update(env)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size not in (1, world):
        raise ValueError(f"--world_size {world_size}, but the launcher started {world}: use torchrun --nproc_per_node.")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no CUDA GPU here: pass --device cpu.")
        if world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    if "RANK" in os.environ and world > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend, init_method=dist_url, world_size=world, rank=int(os.environ["RANK"]), timeout=timedelta(minutes=30)
        )
    return torch.device(device)


def leave_group():
    """Leave the process group, if there is one, when all work is done.

    gloo's threads may still hold a tensor they hand back under the GIL: at the end of Python that aborts the process
    ("terminate called without an active exception"), and torch 2.6 hangs when it destroys the group meanwhile. So
    they get the GIL first.
    """
    if dist.is_initialized():
        time.sleep(0.2)
        dist.destroy_process_group()


def world_and_rank():
    """(number of processes, this one's rank); (1, 0) without a process group."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def is_main():
    """Whether this process writes the files and prints."""
    return world_and_rank()[1] == 0


def gather(thing):
    """A small picklable thing of every rank, as a list in rank order."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def on_main(function, *args):
    """What the function returns on the main process, on every rank; every rank must call it.

    Where it raises OSError, ValueError or RuntimeError there, every rank raises that error.
    """
    outcome = [None]
    if is_main():
        try:
            outcome = [function(*args)]
        except (OSError, ValueError, RuntimeError) as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def sum_over_ranks(tensor):
    """Sum a tensor, on the process group's device, over the ranks in place; every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def broadcast_buffers(*models):
    """Give every rank rank 0's buffers (BatchNorm statistics), so that a logged figure belongs to a checkpoint."""
    if dist.is_initialized():
        for model in models:
            for buffer in model.buffers():
                # NCCL moves GPU tensors only, and --model-ema-force-cpu keeps the average on the CPU.
                staged = buffer.cuda() if dist.get_backend() == "nccl" else buffer
                dist.broadcast(staged, src=0)
                buffer.copy_(staged)


def print_main(*words):
    """Print on the main process."""
    if is_main():
        print(*words, flush=True)


def print_rank(*words):
    """Print on whichever process calls it, its rank in front."""
    print(f"[rank {world_and_rank()[1]}]", *words, flush=True)


# ---------------------------------------------------------------------------------------------- seeds


def derived_seed(*numbers):
    """A 63-bit seed from several integers; any change in one gives an unrelated seed."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*numbers):
    """Seed Python, NumPy and torch from several integers, e.g. (seed, epoch, rank)."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------- meters and logs


class Meters:
    """Weighted means of scalars that stay on the device until someone asks for them."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Forget what was added."""
        self._sums, self._counts = {}, {}

    def add(self, figures):
        """Add {name: (mean, number of items it is over)}; each may be a 0-d tensor on the device."""
        for name, (mean, n) in figures.items():
            self.update(n, **{name: mean})

    def update(self, n=1, **values):
        """Add values that are means over n items each; both may be 0-d tensors on the device."""
        for name, value in values.items():
            value = value.detach().double() if torch.is_tensor(value) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value * n
            self._counts[name] = self._counts.get(name, 0.0) + n

    def totals(self):
        """{name: (weighted sum, count)} as plain floats."""
        return {name: (float(self._sums[name]), float(self._counts[name])) for name in self._sums}

    def means(self):
        """{name: mean}, None where nothing was counted, over this process's updates."""
        return _means([self.totals()])

    def means_over_ranks(self):
        """The same over the updates of all ranks; every rank must call it."""
        return _means(gather(self.totals()))

    def count_over_ranks(self, name):
        """How many items the meter counted on all ranks; every rank must call it."""
        return int(sum(totals.get(name, (0, 0))[1] for totals in gather(self.totals())))


def _means(totals):
    merged = {}
    for name, (value, count) in (item for each in totals for item in each.items()):
        old_value, old_count = merged.get(name, (0.0, 0.0))
        merged[name] = old_value + value, old_count + count
    return {name: value / count if count else None for name, (value, count) in merged.items()}


def _duration(seconds):
    return str(timedelta(seconds=int(seconds)))


class Progress:
    """Iterate over `total` steps, print a line every `every` with eta, figures, step and data time, memory.

    `figures()` is asked for the line's {name: value} only when one is printed, so the device is waited for
    only then. Where given, `report(i, step seconds, data seconds)` comes with every line, on every process; the
    seconds are means since the line before.
    """

    def __init__(self, header, total, every=10, figures=dict, report=None):
        self.header, self.total, self.every, self.figures, self.report = header, total, every, figures, report

    def __call__(self, items):
        start = last = time.perf_counter()
        recent_step, recent_data = deque(maxlen=self.every), deque(maxlen=self.every)
        for i, item in enumerate(items):
            recent_data.append(time.perf_counter() - last)
            yield item
            recent_step.append(time.perf_counter() - last)
            if i % self.every == 0 or i == self.total - 1:
                pace = np.mean(recent_step), np.mean(recent_data)
                self._line(i, start, *pace)
                if self.report:
                    self.report(i, *pace)
                recent_step.clear(), recent_data.clear()
            last = time.perf_counter()

    def _line(self, i, start, step, data):
        figures = "  ".join(f"{k}: {v:.4g}" for k, v in self.figures().items() if v is not None)
        eta = (time.perf_counter() - start) / (i + 1) * (self.total - i - 1)
        memory = f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB" if torch.cuda.is_available() else ""
        place = f"[{i + 1:{len(str(self.total))}d}/{self.total}]"
        print_main(
            f"{self.header} {place}  eta: {_duration(eta)}  {figures}  time: {step:.3f} s  data: {data:.3f} s{memory}"
        )


@contextmanager
def writing(path, flag="--output_dir"):
    """Let a failure to write say in one sentence which file it was and what to do; an OSError.

    `flag` is the one that decides where the file is.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"Cannot write {path} ({reason}): make room there, or choose another {flag}.") from error


def sync_folder(folder):
    """Wait until the names in a folder are on the disk: a rename alone may be lost with the power."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path, content, flag="--output_dir"):
    """Replace a file by text or bytes, always whole. Raises OSError naming it and the flag that decides where it is."""
    temporary = f"{path}.tmp"
    with writing(path, flag):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))


def append_json_line(path, record):
    """Add one JSON object to a JSON-lines file, and see it onto the disk. Raises OSError naming the file."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_json_lines(path, epoch):
    """Keep a log's lines up to an epoch; later ones, and half-written ones, go to `<stem>.dropped<suffix>`.

    A run that goes on from the epoch writes the later ones again. Returns the number of lines moved.
    Raises OSError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    kept, dropped = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        (kept if _epoch_of(line) <= epoch else dropped).append(line)
    if dropped:
        aside = path.with_suffix(f".dropped{path.suffix}")
        with writing(aside), open(aside, "a", encoding="utf-8") as file:
            file.write("".join(line.rstrip("\n") + "\n" for line in dropped))
        write_atomic(path, "".join(kept))
    return len(dropped)


def _epoch_of(line):
    """The epoch of a log line; infinite for one that is not whole."""
    try:
        return json.loads(line)["epoch"] if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def write_json(path, record):
    """Write one JSON object, indented; the file is always whole. Raises OSError naming it."""
    write_atomic(path, json.dumps(record, indent=2, default=str) + "\n")


def environment():
    """Versions and git revision of this run, for run.json."""
    import timm
    import torchvision

    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "revision": git and git.stdout.strip() or None,
    }


# ---------------------------------------------------------------------------------------------- last words


def is_ours(error):
    """Whether our own code raised it to speak to the user; a library's error keeps its traceback."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parent) and "site-packages" not in raised_in.parts


def lost_a_peer(error):
    """Whether the error is but the echo of another rank's end: a connection to it closed."""
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return dist.is_initialized() and (gloo or isinstance(error, dist.DistBackendError | dist.DistNetworkError))


def excepthook(program, kind, error, trace):
    """A `sys.excepthook` once the program's name is given: one sentence where that says it all, else the traceback.

    In a process group, PyTorch puts the rank in front of each line; the process then ends at once, because the threads
    of a group in the middle of its work can abort or hold up Python's own end.
    """
    if dist.is_initialized() and issubclass(kind, Exception):
        atexit.register(os._exit, 1)
    if is_ours(error):
        words = f"{program}: error: {error}\n"
    elif lost_a_peer(error):
        reason = str(error).strip().splitlines()[0]
        words = f"{program}: stopped, because another rank failed: see its error above ({reason})\n"
    else:
        words = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(words)
    sys.stderr.flush()
