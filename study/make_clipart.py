"""Write pictures of the Open Clip Art Library as a folder in ImageNet layout, with a split file.

    python -m study.make_clipart OUT [--labels 80] [--seed 0]

The pictures are those of Debian's package openclipart-png: eight of its categories, of which 300 pictures each are
drawn at random among the files of less than 200 KB. Transparent areas become white, and the shorter side is padded to a
square of 72 pixels. It writes OUT/train/<category>/*.png (200 each), OUT/val/<category>/*.png (100 each) and
OUT/labelled.txt, which lists `--labels` training pictures, the same number of each category. The division into train
and val is fixed; the seed draws the labelled pictures. With `--tune`, val consists of 50 training pictures of each
category instead (and train of the other 150), so that settings are never chosen on the test pictures.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SOURCE = Path("/usr/share/openclipart/png")
CATEGORIES = "animals computer food people recreation shapes signs_and_symbols transportation".split()
SIDE, TRAIN, TEST, TUNE = 72, 200, 100, 50
LARGEST = 200_000  # bytes; some larger ones have a hundred million pixels


def square(picture):
    """An RGB picture of SIDE x SIDE pixels: on white, not distorted."""
    picture = picture.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return ImageOps.pad(white, (SIDE, SIDE), Image.BICUBIC, color="white")


def divide(paths, tune):
    """The pictures of a category for training and for evaluation, from all of its paths."""
    paths = sorted(paths)
    order = np.random.RandomState(0).permutation(len(paths))[: TRAIN + TEST]
    chosen = [paths[i] for i in order]
    rest, test = chosen[TEST:], chosen[:TEST]
    return (rest[TUNE:], rest[:TUNE]) if tune else (rest, test)


def write_clipart(out, labels, seed, tune=False, source=SOURCE):
    """Write the folders and the split file.

    Raises FileNotFoundError if a category has too few pictures, ValueError if `labels` is not a multiple of eight or
    too large.
    """
    lines, rng = [], np.random.RandomState(seed)
    for number, category in enumerate(CATEGORIES):
        paths = [path for path in Path(source, category).rglob("*.png") if path.stat().st_size < LARGEST]
        if len(paths) < TRAIN + TEST:
            raise FileNotFoundError(
                f"{Path(source, category)} has {len(paths)} pictures, and {TRAIN + TEST} are needed: install Debian's "
                "openclipart-png."
            )
        parts = dict(zip(("train", "val"), divide(paths, tune)))
        for part, members in parts.items():
            folder = Path(out, part, category)
            folder.mkdir(parents=True, exist_ok=True)
            for path in members:
                square(Image.open(path)).save(folder / _name(path, source))
        per_class = labels // len(CATEGORIES)
        if labels % len(CATEGORIES) or not 0 < per_class <= len(parts["train"]):
            raise ValueError(
                f"--labels {labels} must be a positive multiple of {len(CATEGORIES)}, and at most "
                f"{len(CATEGORIES) * len(parts['train'])}."
            )
        chosen = [parts["train"][i] for i in rng.permutation(len(parts["train"]))[:per_class]]
        lines += [f"{_name(path, source)},{number},{len(lines) + i}\n" for i, path in enumerate(chosen)]
    Path(out, "labelled.txt").write_text("".join(lines))


def _name(path, source):
    """A file name that no other picture has; folders below a category hold some of the same name."""
    return f"{path.stem}_{zlib.crc32(str(path.relative_to(source)).encode()):08x}.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--labels", type=int, default=80, help="number of labelled pictures, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0, help="seed of the labelled pictures")
    parser.add_argument("--tune", action="store_true", help="use training pictures as val, to choose settings")
    arguments = parser.parse_args()
    write_clipart(arguments.out, arguments.labels, arguments.seed, arguments.tune)
