"""Kill tiny trainings with SIGKILL, resume them with --resume auto, and compare them to the bit with unkilled ones.

    python -m tests.proofs.prove_resume --kills 30 >> docs/reliability.md    # a quarter of an hour on two cores
    python -m tests.proofs.prove_resume --quick                              # three kills

The moments of the kills are drawn from --seed: in the supervised and in the semi-supervised phase, during an
evaluation, and while a checkpoint is being written. The configurations are 1 and 2 processes, 0 and 2 data workers, and
repeated augmentation on and off. The first kill and every tenth after it hit the program as a user starts it (through
torchrun for two processes); the others hit a forked process, which saves the time of the imports. A kill takes the data
workers too. Weights, EMA, optimizer, schedule, scaler and best result of every checkpoint must be equal, and log.txt
byte by byte. The last part runs onto a full disk. Exits with status 1 if anything differs.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

import semi_main
from tests.equality import same
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]

EPOCHS, SEMI, STEPS = 4, 2, 4
PHASES = ("warm-up", "semi-supervised", "evaluation", "checkpoint write")
FORK = multiprocessing.get_context("fork")


def configurations(*more):
    """[(processes, workers, repeated augmentation, further flags)]; on GPUs no more processes than there are."""
    processes = (1, 2) if "cuda" not in more or torch.cuda.device_count() > 1 else (1, 1)
    return list(itertools.product(processes, (0, 2), (False, True), (more,)))


def make_images(root):
    """Write two classes of noise in ImageNet layout: 6 training images each, 4 of them labelled, and 8 to evaluate."""
    rng, names = np.random.default_rng(0), []
    for part, count in (("train", 6), ("val", 8)):
        for c in "ab":
            folder = Path(root, part, c)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (40, 48, 3)) + (50 if c == "a" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{c}{i}.png")
                names += [f"{c}{i}.png,0,0\n"] if part == "train" and i < 4 else []
    Path(root, "labelled.txt").write_text("".join(names))


def flags(data, folder, configuration):
    """The command line of a run, as a list of words."""
    _, workers, repeated, more = configuration
    words = f"""--data-set SEMI-IMNET --data-path {data} --data-split-file {data}/labelled.txt --output_dir {folder}
        --model Semiformer_micro_patch16 --input-size 48 --batch-size 4 --mu 0.5 --threshold 0.3 --mixup 0 --cutmix 0
        --epochs {EPOCHS} --semi-start-epoch {SEMI} --steps-per-epoch {STEPS} --warmup-epochs 1 --model-ema-decay 0.5
        --num_workers {workers} --{"" if repeated else "no-"}repeated-aug --resume auto"""
    return [*words.split(), *more]


def _run_rank(words, rank, processes, rendezvous):
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        words = [*words, "--dist_url", f"file://{rendezvous}"]
    semi_main.main(argparse.ArgumentParser(parents=[semi_main.get_args_parser()]).parse_args(words))


def _run_ranks(words, processes, output, rendezvous):
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    ranks = [FORK.Process(target=_run_rank, args=(words, rank, processes, rendezvous)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    raise SystemExit(max(abs(rank.exitcode) for rank in ranks))


class Training:
    """A running training, forked from this process or started as a user starts it; it prints to the file `output`."""

    def __init__(self, words, processes, output, as_program):
        self.output = Path(output)
        self.output.write_bytes(b"")
        if as_program:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / "semi_main.py", *words]
            with open(output, "wb") as file:
                self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        else:
            rendezvous = tempfile.mktemp(dir=self.output.parent)
            self.process = FORK.Process(target=_run_ranks, args=(words, processes, output, rendezvous))
            self.process.start()

    def status(self):
        """The exit status, or None while it runs."""
        return self.process.exitcode if isinstance(self.process, FORK.Process) else self.process.poll()

    def wait(self, seconds=300):
        """Wait for its end and return the exit status. Kills it and raises TimeoutError after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.status() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.output} did not end in {seconds} s")
            time.sleep(0.01)
        return self.status()

    def kill(self):
        """Send SIGKILL to the process and all its descendants, and return when they are gone."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # the process ended meanwhile
        family = [self.process.pid]
        for pid in family:
            family += [child for child, parent in parents.items() if parent == pid]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while any(_is_running(pid) for pid in family):
            time.sleep(0.002)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def draw_moment(phase, rng):
    """Draw the moment of a kill: (pattern in the output, whether a .tmp file must exist too, seconds to wait then)."""
    if phase in PHASES[:2]:
        epoch = rng.randrange(SEMI) if phase == PHASES[0] else rng.randrange(SEMI, EPOCHS)
        return rf"Epoch {epoch} \[1/", False, rng.uniform(0, 0.3)
    epoch = rng.randrange(EPOCHS)
    writing = phase == PHASES[3]
    return rf"Epoch {epoch} \[{STEPS}/{STEPS}\]", writing, rng.uniform(0, 0.02 if writing else 0.1)


def kill_in_phase(training, folder, phase, rng):
    """Kill the training at a random moment of the phase; returns whether it was still running then."""
    pattern, writing, seconds = draw_moment(phase, rng)
    while not (re.search(pattern, training.output.read_text()) and (not writing or any(folder.glob("*.pth.*.tmp")))):
        if training.status() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(seconds)
    alive = training.status() is None
    training.kill()
    return alive


def locate_kill(training, folder):
    """(phase, place) in which the kill hit, from the last printed lines and the files it left."""
    lines = re.findall(r"Epoch (\d+) \[(\d+)/|\* (EMA) top-1", training.output.read_text())
    steps = [(int(epoch), int(step)) for epoch, step, _ in lines if epoch]
    if not steps:
        return "start-up", "before the first step"
    (epoch, step), unfinished = steps[-1], sorted(path.name for path in folder.glob("*.pth.*.tmp"))
    if unfinished:
        return PHASES[3], f"epoch {epoch}, {unfinished[0]}"
    if lines[-1][2]:
        return "between epochs", f"after epoch {epoch}"
    if step == STEPS:
        return PHASES[2], f"after epoch {epoch}"
    return PHASES[epoch >= SEMI], f"epoch {epoch}, after step {step}/{STEPS}"


def differences(folder, reference):
    """What differs between an output folder and that of the reference run: [description], empty if nothing does."""
    found = []
    for path in sorted(reference.glob("*.pth")):
        if not (folder / path.name).is_file():
            found.append(f"no {path.name}")
            continue
        one, other = (checkpoint.read(each / path.name) for each in (folder, reference))
        found += [f"{path.name}: {key}" for key in other if key != "args" and not same(one.get(key), other[key])]
    logs = [(each / "log.txt").read_bytes() for each in (folder, reference)]
    return found + (["log.txt"] if logs[0] != logs[1] else [])


def one_kill(number, seed, data, work, references, *more):
    """Kill a run, resume it and compare; returns a row of the table, whose last cell is 'yes' or what differs.

    `references` maps a configuration to the output folder of its unkilled run, which is trained where it is missing.
    """
    rng = random.Random(1000 * seed + number)
    configuration, phase = configurations(*more)[number * 5 % 8], PHASES[(number + number // 8) % 4]
    processes, workers, repeated, _ = configuration
    as_program = number % 10 == 0
    if configuration not in references:
        references[configuration] = work / f"reference{len(references)}"
        words = flags(data, references[configuration], configuration)
        if Training(words, processes, work / "output", as_program=False).wait():
            raise RuntimeError((work / "output").read_text()[-2000:])
    folder = work / "killed"
    for _ in range(5):  # a run may end before the moment of its kill
        shutil.rmtree(folder, ignore_errors=True)
        training = Training(flags(data, folder, configuration), processes, work / "output", as_program)
        if kill_in_phase(training, folder, phase, rng):
            break
    hit, place = locate_kill(training, folder)
    resumed = Training(flags(data, folder, configuration), processes, work / "resumed", as_program)
    if resumed.wait():
        result = [f"ended with {resumed.status()}: {resumed.output.read_text()[-300:]!r}"]
    else:
        result = differences(folder, references[configuration])
    kind = "program" if as_program else "fork"
    cells = (number + 1, processes, workers, "on" if repeated else "off", kind, hit, place)
    return *cells, ", ".join(result) or "yes"


def full_disk(data, work, references, *more):
    """Train onto a disk that fills up, then resume with more space; returns (a sentence on the outcome, success)."""
    disk, configuration = work / "disk", configurations(*more)[0]
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=90m", "none", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        return "Full disk: not tried, because mounting a tmpfs needs root.", True
    try:
        words = flags(data, disk / "out", configuration)
        training = Training(words, 1, work / "output", as_program=True)
        status, output = training.wait(), training.output.read_text()
        error = re.search(r"semi_main.py: error: (Cannot write \S+/(\S+) .*)", output)
        epoch = checkpoint.read(disk / "out" / "checkpoint.pth")["epoch"]
        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        resumed = Training(words, 1, work / "resumed", as_program=True).wait()
        result = differences(disk / "out", references[configuration]) if resumed == 0 else [f"status {resumed}"]
        success = status == 1 and error is not None and not result
        return (
            f"Full disk (a tmpfs of 90 MiB, checkpoints of 31 MiB): the run ended with status {status} while it wrote "
            f"{error and error[2]}; checkpoint.pth of epoch {epoch} was intact; resumed with more space, its end is "
            f"identical: {', '.join(result) or 'yes'}."
        ), success
    finally:
        subprocess.run(["umount", disk], check=True)


def main(args):
    """Print a table with a row for each kill, the outcome of the full disk, and the totals."""
    start, references = time.time(), {}
    kills = 3 if args.quick else args.kills
    more = ["--device", args.device] + ["--deterministic"] * (args.device != "cpu")
    torch.set_num_threads(1)
    print("| kill | processes | workers | repeated aug. | started as | landed in | at | identical end |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_images(work / "data")
        identical = 0
        for number in range(kills):
            row = one_kill(number, args.seed, work / "data", work, references, *more)
            identical += row[-1] == "yes"
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        sentence, success = ("", True) if args.quick else full_disk(work / "data", work, references, *more)
    print(f"\n{sentence}\n\nSeed {args.seed}, torch {torch.__version__}, {time.time() - start:.0f} s.\n")
    print(f"{kills} kills, {identical} identical")
    if identical < kills or not success:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of kills (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, with --deterministic (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three kills and no full disk")
    main(parser.parse_args())
