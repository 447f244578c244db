"""Kill tiny trainings (SIGKILL, workers too), go on with --resume auto, compare with runs never killed, to the bit.

    python -m tests.proofs.prove_resume --kills 30 >> docs/reliability.md    # a quarter of an hour on two cores
    python -m tests.proofs.prove_resume --quick                              # three kills

The moments are drawn from --seed: in the supervised and the semi-supervised phase, during an evaluation, while a
checkpoint is written; the configurations are 1 and 2 processes, 0 and 2 workers, repeated augmentation on and off.
Every tenth kill, and the first, is of the program itself (torchrun for two processes); the others fork a process
that has imported it. Compared are weights, EMA, optimizer, schedule, scaler and best of every checkpoint, and
log.txt byte by byte. Last, a run onto a full disk. Ends with status 1 where anything differs.
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
from tests.proofs.same_checkpoint import same

ROOT = Path(__file__).resolve().parents[2]

EPOCHS, SEMI, STEPS = 4, 2, 4
CONFIGURATIONS = list(itertools.product((1, 2), (0, 2), (False, True)))  # processes, workers, repeated augmentation
PHASES = ("warm-up", "semi-supervised", "evaluation", "checkpoint write")
FORK = multiprocessing.get_context("fork")


def make_images(root):
    """Two classes of noise in ImageNet layout, 6 images each to train on and 8 to evaluate, 4 labelled."""
    draw, names = np.random.default_rng(0), []
    for part, count in (("train", 6), ("val", 8)):
        for c in "ab":
            folder = Path(root, part, c)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 200, (40, 48, 3)) + (50 if c == "a" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{c}{i}.png")
                names += [f"{c}{i}.png,0,0\n"] if part == "train" and i < 4 else []
    Path(root, "labelled.txt").write_text("".join(names))


def flags(data, folder, configuration):
    """The command line of a run."""
    _, workers, repeated = configuration
    words = f"""--data-set SEMI-IMNET --data-path {data} --data-split-file {data}/labelled.txt --output_dir {folder}
        --model Semiformer_micro_patch16 --input-size 48 --batch-size 4 --mu 0.5 --threshold 0.3 --mixup 0 --cutmix 0
        --epochs {EPOCHS} --semi-start-epoch {SEMI} --steps-per-epoch {STEPS} --warmup-epochs 1 --model-ema-decay 0.5
        --device cpu --num_workers {workers} --{"" if repeated else "no-"}repeated-aug --resume auto"""
    return words.split()


def _rank(words, rank, processes, meeting):
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        words = [*words, "--dist_url", f"file://{meeting}"]
    semi_main.main(argparse.ArgumentParser(parents=[semi_main.get_args_parser()]).parse_args(words))


def _ranks(words, processes, said, meeting):
    with open(said, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    ranks = [FORK.Process(target=_rank, args=(words, rank, processes, meeting)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    raise SystemExit(max(abs(rank.exitcode) for rank in ranks))


class Start:
    """A started training: forked from this process, or as a user starts it; what it says goes to the file `said`."""

    def __init__(self, words, processes, said, program):
        self.said = Path(said)
        self.said.write_bytes(b"")
        if program:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / "semi_main.py", *words]
            with open(said, "wb") as file:
                self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        else:
            meeting = tempfile.mktemp(dir=self.said.parent)
            self.process = FORK.Process(target=_ranks, args=(words, processes, said, meeting))
            self.process.start()

    def status(self):
        """Its exit status, None while it runs."""
        return self.process.exitcode if isinstance(self.process, FORK.Process) else self.process.poll()

    def wait(self, seconds=300):
        """Its exit status; TimeoutError where it does not end."""
        until = time.monotonic() + seconds
        while self.status() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{self.said} did not end in {seconds} s")
            time.sleep(0.01)
        return self.status()

    def kill(self):
        """SIGKILL to it and all it has started, workers too; returns when they are gone."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended meanwhile
        family = [self.process.pid]
        for pid in family:
            family += [child for child, parent in parents.items() if parent == pid]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while any(_runs(pid) for pid in family):
            time.sleep(0.002)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def moment(phase, draw):
    """(what its words must match, whether a .tmp file must be there, seconds to wait then) before a kill."""
    if phase in PHASES[:2]:
        epoch = draw.randrange(SEMI) if phase == PHASES[0] else draw.randrange(SEMI, EPOCHS)
        return rf"Epoch {epoch} \[1/", False, draw.uniform(0, 0.3)
    epoch = draw.randrange(EPOCHS)
    writing = phase == PHASES[3]
    return rf"Epoch {epoch} \[{STEPS}/{STEPS}\]", writing, draw.uniform(0, 0.02 if writing else 0.1)


def kill_at(start, folder, phase, draw):
    """Kill the run at a moment of the phase; whether it was still running."""
    words, writing, seconds = moment(phase, draw)
    while not (re.search(words, start.said.read_text()) and (not writing or any(folder.glob("*.pth.tmp")))):
        if start.status() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(seconds)
    alive = start.status() is None
    start.kill()
    return alive


def where(start, folder):
    """The phase and the place the kill landed in, from what the run said last and the files it left."""
    said = re.findall(r"Epoch (\d+) \[(\d+)/|\* (EMA) top-1", start.said.read_text())
    steps = [(int(epoch), int(step)) for epoch, step, _ in said if epoch]
    if not steps:
        return "start-up", "before the first step"
    (epoch, step), half = steps[-1], sorted(path.name for path in folder.glob("*.pth.tmp"))
    if half:
        return PHASES[3], f"epoch {epoch}, {half[0]}"
    if said[-1][2]:
        return "between epochs", f"after epoch {epoch}"
    if step == STEPS:
        return PHASES[2], f"after epoch {epoch}"
    return PHASES[epoch >= SEMI], f"epoch {epoch}, after step {step}/{STEPS}"


def differences(folder, whole):
    """What differs between two output folders, as words."""
    found = []
    for path in sorted(whole.glob("*.pth")):
        if not (folder / path.name).is_file():
            found.append(f"no {path.name}")
            continue
        one, other = (torch.load(each / path.name, weights_only=False) for each in (folder, whole))
        found += [f"{path.name}: {key}" for key in other if key != "args" and not same(one.get(key), other[key])]
    logs = [(each / "log.txt").read_bytes() for each in (folder, whole)]
    return found + (["log.txt"] if logs[0] != logs[1] else [])


def one_kill(number, seed, data, work, wholes):
    """Kill a run, start it again, compare; returns the row of the table, its last cell 'yes' or what differs."""
    draw = random.Random(1000 * seed + number)
    configuration, phase = CONFIGURATIONS[number * 5 % 8], PHASES[(number + number // 8) % 4]
    processes, workers, repeated = configuration
    program = number % 10 == 0
    if configuration not in wholes:
        wholes[configuration] = work / f"whole{len(wholes)}"
        if Start(flags(data, wholes[configuration], configuration), processes, work / "said", False).wait():
            raise RuntimeError((work / "said").read_text()[-2000:])
    folder = work / "killed"
    for _ in range(5):  # A run may end before its moment has come.
        shutil.rmtree(folder, ignore_errors=True)
        start = Start(flags(data, folder, configuration), processes, work / "said", program)
        if kill_at(start, folder, phase, draw):
            break
    landed, place = where(start, folder)
    again = Start(flags(data, folder, configuration), processes, work / "again", program)
    if again.wait():
        result = [f"ended with {again.status()}: {again.said.read_text()[-300:]!r}"]
    else:
        result = differences(folder, wholes[configuration])
    kind = "program" if program else "fork"
    cells = (number + 1, processes, workers, "on" if repeated else "off", kind, landed, place)
    return *cells, ", ".join(result) or "yes"


def full_disk(data, work, wholes):
    """A run onto a disk that fills up, then again with room: what came of it, a sentence, and whether all was well."""
    disk, configuration = work / "disk", CONFIGURATIONS[0]
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=90m", "none", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        return "Full disk: not tried, mounting a tmpfs needs root.", True
    try:
        start = Start(flags(data, disk / "out", configuration), 1, work / "said", True)
        status, said = start.wait(), start.said.read_text()
        sentence = re.search(r"semi_main.py: error: (Cannot write \S+/(\S+) .*)", said)
        epoch = torch.load(disk / "out" / "checkpoint.pth", weights_only=False)["epoch"]
        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        again = Start(flags(data, disk / "out", configuration), 1, work / "again", True).wait()
        result = differences(disk / "out", wholes[configuration]) if again == 0 else [f"status {again}"]
        well = status == 1 and sentence is not None and not result
        return (
            f"Full disk (a tmpfs of 90 MiB, for checkpoints of 31): the run ended with status {status} while it wrote "
            f"{sentence and sentence[2]}; checkpoint.pth of epoch {epoch} was whole; started again with room for more, "
            f"the end is identical: {', '.join(result) or 'yes'}."
        ), well
    finally:
        subprocess.run(["umount", disk], check=True)


def main(args):
    """Print a row a kill, the full disk, and the sums; status 1 where an end is not identical."""
    began, wholes = time.time(), {}
    kills = 3 if args.quick else args.kills
    torch.set_num_threads(1)
    print("| kill | processes | workers | repeated aug. | started as | landed in | at | identical end |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_images(work / "data")
        good = 0
        for number in range(kills):
            row = one_kill(number, args.seed, work / "data", work, wholes)
            good += row[-1] == "yes"
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        sentence, well = ("", True) if args.quick else full_disk(work / "data", work, wholes)
    print(f"\n{sentence}\n\nSeed {args.seed}, torch {torch.__version__}, {time.time() - began:.0f} s.\n")
    print(f"{kills} kills, {good} identical")
    if good < kills or not well:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three kills and no full disk")
    main(parser.parse_args())
