"""One attack: a folder of its own, one of our programs that runs in it, and the verdict on how that ended."""

import functools
import hashlib
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.trees import FORKSERVER, ROOT, make_tree, run_as_main

LIMIT_S = 10
REFUSED, REPORTED, DONE, EITHER = "refused", "reported", "done", "either"
LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_DATA: 8 * 2**30}  # an attack on the memory must not hit others
# What Python and the C library print of an error that nobody has turned into a sentence.
CRASH = re.compile(r"Traceback \(most|Exception ignored|Fatal Python error|Segmentation fault|terminate called")
TRAIN = """--data-set SEMI-IMNET --data-path data --data-split-file data/labelled.txt --output_dir out --device cpu
    --model lcnet_035 --input-size 48 --mixup 0 --cutmix 0 --no-repeated-aug --batch-size 4 --mu 0.5 --epochs 1
    --steps-per-epoch 1 --warmup-epochs 0 --num_workers 0""".split()
_PROCESSES, _RUN = threading.Lock(), threading.Lock()  # one thread at a time starts processes, or makes the run


@dataclass(frozen=True)
class Command:
    """One of our programs and how it is started.

    Attributes:
        program: a file below the repository's root, or a module as after `python -m`.
        words: its command line. The sandbox is its working directory.
        may_write: names in the sandbox that it may create, change and remove.
        limits: added to LIMITS, {resource.RLIMIT_...: limit}.
        stdout: a file to print to, in place of the one that is judged.
        anew: whether it is started as a user starts it, and not forked.
        meanwhile: called with the sandbox and the process's id while the program runs; LIMIT_S begins at its end.
    """

    program: str
    words: tuple
    may_write: tuple = ("out",)
    limits: dict = field(default_factory=dict)
    stdout: str = ""
    anew: bool = False
    meanwhile: Callable | None = None

    @property
    def name(self):
        """The name of the program in its messages."""
        return Path(self.program).name if self.program.endswith(".py") else f"{self.program.split('.')[-1]}.py"


def command(program, *words, **settings):
    """A Command; its words may be paths and numbers."""
    return Command(program, tuple(map(str, words)), **settings)


def train(*words, **settings):
    """A tiny training run in the sandbox, of one step; later flags win over those of TRAIN."""
    return command("semi_main.py", *TRAIN, *words, **settings)


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        area: the kind of target, a row of the table.
        name: the attack in a few words.
        prepare: makes the sandbox, a folder that holds `data/`, and returns the Command to run in it; raises Skipped
            where the machine does not allow the attack.
        ends: how the program must end: REFUSED (a status that is not 0 and one sentence), REPORTED (status 1, and no
            error, from a tool that has found something), DONE (status 0), EITHER (DONE or REFUSED), or the number of
            the signal that a user sent it.
        words: a regular expression that is found in the last message of a program that refuses, else in all that it
            printed.
    """

    area: str
    name: str
    prepare: Callable
    ends: str | int = EITHER
    words: str = ""


def cases(area, *rows):
    """The Cases of an area; a row has their other attributes."""
    return [Case(area, *row) for row in rows]


class Skipped(Exception):
    """The attack is not possible on this machine."""


# ------------------------------------------------------------------------------- what a sandbox holds


class Executing:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def fill(path, content):
    """Make a file, in place of the one that is there, of these bytes, or by a function of its path."""
    path.unlink(missing_ok=True)
    content(path) if callable(content) else path.write_bytes(content)


@functools.cache
def originals():
    """The folder with the `data` of every sandbox; `_original_run` adds the `out` of a run of two epochs.

    It must be called before several threads attack.
    """
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    make_tree(folder / "data", train=4, val=2)
    with _PROCESSES:
        first = FORKSERVER.Process(target=int)
        first.start()
        first.join()  # when PyTorch has been imported, which must not count as the time of a program
    return folder


@functools.cache
def _original_run():
    box = originals()
    code = wait(start(train("--epochs", 2), box, box / "printed"), 60)
    if code:
        raise RuntimeError((box / "printed.err").read_text())
    return box / "out"


def remove_originals():
    """Remove what the sandboxes were copied from."""
    shutil.rmtree(originals())
    originals.cache_clear(), _original_run.cache_clear()


def add_run(box, folder="out", *names):
    """Put the output folder of a run of two epochs into a sandbox: these of its files, else all; returns its path."""
    with _RUN:
        original = _original_run()
    Path(box, folder).mkdir()
    for name in names or ("checkpoint.pth", "checkpoint.prev.pth", "log.txt", "run.json"):
        shutil.copy(original / name, Path(box, folder, name))
    return Path(box, folder)


# ------------------------------------------------------------------------------- processes


def _enter(box, each, environment, output):
    """In a new process: become the program."""
    os.setsid()
    os.chdir(box)
    tempfile.tempdir = None  # which was found from another environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for which, limit in {**LIMITS, **each.limits}.items():
        resource.setrlimit(which, (limit, limit))
    path = str(ROOT / each.program) if each.program.endswith(".py") else each.program
    run_as_main(path, each.words, environment, output, each.anew)


def start(each, box, printed):
    """Start a Command in a sandbox; its output goes to the files `printed`.out and .err. Returns the process."""
    places = {"TMPDIR": str(box / "tmp"), "TORCH_HOME": str(box / "torch_home"), "OMP_NUM_THREADS": "1"}
    output = each.stdout or f"{printed}.out", f"{printed}.err"
    sent = replace(each, meanwhile=None)  # a function cannot be sent
    process = FORKSERVER.Process(target=_enter, args=(box, sent, {**os.environ, **places}, output))
    with _PROCESSES:
        process.start()
    return process


def wait(process, seconds):
    """Wait for a process so long; returns its status as of subprocess, None while it runs."""
    until = time.monotonic() + seconds
    while True:
        with _PROCESSES:
            code = process.exitcode
        if code is not None or time.monotonic() > until:
            return code
        time.sleep(0.02)


def until(condition, seconds=60):
    """Wait until a function returns true; TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the program did not come so far in {seconds} s")
        time.sleep(0.02)


def living(box):
    """The processes whose working directory is the sandbox, which are those started there and all their children."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link) == str(box):
                found.add(int(link.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def _end_all(box):
    while processes := living(box):
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


# ------------------------------------------------------------------------------- files


def snapshot(box, may_write=()):
    """{path: what it is} of everything in a folder but what lies at or below the names in `may_write`."""
    found = {}
    for folder, subfolders, files in os.walk(box):
        inside = os.path.relpath(folder, box)
        paths = {name: os.path.normpath(os.path.join(inside, name)) for name in (*subfolders, *files)}
        subfolders[:] = [name for name in subfolders if paths[name] not in may_write]
        for name, path in paths.items():
            if path not in may_write:
                found[path] = _identity(os.path.join(folder, name))
    return found


def _identity(path):
    status = os.lstat(path)
    content = None
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = status.st_size
        if status.st_size < 2**26:
            content = status.st_size, hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return status.st_mode, status.st_ino, content


# ------------------------------------------------------------------------------- the verdict


def _fault(case, program, code, printed, errors):
    """What is wrong with how a program has ended, "" if nothing is."""
    everything = printed + errors
    if crash := CRASH.search(everything):
        return f"it printed {crash[0]!r}"
    ended = -code if code < 0 else REFUSED if code else DONE
    if case.ends == REPORTED and code == 1 and ": error: " not in errors:
        ended = REPORTED
    if ended != case.ends and not (case.ends == EITHER and code >= 0):
        return f"it ended with status {code}, not {case.ends}"
    last = errors.strip().removesuffix(f"see {program} --help").strip().split("\n")[-1]
    if ended == REFUSED and not (last.startswith(f"{program}: error: ") and last.isprintable()):
        return f"its last message is not one of ours: {last!r}"
    if not re.search(case.words, last if ended == REFUSED else everything):
        return f"its {'last message' if ended == REFUSED else 'output'} has no {case.words!r}"
    return ""


def attack(case, limit_s=LIMIT_S):
    """Carry out a case. Returns "" where the program survives, else what is wrong and what it printed; raises Skipped.

    It survives if it ends by itself in `limit_s` seconds, as Case says, with no process left behind, no traceback, and
    nothing in the sandbox changed but what it may write.
    """
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        box, printed = Path(folder, "box"), Path(folder, "printed")
        shutil.copytree(originals() / "data", box / "data")
        (box / "tmp").mkdir()
        try:
            each = case.prepare(box)
            before, others = snapshot(box, each.may_write), living(box)
            process = start(each, box, printed)
            if each.meanwhile:
                each.meanwhile(box, process.pid)
            end = time.monotonic() + limit_s
            code = wait(process, limit_s)
            while code is not None and living(box) - others and time.monotonic() < end:
                time.sleep(0.05)
            left = living(box) - others
            after = snapshot(box, each.may_write)
        finally:
            _end_all(box)
            if os.path.ismount(box / "out"):
                subprocess.run(["umount", box / "out"], check=True)
        output = [Path(f"{printed}{end}").read_text("utf-8", "replace") for end in (".out", ".err")
                  if os.path.exists(f"{printed}{end}")]  # fmt: skip
        out, errors = ["", *output][-2:]
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if code is None:
        fault = f"it was still running after {limit_s} s"
    elif left:
        fault = f"it left {len(left)} processes behind"
    elif changed:
        fault = f"it changed {changed[:3]}"
    else:
        fault = _fault(case, each.name, code, out, errors)
    return fault and f"{fault}\n    $ {each.name} {' '.join(each.words)[-300:]}\n{out[-1000:]}{errors[-6000:]}"
