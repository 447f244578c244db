"""Read every image below a folder as training reads it, and name those that cannot be read.

    python -m script.check_images ROOT [--workers N] [--output FILE]

Prints the reason for each unreadable file, then how many images there are of each mode and how many are unreadable.
--output writes the paths of the unreadable images, relative to ROOT, one a line. Exits with status 1 if there are any.
It reads the files that training treats as images: those that are not hidden and have the extension of a format that
Pillow reads here. Other pictures, such as .heic, are left out, and counted in a line of their own.
"""

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from images.decoding import UnreadableImage, read_rgb
from images.folders import images_below, left_out_words
from utils import printable_path

CHUNK = 32  # images that a worker reads at a time
CONVERSIONS = {  # Pillow mode: how it becomes RGB
    "RGB": "RGB",
    "L": "8-bit grey, converted to RGB",
    "1": "1-bit, converted to RGB",
    "P": "palette, converted to RGB",
    "CMYK": "CMYK, converted to RGB",
    "I": "16-bit or wider grey, reduced to 8 bits",
    "F": "floating point, clamped to 0..255",
    "LA": "grey with alpha, alpha dropped",
    "RGBA": "RGB with alpha, alpha dropped",
}


def conversion(mode):
    """How an image of this Pillow mode becomes RGB, in words."""
    return CONVERSIONS.get("I" if mode.startswith("I;16") else mode, f"{mode}, converted to RGB")


def check(root, paths):
    """Read images, whose paths are relative to `root`.

    Returns [(path, mode, None)] for those that can be read and [(path, None, reason)] for the others.
    """
    results = []
    for path in paths:
        try:
            results.append((path, read_rgb(Path(root, path))[1], None))
        except UnreadableImage as error:
            results.append((path, None, str(error)))
    return results


def find(root, output=None):
    """(paths of the images below `root`, sorted, what is left out, in words or ''), as `images.folders` finds them.

    Raises FileNotFoundError if there is no such folder, OSError if it cannot be listed, and ValueError if it contains
    no image or `output` is one of them.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"There is no folder {root}: ROOT must be a folder of images.")
    paths, left_out = images_below(root)
    words = left_out_words(left_out)
    if not paths:
        raise ValueError(f"There is no image below {root}{words and f' but {words}'}: ROOT must be a folder of images.")
    if output and os.path.exists(output) and any(_same(output, Path(root, path)) for path in paths):
        raise ValueError(f"--output {output} is one of the images: name another file.")
    return sorted(paths), words


def _same(output, path):
    return os.path.exists(path) and os.path.samefile(output, path)


def check_all(root, paths, workers):
    """Read images and show the progress; returns (Counter of conversions, {unreadable path: reason}).

    Raises ValueError if `workers` is below 1, and OSError for a failure that is not the fault of an image.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    counts, unreadable = Counter(), {}
    try:
        with ProcessPoolExecutor(min(workers, len(chunks))) as pool, tqdm(total=len(paths), unit=" images") as bar:
            for results in pool.map(check, [root] * len(chunks), chunks):
                counts.update(conversion(mode) for _, mode, _ in results if mode)
                unreadable |= {path: reason for path, mode, reason in results if mode is None}
                bar.set_postfix(unreadable=len(unreadable), refresh=False)
                bar.update(len(results))
    except BrokenProcessPool as error:
        raise OSError("A worker was killed, perhaps for lack of memory: pass fewer --workers.") from error
    return counts, unreadable


def main(argv=None):
    """Check the images, print the results, write --output, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", help="folder whose images are checked, at any depth")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="number of processes (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="file for the paths of the unreadable images, one a line")
    args = parser.parse_args(argv)
    try:
        paths, left_out = find(args.root, args.output)
        counts, unreadable = check_all(args.root, paths, args.workers)
        total = counts.total() + len(unreadable)
        rows = [*counts.most_common(), ("unreadable", len(unreadable))]
        rows.append((f"in total below {printable_path(args.root)}", total))
        print(*unreadable.values(), *(f"{count:>10,}  {name}" for name, count in rows), sep="\n")
        if left_out:
            print(f"Left out {left_out}.")
        if args.output:
            Path(args.output).write_bytes(b"".join(os.fsencode(path) + b"\n" for path in unreadable))
    except (OSError, ValueError) as error:
        sys.exit(f"check_images.py: error: {error}")
    return int(bool(unreadable))


if __name__ == "__main__":
    sys.exit(main())
