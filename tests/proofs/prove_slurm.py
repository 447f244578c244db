"""Interrupt jobs of four ranks on two Slurm nodes and compare their ends with that of one left alone, as Markdown.

eval "$(bash tests/proofs/slurm_sandbox.sh start)" && python -m tests.proofs.prove_slurm
"""

import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

import run_with_submitit
from tests.equality import same
from tests.trees import SMALL, make_tree

ROOT = Path(__file__).resolve().parents[2]

LIMIT_S = 1500
STEPS = 20
FLAGS = [*SMALL, "--num_workers", "1", "--batch-size", "6", "--mu", "0.34", "--threshold", "0.3", "--epochs", "8",
         "--semi-start-epoch", "1", "--warmup-epochs", "0", "--model-ema-decay", "0.5", "--evaluate-freq", "2",
         "--steps-per-epoch", str(STEPS), "--partition", "", "--nodes", "2", "--ngpus", "2"]  # fmt: skip
ENDS = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
USR2, REQUEUE = ("scancel", "--signal=USR2"), ("scontrol", "requeue")


class Job:
    """A job submitted by run_with_submitit.py with FLAGS and `words`, below `folder`; what happens to it.

    `ahead` is another SIGNAL_AHEAD_S than the launcher's.
    """

    def __init__(self, folder, tree, *words, ahead=run_with_submitit.SIGNAL_AHEAD_S):
        data = ["--data-path", tree, "--data-split-file", tree / "labelled.txt", "--shared_folder", folder]
        code = f"import run_with_submitit as r; r.SIGNAL_AHEAD_S = {ahead}; r.main(r.get_args_parser().parse_args())"
        launcher = [sys.executable, "-c", code, *FLAGS, *data, *words]
        said = subprocess.run([*map(str, launcher)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        self.id = re.match(r"Job (\d+)", said).group(1)
        self.folder = Path(folder, self.id)
        self.deadline = time.monotonic() + LIMIT_S

    def facts(self):
        """What Slurm says of the job: {JobState: ..., Restarts: ...}."""
        return facts(self.id)

    def attempts(self):
        """Rank 0's output of each attempt so far."""
        return self.log(0, "out").split("Starting with JobEnvironment")[1:]

    def epochs(self):
        """The epochs each attempt began: [[0, 1], [1, 2], ...]."""
        return [[int(n) for n in re.findall(rf"Epoch (\d+) \[ *1/{STEPS}\]", text)] for text in self.attempts()]

    def log(self, rank, kind):
        """A task's output (`out`) or errors (`err`) so far."""
        path = self.folder / f"{self.id}_{rank}_log.{kind}"
        return path.read_text() if path.exists() else ""

    def lines(self):
        """log.txt so far."""
        path = self.folder / "log.txt"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, condition):
        """Seconds until the condition holds; RuntimeError if the job ends before, or after LIMIT_S."""
        start = time.monotonic()
        while not condition():
            state = self.facts()["JobState"]
            if state in ENDS and not condition():
                raise RuntimeError(f"Job {self.id} ended as {state}: see {self.folder}.")
            if time.monotonic() > self.deadline:
                raise RuntimeError(f"Job {self.id} is {state} after {LIMIT_S} s: see {self.folder}.")
            time.sleep(0.05)
        return time.monotonic() - start

    def end(self):
        """Wait until the job has completed; returns it."""
        self.wait(lambda: self.facts()["JobState"] == "COMPLETED")
        return self

    def interrupt(self, command, moment):
        """Give the job's id to the command at the moment; seconds until it is in the queue and until it trains."""
        n = len(self.attempts()) or 1
        self.wait(lambda: len(self.attempts()) == n and moment(self))
        subprocess.run([*command, self.id], check=True)
        queued = self.wait(lambda: int(self.facts()["Restarts"]) == n)
        return queued, queued + self.wait(lambda: len(self.epochs()) > n and self.epochs()[n])


def out_of_time(whole, folder, tree):
    """A job that Slurm signals, its time being nearly up, when it has trained for about a third of `whole`'s time.

    Slurm counts whole minutes, looks every 30 s, and signals half a minute early rather than late.
    """
    began = datetime.fromisoformat(whole.facts()["StartTime"]).timestamp()
    first, last = (Path(whole.folder, name).stat().st_mtime for name in ("run.json", "checkpoint.pth"))
    trained = int(first - began + (last - first) / 3)
    minutes = trained // 60 + 2
    return Job(folder, tree, "--timeout", minutes, ahead=60 * minutes - 30 - trained)


def facts(job):
    """What Slurm says of a job: {JobState: ..., Restarts: ..., ...}."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], check=True, capture_output=True, text=True).stdout
    return dict(word.partition("=")[::2] for word in shown.split())


def printed(pattern):
    """A moment: rank 0 has printed it in this attempt."""
    return lambda job: re.search(pattern, job.attempts()[-1])


def saved(job):
    """A moment: the first checkpoint is there, and the workers of the next epoch are being started."""
    return Path(job.folder, "checkpoint.pth").exists()


INTERRUPTIONS = [
    ("SIGUSR2 while Python starts", USR2, lambda job: bool(job.attempts())),
    # Slurm's own: the tasks, which bypass SIGTERM, train on until SIGKILL, and nobody told the job of its checkpoint.
    ("`scontrol requeue` while the workers of epoch 1 start", REQUEUE, saved),
    ("SIGUSR2 between the steps of an epoch", USR2, printed(rf"\[11/{STEPS}\]")),
    ("SIGUSR2 during an evaluation", USR2, printed(rf"Epoch \d*[02468] \[{STEPS}/{STEPS}\]")),
]


def differences(job, other):
    """What is not equal to the bit at the ends of two jobs: keys of checkpoint.pth, `log.txt`."""
    ends = [torch.load(each.folder / "checkpoint.pth", weights_only=False) for each in (job, other)]
    keys = ("model", "model_ema", "optimizer", "lr_scheduler", "epoch", "best")
    unlike = [key for key in keys if not same(*(end[key] for end in ends))]
    return unlike + (["log.txt"] if job.lines() != other.lines() else [])


def repeated(job):
    """How many epochs each requeue made the job begin once more."""
    epochs = job.epochs()
    return [len(set(new) & {e for old in epochs[:i] for e in old}) for i, new in enumerate(epochs)][1:]


def main():
    """Run the three jobs and print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        tree = make_tree(Path(folder, "tree"), train=24, val=100, labelled=8)
        whole = Job(folder, tree).end()
        job = Job(folder, tree)
        seconds = [job.interrupt(command, moment) for _, command, moment in INTERRUPTIONS]
        verdict = "identical" if not differences(job.end(), whole) else f"NOT identical: {differences(job, whole)}"
        limited = out_of_time(whole, folder, tree).end()
        print("| interrupted by | back in the queue after | training again after | epochs repeated |")
        print("|---|---|---|---|")
        for (what, *_), (queued, trains), n in zip(INTERRUPTIONS, seconds, repeated(job)):
            print(f"| {what} | {queued:.1f} s | {trains:.0f} s | {n} |")
        print(f"\nEpochs begun by the attempts: {job.epochs()}; end: {verdict}.")
        verdict = "identical" if not differences(limited, whole) else f"NOT identical: {differences(limited, whole)}"
        log = limited.log(0, "out")
        print(f"\nOut of time, SIGUSR2 from Slurm itself: {log.count('Requeued job')} requeue(s), signal caught at")
        print(f"{', '.join(times(log, 'Job has timed'))}, in the queue at {', '.join(times(log, 'Requeued job'))};")
        print(f"epochs begun by the attempts: {limited.epochs()}, repeated: {repeated(limited)}; end: {verdict}.")


def times(log, words):
    """The times of day at which submitit logged a line with these words."""
    return re.findall(rf"\d\d:\d\d:\d\d(?=,\d+\) - {words})", log)


if __name__ == "__main__":
    main()
