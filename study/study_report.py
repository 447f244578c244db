"""The tables and plots of study/study.py, made from the output folders of the runs alone."""

import json
import statistics

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from script.compare_runs import markdown, mean_and_deviation, read_runs

DPI = 150
COLOURS = {"vit": "#D55E00", "cnn": "#009E73", "semiformer": "#0072B2"}  # Okabe and Ito, 2008
TITLES = {"vit": "ViT", "cnn": "CNN", "semiformer": "Semiformer"}
STYLES = {"supervised": ("--", "labelled images only"), "semi": ("-", "with pseudo labels")}
COLUMNS = {
    "test_acc1": "top-1 %",
    "test_acc1_head1": "CNN stream %",
    "test_acc1_head2": "transformer stream %",
    "train_mask_rate": "mask rate %",
    "train_pseudo_acc": "pseudo-label acc. %",
}
PAIRS = (  # (run, meter) minus (run, meter)
    (("semiformer-semi", "test_acc1"), ("semiformer-supervised", "test_acc1")),
    (("semiformer-semi", "test_acc1_head1"), ("semiformer-supervised", "test_acc1_head1")),
    (("semiformer-semi", "test_acc1_head2"), ("semiformer-supervised", "test_acc1_head2")),
    (("semiformer-semi", "test_acc1"), ("cnn-semi", "test_acc1")),
    (("semiformer-semi", "test_acc1_head1"), ("cnn-semi", "test_acc1")),
    (("semiformer-semi", "test_acc1_head2"), ("vit-semi", "test_acc1")),
    (("cnn-semi", "test_acc1"), ("vit-semi", "test_acc1")),
    (("cnn-semi", "test_acc1"), ("cnn-supervised", "test_acc1")),
    (("vit-semi", "test_acc1"), ("vit-supervised", "test_acc1")),
)
STREAMS = {"test_acc1": "", "test_acc1_head1": ", CNN stream", "test_acc1_head2": ", transformer stream"}


def mean_minutes(runs, name):
    """Mean of `seconds` or `cpu_seconds` in the runs' study.json, in minutes, as text."""
    times = [json.loads((run.folder / "study.json").read_text())[name] for run in runs]
    return f"{statistics.fmean(times) / 60:.1f} min"


def results_table(runs):
    """The Markdown table of the results: {name: [Run of each seed]} -> text."""
    rows = []
    for name, seeds in runs.items():
        flags, last = seeds[0].flags, seeds[0].last
        steps = (last["epoch"] + 1) * flags["steps_per_epoch"]
        times = [mean_minutes(seeds, "seconds"), mean_minutes(seeds, "cpu_seconds")]
        meters = [mean_and_deviation(seeds, meter) for meter in COLUMNS]
        rows.append([name, f"{last['n_parameters'] / 1e6:.2f} M", *meters, len(seeds), steps, *times])
    return markdown(["run", "parameters", *COLUMNS.values(), "seeds", "steps", "time", "CPU time"], rows, 1)


def differences_table(runs, pairs):
    """The Markdown table of paired differences over the seeds: mean, standard error, and how many are above zero."""
    rows = []
    for (name, meter), (other, other_meter) in pairs:
        if name not in runs or other not in runs:
            continue
        differences = [a.last[meter] - b.last[other_meter] for a, b in zip(runs[name], runs[other])]
        mean, n = statistics.fmean(differences), len(differences)
        error = statistics.stdev(differences) / n**0.5 if n > 1 else None
        each = " / ".join(f"{x:+.1f}" for x in differences)
        above = f"{sum(x > 0 for x in differences)} of {n}"
        errors = [f"{error:.2f}", f"{mean / error:.1f}" if error else "-"] if n > 1 else ["-", "-"]
        rows.append([f"{name}{STREAMS[meter]}", f"{other}{STREAMS[other_meter]}", each, f"{mean:+.2f}", *errors, above])
    header = ["top-1 of", "minus", "each seed", "mean", "standard error (s.e.)", "mean / s.e.", "above 0"]
    return markdown(header, rows, 2)


def smoke_table(folder, changes):
    """The Markdown table of the smoke suite, and the names of the runs in which no quantity changed that should."""
    rows, unchanged = [], []
    base = quantities(folder / "baseline")
    for name, (flags, meters) in changes.items():
        pairs = [(meter, a[meter], b[meter]) for a, b in zip(base, quantities(folder / name)) for meter in meters]
        shown, before, after = next((pair for pair in pairs if pair[1] != pair[2]), pairs[0])
        if before == after:
            unchanged.append(name)
        rows.append([name, f"`{flags}`", shown, f"{before:.6g}", f"{after:.6g}", before != after])
    return markdown(["run", "flags", "quantity", "baseline", "changed", "differs"], rows, 3), unchanged


def quantities(folder):
    """[{name: number}] for each log line of a run: its meters, the sizes of its batches, and the numbers of images."""
    record = json.loads((folder / "run.json").read_text())
    batches = {name: n for phase in record["phases"].values() for name, n in phase.items()}
    images = {f"{name}_images": n for name, n in record["images"].items()}
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    constant = {"train_loss_consistency": 0.0} | images | batches
    return [constant | {name: value for name, value in line.items() if value is not None} for line in lines]


def _curve(axis, runs, meter, style, colour, label=None, scale=1):
    for i, run in enumerate(runs):
        points = [(line["epoch"] + 1, line[meter]) for line in run.log if line.get(meter) is not None]
        if points:
            steps, values = zip(*points)
            steps = [n * run.flags["steps_per_epoch"] for n in steps]
            axis.plot(steps, [scale * v for v in values], style, color=colour, marker="o", markersize=2.5,
                      linewidth=1.2, label=label if i == 0 else None)  # fmt: skip


def draw_accuracy(runs, path):
    """Plot top-1 over steps, with a line for each seed.

    There is a panel for each network, and one for the transformer stream beside the ViT alone.
    """
    panels = {
        "ViT": {"vit": "test_acc1"},
        "CNN": {"cnn": "test_acc1"},
        "Semiformer,\nsum of streams": {"semiformer": "test_acc1"},
        "Semiformer's transformer\nstream, and the ViT": {"vit": "test_acc1", "semiformer": "test_acc1_head2"},
    }
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(8.3, 3.9), dpi=DPI, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (title, meters) in zip(axes, panels.items()):
            for network, meter in meters.items():
                for how, (style, _) in STYLES.items():
                    _curve(axis, runs.get(f"{network}-{how}", []), meter, style, COLOURS[network])
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimizer steps")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("top-1, % of test images")
        handles = [Line2D([], [], color="#444444", linestyle=style, label=label) for style, label in STYLES.values()]
        handles += [Line2D([], [], color=COLOURS[network], linewidth=4, label=TITLES[network]) for network in TITLES]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.savefig(path)


def draw_pseudo_labels(runs, path):
    """Plot mask rate and pseudo-label accuracy over steps, with a colour for each network and a line for each seed."""
    panels = {
        "train_mask_rate": "mask rate, % of unlabelled images",
        "train_pseudo_acc": "correct, % of pseudo labels",
    }
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8.3, 3.2), dpi=DPI, layout="constrained")
        for axis, (meter, label) in zip(figure.subplots(1, 2), panels.items()):
            for network, title in TITLES.items():
                _curve(axis, runs.get(f"{network}-semi", []), meter, "-", COLOURS[network], title, 100)
            axis.set(xlabel="optimizer steps", ylabel=label)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(frameon=False)
        figure.savefig(path)


def _finished(record):
    return record.is_file() and json.loads(record.read_text())["finished"]


def write_report(suite, folder, names, seeds, changes):
    """Write table.md and the plots of a suite into its folder; returns the text of table.md.

    Runs that are not finished for every seed are left out. Raises RuntimeError if a run of the smoke suite changed none
    of the quantities that it should.

    Args:
        suite, names: name of the suite, and of its runs.
        changes: `study.CHANGES`.
    """
    records = {name: [folder / f"seed{seed}" / name / "study.json" for seed in seeds] for name in names}
    complete = [name for name, paths in records.items() if all(map(_finished, paths))]
    if suite == "smoke":
        text, unchanged = smoke_table(folder / f"seed{seeds[0]}", changes)
        (folder / "table.md").write_text(text + "\n")
        if unchanged:
            raise RuntimeError(f"No quantity changed that should: {', '.join(unchanged)}; see {folder / 'table.md'}.")
        return text
    runs = {name: read_runs([folder / f"seed{seed}" / name for seed in seeds]) for name in complete}
    baseline = ("baseline", "test_acc1")
    pairs = PAIRS if suite == "main" else [((name, "test_acc1"), baseline) for name in complete if name != "baseline"]
    text = f"{results_table(runs)}\n\n{differences_table(runs, pairs)}"
    (folder / "table.md").write_text(text + "\n")
    if suite == "main":
        draw_accuracy(runs, folder / "accuracy.png")
        draw_pseudo_labels(runs, folder / "pseudo_labels.png")
    return text
