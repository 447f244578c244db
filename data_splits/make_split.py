"""Shuffle a training folder into shards and draw the labelled images, identically on every machine.

    python -m data_splits.make_split TRAIN_FOLDER OUT [--seed 0] (--fraction F | --per-class N)
                                     [--balanced] [--shards 1020]

Writes OUT/all.txt, which lists every image of TRAIN_FOLDER/<class>/, and OUT/labelled.txt, for --data-split-file. A
line is `image,shard,place in the shard`, where the image is a file name, or a path relative to TRAIN_FOLDER if several
files have that name.

The paths are sorted by their UTF-8 bytes, each is assigned the next number of `random.Random(seed).random()`, which is
the same in every version of Python, and the images are sorted by these numbers. Shard s of S holds the lines from
s * n // S up to (s + 1) * n // S, as in the published 10 % list. The labelled images are the first int(F * n) lines,
whatever their classes; with --balanced, the first int(F * size) images of each class, at least 1; with --per-class, the
first N images of each class. A smaller split is therefore contained in every larger one of the same kind and seed.
"""

import argparse
import hashlib
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from images.files import read_regular
from images.readers import image_folder
from utils import atomic

MOST_SHARDS = 1_000_000


def entries(samples):
    """The entry of each image in a list: its file name, or its path if several files have that name.

    Raises ValueError for an image whose name cannot be written on a line of UTF-8 text.
    """
    paths = [samples.source.path(i) for i in range(len(samples))]
    names = [path.rsplit("/", 1)[-1] for path in paths]
    count = Counter(names)
    found = [name if count[name] == 1 else path for name, path in zip(names, paths)]
    for path, entry in zip(paths, found):
        utf8 = path.encode("utf-8", "replace").decode("utf-8") == path
        if not utf8 or entry != entry.strip() or set(entry) & set("\r\n\ufeff"):
            raise ValueError(
                f"No list can hold {path!r} of {samples.source.root}: rename it (UTF-8, without outer spaces)."
            )
    return found


def shuffled(samples, seed):
    """The indices of all images in shuffled order. Raises ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"--seed {seed} is negative: pass 0 or more.")
    generator = random.Random(seed)
    order = sorted(range(len(samples)), key=lambda i: samples.source.path(i).encode())
    return [i for _, i in sorted((generator.random(), i) for i in order)]


def shard_lines(names, shards):
    """The lines of a list of images in shuffled order. The sizes of the shards differ by one image at most.

    Raises ValueError for fewer than 1 shard and more than MOST_SHARDS.
    """
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(f"--shards {shards} must be from 1 to {MOST_SHARDS}.")
    ends = [shard * len(names) // shards for shard in range(shards + 1)]
    places = ((shard, place) for shard in range(shards) for place in range(ends[shard + 1] - ends[shard]))
    return [f"{name},{shard},{place}\n" for name, (shard, place) in zip(names, places)]


def draw(targets, classes, fraction=None, per_class=None, balanced=False):
    """The places of the labelled images in the shuffled list, ascending.

    Args:
        targets: class index of each image, in shuffled order.
        classes: names of the classes.
        fraction, per_class: the flags, of which one is given.
        balanced: take the fraction of each class.

    Raises ValueError if a flag asks for no image or for too many.
    """
    sizes = np.bincount(targets, minlength=len(classes)).tolist()
    if per_class is not None:
        if per_class < 1 or balanced:
            raise ValueError(f"--per-class {per_class} must be 1 or more, and cannot be combined with --balanced.")
        short = [i for i, size in enumerate(sizes) if size < per_class]
        if short:
            name, size = classes[short[0]], sizes[short[0]]
            raise ValueError(f"The class {name!r} has {size} images, --per-class asks for {per_class}: pass fewer.")
        left = [per_class] * len(sizes)
    else:
        if not 0 < fraction <= 1:
            raise ValueError(f"--fraction {fraction} must be above 0 and at most 1.")
        if not balanced:
            count = int(fraction * len(targets) + 1e-9)  # 128,116 for 10 % of ImageNet, as published
            if not count:
                raise ValueError(f"--fraction {fraction} of {len(targets)} images is none: pass a larger one.")
            return list(range(count))
        left = [max(1, int(fraction * size + 1e-9)) for size in sizes]
    places = []
    for place, target in enumerate(targets):
        if left[target]:
            left[target] -= 1
            places.append(place)
    return places


def write(path, lines):
    """Write a list atomically and return its sha256.

    Raises FileExistsError if the file exists with other content, OSError if it cannot be written.
    """
    content = "".join(lines).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with atomic(path) as file:
                file.write(content)
        same = read_regular(path) == content
    except OSError as error:
        raise OSError(f"Cannot write {path} ({error.strerror}): choose a folder OUT that can be written.") from error
    if not same:
        raise FileExistsError(f"{path} holds another list: remove it or choose another folder OUT.")
    return hashlib.sha256(content).hexdigest()


def make_split(train, out, seed=0, shards=1020, **drawn):
    """Write OUT/all.txt and OUT/labelled.txt; returns a line to print for each, with its counts and sha256.

    Args:
        train, out, seed, shards: the flags.
        drawn: `fraction`, `per_class` and `balanced` of `draw`.

    Raises ValueError or OSError for wrong flags and folders, and the errors of `readers.image_folder`.
    """
    train, out = Path(train), Path(out)
    if not train.is_dir():
        raise FileNotFoundError(f"There is no folder {train}: TRAIN_FOLDER must contain a folder for each class.")
    if out.resolve().is_relative_to(train.resolve()):
        raise ValueError(f"{out} lies in {train}, where it would be a class: choose a folder OUT elsewhere.")
    samples = image_folder(train)
    names, order = entries(samples), shuffled(samples, seed)
    targets = samples.targets[order]
    lines = shard_lines([names[i] for i in order], shards)
    labelled = draw(targets, samples.classes, **drawn)
    summary = []
    for name, places in (("all.txt", range(len(lines))), ("labelled.txt", labelled)):
        sizes = np.bincount(targets[list(places)], minlength=len(samples.classes))
        digest = write(out / name, [lines[place] for place in places])
        summary.append(
            f"{out / name}: {len(places)} images of {len(sizes)} classes, {min(sizes)} to {max(sizes)} per class, "
            f"sha256 {digest}"
        )
    return summary


def main():
    """Make the lists that the command line asks for, and print their counts and sha256."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", metavar="TRAIN_FOLDER", help="folder that contains a folder of images for each class")
    parser.add_argument("out", metavar="OUT", help="folder of the two lists")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffling (default: %(default)s)")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--fraction", type=float, metavar="F", help="share of labelled images, above 0 and at most 1")
    amount.add_argument("--per-class", type=int, metavar="N", help="labelled images of each class")
    parser.add_argument("--balanced", action="store_true", help="take the fraction of each class, not of the whole")
    parser.add_argument("--shards", type=int, default=1020, help="number of shards (default: %(default)s)")
    try:
        print(*make_split(**vars(parser.parse_args())), sep="\n")
    except (OSError, ValueError) as error:
        sys.exit(f"make_split.py: error: {error}")


if __name__ == "__main__":
    main()
