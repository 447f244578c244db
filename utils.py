"""Process group, random seeds, meters, progress lines and files, for all other modules.

The library prints through `print_main` and `print_rank` only.
"""

import atexit
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------- process group


def master_port(job):
    """The port at which the processes of a Slurm or submitit job meet, below those that Linux hands out itself."""
    return 20_000 + int(job) % 12_000


def _slurm_environment():
    """The variables torchrun would set, from those of a Slurm step of several tasks; {} outside one."""
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
        "MASTER_PORT": env.get("MASTER_PORT", str(master_port(env["SLURM_JOB_ID"]))),
    }


def check_device_name(device):
    """Raise ValueError, one sentence, where `--device` is none of ours, on whatever machine."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise ValueError(f"--device {device} must be cpu, cuda or cuda:N, the N-th GPU counted from 0")


def check_device(device):
    """Raise ValueError, one sentence, where this machine does not have the device or PyTorch has no code for it."""
    check_device_name(device)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}, but PyTorch sees no CUDA GPU here: pass --device cpu.")
    count, index = torch.cuda.device_count(), int(device.removeprefix("cuda").lstrip(":") or 0)
    if index >= count:
        raise ValueError(
            f"--device {device}, but the last of the {count} GPU(s) that PyTorch sees here is cuda:{count - 1}; "
            "each process needs one."
        )
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not _has_code(capability, built):
        raise ValueError(
            f"--device {device} is a {torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]}), for "
            f"which PyTorch {torch.__version__} has no code ({', '.join(built)}): install a build that has it."
        )


def _has_code(capability, built):
    """Whether code of the architectures `built` runs on a GPU.

    Machine code (sm_86) runs on GPUs of the same major and at least the same minor capability, intermediate code
    (compute_86) on all from there on. AMD's architectures (gfx90a) and a build that names none are not judged.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in built]
    if not all(found) or not found:
        return True
    versions = [(kind, (int(major), int(minor))) for kind, major, minor in (match.groups() for match in found)]
    return any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions
    )


def init_distributed(device, dist_url="env://", world_size=1, from_slurm=False):
    """Join the process group that torchrun or Slurm describes. A plain process joins none.

    Args:
        device: 'cuda', 'cuda:N' or 'cpu'; the group's backend is NCCL or gloo accordingly.
        dist_url: the address at which the processes meet.
        world_size: the number of processes according to the flags; 1: as many as the launcher started.
        from_slurm: require Slurm's environment (`--use_submitit true`).
    Returns this process's torch.device.
    Raises ValueError where the environment contradicts the flags, or this machine has no such device.
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
    check_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu and world > 1:
        # Slurm can show each task one GPU, its own; torchrun shows all processes the same ones.
        sees_its_own = torch.cuda.device_count() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        device = f"cuda:{0 if sees_its_own else os.environ['LOCAL_RANK']}"
        check_device(device)
    device = torch.device(device)
    if device.index is not None:
        torch.cuda.set_device(device)  # for what only says "cuda", such as `Tensor.cuda` and streams
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())
    if "RANK" in os.environ and world > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=dist_url,
            world_size=world,
            rank=int(os.environ["RANK"]),
            timeout=timedelta(minutes=30),
            device_id=device if on_gpu else None,
        )
    return device


def _end_with(launcher):
    """End this process soon after torchrun has ended: its ranks would train on without it, unseen."""

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        sys.stderr.write("torchrun has ended, and this rank with it.\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leave_group():
    """Leave the process group, if there is one, at the end of the program.

    A gloo thread may still be waiting for the GIL to release a tensor. If Python exits meanwhile, the process aborts
    ("terminate called without an active exception"); if the group is destroyed meanwhile, torch 2.6 hangs. The pause
    lets these threads finish.
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
    """Collect a small picklable object from every rank; returns a list in rank order on all of them."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def on_main(function, *args):
    """Call the function on the main process and return its result on every rank. Every rank must call this.

    Where the function raises OSError, ValueError, RuntimeError or FloatingPointError, every rank raises that error.
    """
    outcome = [None]
    if is_main():
        try:
            outcome = [function(*args)]
        except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def sum_over_ranks(tensor):
    """Sum a tensor over the ranks, in place, on the process group's device. Every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def broadcast_buffers(*models):
    """Give every rank rank 0's buffers (BatchNorm statistics), so that a logged figure belongs to a checkpoint."""
    buffers = [buffer for model in models for buffer in model.buffers()]
    if dist.is_initialized() and buffers:
        # One transfer of all their bytes. NCCL transfers GPU tensors only, and --model-ema-force-cpu keeps the average
        # on the CPU.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        parts = [buffer.contiguous().view(-1).view(torch.uint8).to(device) for buffer in buffers]
        flat = torch.cat(parts)
        dist.broadcast(flat, src=0)
        for buffer, part in zip(buffers, flat.split([len(part) for part in parts])):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def printable(text, kept="\n\t"):
    """Text for a terminal: control characters and the like, but those in `kept`, as escapes.

    A class or a folder may have any name, which could otherwise move the cursor, change colours or hide other lines.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in str(text))


def printable_path(path):
    """A path, or another text, in one line of a message: bytes of a name that are no UTF-8 become escapes, too."""
    return printable(os.fsdecode(path), kept="").replace("\\udc", "\\x")  # Python represents the byte FF as U+DCFF


def print_main(*words):
    """Print on the main process."""
    if is_main():
        print(*map(printable, words), flush=True)


def print_rank(*words):
    """Print on any process, with its rank in front."""
    print(f"[rank {world_and_rank()[1]}]", *map(printable, words), flush=True)


# ---------------------------------------------------------------------------------------------- seeds


def derived_seed(*numbers):
    """A 63-bit seed from several integers; any change in one gives an unrelated seed."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*numbers):
    """Seed Python, NumPy and torch, on all devices, from several integers, e.g. (seed, epoch, rank)."""
    seed_cpu(*numbers)
    torch.manual_seed(derived_seed(*numbers))


def seed_cpu(*numbers):
    """Seed the generators that augmentation draws from: Python's, NumPy's and torch's on the CPU."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_cpu_generators():
    """Restore the states of Python's, NumPy's and torch's CPU generators when the block ends."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def make_deterministic():
    """Let PyTorch use deterministic algorithms alone (`--deterministic`); call it before the first work on a GPU.

    PyTorch raises RuntimeError, naming the operation, where it has no such algorithm.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for which cuBLAS promises it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    torch.backends.cudnn.benchmark = False  # which would choose among algorithms by their speed at the moment
    torch.backends.cudnn.deterministic = True


# ---------------------------------------------------------------------------------------------- meters and logs


class Meters:
    """Weighted means of scalars. The sums stay on the device until they are read."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Forget everything that was added."""
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
        """{name: mean over this process's updates}, None where nothing was counted."""
        return _means([self.totals()])

    def means_over_ranks(self):
        """{name: mean over the updates of all ranks}; every rank must call it."""
        return _means(gather(self.totals()))

    def count_over_ranks(self, name):
        """The number of items that the meter counted on all ranks; every rank must call it."""
        return int(sum(totals.get(name, (0, 0))[1] for totals in gather(self.totals())))


def _means(totals):
    merged = {}
    for name, (value, count) in (item for each in totals for item in each.items()):
        old_value, old_count = merged.get(name, (0.0, 0.0))
        merged[name] = old_value + value, old_count + count
    return {name: value / count if count else None for name, (value, count) in merged.items()}


class EpochLog:
    """Everything an epoch reports while it trains: progress lines, scalars for a writer, and the means at its end.

    A line is due after the first step, after every `print_freq` steps and after the last. Only then are the
    figures read, so that no other step waits for the device.

    Args:
        epoch, steps: the epoch's number, from 0, and how many steps it has.
        print_freq: steps between two lines.
        write: None, or a function (step of the epoch, {name: mean since the previous line, or None}) that is called
            with every line, on every process that was given one. The scalars are the step's figures and
            `images_per_second` (of all ranks, an unlabelled image counts once), `step_seconds` and, of these,
            `data_seconds` spent waiting for the loaders.
    """

    def __init__(self, epoch, steps, print_freq=10, write=None):
        self.epoch, self.steps, self.print_freq, self.write = epoch, steps, print_freq, write
        self._whole, self._recent = Meters(), Meters()  # since the start of the epoch, since the previous line

    def timed(self, batches):
        """Yield the batches and measure how long the loop waits for them."""
        self._start = self._line_start = before = time.perf_counter()
        self._waited, self._steps = 0.0, 0  # since the previous line
        for batch in batches:
            self._waited += time.perf_counter() - before
            self._steps += 1
            yield batch
            before = time.perf_counter()

    def add(self, figures, images):
        """Add a step's {name: (mean, count)} and the number of images that this process trained on."""
        # The gradient's norm is measured for the writer alone, which must change neither line nor means.
        self._whole.add({name: figure for name, figure in figures.items() if name != "grad_norm"})
        if self.write:
            self._recent.add({**figures, "images": (images, 1)})

    def is_due(self, step):
        """Whether a line follows this step, counted from 0."""
        return step % self.print_freq == 0 or step == self.steps - 1

    def print_line(self, step):
        """Print the line of this step and pass the means since the previous one to the writer."""
        now = time.perf_counter()
        pace = {"step_seconds": (now - self._line_start) / self._steps, "data_seconds": self._waited / self._steps}
        place = f"[{step + 1:{len(str(self.steps))}d}/{self.steps}]"
        eta = timedelta(seconds=int((now - self._start) / (step + 1) * (self.steps - step - 1)))
        figures = "  ".join(f"{k}: {v:.4g}" for k, v in self._whole.means().items() if v is not None)
        memory = f"  max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB" if torch.cuda.is_available() else ""
        print_main(
            f"Epoch {self.epoch} {place}  eta: {eta}  {figures}  "
            f"time: {pace['step_seconds']:.3f} s  data: {pace['data_seconds']:.3f} s{memory}"
        )
        if self.write:
            means = self._recent.means()
            rate = means.pop("images") * world_and_rank()[0] / pace["step_seconds"]
            self.write(step, {**means, "images_per_second": rate, **pace})
            self._recent.clear()
        self._line_start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def means(self):
        """{name: mean over all steps and ranks}; every rank must call it."""
        return self._whole.means_over_ranks()


# ---------------------------------------------------------------------------------------------- files

NOT_GIVEN = "None"  # released code: the default of most path flags is this string


def given(path):
    """Whether a path flag was given on the command line."""
    return path not in ("", NOT_GIVEN)


@contextmanager
def writing(path, flag="--output_dir"):
    """Turn an OSError into one sentence that names the file and the flag that decides where it is."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"Cannot write {path} ({reason}): make room there, or choose another {flag}.") from error


@contextmanager
def atomic(path, before_rename=None):
    """Open a binary file that replaces `path` when the block ends. `path` is never seen half-written.

    The content is written under a temporary name, synchronised to the disk and renamed. Where the block or the disk
    fails, the temporary file is removed and `path` stays as it was. A killed process leaves `<path>.<pid>.tmp`.

    Args:
        before_rename: called without arguments when the new content is complete and `path` still has the old one.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename:
            before_rename()
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def sync_folder(folder):
    """Wait until the names in a folder are on the disk: a rename alone may be lost in a power failure."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path, content, flag="--output_dir"):
    """Replace a file by text or bytes, as `atomic` does. Raises OSError naming the file and the flag."""
    with writing(path, flag), atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append_json_line(path, record):
    """Append one JSON object to a JSON-lines file and synchronise it. Raises OSError naming the file."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_json_lines(path, epoch):
    """Keep a log's lines up to an epoch and move the later and the incomplete ones to `<stem>.dropped<suffix>`.

    A run that resumes from this epoch writes the later ones again. Returns the number of lines that were moved.
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
    """The epoch of a log line; infinity for one that is incomplete or no record of an epoch."""
    try:
        epoch = json.loads(line)["epoch"] if line.endswith("\n") else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return epoch if type(epoch) is int else math.inf


def write_json(path, record):
    """Write one JSON object, indented, as `atomic` does. Raises OSError naming the file."""
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


# ---------------------------------------------------------------------------------------------- uncaught errors


def is_ours(error):
    """Whether the project's own code raised the error for the user to read; a library's error needs its traceback."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parent) and "site-packages" not in raised_in.parts


def lost_a_peer(error):
    """Whether the error only reports that the connection to another rank closed, because that rank ended."""
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return dist.is_initialized() and (gloo or isinstance(error, dist.DistBackendError | dist.DistNetworkError))


def interrupt_once():
    """Let SIGINT raise KeyboardInterrupt once: torchrun passes on the one that the terminal has sent to all already."""

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def excepthook(program, kind, error, trace):
    """A `sys.excepthook` (bind `program`, its name): prints one sentence where that is enough, else the traceback.

    In a process group PyTorch prefixes each line with the rank. The process then exits at once, because the threads
    of a group that is in the middle of a collective can abort or block Python's own shutdown.
    """
    interrupted = issubclass(kind, KeyboardInterrupt)
    if dist.is_initialized() and (interrupted or issubclass(kind, Exception)):
        atexit.register(os._exit, 130 if interrupted else 1)
    if interrupted:
        message = f"{program}: {error or 'stopped'}\n" if is_main() else ""
    elif is_ours(error):
        message = f"{program}: error: {printable(error, kept='')}\n"  # a name in it may hold a newline
    elif lost_a_peer(error):
        reason = str(error).strip().splitlines()[0]
        message = f"{program}: stopped, because another rank failed: see its error above ({reason})\n"
    else:
        message = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(printable(message))
    sys.stderr.flush()
