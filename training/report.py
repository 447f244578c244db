"""The report of an evaluation: classes, confusions, calibration and pace, as figures, CSV files and pictures."""

import csv
import io
import os
import time
from pathlib import Path

import torch

import utils
from utils import print_main

BINS = 15
STREAMS = {"": "top1", "_head1": "top1_cnn", "_head2": "top1_transformer"}  # score of `engine.evaluate`: CSV column
MOST_CLASSES = 100  # of the confusion matrix's picture
WIDTH, DPI = 8.3, 200  # inches, dots an inch: 1660 pixels, twice the width of a README
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito, 2008


def calibration_error(bins):
    """Expected calibration error, a fraction 0..1 (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

    An image's confidence p is the largest probability of the softmax of the streams' summed logits, and it is a hit
    where that class is the true one. Of M bins of equal width, the m-th holds the images with (m-1)/M < p <= m/M,
    and ECE = sum over m of (images in m / all images) * |share of hits in m - mean confidence in m|.

    Args:
        bins: (3, M) float64: images, hits and sum of confidences of each bin. NaN where there is no image.
    """
    images, hits, confidence = bins
    return ((hits - confidence).abs().sum() / images.sum()).item()


class Tally:
    """Counts of an evaluation's images, kept on the device until `over_ranks`, and its clock.

    Attributes:
        confusion: (C, C) int32, images by true and predicted class (of the summed logits).
        hits: (3, C) int64, by true class: of the summed logits, the CNN, the transformer (0 for a single stream).
        bins: as in `calibration_error`, of `BINS` bins.
    """

    def __init__(self, classes, device):
        self.device = device
        self.confusion = torch.zeros(classes, classes, dtype=torch.int32, device=device)
        self.hits = torch.zeros(len(STREAMS), classes, dtype=torch.int64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.images, self.waited, self.start = 0, 0.0, None

    def clocked(self, batches):
        """The batches, (images, ...), timed from the second on: the first has what happens once."""
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
        """Count a batch: the `observe` of `engine.evaluate`. Nothing waits for the device."""
        for hits, name in zip(self.hits, STREAMS):
            if name in ranked:
                hits.index_add_(0, target, (ranked[name][:, 0] == target).long())
        predicted = ranked[""][:, 0]
        place = target * len(self.confusion) + predicted
        self.confusion.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        confidence = scores[""].double().softmax(1).amax(1)
        index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        counted = torch.stack([torch.ones_like(confidence), (predicted == target).double(), confidence])
        self.bins.index_add_(1, index, counted)

    def over_ranks(self):
        """Sum the counts over the ranks, which must all call it, right after the evaluation.

        Returns `ece`; and from the second batch on `images_per_second`, of all ranks together, and `data_wait`, the
        share 0..1 of that time in which a rank waited for images (both None where each rank had one batch).
        """
        seconds = (
            time.perf_counter() - self.start if self.start is not None else 0.0
        )  # evaluate has waited for the device
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
    """The figures of `Tally.over_ranks` in words."""
    words = f"expected calibration error {figures['ece']:.4f}"
    if figures["images_per_second"] is None:
        return words + "; one batch is too few to time"
    waited = f"{figures['data_wait']:.0%} of the time waiting for them"
    return words + f"; {figures['images_per_second']:.1f} images/s, {waited}"


# -------------------------------------------------------------------------------- files


def write(folder, tally, classes, streams, prefix=""):
    """Write per_class.csv, confusion.csv, reliability.png and, up to 100 classes, confusion.png of a summed tally.

    Args:
        classes: names, by index. streams: how many the network has. prefix: before the files' names.
    Raises OSError naming the file. Where matplotlib is missing, what is not drawn is said.
    """
    confusion, hits = tally.confusion.cpu(), tally.hits.cpu().tolist()
    images = confusion.sum(1).tolist()
    columns = list(STREAMS.values())[: 3 if streams > 1 else 1]
    shares = [[f"{100 * n / of:.3f}" if of else "" for n, of in zip(row, images)] for row in hits[: len(columns)]]
    rows = [["class", "name", "images", *columns], *zip(range(len(classes)), classes, images, *shares)]
    _write_csv(Path(folder, f"{prefix}per_class.csv"), rows)
    table = ([name, *row.tolist()] for name, row in zip(classes, confusion))
    _write_csv(Path(folder, f"{prefix}confusion.csv"), [["true \\ predicted", *classes], *table])
    pictures = {f"{prefix}reliability.png": lambda: draw_reliability(tally.bins.cpu())}
    if len(classes) <= MOST_CLASSES:
        pictures[f"{prefix}confusion.png"] = lambda: draw_confusion(confusion, classes)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print_main(f"Not drawn: {' and '.join(pictures)}, for matplotlib is not installed: pip install matplotlib.")
        return
    for name, draw in pictures.items():
        path = Path(folder, name)
        with utils.writing(path):
            draw().savefig(f"{path}.tmp", format="png")
            os.replace(f"{path}.tmp", path)


def _write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    utils.write_atomic(path, text.getvalue())


# -------------------------------------------------------------------------------- pictures


def _figure(height):
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _label(name, length=22):
    """A class name as a label: cut, and nothing in it taken for a formula."""
    name = name if len(name) <= length else name[: length - 1] + "…"
    return name.replace("$", r"\$")


def draw_confusion(confusion, classes):
    """The matplotlib figure of a confusion matrix, (C, C) integers: each row in percent of its true class.

    Up to 30 classes have their names beside them, up to 20 their percents in the cells. Rows of no image are grey.
    """
    import matplotlib

    count, rows = len(classes), confusion.sum(1, keepdim=True)
    percent = (100 * confusion / rows).numpy()  # NaN in a row of no image
    figure = _figure(7.2)
    axis = figure.subplots()
    with matplotlib.rc_context({"font.size": 10}):
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#cccccc")
        image = axis.imshow(percent, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
        named, size = count <= 30, 8 if 20 < count <= 30 else 10
        ticks = range(0, count, 1 if named else 10)
        labels = [_label(classes[i]) if named else str(i) for i in ticks]
        turned = named and max(map(len, labels)) * count > 60
        axis.set_xticks(ticks, labels, fontsize=size, rotation=90 if turned else 0)
        axis.set_yticks(ticks, labels, fontsize=size)
        kind = "class" if named else "class (its index: per_class.csv has the names)"
        axis.set_xlabel(f"predicted {kind}", fontsize=11)
        axis.set_ylabel(f"true {kind}", fontsize=11)
        axis.set_title(f"{int(rows.sum()):,} images: what each true class is taken for", fontsize=12)
        bar = figure.colorbar(image, ax=axis, shrink=0.8)
        bar.set_label("% of the true class's images", fontsize=11)
        if count <= 20:
            for (i, j), value in zip(torch.cartesian_prod(*[torch.arange(count)] * 2).tolist(), percent.flat):
                if value >= 0.5:
                    axis.text(j, i, int(value + 0.5), ha="center", va="center", fontsize=11 if count <= 12 else 7,
                              color="white" if value < 55 else "black")  # fmt: skip
    return figure


def draw_reliability(bins):
    """The matplotlib figure of the reliability diagram of bins as in `calibration_error`, over their images."""
    images, hits, confidence = (row.numpy() for row in bins)
    total, there, width = images.sum(), images > 0, 1 / len(images)
    middle = (torch.arange(len(images)).numpy() + 0.5) * width
    accuracy, mean = hits[there] / images[there], confidence[there] / images[there]
    figure = _figure(6.6)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.bar(middle[there], accuracy, width * 0.94, color=BLUE, label="accuracy")
    upper.bar(middle[there], mean - accuracy, width * 0.94, accuracy, color="none", edgecolor=ORANGE, hatch="///",
              label="gap to the mean confidence")  # fmt: skip
    upper.plot([0, 1], [0, 1], "--", color=GREY, label="calibrated")
    upper.set(ylabel="share of hits in the bin", xlim=(0, 1), ylim=(0, 1))
    title = f"expected calibration error {100 * calibration_error(bins):.1f} %"
    title += f"  (accuracy {100 * hits.sum() / total:.1f} %, mean confidence {100 * confidence.sum() / total:.1f} %)"
    upper.set_title(title, fontsize=12)
    upper.legend(loc="upper left", fontsize=11)
    lower.bar(middle, 100 * images / total, width * 0.94, color=BLUE)
    lower.set(xlabel="confidence: largest probability of the summed logits", ylabel="% of images")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=11)
        axis.xaxis.label.set_size(12)
        axis.yaxis.label.set_size(12)
    return figure
