"""Write scikit-learn's 1,797 handwritten digits as a folder in ImageNet layout, with a split file.

    python -m study.make_digits OUT [--labels 40] [--seed 0]

makes OUT/train/<digit>/*.png (1,297 images), OUT/val/<digit>/*.png (500: the part results are read from),
and OUT/labelled.txt, `--labels` train images, the same number of each digit. The train/val division is
fixed; the seed draws the labelled images, and `--tune` swaps val for 300 other train images, so that settings are
never chosen on the part results are read from. Source: sklearn.datasets.load_digits (UCI, 8x8 pixels, 0..16).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST, TUNE = 500, 300


def divide(n, tune):
    """Indices of the train and the evaluation part: (n - 500, 500), or with `tune` (n - 800, 300)."""
    order = np.random.RandomState(0).permutation(n)
    rest, test = order[TEST:], order[:TEST]
    return (rest[TUNE:], rest[:TUNE]) if tune else (rest, test)


def write_digits(out, labels, seed, tune=False):
    """Write the folders and the split file; ValueError where `labels` is no multiple of ten or too many."""
    digits = load_digits()
    train, val = divide(len(digits.target), tune)
    per_class = labels // 10
    if labels % 10 or not 0 < per_class <= min(np.bincount(digits.target[train])):
        raise ValueError(
            f"--labels {labels} must be a positive multiple of 10 within the train part of {len(train)} images."
        )
    for part, indices in (("train", train), ("val", val)):
        for i in indices:
            folder = Path(out, part, f"digit{digits.target[i]}")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[i] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"digit_{i}.png")
    rng = np.random.RandomState(seed)
    chosen = [i for d in range(10) for i in rng.permutation(np.sort(train[digits.target[train] == d]))[:per_class]]
    Path(out, "labelled.txt").write_text("".join(f"digit_{i}.png,0,{n}\n" for n, i in enumerate(chosen)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--labels", type=int, default=40, help="labelled images in all, a multiple of 10")
    parser.add_argument("--seed", type=int, default=0, help="seed of the labelled images")
    parser.add_argument("--tune", action="store_true", help="evaluate on 300 train images instead of the test part")
    arguments = parser.parse_args()
    write_digits(arguments.out, arguments.labels, arguments.seed, arguments.tune)
