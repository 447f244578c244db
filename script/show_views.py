"""Draw what training sees: a contact sheet of the evaluation, labelled, weak and strong views of real images.

    python -m script.show_views --data-set SEMI-IMNET --data-path DATA --data-split-file LIST [--output views.png]

Takes the flags of semi_main.py, so a training command's own show its views. A row is an image of the labelled list;
where the unlabelled images are other ones (--unlabelled-path, or a list of their own), the later half of the rows are
of these. --seed decides which images are shown, and how they are augmented. Normalisation is undone.
"""

import argparse
import random
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import default_collate

import options
import utils
from datasets import MultiViewDataset, build_training_sets, fixmatch_colours, validation_view
from images.fast_transforms import DeviceFinish
from images.transforms import IMAGENET
from script import picture

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    Figure = None

WIDTH, DPI = 8.3, 200  # inches, dots an inch: 1660 pixels, twice the width of a README
STRONG, MOST = 3, 50  # strong views of an image, rows of a sheet


def _colours(images, data_set):
    """Normalised (N, 3, S, S) as colours 0..1, (N, S, S, 3)."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in fixmatch_colours(data_set) or IMAGENET)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _batch(views, places, seed):
    """The batch of these places of MultiViewDataset as the network gets it."""
    batch = default_collate([views[place] for place in places])
    return views.finish(seed, torch.device("cpu"))(batch) if views.finish else batch


def _rows(args, pool, places, labelled, unlabelled):
    """[(target, {title: (S, S, 3)})] of these places of `pool`, Views; `labelled`, `unlabelled` or None lend theirs."""
    like = partial(MultiViewDataset, pool.samples, pool.indices, tolerated=pool.tolerated)
    whole = like(validation_view(args), finish=DeviceFinish if pool.finish else None)
    images, targets, _ = _batch(whole, places, args.seed)
    columns = {"evaluation": images}
    if labelled is not None:
        columns["labelled"] = _batch(like(*labelled.transforms, finish=labelled.finish), places, args.seed)[0]
    if unlabelled is not None:
        both = like(*unlabelled.transforms, finish=unlabelled.finish)
        draws = [_batch(both, places, args.seed + k)[:2] for k in range(STRONG)]
        columns["weak"] = draws[0][1]
        columns |= {f"strong {k}": strong for k, (strong, _) in enumerate(draws, 1)}
    columns = {title: _colours(images, args.data_set) for title, images in columns.items()}
    return [(target, {title: each[i] for title, each in columns.items()}) for i, target in enumerate(targets.tolist())]


def _places(number, views, what):
    if number > len(views):
        raise ValueError(f"--images asks for {number} {what} images, and there are {len(views)}: lower it.")
    return random.sample(range(len(views)), number)


def read(args):
    """[(name, {title: colours (S, S, 3), 0..1})], a row an image, named by its class or 'unlabelled'.

    Raises ValueError or OSError for what is wrong with the flags or on the disk.
    """
    utils.seed_everything(args.seed)
    labelled, unlabelled = build_training_sets(args, options.semi_supervised(args))
    others = args.images // 2 if unlabelled is not None and unlabelled.samples is not labelled.samples else 0
    places = _places(args.images - others, labelled, "labelled")
    rows = _rows(args, labelled, places, labelled, unlabelled)
    rows = [(labelled.samples.classes[target], views) for target, views in rows]
    if others:
        places = _places(others, unlabelled, "unlabelled")
        rows += [("unlabelled", views) for _, views in _rows(args, unlabelled, places, None, unlabelled)]
    return rows


def draw(rows):
    """The matplotlib figure of `read`'s rows; a view that a row does not have stays empty."""
    titles = list(rows[0][1])
    side = WIDTH / (len(titles) + 0.6)
    figure = Figure(figsize=(WIDTH, side * len(rows) + 0.4), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for (name, views), row in zip(rows, axes):
        for title, axis in zip(titles, row):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if title in views:
                axis.imshow(views[title], interpolation="nearest")
        lines = textwrap.wrap(name.replace("_", " "), 16) or [name]
        row[0].set_ylabel("\n".join(lines[:3]).replace("$", r"\$"), fontsize=11)
    for title, axis in zip(titles, axes[0]):
        axis.set_title(title, fontsize=12)
    return figure


def main(words=None):
    """Parse, read, draw, save, and say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options.get_args_parser()]
    )
    group = parser.add_argument_group("contact sheet")
    group.add_argument("--images", type=int, default=6, metavar="N", help="rows of the sheet (default: %(default)s)")
    group.add_argument(
        "--output", type=Path, default=Path("views.png"), metavar="FILE", help="the picture, a PNG (default: views.png)"
    )
    args = parser.parse_args(words)
    try:
        if Figure is None:
            raise ValueError("matplotlib is not installed: pip install matplotlib.")
        if not 1 <= args.images <= MOST:
            raise ValueError(f"--images {args.images} must be from 1 to {MOST}.")
        options.check(args)
        picture.save(lambda: draw(read(args)), args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"show_views.py: error: {error}")
    print(f"{args.images} image(s) drawn in {args.output}")


if __name__ == "__main__":
    main()
