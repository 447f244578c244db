"""Plot the logs of several training runs in one picture: losses, top-1, pseudo labels, learning rate.

    python -m script.plot_log output/supervised output/semi [--output log.png]

A RUN is an --output_dir of semi_main.py; other files and folders are named on stderr and left out. Each run has a
colour (Okabe and Ito, 2008), each stream a line style, and each evaluated epoch a dot.
"""

import argparse
import sys
from pathlib import Path

from script import picture
from script.compare_runs import SHARES, runs_among, short_names
from utils import printable

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    matplotlib = None

WIDTH, DPI = 8.3, 200  # inches, dots per inch: 1660 pixels, twice the width of a README
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without yellow, too pale
STYLES = {"CNN stream": "--", "transformer stream": ":", "whole network": "-"}
CNN, TRANSFORMER, NETWORK = STYLES
PANELS = (  # title, label of the y axis, {meter: a key of STYLES}
    ("training loss, total", "nats", {"train_loss": NETWORK}),
    ("labelled loss by stream", "nats / number of streams", {"train_loss_0": CNN, "train_loss_1": TRANSFORMER}),
    (
        "unlabelled loss by stream",
        "nats / number of streams",
        {"train_loss_0_u": CNN, "train_loss_1_u": TRANSFORMER, "train_loss_u": NETWORK},
    ),
    ("top-1, CNN stream", "% of validation images", {"test_acc1_head1": CNN}),
    ("top-1, transformer stream", "% of validation images", {"test_acc1_head2": TRANSFORMER}),
    ("top-1, sum of streams", "% of validation images", {"test_acc1": NETWORK}),
    ("mask rate", "% of unlabelled images", {"train_mask_rate": NETWORK}),
    ("pseudo-label accuracy (precision)", "% of pseudo labels", {"train_pseudo_acc": NETWORK}),
    ("pseudo-label recall", "% of unlabelled images", {"train_pseudo_recall": NETWORK}),
    ("most frequent pseudo label", "% of pseudo labels", {"train_pseudo_largest": NETWORK}),
    ("threshold, or mean weight", "0 to 1", {"train_threshold": NETWORK, "train_mean_weight": NETWORK}),
    ("learning rate", "per optimizer step", {"train_lr": NETWORK}),
)
EMPTY = "not in these logs"


def points(log, meter):
    """(epochs, values) of the records that contain the meter; shares of 0..1 are returned in percent."""
    scale = 100 if meter in SHARES else 1
    found = [(record["epoch"], scale * record[meter]) for record in log if record.get(meter) is not None]
    return tuple(zip(*found)) or ((), ())


def _panel(axis, runs, title, unit, meters):
    for run, colour in zip(runs, COLOURS):
        for meter, stream in meters.items():
            epochs, values = points(run.log, meter)
            if epochs:
                axis.plot(epochs, values, STYLES[stream], color=colour, marker="o", markersize=1.8, label=stream)
    axis.set(title=title, xlabel="epoch", ylabel=unit)
    axis.tick_params(labelbottom=True)
    if axis.lines:
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
    else:
        axis.tick_params(left=False, labelleft=False)
        axis.text(0.5, 0.5, EMPTY, transform=axis.transAxes, ha="center", va="center", color="#666666")


def draw(runs):
    """The matplotlib figure of up to seven runs, with the panels of PANELS. Raises ValueError for more runs."""
    if len(runs) > len(COLOURS):
        raise ValueError(f"There are {len(runs)} runs for {len(COLOURS)} colours: plot fewer at a time.")
    names = [printable(name, kept="") for name in short_names([run.folder for run in runs])]
    columns = 2 if max(map(len, names)) > 24 else 4
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8.5, "lines.linewidth": 1.1}):
        height = 8.6 + 0.17 * -(-len(runs) // columns)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = list(figure.subplots(4, 3, sharex=True).flat)
        axes[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axis in axes[4:6]:
            axis.sharey(axes[3])  # the three top-1 panels
        for axis, panel in zip(axes, PANELS):
            _panel(axis, runs, *panel)
        drawn = {line.get_label() for axis in axes for line in axis.lines}
        styles = [
            Line2D([], [], color="#444444", linestyle=STYLES[name], label=name) for name in STYLES if name in drawn
        ]
        colours = [Line2D([], [], color=c, linewidth=3, label=name) for c, name in zip(COLOURS, names)]
        figure.legend(handles=styles, loc="outside upper center", ncols=3, frameon=False, handlelength=3)
        figure.legend(handles=colours, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def main(argv=None):
    """Read the runs, plot them, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training run")
    parser.add_argument("--output", type=Path, default=Path("log.png"), help="PNG file to write (default: log.png)")
    args = parser.parse_args(argv)
    if matplotlib is None:
        sys.exit("plot_log.py: error: matplotlib is not installed: pip install -r requirements-dev.txt.")
    try:
        runs = runs_among(args.runs)
        picture.save(lambda: draw(runs), args.output)
    except (ValueError, OSError) as error:
        sys.exit(printable(f"plot_log.py: error: {error}"))
    print(printable(f"Plotted {len(runs)} run(s) in {args.output}"))


if __name__ == "__main__":
    main()
