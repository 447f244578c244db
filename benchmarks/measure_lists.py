"""Measure the memory that a list of 1.28 million images takes in the training process and in each loader worker.

    python -m benchmarks.measure_lists [--images 1281167] [--workers 8] [--batches 300] >> docs/benchmarks.md

The list is synthetic: as many paths as ImageNet has, about as long, all of which lead to eight small JPEG files. After
some hundred batches, the proportional set size (PSS, which divides shared memory among the processes that share it) of
the process and its workers is read from /proc. What a list of only eight images takes is subtracted; the rest is due
to the list. Exits with status 1 if that exceeds 200 MB in any process.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import MultiViewDataset
from images.loading import TrainingLoader
from images.readers import FileSource, Samples
from images.transforms import weak_view
from samplers import training_order

ROOT = Path(__file__).resolve().parents[1]

BATCH, FILES = 16, 8
LIMIT = 200  # MB per process


def proportional(process):
    """PSS of a process in MB."""
    return int(re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)[1]) / 1024


def synthetic(root, images):
    """Samples with so many paths of 31 characters (ImageNet's have 30 at most) to FILES files, written below `root`."""
    (root / "n00000000").mkdir(exist_ok=True)
    for i in range(FILES):
        Image.new("RGB", (40, 36), (i, 0, 0)).save(root / f"{i}.JPEG")
    paths = (f"n00000000/../././././././{i % FILES}.JPEG" for i in range(images))
    return Samples(FileSource(root, list(paths)), np.arange(images) % 1000, ("",) * 1000)


def measure(images, workers, batches):
    """PSS in MB of this process and of each of its loader workers, after so many batches."""
    with tempfile.TemporaryDirectory() as folder:
        views = MultiViewDataset(synthetic(Path(folder), images), np.arange(images), weak_view(32), tolerated=0)
        steps = max(batches + 2 * workers, images // BATCH)  # enough for the workers to be busy when they are measured
        loader = TrainingLoader(views, training_order(images), seed=0, rank=0, stream=0)
        loader.start(0, BATCH, steps, workers)
        loaded = loader.read()
        for _ in range(batches):
            next(loaded)
        workers = [each.pid for each in multiprocessing.active_children()]
        return [proportional(process) for process in (os.getpid(), *workers)]


def main():
    """Print a Markdown table, and exit with status 1 if the list takes more than LIMIT in a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167, help="length of the list (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="loader workers (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=300, help="batches before measuring (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(*measure(args.images, args.workers, args.batches))
        return
    rows = []
    for images in (args.images, FILES):
        words = ["--images", images, "--workers", args.workers, "--batches", args.batches, "--alone"]
        python = [sys.executable, "-W", "ignore::UserWarning"]  # PyTorch's, about more workers than cores
        command = [*python, "-m", "benchmarks.measure_lists", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append([float(word) for word in done.stdout.split()])
    print(f"| process | PSS, MB, {args.images:,} images | {FILES} images | difference |\n|---|---|---|---|")
    for i, (with_list, without) in enumerate(zip(*rows)):
        name = f"worker {i}" if i else "training process"
        print(f"| {name} | {with_list:.1f} | {without:.1f} | {with_list - without:.1f} |")
    worst = max(a - b for a, b in zip(*rows))
    print(f"\nAfter {args.batches} batches the list takes at most {worst:.1f} MB in a process (limit {LIMIT}).")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
