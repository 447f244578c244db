"""The report of an evaluation: per-class accuracy, confusion matrix, calibration and speed, as CSV files and plots."""

import csv
import io
import time
from pathlib import Path

import torch

import utils
from utils import print_main

BINS = 15
STREAMS = {"": "top1", "_head1": "top1_cnn", "_head2": "top1_transformer"}  # suffix in `engine.evaluate`: CSV column
MOST_CLASSES = 100  # up to which the confusion matrix is drawn
WIDTH, DPI = 8.3, 200  # inches and dots per inch: 1660 pixels, twice the width of a README
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # colours of Okabe and Ito, 2008


def calibration_error(bins):
    """Return the expected calibration error (ECE), a fraction 0..1.

    The confidence p of an image is the largest softmax probability of the streams' summed logits; the image is a hit
    if that class is the true one. Bin m of M contains the images with (m-1)/M < p <= m/M, and ECE is the sum over all
    bins of (images in m / all images) * |accuracy in m - mean confidence in m|. Source: Guo et al., "On Calibration of
    Modern Neural Networks", ICML 2017.

    Args:
        bins: (3, M) float64: the number of images, the number of hits and the sum of confidences of every bin.

    Returns NaN if there are no images.
    """
    images, hits, confidence = bins
    return ((hits - confidence).abs().sum() / images.sum()).item()


class Tally:
    """Counts the results of an evaluation on the device, and measures its speed.

    Attributes:
        confusion: (C, C) int32, images by true class and class predicted by the summed logits.
        hits: (3, C) int64, correctly classified images by true class: by the summed logits, the CNN and the
            transformer (the last two are 0 for a single stream).
        bins: the counts that `calibration_error` takes, (3, BINS) float64.
    """

    def __init__(self, classes, device):
        self.device = device
        self.confusion = torch.zeros(classes, classes, dtype=torch.int32, device=device)
        self.hits = torch.zeros(len(STREAMS), classes, dtype=torch.int64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.images, self.waited, self.start = 0, 0.0, None

    def clocked(self, batches):
        """Yield the batches, (images, ...), and measure their time from the second on: the first includes start-up."""
        last = time.perf_counter()
        for batch in batches:
            if self.start is not None:
                self.images += len(batch[0])
                self.waited += time.perf_counter() - last
            yield batch
            if self.start is None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.start = time.perf_counter()
            last = time.perf_counter()

    def add(self, scores, ranked, target):
        """Count a batch, as the `observe` argument of `engine.evaluate`, without synchronising with the device.

        Args:
            scores: {suffix: scores (N, C)}, with the summed logits under "".
            ranked: {suffix: classes (N, k), the most probable first}.
            target: true classes (N,) int64.
        """
        for hits, name in zip(self.hits, STREAMS):
            if name in ranked:
                hits.index_add_(0, target, (ranked[name][:, 0] == target).long())
        predicted = ranked[""][:, 0]
        cell = target * len(self.confusion) + predicted
        self.confusion.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))
        confidence = scores[""].double().softmax(1).amax(1)
        index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        counted = torch.stack([torch.ones_like(confidence), (predicted == target).double(), confidence])
        self.bins.index_add_(1, index, counted)

    def over_ranks(self):
        """Sum the counts over all ranks in place; every rank must call it right after the evaluation.

        Returns a dict with `ece` (see `calibration_error`), `images_per_second` of all ranks together, and `data_wait`,
        the fraction 0..1 of their time that the ranks spent waiting for images. The last two are None if no rank had a
        second batch.
        """
        # The device has finished: engine.evaluate read its results.
        seconds = time.perf_counter() - self.start if self.start is not None else 0.0
        for counts in (self.confusion, self.hits, self.bins):
            utils.sum_over_ranks(counts)
        images, waited, times = zip(*utils.gather((self.images, self.waited, seconds)))
        timed = sum(images) > 0
        return {
            "ece": calibration_error(self.bins),
            "images_per_second": sum(images) / max(times) if timed else None,
            "data_wait": sum(waited) / sum(times) if timed else None,
        }


def summary(figures):
    """Return the figures of `Tally.over_ranks` as a line of text."""
    words = f"expected calibration error {figures['ece']:.4f}"
    if figures["images_per_second"] is None:
        return words + "; one batch is too few to time"
    waited = f"{figures['data_wait']:.0%} of the time waiting for data"
    return words + f"; {figures['images_per_second']:.1f} images/s, {waited}"


# -------------------------------------------------------------------------------- files


def write(folder, tally, classes, streams, prefix=""):
    """Write per_class.csv, confusion.csv, reliability.png and, up to 100 classes, confusion.png.

    Args:
        folder: an existing folder.
        tally: a Tally after `over_ranks`.
        classes: the classes' names, in the order of their indices.
        streams: number of streams of the network, 1 or 2.
        prefix: put in front of the files' names.

    If matplotlib is not installed, nothing is drawn and a message is printed. Raises OSError, which names the file.
    """
    confusion, hits = tally.confusion.cpu(), tally.hits.cpu().tolist()
    images = confusion.sum(1).tolist()
    columns = list(STREAMS.values())[: 3 if streams > 1 else 1]
    percents = [[f"{100 * n / of:.3f}" if of else "" for n, of in zip(row, images)] for row in hits[: len(columns)]]
    rows = [["class", "name", "images", *columns], *zip(range(len(classes)), classes, images, *percents)]
    _write_csv(Path(folder, f"{prefix}per_class.csv"), rows)
    table = ([name, *row.tolist()] for name, row in zip(classes, confusion))
    _write_csv(Path(folder, f"{prefix}confusion.csv"), [["true \\ predicted", *classes], *table])
    plots = {f"{prefix}reliability.png": lambda: draw_reliability(tally.bins.cpu())}
    if len(classes) <= MOST_CLASSES:
        plots[f"{prefix}confusion.png"] = lambda: draw_confusion(confusion, classes)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print_main(f"Cannot draw {' and '.join(plots)} without matplotlib: pip install matplotlib.")
        return
    for name, draw in plots.items():
        path = Path(folder, name)
        with utils.writing(path), utils.atomic(path) as file:
            draw().savefig(file, format="png")


def _write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    utils.write_atomic(path, text.getvalue())


# -------------------------------------------------------------------------------- plots


def _figure(height):
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _label(name, length=22):
    """Shorten a class's name to `length` characters for a plot, and escape what matplotlib would take for a formula."""
    name = name if len(name) <= length else name[: length - 1] + "…"
    return name.replace("$", r"\$")


def draw_confusion(confusion, classes):
    """Return the matplotlib figure of a confusion matrix, (C, C) integers, as percentages of each true class.

    Up to 30 classes are labelled with their names, and up to 20 have the percentages in the cells. The rows of classes
    without images are grey.
    """
    import matplotlib

    count, rows = len(classes), confusion.sum(1, keepdim=True)
    percent = (100 * confusion / rows).numpy()  # NaN for a class without images
    figure = _figure(7.2)
    axis = figure.subplots()
    with matplotlib.rc_context({"font.size": 10}):
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#cccccc")
        image = axis.imshow(percent, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
        named, size = count <= 30, 8 if 20 < count <= 30 else 10
        ticks = range(0, count, 1 if named else 10)
        labels = [_label(classes[i]) if named else str(i) for i in ticks]
        vertical = named and max(map(len, labels)) * count > 60
        axis.set_xticks(ticks, labels, fontsize=size, rotation=90 if vertical else 0)
        axis.set_yticks(ticks, labels, fontsize=size)
        kind = "class" if named else "class (index; the names are in per_class.csv)"
        axis.set_xlabel(f"predicted {kind}", fontsize=11)
        axis.set_ylabel(f"true {kind}", fontsize=11)
        axis.set_title(f"confusion matrix of {int(rows.sum()):,} images", fontsize=12)
        bar = figure.colorbar(image, ax=axis, shrink=0.8)
        bar.set_label("% of the true class's images", fontsize=11)
        if count <= 20:
            for (i, j), value in zip(torch.cartesian_prod(*[torch.arange(count)] * 2).tolist(), percent.flat):
                if value >= 0.5:
                    axis.text(j, i, int(value + 0.5), ha="center", va="center", fontsize=11 if count <= 12 else 7,
                              color="white" if value < 55 else "black")  # fmt: skip
    return figure


def draw_reliability(bins):
    """Return the matplotlib figure of a reliability diagram above a histogram of the confidences.

    Args:
        bins: as in `calibration_error`.
    """
    images, hits, confidence = (row.numpy() for row in bins)
    total, occupied, width = images.sum(), images > 0, 1 / len(images)
    centre = (torch.arange(len(images)).numpy() + 0.5) * width
    accuracy, mean = hits[occupied] / images[occupied], confidence[occupied] / images[occupied]
    figure = _figure(6.6)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.bar(centre[occupied], accuracy, width * 0.94, color=BLUE, label="accuracy")
    upper.bar(centre[occupied], mean - accuracy, width * 0.94, accuracy, color="none", edgecolor=ORANGE, hatch="///",
              label="gap to the mean confidence")  # fmt: skip
    upper.plot([0, 1], [0, 1], "--", color=GREY, label="perfect calibration")
    upper.set(ylabel="accuracy in the bin", xlim=(0, 1), ylim=(0, 1))
    title = f"expected calibration error {100 * calibration_error(bins):.1f} %"
    title += f"  (accuracy {100 * hits.sum() / total:.1f} %, mean confidence {100 * confidence.sum() / total:.1f} %)"
    upper.set_title(title, fontsize=12)
    upper.legend(loc="upper left", fontsize=11)
    lower.bar(centre, 100 * images / total, width * 0.94, color=BLUE)
    lower.set(xlabel="confidence: largest softmax probability of the summed logits", ylabel="% of images")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=11)
        axis.xaxis.label.set_size(12)
        axis.yaxis.label.set_size(12)
    return figure
