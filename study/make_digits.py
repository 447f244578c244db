"""Write scikit-learn's 1,797 handwritten digits as a folder in ImageNet layout, with a split file.

    python -m study.make_digits OUT [--labels 40] [--seed 0]

writes OUT/train/<digit>/*.png (1,297 images), OUT/val/<digit>/*.png (the 500 test images) and OUT/labelled.txt, which
lists `--labels` training images, the same number of each digit. The division into train and val is fixed; the seed
draws the labelled images. With `--tune`, val consists of 300 training images instead (and train of the other 997), so
that settings are never chosen on the test images. Source: sklearn.datasets.load_digits (UCI, 8x8 pixels, 0..16).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST, TUNE = 500, 300


def divide(n, tune):
    """Indices of the training and the evaluation part, of n - 500 and 500 images, or with `tune` n - 800 and 300."""
    order = np.random.RandomState(0).permutation(n)
    rest, test = order[TEST:], order[:TEST]
    return (rest[TUNE:], rest[:TUNE]) if tune else (rest, test)


def write_digits(out, labels, seed, tune=False):
    """Write the folders and the split file. Raises ValueError if `labels` is not a multiple of ten, or too large."""
    digits = load_digits()
    train, val = divide(len(digits.target), tune)
    per_class = labels // 10
    if labels % 10 or not 0 < per_class <= min(np.bincount(digits.target[train])):
        raise ValueError(
            f"--labels {labels} must be a positive multiple of 10 that the {len(train)} training images can provide."
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
    parser.add_argument("--labels", type=int, default=40, help="number of labelled images, a multiple of 10")
    parser.add_argument("--seed", type=int, default=0, help="seed of the labelled images")
    parser.add_argument("--tune", action="store_true", help="use 300 training images as val, to choose settings")
    arguments = parser.parse_args()
    write_digits(arguments.out, arguments.labels, arguments.seed, arguments.tune)
