"""Interrupt jobs of four ranks on two Slurm nodes and compare the results with an uninterrupted job's, as Markdown.

eval "$(bash tests/proofs/slurm_sandbox.sh start)" && python -m tests.proofs.prove_slurm
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import run_with_submitit
from tests.equality import same
from tests.trees import SMALL, make_tree
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]

TIMEOUT = 1500  # seconds for a job, requeues included
STEPS = 20
FLAGS = [*SMALL, "--num_workers", "1", "--batch-size", "6", "--mu", "0.34", "--threshold", "0.3", "--epochs", "8",
         "--semi-start-epoch", "1", "--warmup-epochs", "0", "--model-ema-decay", "0.5", "--evaluate-freq", "2",
         "--steps-per-epoch", str(STEPS), "--partition", "", "--nodes", "2", "--ngpus", "2"]  # fmt: skip
FINAL_STATES = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
USR2, REQUEUE = ("scancel", "--signal=USR2"), ("scontrol", "requeue")


class Job:
    """A job submitted by run_with_submitit.py with FLAGS and `words`, whose files lie below `folder`.

    `ahead` replaces the launcher's SIGNAL_AHEAD_S, the seconds between Slurm's signal and the time limit.
    """

    def __init__(self, folder, tree, *words, ahead=run_with_submitit.SIGNAL_AHEAD_S):
        data = ["--data-path", tree, "--data-split-file", tree / "labelled.txt", "--shared_folder", folder]
        code = f"import run_with_submitit as r; r.SIGNAL_AHEAD_S = {ahead}; r.main(r.get_args_parser().parse_args())"
        launcher = [str(word) for word in (sys.executable, "-c", code, *FLAGS, *data, *words)]
        output = subprocess.run(launcher, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        self.id = re.match(r"Job (\d+)", output).group(1)
        self.folder = Path(folder, self.id)
        self.deadline = time.monotonic() + TIMEOUT

    def facts(self):
        """Slurm's record of the job: {"JobState": ..., "Restarts": ..., ...}."""
        return facts(self.id)

    def attempts(self):
        """Rank 0's output so far, one text for each attempt."""
        return self.log(0, "out").split("Starting with JobEnvironment")[1:]

    def epochs(self):
        """The epochs that each attempt began: [[0, 1], [1, 2], ...]."""
        return [[int(n) for n in re.findall(rf"Epoch (\d+) \[ *1/{STEPS}\]", text)] for text in self.attempts()]

    def log(self, rank, kind):
        """A task's output (`out`) or errors (`err`) so far."""
        path = self.folder / f"{self.id}_{rank}_log.{kind}"
        return path.read_text() if path.exists() else ""

    def lines(self):
        """The lines of log.txt so far."""
        path = self.folder / "log.txt"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, condition):
        """Wait until the condition holds and return the seconds it took.

        Raises RuntimeError if the job ends before, or after TIMEOUT.
        """
        start = time.monotonic()
        while not condition():
            state = self.facts()["JobState"]
            if state in FINAL_STATES and not condition():
                raise RuntimeError(f"Job {self.id} ended as {state}: see {self.folder}.")
            if time.monotonic() > self.deadline:
                raise RuntimeError(f"Job {self.id} is {state} after {TIMEOUT} s: see {self.folder}.")
            time.sleep(0.05)
        return time.monotonic() - start

    def end(self):
        """Wait until the job has completed, and return the job."""
        self.wait(lambda: self.facts()["JobState"] == "COMPLETED")
        return self

    def interrupt(self, command, moment):
        """Run the command on the job once `moment(job)` holds.

        Returns the seconds until the job is back in the queue and until it trains again.
        """
        n = len(self.attempts()) or 1
        self.wait(lambda: len(self.attempts()) == n and moment(self))
        subprocess.run([*command, self.id], check=True)
        queued = self.wait(lambda: int(self.facts()["Restarts"]) == n)
        return queued, queued + self.wait(lambda: len(self.epochs()) > n and self.epochs()[n])


def out_of_time(reference, folder, tree):
    """Submit a job that Slurm signals before its time limit, after about a third of the training time of `reference`.

    Slurm counts whole minutes, checks every 30 s, and signals up to half a minute early rather than late.
    """
    start = datetime.fromisoformat(reference.facts()["StartTime"]).timestamp()
    first, last = (Path(reference.folder, name).stat().st_mtime for name in ("run.json", "checkpoint.pth"))
    trained = int(first - start + (last - first) / 3)
    minutes = trained // 60 + 2
    return Job(folder, tree, "--timeout", minutes, ahead=60 * minutes - 30 - trained)


def facts(job):
    """Slurm's record of a job: {"JobState": ..., "Restarts": ..., ...}."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], check=True, capture_output=True, text=True).stdout
    return dict(word.partition("=")[::2] for word in shown.split())


def printed(pattern):
    """A moment: rank 0 has printed the pattern in the present attempt."""
    return lambda job: re.search(pattern, job.attempts()[-1])


def saved(job):
    """A moment: the first checkpoint exists, and the workers of the next epoch are starting."""
    return Path(job.folder, "checkpoint.pth").exists()


INTERRUPTIONS = [
    ("SIGUSR2 while Python starts", USR2, lambda job: bool(job.attempts())),
    # Here submitit's checkpoint hook is not called: its tasks bypass SIGTERM and train until SIGKILL.
    ("`scontrol requeue` while the workers of epoch 1 start", REQUEUE, saved),
    ("SIGUSR2 between the steps of an epoch", USR2, printed(rf"\[11/{STEPS}\]")),
    ("SIGUSR2 during an evaluation", USR2, printed(rf"Epoch \d*[02468] \[{STEPS}/{STEPS}\]")),
]


def differences(job, other):
    """What is not equal to the bit at the ends of two jobs: keys of checkpoint.pth, and `log.txt`."""
    contents = [checkpoint.read(each.folder / "checkpoint.pth") for each in (job, other)]
    keys = ("model", "model_ema", "optimizer", "lr_scheduler", "epoch", "best")
    differing = [key for key in keys if not same(*(content[key] for content in contents))]
    return differing + (["log.txt"] if job.lines() != other.lines() else [])


def verdict(job, other):
    """Whether two jobs ended identically, in words."""
    found = differences(job, other)
    return f"NOT identical: {found}" if found else "identical"


def repeated(job):
    """How many epochs each requeue made the job begin again."""
    epochs = job.epochs()
    return [len(set(new) & {e for old in epochs[:i] for e in old}) for i, new in enumerate(epochs)][1:]


def times(log, message):
    """The times of day at which submitit logged a line that starts with the message."""
    return re.findall(rf"\d\d:\d\d:\d\d(?=,\d+\) - {message})", log)


def main():
    """Run the three jobs and print the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = make_tree(Path(folder, "tree"), train=24, val=100, labelled=8)
        reference = Job(folder, tree).end()
        job = Job(folder, tree)
        seconds = [job.interrupt(command, moment) for _, command, moment in INTERRUPTIONS]
        job_verdict = verdict(job.end(), reference)
        limited = out_of_time(reference, folder, tree).end()
        print("| interrupted by | back in the queue after | training again after | epochs repeated |")
        print("|---|---|---|---|")
        for (what, *_), (queued, trains), n in zip(INTERRUPTIONS, seconds, repeated(job)):
            print(f"| {what} | {queued:.1f} s | {trains:.0f} s | {n} |")
        print(f"\nEpochs begun by the attempts: {job.epochs()}; end: {job_verdict}.")
        log = limited.log(0, "out")
        print(f"\nOut of time, SIGUSR2 from Slurm itself: {log.count('Requeued job')} requeue(s), signal caught at")
        print(f"{', '.join(times(log, 'Job has timed'))}, in the queue at {', '.join(times(log, 'Requeued job'))};")
        print(f"epochs begun by the attempts: {limited.epochs()}, repeated: {repeated(limited)};", end=" ")
        print(f"end: {verdict(limited, reference)}.")


if __name__ == "__main__":
    main()
