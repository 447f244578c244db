"""Classify images with a trained network: the most probable classes of each image, as CSV or JSON.

    python predict.py IMAGE|FOLDER... --checkpoint FILE [--format json] [--output FILE]

A folder stands for all images below it. Images are resized and cropped as in `semi_main.py --eval`; probabilities are
the softmax of the streams' summed logits. The CSV columns are path, rank, class and probability. Images that cannot
be read, or for which the network computes no finite probabilities, are named on stderr and left out; the exit status is
then 1. On a terminal, control characters in names are shown as escapes; files and pipes get the names as they are.
"""

import csv
import io
import json
import math
import os
import sys
from argparse import RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from functools import partial

import torch
from torch.utils.data import DataLoader

import utils
from images.decoding import UnreadableImage, read_rgb
from images.folders import images_below, left_out_words
from images.loading import by_workers, raw_batches
from models import fold_batchnorm, pretrained
from options import Parser


class ImageFiles:
    """A data set of image files: (view (3, S, S), ""), or (None, error message) for a file that cannot be used."""

    def __init__(self, paths, view):
        self.paths, self.view = paths, view

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.view(read_rgb(self.paths[i])[0]), ""
        except UnreadableImage as error:
            return None, str(error)
        except ValueError as error:  # a size that the view does not accept
            return None, f"{utils.printable_path(self.paths[i])}: {error}"


def _collate(items):
    views, errors = zip(*items)
    readable = [view for view in views if view is not None]
    return torch.stack(readable) if readable else None, errors


def paths_of(entries):
    """Return the image files that command-line arguments name: files as they are, folders as all images below, sorted.

    Pictures below a folder whose format is not read are counted on stderr. Raises ValueError for a folder without
    images, and OSError for one that cannot be listed.
    """
    paths = []
    for entry in entries:
        if not os.path.isdir(entry):
            paths.append(entry)
            continue
        below, left_out = images_below(entry)
        words = left_out_words(left_out)
        if not below:
            raise ValueError(
                f"There is no image below {entry}{words and f' but {words}'}: "
                "name image files or a folder that contains some."
            )
        if words:
            sys.stderr.write(f"predict.py: pictures below {utils.printable_path(entry)} are left out: {words}.\n")
        paths += [os.path.join(entry, path) for path in sorted(below)]
    return paths


@torch.inference_mode()
def predict(network, view, paths, top=5, batch_size=64, workers=0, device="cpu"):
    """Yield (path, [(class index, probability), ...], error message) for every image file, in order.

    Args:
        network: maps images (N, 3, S, S) to a list of logits (N, classes).
        view: maps a PIL image to a tensor (3, S, S).
        paths: the image files.
        top: number of most probable classes per image.
        batch_size, workers: of the loader; without workers this process reads the images.
        device: of the network, "cpu", "cuda" or "cuda:N".

    The error message is "", or a sentence for an image that cannot be read or whose probabilities are not finite; its
    list of classes is empty.
    """
    network = fold_batchnorm(network).to(device, memory_format=torch.channels_last)
    loader = DataLoader(ImageFiles(paths, view), batch_size, collate_fn=_collate, **by_workers(workers))
    remaining = iter(paths)
    for images, errors in raw_batches(loader, "--workers"):
        rows = iter(())
        if images is not None:
            probabilities = sum(network(images.to(device))).softmax(1)
            values, classes = (x.tolist() for x in probabilities.topk(min(top, probabilities.shape[1])))
            rows = (list(zip(*row)) for row in zip(classes, values))
        for error, path in zip(errors, remaining):
            row = [] if error else next(rows)
            if not all(math.isfinite(probability) for _, probability in row):
                row, error = [], f"The network's probabilities for {path} are not finite: check its weights."
            yield path, row, error


def as_text(rows, style):
    """Format rows (path, [(class name, probability), ...]) as "csv" or "json"."""
    if style == "json":
        records = [
            {"path": path, "top": [{"class": c, "probability": round(p, 6)} for c, p in top]} for path, top in rows
        ]
        return json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "probability"))
    for path, top in rows:
        writer.writerows((path, rank, c, f"{p:.6f}") for rank, (c, p) in enumerate(top, 1))
    return file.getvalue()


def check_output(output, inputs):
    """Raise ValueError where writing the file `output` would replace one of the input files, a device or a folder."""
    if not os.path.exists(output):
        return
    if not os.path.isfile(output):  # the new file is renamed onto it: /dev/null would be one for everybody
        raise ValueError(f"--output {output} is no regular file: choose another file, or leave it out for stdout.")
    for path in inputs:
        if os.path.exists(path) and os.path.samefile(output, path):
            raise ValueError(f"--output {output} would replace the input {path}: choose another file.")


def _warn(message):
    sys.stderr.write(utils.printable(f"predict.py: {message}\n"))


def _parser():
    parser = Parser("predict.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of images at any depth")
    pretrained.add_flags(parser)
    add("--format", choices=("csv", "json"), default="csv", help="format of the output (default: %(default)s)")
    add("--output", metavar="FILE", help="output file, written completely or not at all (default: stdout)")
    add("--top", type=int, default=5, metavar="N", help="number of classes per image (default: %(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N",
        help="processes that load images; 0: the main process does (default: %(default)s)")  # fmt: skip
    add("--device", default="cpu", help="device of the network: cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def main(argv=None):
    """Classify the images of the command line and write the result. Return the exit status: 1 if one was left out.

    Raises ValueError or OSError with a one-sentence message for bad input.
    """
    args = _parser().parse_args(argv)
    for flag, value, least in (
        ("--top", args.top, 1),
        ("--batch-size", args.batch_size, 1),
        ("--workers", args.workers, 0),
    ):
        if value < least:
            raise ValueError(f"{flag} {value} must be at least {least}.")
    utils.check_device(args.device)
    paths = paths_of(args.images)
    if args.output:
        check_output(args.output, [args.checkpoint, *([args.classes] if args.classes else []), *paths])
    with redirect_stdout(sys.stderr):  # messages of a download must not end up in the output
        model = pretrained.from_flags(args)
    if not model.classes:
        _warn(f"{args.checkpoint} has no class names, so classes are numbers: see --classes.")
    names, rows, status = model.classes or list(map(str, range(model.num_classes))), [], 0
    for path, top, error in predict(
        model.network, model.view, paths, args.top, args.batch_size, args.workers, args.device
    ):
        if error:
            _warn(error)
            status = 1
        else:
            printable = os.fsencode(path).decode("utf-8", "backslashreplace")  # a file name may not be UTF-8
            rows.append((printable, [(names[c], p) for c, p in top]))
    text = as_text(rows, args.format)
    if args.output:
        utils.write_atomic(args.output, text, "--output")
    else:
        sys.stdout.write(utils.printable(text) if sys.stdout.isatty() else text)
    return status


if __name__ == "__main__":
    sys.excepthook = partial(utils.excepthook, "predict.py")
    sys.exit(main())
