"""The output folder of a run: who writes there, its files and their order, and the checkpoint to resume from."""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import utils
from training import checkpoint, validation
from utils import print_main

LATEST, PREVIOUS, BEST, FORK = "checkpoint.pth", "checkpoint.prev.pth", "best.pth", "epoch_{}_checkpoint.pth"
LOG, DROPPED, RECORD, LOCK = "log.txt", "log.dropped.txt", "run.json", "run.lock"
CHECKPOINTS = (LATEST, PREVIOUS, BEST, FORK.format("*"))
# Everything of a run and of the evaluations beside it; the folder of a Slurm job also holds the files of submitit.
OF_A_RUN = (*CHECKPOINTS, LOG, DROPPED, RECORD, "tensorboard", "eval.json", "*per_class.csv", "*confusion.csv",
            "*confusion.png", "*reliability.png")  # fmt: skip
WAIT_S = 300  # for the end of the attempt before this one, in a job that Slurm has requeued


# --------------------------------------------------------------------------------------------- who writes there


@contextmanager
def claimed(folder, resume, overwrite):
    """Keep the folder for this run alone inside the block. A run that it holds already is continued, or moved aside.

    Every rank must enter it. Raises ValueError as `_check_files`, `_lock` and `_make_room`, on all ranks together. An
    empty name claims nothing.
    """
    lock = []
    if folder:
        utils.on_main(_check_files, folder)
        utils.on_main(lambda: lock.append(_lock(folder)))
        if aside := utils.on_main(_make_room, folder, resume, overwrite):
            print_main(f"--overwrite: the files of the run before are in {aside}.")
    try:
        yield
    finally:
        for file in lock:
            file.close()


def _check_files(folder):
    """Raise ValueError where a text file of a run is something else.

    A FIFO would block the run that opens it, and through a link the run would write to a file outside of its folder.
    """
    for path in (Path(folder, name) for name in (LOG, DROPPED, RECORD, LOCK)):
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path} is no regular file, but a link, a folder or a device: remove it.")


def _lock(folder):
    """Take the lock of an output folder; the open file that holds it.

    It is a lock of the kernel (fcntl) on the file run.lock, which ends with the process, however that ends. On NFS 4
    the server ends the lock of a node that died after its lease, by default 90 s. A requeued Slurm job waits up to
    WAIT_S for the end of the attempt before it. Raises ValueError naming the process that has the lock.
    """
    path = Path(folder, LOCK)
    with utils.writing(path):
        file = open(path, "a+", encoding="utf-8")
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("SUBMITIT_LOCAL_JOB_ID"))
    until, waiting = time.monotonic() + WAIT_S, False
    while not _locked(file, path):
        holder = {"pid": "?", "host": "?", "started": "?"} | _holder(file)
        words = f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
        if job is None or holder.get("job") != job or time.monotonic() > until:
            file.close()
            raise ValueError(
                f"{folder} is in use by {words}: wait for its end, end it, or choose another --output_dir."
            )
        if not waiting:
            print_main(f"Waiting up to {WAIT_S} s for the end of {words}, the attempt before this one.")
        waiting = True
        time.sleep(1)
    file.truncate(0)
    json.dump(
        {"host": socket.gethostname(), "pid": os.getpid(), "started": f"{datetime.now():%F %T}", "job": job}, file
    )
    file.flush()
    return file


def _locked(file, path):
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        # A file system without locks, such as Lustre mounted without the option flock.
        print_main(f"Warning: {path} cannot be locked ({error.strerror}): see that no second run uses this folder.")
    return True


def _holder(file):
    """What the process that has or had the lock wrote about itself; {} where that cannot be read."""
    try:
        # Not by a second descriptor: closing it would end a lock of this process.
        holder = json.loads(os.pread(file.fileno(), 10_000, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def begun_by_job(folder, job):
    """Whether the last run in the folder was started in this Slurm or submitit job."""
    try:
        with open(Path(folder, LOCK), encoding="utf-8") as file:
            return _holder(file).get("job") == job
    except OSError:
        return False


def holds_run(folder):
    """Whether the folder has a checkpoint or a log line of a run."""
    logged = Path(folder, LOG)
    return any(True for name in CHECKPOINTS for _ in Path(folder).glob(name)) or (
        logged.is_file() and logged.stat().st_size > 0
    )


def is_inside(path_or_url, folder):
    """Whether a checkpoint is one of the run in this folder."""
    # Not by Path.resolve, which raises RuntimeError at a link to itself.
    return "://" not in path_or_url and os.path.dirname(os.path.realpath(path_or_url)) == os.path.realpath(folder)


def _make_room(folder, resume, overwrite):
    """See that a new run does not write over the files of another one.

    A run that resumes from this folder goes on in it. Any other needs a folder without a run, or with `overwrite` the
    files of the run are moved into a new folder below it. Returns that folder's name, or None. Raises ValueError where
    the folder holds a run.
    """
    inside = resume == "auto" or is_inside(resume, folder)
    if overwrite and inside:
        raise ValueError(f"--overwrite and --resume {resume} contradict each other: keep one of them.")
    if inside or not holds_run(folder):
        return None
    if not overwrite:
        raise ValueError(
            f"{folder} holds another run: choose a new --output_dir, go on with that run by --resume auto, or pass "
            "--overwrite, which moves its files into a folder below."
        )
    aside = Path(folder, f"replaced-{datetime.now():%Y%m%d-%H%M%S}")
    with utils.writing(aside):
        aside.mkdir()
        for pattern in OF_A_RUN:
            for path in sorted(Path(folder).glob(pattern)):
                path.rename(aside / path.name)
    return str(aside)


# --------------------------------------------------------------------------------------------- where to resume


def newest(folder):
    """The path of the newest complete checkpoint of an output folder, None where the folder has no checkpoint.

    That is checkpoint.pth. Where it is missing or damaged, the file of the latest epoch among the others that hold a
    complete training state takes its place, and a warning names the damaged ones. Raises ValueError where there are
    checkpoints but none is complete.
    """
    forks = sorted(Path(folder).glob(FORK.format("*")))
    found, epoch, damaged = None, None, []
    for path in [*(Path(folder, name) for name in (LATEST, PREVIOUS, BEST)), *forks]:
        if not path.exists():
            continue
        try:
            content = checkpoint.read(path)
            validation.check(content, path)
            if any(key not in content for key in checkpoint.STATE_KEYS):
                raise ValueError(f"{path} holds no whole training state ({', '.join(checkpoint.STATE_KEYS)})")
        except (OSError, ValueError) as error:
            damaged.append(str(error))
            continue
        if found is None or content["epoch"] > epoch:
            found, epoch = path, content["epoch"]
        if path.name == LATEST:
            break
    if damaged and found is None:
        raise ValueError(
            f"No checkpoint of {folder} is complete ({damaged[0]}): move them away for a fresh start, "
            "or name another file with --resume."
        )
    for reason in damaged:
        print_main(f"Warning: {reason}; going on from the older {found}, of epoch {epoch}.")
    return found and str(found)


def resume_file(resume, folder):
    """The checkpoint to resume from, "" for none: the one that --resume names, or for `auto` the newest of the folder.

    Every rank must call this and gets the same answer. Raises ValueError for `auto` without a folder, and as `newest`.
    """
    if resume != "auto":
        return resume
    if not folder:
        raise ValueError("--resume auto looks for a checkpoint in --output_dir: name that folder, or a file.")
    found = utils.on_main(newest, folder)
    print_main(
        f"--resume auto: going on from {found}." if found else f"--resume auto: {folder} holds no checkpoint yet."
    )
    return found or ""


# --------------------------------------------------------------------------------------------- what is written


def _earlier_starts(path, folder):
    """[{"resumed_from", "changed"}] of the starts in a run.json that came from elsewhere or changed a flag."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        start = {key: record[key] for key in ("resumed_from", "changed")}
        told = start["changed"] or start["resumed_from"] and not is_inside(start["resumed_from"], folder)
        return record["earlier"] + [start] * bool(told)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []  # written by a version that did not record this


class Output:
    """The files of a run. All ranks call its methods together; the main one writes, and all raise its OSError.

    Args:
        folder: an existing folder; empty: nothing is written.
    """

    def __init__(self, folder):
        self.folder = Path(folder) if folder else None

    def write_run_json(self, content, goes_on):
        """Write run.json. `content()` makes the object to write, on the main process alone.

        Where the run `goes_on` in its folder, `earlier` lists what the starts before this one changed or came from.
        """

        def write():
            path, record = self.folder / RECORD, content()
            utils.write_json(path, record | {"earlier": _earlier_starts(path, self.folder) if goes_on else []})

        if self.folder:
            utils.on_main(write)

    def tidy(self, epoch, logged=()):
        """Prepare the folder for a run whose log goes on after this epoch.

        Temporary files of a killed run are removed; the lines of later epochs, which the run writes again, and
        incomplete lines are moved out of log.txt. Those of the epochs in `logged` that it lacks are named.
        """
        if self.folder is None:
            return
        log = self.folder / LOG

        def tidy_up():
            for leftover in self.folder.glob("*.[0-9]*.tmp"):
                if not leftover.is_dir():  # a folder is not ours
                    leftover.unlink()
            dropped = utils.trim_json_lines(log, epoch)
            kept = [json.loads(line)["epoch"] for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
            begun = min(kept, default=max(logged, default=0))  # a fork has no lines of the run it comes from
            return dropped, [each for each in logged if each >= begun and each not in kept]

        dropped, missing = utils.on_main(tidy_up)
        if dropped:
            print_main(f"{log}: {dropped} lines are not of epochs up to {epoch}, now in log.dropped.txt.")
        if missing:
            print_main(f"Warning: {log} lacks the lines of epochs {', '.join(map(str, missing))}, which were trained.")

    def log(self, record):
        """Append an epoch's record to log.txt."""
        if self.folder:
            utils.on_main(utils.append_json_line, self.folder / LOG, record)

    def save(self, content, names, keep_previous=True):
        """Write an epoch's checkpoints in the order of `names`: one file with several names.

        checkpoint.pth should be the last name: a run that is killed before this file is in place repeats the epoch.
        `content()` makes the state to write, on the main process alone. The checkpoint.pth of the epoch before
        becomes checkpoint.prev.pth.
        """

        def write():
            state, (first, *others) = content(), [self.folder / name for name in names]

            def previous(path):
                return self.folder / PREVIOUS if path.name == LATEST and keep_previous else None

            checkpoint.save(state, first, previous(first))
            for path in others:
                checkpoint.save_again(state, first, path, previous(path))

        if self.folder:
            utils.on_main(write)
