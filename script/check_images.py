"""Read every image below a folder as training reads it, and name those that cannot be read.

    python -m script.check_images ROOT [--workers N] [--output FILE]

Prints a line for each unreadable file with its reason, then how many images have which mode and how many are
unreadable; --output writes the paths of these, relative to ROOT, one a line. Ends with status 1 if there are any.
Images are what the readers take for images: files with a known ending, hidden ones left out.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

from images.decoding import UnreadableImage, read_rgb
from images.readers import images_below

CHUNK = 32  # images a worker takes at once
KINDS = {
    "RGB": "RGB",
    "L": "8-bit grey, made RGB",
    "1": "1-bit, made RGB",
    "P": "palette, looked up",
    "CMYK": "CMYK, made RGB",
    "I": "16-bit or wider grey, made 8-bit",
    "F": "floats, cut to 0..255",
    "LA": "grey with alpha, dropped",
    "RGBA": "RGB with alpha, dropped",
}


def kind(mode):
    """How an image of this Pillow mode becomes RGB, in words."""
    return KINDS.get("I" if mode.startswith("I;16") else mode, f"{mode}, made RGB")


def check(root, paths):
    """[(path, mode or None, why it is unreadable or None)] of images, their paths relative to `root`."""
    found = []
    for path in paths:
        try:
            found.append((path, read_rgb(Path(root, path))[1], None))
        except UnreadableImage as error:
            found.append((path, None, str(error)))
    return found


class Bar:
    """A bar with counts, rate and time left on stderr: one line that is rewritten, or without a terminal a few."""

    def __init__(self, total):
        self.total, self.start, self.last = total, time.perf_counter(), 0.0
        self.terminal = sys.stderr.isatty()

    def show(self, done, bad):
        """Show it, if the last time is long enough ago or all is done."""
        now = time.perf_counter()
        if done < self.total and now - self.last < (0.2 if self.terminal else 30):
            return
        self.last, rate = now, done / max(now - self.start, 1e-9)
        left = timedelta(seconds=round((self.total - done) / rate))
        line = f"[{'#' * (30 * done // self.total):30}] {done:,} of {self.total:,}, {bad:,} unreadable"
        line += f", {rate:,.0f} images/s, {left} left"
        print(
            f"\r{line:<100}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )
        if self.terminal and done == self.total:
            print(file=sys.stderr)


def check_all(root, workers):
    """(Counter of kinds, {path: why it is unreadable}) of all images below `root`, with a bar.

    Raises FileNotFoundError where there is no folder, ValueError where it holds no image or `workers` is below 1,
    OSError for what is no image's fault.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"There is no folder {root}: ROOT must be a folder of images.")
    paths = sorted(images_below(root))
    if not paths:
        raise ValueError(f"There is no image below {root}: ROOT must be a folder of images.")
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    kinds, bad, done, bar = Counter(), {}, 0, Bar(len(paths))
    try:
        with ProcessPoolExecutor(min(workers, len(chunks))) as pool:
            for found in pool.map(check, [root] * len(chunks), chunks):
                kinds.update(kind(mode) for _, mode, _ in found if mode)
                bad |= {path: why for path, mode, why in found if mode is None}
                done += len(found)
                bar.show(done, len(bad))
    except BrokenProcessPool as error:
        raise OSError("A worker was killed, for lack of memory perhaps: pass fewer --workers.") from error
    return kinds, bad


def main(words=None):
    """Check, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", help="folder whose images are checked, at any depth")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="file for the paths of the unreadable images, one a line")
    args = parser.parse_args(words)
    try:
        kinds, bad = check_all(args.root, args.workers)
        if args.output:
            Path(args.output).write_bytes(b"".join(os.fsencode(path) + b"\n" for path in bad))
    except (OSError, ValueError) as error:
        sys.exit(f"check_images.py: error: {error}")
    rows = [*kinds.most_common(), ("unreadable", len(bad)), (f"in all below {args.root}", kinds.total() + len(bad))]
    lines = [*bad.values(), *(f"{count:>10,}  {name}" for name, count in rows)]
    # A name that is not UTF-8 is shown as well as can be.
    print("\n".join(lines).encode("utf-8", "backslashreplace").decode())
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
