"""Draw the images that training sees: a contact sheet of evaluation, labelled, weak and strong views of real images.

    python -m script.show_views --data-set SEMI-IMNET --data-path DATA --data-split-file LIST [--output views.png]

Takes the flags of semi_main.py, so that the flags of a training command show the views of that training. Each row is
an image of the labelled list. If the unlabelled images are others (--unlabelled-path, or a list of their own), the
second half of the rows shows some of those. --seed decides which images are shown and how they are augmented. The
normalisation is undone.
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

WIDTH, DPI = 8.3, 200  # inches, dots per inch: 1660 pixels, twice the width of a README
STRONG_VIEWS, MAX_ROWS = 3, 50


def _colours(images, data_set):
    """Undo the normalisation: (N, 3, S, S) -> colours in 0..1, (N, S, S, 3)."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in fixmatch_colours(data_set) or IMAGENET)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _batch(dataset, places, seed):
    """Collate these places of a MultiViewDataset, finished on the device as for the network."""
    batch = default_collate([dataset[place] for place in places])
    return dataset.finish(seed, torch.device("cpu"))(batch) if dataset.finish else batch


def _rows(args, dataset, places, labelled, unlabelled):
    """Draw the views of some images: [(target, {title: colours (S, S, 3)})].

    Args:
        dataset: the MultiViewDataset whose images at `places` are read.
        labelled, unlabelled: the training sets whose views are drawn, or None to leave them out.
    """
    with_views = partial(MultiViewDataset, dataset.samples, dataset.indices, tolerated=dataset.bad_images.tolerated)
    evaluation = with_views(validation_view(args), finish=DeviceFinish if dataset.finish else None)
    images, targets, _ = _batch(evaluation, places, args.seed)
    columns = {"evaluation": images}
    if labelled is not None:
        columns["labelled"] = _batch(with_views(*labelled.transforms, finish=labelled.finish), places, args.seed)[0]
    if unlabelled is not None:
        pairs = with_views(*unlabelled.transforms, finish=unlabelled.finish)
        draws = [_batch(pairs, places, args.seed + k)[:2] for k in range(STRONG_VIEWS)]
        columns["weak"] = draws[0][1]
        columns |= {f"strong {k}": strong for k, (strong, _) in enumerate(draws, 1)}
    columns = {title: _colours(images, args.data_set) for title, images in columns.items()}
    return [(target, {title: each[i] for title, each in columns.items()}) for i, target in enumerate(targets.tolist())]


def _draw_places(number, dataset, kind):
    if number > len(dataset):
        raise ValueError(f"--images asks for {number} {kind} images, but there are {len(dataset)}: lower it.")
    return random.sample(range(len(dataset)), number)


def read(args):
    """Read the images and draw their views: [(class or 'unlabelled', {title: colours (S, S, 3) in 0..1})].

    Raises ValueError or OSError for wrong flags and for missing or unreadable files.
    """
    utils.seed_everything(args.seed)
    labelled, unlabelled = build_training_sets(args, options.semi_supervised(args))
    others = args.images // 2 if unlabelled is not None and unlabelled.samples is not labelled.samples else 0
    places = _draw_places(args.images - others, labelled, "labelled")
    rows = _rows(args, labelled, places, labelled, unlabelled)
    rows = [(labelled.samples.classes[target], views) for target, views in rows]
    if others:
        places = _draw_places(others, unlabelled, "unlabelled")
        rows += [("unlabelled", views) for _, views in _rows(args, unlabelled, places, None, unlabelled)]
    return rows


def draw(rows):
    """The matplotlib figure of the rows that `read` returns; views that a row lacks are left empty."""
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


def main(argv=None):
    """Draw the contact sheet and save it."""
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options.get_args_parser()]
    )
    group = parser.add_argument_group("contact sheet")
    group.add_argument("--images", type=int, default=6, metavar="N", help="rows of the sheet (default: %(default)s)")
    group.add_argument(
        "--output", type=Path, default=Path("views.png"), metavar="FILE", help="PNG file to write (default: views.png)"
    )
    args = parser.parse_args(argv)
    try:
        if Figure is None:
            raise ValueError("matplotlib is not installed: pip install matplotlib.")
        if not 1 <= args.images <= MAX_ROWS:
            raise ValueError(f"--images {args.images} must be from 1 to {MAX_ROWS}.")
        options.check(args)
        picture.save(lambda: draw(read(args)), args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"show_views.py: error: {error}")
    print(f"Drew {args.images} image(s) in {args.output}")


if __name__ == "__main__":
    main()
