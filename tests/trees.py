"""Small real image trees and ways to start the program, for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "Semiformer_micro_patch16", "--input-size", "48", "--device", "cpu", "--num_workers", "0",
         "--mixup", "0", "--cutmix", "0", "--no-repeated-aug", "--data-set", "SEMI-IMNET"]  # fmt: skip


def make_tree(root, classes=3, train=8, val=5, labelled=4, size=40, seed=0):
    """An ImageNet-layout tree of PNG noise with a colour a class, and `labelled.txt`; returns the root."""
    rng = np.random.default_rng(seed)
    lines = []
    for part, count in (("train", train), ("val", val)):
        for c in range(classes):
            folder = Path(root, part, f"class{c}")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (size, size + 8, 3)) + 50 * np.eye(3, dtype=int)[c % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"c{c}_{i}.png")
            if part == "train":
                lines += [f"c{c}_{i}.png,0,{i}\n" for i in range(labelled)]
    Path(root, "labelled.txt").write_text("".join(lines))
    return Path(root)


def semi_main(*words, processes=0, env=None, check=True, timeout=300):
    """Run semi_main.py as a user would: plainly, or with `processes` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "semi_main.py"), *map(str, words)],
                          capture_output=True, text=True, timeout=timeout, env=environment)  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
