"""The likeliest classes of images by a trained network, with their probabilities, as CSV or JSON.

    python predict.py IMAGE|FOLDER... --checkpoint FILE [--format json] [--output FILE]

A folder stands for all images below it. Images are seen as in `semi_main.py --eval`; a probability is the softmax of
the streams' summed logits. CSV has the columns path, rank, class, probability. An image that cannot be read is named
on stderr, the others are predicted, and the program ends with status 1.
"""

import argparse
import csv
import io
import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial

import torch
from torch.utils.data import DataLoader

import utils
from images.decoding import UnreadableImage, read_rgb
from images.readers import images_below
from models import fold_batchnorm, pretrained


class ImageFiles:
    """Image files, each (tensor (3, S, S), "") or, where it cannot be shown to the network, (None, why)."""

    def __init__(self, paths, view):
        self.paths, self.view = paths, view

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.view(read_rgb(self.paths[i])[0]), ""
        except UnreadableImage as error:
            return None, str(error)
        except ValueError as error:  # a size that the view does not take
            return None, f"{self.paths[i]}: {error}"


def _batch(items):
    views, reasons = zip(*items)
    seen = [view for view in views if view is not None]
    return torch.stack(seen) if seen else None, reasons


def paths_of(entries):
    """The image files of a command line: files as they are, folders as all images below them, sorted.

    Raises ValueError naming a folder without images.
    """
    paths = []
    for entry in entries:
        below = sorted(images_below(entry)) if os.path.isdir(entry) else None
        if below == []:
            raise ValueError(f"There is no image below {entry}: name images, or a folder of them.")
        paths += [entry] if below is None else [os.path.join(entry, path) for path in below]
    return paths


@torch.inference_mode()
def predict(network, view, paths, top=5, batch_size=64, workers=0, device="cpu"):
    """For each image file (path, [(class index, probability), ...], why), in order: the `top` likeliest classes.

    Args:
        network: images (N, 3, S, S) -> list of logits (N, classes). view: PIL.Image -> (3, S, S).
    Of an image that cannot be read the classes are [] and `why` is a sentence; else `why` is "".
    """
    network = fold_batchnorm(network).to(device, memory_format=torch.channels_last)
    loader = DataLoader(ImageFiles(paths, view), batch_size, num_workers=workers, collate_fn=_batch)
    remaining = iter(paths)
    for images, reasons in loader:
        rows = iter(())
        if images is not None:
            probabilities = sum(network(images.to(device))).softmax(1)
            values, classes = (x.tolist() for x in probabilities.topk(min(top, probabilities.shape[1])))
            rows = (list(zip(*row)) for row in zip(classes, values))
        for why in reasons:
            yield next(remaining), [] if why else next(rows), why


def as_text(rows, style):
    """CSV or JSON of [(path, [(class name, probability), ...])]."""
    if style == "json":
        found = [
            {"path": path, "top": [{"class": c, "probability": round(p, 6)} for c, p in top]} for path, top in rows
        ]
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "probability"))
    for path, top in rows:
        writer.writerows((path, rank, c, f"{p:.6f}") for rank, (c, p) in enumerate(top, 1))
    return file.getvalue()


def _parser():
    parser = argparse.ArgumentParser(
        "predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, and folders of them at any depth")
    pretrained.add_flags(parser)
    add("--format", choices=("csv", "json"), default="csv", help="(%(default)s)")
    add("--output", metavar="FILE", help="written whole or not at all (stdout)")
    add("--top", type=int, default=5, metavar="N", help="classes an image (%(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="images at once (%(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images (%(default)s: this one does)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    return parser


def main(words=None):
    """Predict and write; returns the exit status, 1 where an image could not be read.

    Raises ValueError or OSError, one sentence, for bad input.
    """
    args = _parser().parse_args(words)
    for flag, value, least in (
        ("--top", args.top, 1),
        ("--batch-size", args.batch_size, 1),
        ("--workers", args.workers, 0),
    ):
        if value < least:
            raise ValueError(f"{flag} {value} must be at least {least}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA GPU here: pass --device cpu.")
    paths = paths_of(args.images)
    with redirect_stdout(sys.stderr):  # what a download says is no prediction
        model = pretrained.from_flags(args)
    if not model.classes:
        sys.stderr.write(f"predict.py: {args.checkpoint} has no class names, so classes are numbers: see --classes.\n")
    names, rows, status = model.classes or list(map(str, range(model.num_classes))), [], 0
    for path, top, why in predict(
        model.network, model.view, paths, args.top, args.batch_size, args.workers, args.device
    ):
        if why:
            sys.stderr.write(f"predict.py: {why}\n")
            status = 1
        else:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")  # a name need not be UTF-8
            rows.append((shown, [(names[c], p) for c, p in top]))
    text = as_text(rows, args.format)
    if args.output:
        utils.write_atomic(args.output, text, "--output")
    else:
        sys.stdout.write(text)
    return status


if __name__ == "__main__":
    sys.excepthook = partial(utils.excepthook, "predict.py")
    sys.exit(main())
