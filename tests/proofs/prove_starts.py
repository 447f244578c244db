"""Start four gloo ranks with data workers again and again, and count what a worker's start costs; prints Markdown.

    python -m tests.proofs.prove_starts --starts 40 >> docs/reliability.md    # a quarter of an hour on two cores

Each start trains, evaluates and saves for four epochs, in which every rank starts ten data workers beside the threads
of gloo. A start that does not end within two minutes hangs. Exits with status 1 if one hangs or fails.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from images.loading import TrainingLoader
from samplers import training_order
from tests.proofs.prove_resume import Training, flags, make_images

RANKS, WORKERS, LIMIT_S = 4, 2, 120


class _Nothing:
    """A data set of numbers."""

    bad_images = argparse.Namespace(add=lambda *_: None)

    def __len__(self):
        return 8

    def load(self, i):
        return (torch.tensor(i),), []


def cost(workers):
    """Seconds until the first batch of so many workers, the first ones of this process and the next."""
    found = []
    for _ in range(2):
        loader, start = TrainingLoader(_Nothing(), training_order(8), seed=0, rank=0, stream=0), time.perf_counter()
        loader.start(0, 2, 4, workers)
        next(loader.read())
        found.append(time.perf_counter() - start)
    return found


def main(starts):
    """Print the table."""
    took, failed = [], []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_images(work / "data")
        for number in range(starts):
            shutil.rmtree(work / "out", ignore_errors=True)
            words = flags(work / "data", work / "out", (RANKS, WORKERS, False, ("--device", "cpu")))
            begun, training = time.perf_counter(), Training(words, RANKS, work / "output", as_program=False)
            try:
                status = training.wait(LIMIT_S)
            except TimeoutError:
                status = "hangs"
            took.append(time.perf_counter() - begun)
            if status:
                failed.append(f"start {number}: {status}")
                print((work / "output").read_text()[-2000:], file=sys.stderr)
    first, later = cost(WORKERS)
    ended = f"{starts - len(failed)} ended as they should{''.join(f'; {each}' for each in failed)}"
    print(
        f"{starts} starts of {RANKS} ranks with {WORKERS} data workers each: {ended}. A start took "
        f"{statistics.median(took):.1f} s (median). The first batch of {WORKERS} workers comes after {first:.1f} s, in "
        f"which the fork server imports, and later after {later:.2f} s."
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=40, help="number of starts (default: %(default)s)")
    main(parser.parse_args().starts)
