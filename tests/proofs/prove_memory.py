"""Train a tiny model for 2,000 steps and show that the memory of the process and of its data workers does not grow.

    python -m tests.proofs.prove_memory [--steps 2000] >> docs/reliability.md
    python -m tests.proofs.prove_memory --compile >> docs/benchmarks.md

The resident memory of the training process and of its workers (two for the labelled and two for the unlabelled images)
is read from /proc at every printed line, which is every tenth step. Memory counts as flat if the least-squares line
through the last three quarters of the samples rises or falls by less than 1 % over 2,000 steps; otherwise the exit
status is 1.

`--compile` does the same for a compiled Semiformer in epochs of 50 steps. The first five epochs are supervised; every
epoch ends with an incomplete group of accumulated batches, and every other one with an evaluation whose batch is
smaller. PyTorch's log must then show exactly one recompilation, that of the graph that makes the pseudo labels.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.proofs.prove_resume import make_images

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """--model resnet10t --input-size 64 --batch-size 8 --mu 0.5 --mixup 0 --cutmix 0 --epochs 1 --device cpu
    --num_workers 4 --data-set SEMI-IMNET"""
COMPILED = """--compile --model Semiformer_micro_patch16 --input-size 48 --batch-size 8 --mu 0.5 --mixup 0 --cutmix 0
    --device cpu --num_workers 0 --data-set SEMI-IMNET --semi-start-epoch 5 --evaluate-freq 2 --accum-iter 3
    --warmup-epochs 3"""
FLAT = 0.01  # largest change over 2,000 steps, as a share of the memory


def resident(process):
    """Resident memory of a process in MB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) / 1024


def children(process):
    """The process numbers of a process's children, ascending."""
    return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def data_workers(process):
    """The process numbers of the data workers of a training process: the children of its fork server."""
    return [worker for server in children(process) for worker in children(server)]


def measure(command, steps, workers=True, log=None):
    """Run a training; returns {process: [(step, resident MB)]}, the training process first. RuntimeError if it fails.

    Args:
        command: the words of the command.
        steps: steps of an epoch.
        workers: whether to measure the data workers too.
        log: an open file for stderr.
    """
    found, line = {}, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as run:
        for line in run.stdout:
            step = re.match(rf"Epoch (\d+) \[ *(\d+)/{steps}\]", line)
            if step and int(step[2]) < steps:  # after the last step the workers may have ended
                for process in (run.pid, *(data_workers(run.pid) if workers else ())):
                    found.setdefault(process, []).append((int(step[1]) * steps + int(step[2]), resident(process)))
    if run.returncode:
        raise RuntimeError(f"The run ended with status {run.returncode}: {line}")
    return found


def slope(points):
    """Slope of the least-squares line through the last three quarters of (step, MB) points, in MB per 1,000 steps."""
    steps, memory = np.array(points[len(points) // 4 :], dtype=float).T
    return float(np.polyfit(steps, memory, 1)[0] * 1000)


def main():
    """Run, print a Markdown table, and exit with status 1 if memory is not flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the network, and count recompilations too")
    args = parser.parse_args()
    steps = 50 if args.compile else args.steps
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        make_images(data)
        words = f"{COMPILED} --epochs {args.steps // steps}" if args.compile else FLAGS
        words += f" --steps-per-epoch {steps} --data-path {data} --data-split-file {data}/labelled.txt"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, str(ROOT / "semi_main.py"), *words.split()]
        if args.compile:
            os.environ["TORCH_LOGS"] = "recompiles"
            with open(Path(folder, "stderr.txt"), "w+", encoding="utf-8") as log:
                found = measure(command, steps, workers=False, log=log)
                log.seek(0)
                recompilations = log.read().count("Recompiling function")
        else:
            found, recompilations = measure(command, steps), None
    print("| process | samples | MB at first | MB at last | slope, MB per 1,000 steps |")
    print("|---|---|---|---|---|")
    changes = []
    for i, points in enumerate(found.values()):
        name, rise = f"worker {i}" if i else "training process", slope(points)
        print(f"| {name} | {len(points)} | {points[0][1]:.1f} | {points[-1][1]:.1f} | {rise:+.3f} |")
        changes.append(abs(2 * rise) / points[-1][1])
    print(f"\n{args.steps} steps: {'flat' if max(changes) < FLAT else 'NOT flat'} ({100 * max(changes):.2f} % at most)")
    if args.compile:
        print(f"Recompilations: {recompilations} (1 expected, that of the graph that makes the pseudo labels)")
    sys.exit(max(changes) >= FLAT or recompilations not in (None, 1))


if __name__ == "__main__":
    main()
