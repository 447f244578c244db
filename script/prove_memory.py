"""Train a tiny model for 2,000 steps and measure the resident memory of the process and of its data workers.

    python script/prove_memory.py [--steps 2000] >> docs/reliability.md

At every printed line (each tenth step) /proc tells the resident memory of the training process and of its workers
(two for each stream). Memory is flat where the straight line through the last three quarters of the steps rises or
falls by less than 1 % over 2,000 steps; else the status is 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from prove_resume import make_images

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """--model resnet10t --input-size 64 --batch-size 8 --mu 0.5 --mixup 0 --cutmix 0 --epochs 1 --device cpu
    --num_workers 2 --data-set SEMI-IMNET"""
FLAT = 0.01  # of the memory, over 2,000 steps


def resident(process):
    """Resident memory of a process in MB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) / 1024


def children(process):
    """The processes a process started, by number."""
    return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def measured(command, steps):
    """{process: [(step, resident MB)]} of a training run, the training process first. RuntimeError if it fails."""
    found, line = {}, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            step = re.match(rf"Epoch 0 \[ *(\d+)/{steps}\]", line)
            if step and int(step[1]) < steps:  # after the last step the workers may be gone
                for process in (run.pid, *children(run.pid)):
                    found.setdefault(process, []).append((int(step[1]), resident(process)))
    if run.returncode:
        raise RuntimeError(f"The run ended with status {run.returncode}: {line}")
    return found


def slope(points):
    """Rise in MB over 1,000 steps of the least-squares line through the last three quarters of (step, MB) points."""
    steps, memory = np.array(points[len(points) // 4 :], dtype=float).T
    return float(np.polyfit(steps, memory, 1)[0] * 1000)


def main():
    """Run, print a Markdown table, and end with 1 where memory is not flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        make_images(data)
        words = f"{FLAGS} --steps-per-epoch {args.steps} --data-path {data} --data-split-file {data}/labelled.txt"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        found = measured([sys.executable, str(ROOT / "semi_main.py"), *words.split()], args.steps)
    print("| process | samples | MB at first | MB at last | slope, MB per 1,000 steps |")
    print("|---|---|---|---|---|")
    rises = []
    for i, points in enumerate(found.values()):
        name, rise = f"worker {i}" if i else "training process", slope(points)
        print(f"| {name} | {len(points)} | {points[0][1]:.1f} | {points[-1][1]:.1f} | {rise:+.3f} |")
        rises.append(abs(2 * rise) / points[-1][1])
    print(f"\n{args.steps} steps: {'flat' if max(rises) < FLAT else 'NOT flat'} ({100 * max(rises):.2f} % at most)")
    sys.exit(max(rises) >= FLAT)


if __name__ == "__main__":
    main()
