"""Attacks by the machine: signals, a full disk and exhausted limits."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time

from tests.proofs.attacks.sandbox import DONE, REFUSED, Skipped, add_run, cases, command, start, train, until, wait
from tests.proofs.prove_memory import data_workers
from tests.trees import ROOT

LONG = "--epochs 9999 --steps-per-epoch 40".split()
AND_TMP = "out", "tmp"  # what is killed cannot remove the sockets of its workers

# ------------------------------------------------------------------------------- signals


def _in_mid_epoch(box, printed):
    """Wait until a run, which prints to this file, has a checkpoint and is training again."""
    until((box / "out" / "log.txt").exists)
    epochs = len(re.findall("Epoch", printed.read_text()))
    until(lambda: len(re.findall("Epoch", printed.read_text())) > epochs)


def sending(*signals, to_group=False):
    """A Command.meanwhile that sends signals to a run in mid-epoch, to its process alone or as Ctrl-C does to all."""

    def meanwhile(box, pid, printed="printed.out"):
        _in_mid_epoch(box, box.parent / printed)
        for each in signals:
            (os.killpg if to_group else os.kill)(pid, each)
            time.sleep(0.05)

    return meanwhile


def _kill_a_worker(box, pid):
    _in_mid_epoch(box, box.parent / "printed.out")
    until(lambda: data_workers(pid))
    os.kill(data_workers(pid)[-1], signal.SIGKILL)


def interrupted(*signals, to_group=False, workers=2):
    """Prepare a run, started as a user starts it, that is sent signals."""
    meanwhile = sending(*signals, to_group=to_group)
    return lambda box: train(*LONG, "--num_workers", workers, anew=True, meanwhile=meanwhile, may_write=AND_TMP)


def resumed_after(number):
    """Prepare a run that was ended by a signal, and resume it for an epoch."""

    def prepare(box):
        first = start(train(*LONG, "--num_workers", 2), box, box.parent / "first")
        sending(number)(box, first.pid, "first.out")
        wait(first, 60)
        done = len((box / "out" / "log.txt").read_text().splitlines())
        return train("--epochs", done + 1, "--resume", "auto")

    return prepare


def _under_torchrun(box):
    launcher = "--standalone", "--nproc_per_node=2", ROOT / "semi_main.py"
    run = train(*LONG).words
    meanwhile = sending(signal.SIGKILL)
    return command("torch.distributed.run", *launcher, *run, anew=True, meanwhile=meanwhile, may_write=AND_TMP)


SIGNALS = cases(
    "signals",
    ("SIGINT to all, as Ctrl-C", interrupted(signal.SIGINT, to_group=True), signal.SIGINT.value,
     r"semi_main.py: stopped in epoch \d+; --resume auto goes on\n$"),
    ("SIGINT twice", interrupted(signal.SIGINT, signal.SIGINT, to_group=True), signal.SIGINT.value,
     r"semi_main.py: stopped in epoch \d+; --resume auto goes on\n$"),
    ("SIGTERM", interrupted(signal.SIGTERM), signal.SIGTERM.value),
    ("SIGTERM to all, as a cluster", interrupted(signal.SIGTERM, to_group=True), signal.SIGTERM.value),
    ("resumed after SIGTERM", resumed_after(signal.SIGTERM), DONE, "Trained in"),
    ("resumed after SIGKILL", resumed_after(signal.SIGKILL), DONE, "Trained in"),
    ("SIGKILL to a worker", lambda box: train(*LONG, "--num_workers", 1, meanwhile=_kill_a_worker, may_write=AND_TMP),
     REFUSED, "a worker was killed, perhaps for lack of memory: pass fewer --num_workers"),
    ("torchrun is killed", _under_torchrun, signal.SIGKILL.value),
)  # fmt: skip

# ------------------------------------------------------------------------------- resources


def limited(which, limit, *words):
    """Prepare a run under a limit of the system."""
    return lambda box: train(*words, limits={which: limit})


def _on_a_disk(options, then):
    """Prepare a tmpfs as output folder; Skipped where it cannot be mounted."""

    def prepare(box):
        (box / "out").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "none", box / "out"]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            raise Skipped("mounting a tmpfs needs root")
        return then(box)

    return prepare


def predicting(*words, images="data/val", **settings):
    """A function of a sandbox: classify its images, or others."""

    def then(box):
        add_run(box, "run", "checkpoint.pth")
        return command("predict.py", images, "--checkpoint", "run/checkpoint.pth", *words, **settings)

    return then


def _exporting(box):
    add_run(box, "run", "checkpoint.pth")
    return command("script.export", "--checkpoint", "run/checkpoint.pth", "--output", "out", "--no-onnx")


FULL = "No space left on device.*: make room there, or choose another"
CASES = SIGNALS + cases(
    "resources",
    ("30 open files, 2 workers", limited(resource.RLIMIT_NOFILE, 30, "--num_workers", 2), REFUSED,
     "too many files are open: raise the limit"),
    ("30 open files, no workers", limited(resource.RLIMIT_NOFILE, 30), DONE, "Trained in"),
    ("100 open files, 100 workers", limited(resource.RLIMIT_NOFILE, 100, "--num_workers", 100),
     REFUSED, "too many files are open"),
    ("files of at most 1 MB", limited(resource.RLIMIT_FSIZE, 10**6), REFUSED, "Cannot write .*too lar"),
    ("files of at most 100 bytes", limited(resource.RLIMIT_FSIZE, 100), REFUSED, "too large"),
    ("a disk of 1 MB", _on_a_disk("size=1m", lambda box: train()), REFUSED, FULL),
    ("a disk of one checkpoint", _on_a_disk("size=8m", lambda box: train("--epochs", 3)), REFUSED, FULL),
    ("a disk without inodes", _on_a_disk("nr_inodes=1", lambda box: train()), REFUSED, FULL),
    ("a disk that is read-only", _on_a_disk("ro", lambda box: train()), REFUSED, "Read-only"),
    ("a full disk, predict.py",
     _on_a_disk("size=4k,nr_inodes=1", predicting("--output", "out/a.csv")), REFUSED, FULL),
    ("a full disk, export", _on_a_disk("size=1m", _exporting), REFUSED, FULL),
    ("stdout is full", lambda box: train(stdout="/dev/full"), REFUSED, "No space left"),
    ("stdout is full, predict.py", predicting(stdout="/dev/full"), REFUSED, "No space left"),
)  # fmt: skip
