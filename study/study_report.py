"""The tables and plots of study/study.py, made from the lines of results.jsonl alone.

python -m study.study_report    # the tables and plots of docs/study.md, from study/results
"""

import json
import math
import re
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from script.compare_runs import IGNORED_FLAGS, SHARES, Run, markdown, mean_and_deviation
from study.suites import CHANGES, LATER, SHARED, SUITES, TUNED

DPI = 150
COLUMNS = {
    "test_acc1": "top-1 %",
    "test_acc1_head1": "CNN stream %",
    "test_acc1_head2": "transformer stream %",
    "train_mask_rate": "mask rate %",
    "train_pseudo_acc": "pseudo-label acc. %",
    "train_pseudo_recall": "recall %",
    "train_classes": "classes",
}
PAIRS = (  # (run, meter) minus (run, meter)
    *(((name, "test_acc1"), ("published", "test_acc1")) for name in (*LATER, "recipe")),
    *((("recipe", meter), ("supervised", meter)) for meter in ("test_acc1", "test_acc1_head1", "test_acc1_head2")),
    (("published", "test_acc1"), ("cnn-published", "test_acc1")),
    (("recipe", "test_acc1"), ("cnn-recipe", "test_acc1")),
    (("recipe", "test_acc1_head1"), ("cnn-recipe", "test_acc1")),
    (("recipe", "test_acc1_head2"), ("vit-recipe", "test_acc1")),
    (("cnn-recipe", "test_acc1"), ("cnn-published", "test_acc1")),
    (("cnn-published", "test_acc1"), ("cnn-supervised", "test_acc1")),
)
PANELS = {
    "test_acc1": "top-1, % of evaluation images",
    "train_pseudo_acc": "correct, % of pseudo labels",
    "train_pseudo_recall": "correctly labelled, % of images",
    "train_classes": "classes of the pseudo labels",
}
STREAMS = {"test_acc1": "", "test_acc1_head1": ", CNN stream", "test_acc1_head2": ", transformer stream"}


# What a line of the results keeps of a log.
FIGURES = """epoch n_parameters test_acc1 test_acc1_head1 test_acc1_head2 test_ema_acc1 test_ema_acc1_head1
    test_ema_acc1_head2 train_loss train_mask_rate train_pseudo_acc train_pseudo_recall train_pseudo_entropy
    train_pseudo_largest train_threshold train_mean_weight train_agreement""".split()
PLACES = (*IGNORED_FLAGS, "data_path", "data_split_file")


def kept_flags(flags):
    """The flags of a run without the names of its folders."""
    return {name: value for name, value in flags.items() if name not in PLACES} | {"seed": flags["seed"]}


def kept_figures(log):
    """The records of a log with the figures that the report reads, and `classes`, how many the kept labels are of.

    That is exp(entropy): the number of equally frequent classes with the same entropy.
    """
    kept = [{name: record[name] for name in FIGURES if name in record} for record in log]
    for record in kept:
        if record.get("train_pseudo_entropy") is not None:
            record["train_classes"] = math.exp(record["train_pseudo_entropy"])
    return kept


def read_results(path):
    """The lines of a results.jsonl; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def runs_of(lines, names):
    """{name: [its Runs, in the order of their seeds]} of the names that have a line."""
    lines = sorted(lines, key=lambda line: line["seed"])
    runs = {name: [_run(line) for line in lines if line["name"] == name] for name in names}
    return {name: found for name, found in runs.items() if found}


def _run(line):
    log = [record | {name: line[name] for name in ("seconds", "cpu_seconds")} for record in line["log"]]
    return Run(Path(line["name"]), line["args"], log)


def mean_minutes(runs, name):
    """Mean of `seconds` or `cpu_seconds` of the runs, in minutes, as text."""
    return f"{statistics.fmean(run.last[name] for run in runs) / 60:.1f} min"


def results_table(runs):
    """The Markdown table of the results, without columns that no run fills: {name: [Run of each seed]} -> text."""
    meters = {name: title for name, title in COLUMNS.items() if any(seeds[0].last.get(name) for seeds in runs.values())}
    rows = []
    for name, seeds in runs.items():
        flags, last = seeds[0].flags, seeds[0].last
        steps = (last["epoch"] + 1) * flags["steps_per_epoch"]
        times = [mean_minutes(seeds, "seconds"), mean_minutes(seeds, "cpu_seconds")]
        figures = [mean_and_deviation(seeds, meter) for meter in meters]
        rows.append([name, f"{last['n_parameters'] / 1e6:.2f} M", *figures, len(seeds), steps, *times])
    return markdown(["run", "parameters", *meters.values(), "seeds", "steps", "time", "CPU time"], rows, 1)


def differences_table(runs, pairs):
    """The Markdown table of paired differences over the seeds that both runs have.

    Mean, standard error, and how many are above zero.
    """
    rows = []
    for (name, meter), (other, other_meter) in pairs:
        first, second = ({run.flags["seed"]: run.last for run in runs.get(each, ())} for each in (name, other))
        differences = [first[seed][meter] - second[seed][other_meter] for seed in first if seed in second]
        if not differences:
            continue
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


def draw(runs, path):
    """Plot top-1, precision, recall and number of classes of the pseudo labels over steps.

    Each run has a colour: a strong line for the mean of its seeds, and a weak one for each of them.
    """
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8.3, 6.6), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
        for axis, (meter, label) in zip(axes.flat, PANELS.items()):
            for i, (name, seeds) in enumerate(runs.items()):
                _curves(axis, seeds, meter, 100 if meter in SHARES else 1, colours(i), name)
            axis.set(ylabel=label)
            axis.grid(alpha=0.3)
        for axis in axes[1]:
            axis.set_xlabel("optimizer steps")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path)


def _curves(axis, runs, meter, scale, colour, label):
    points = defaultdict(list)  # step: the values of the seeds
    for run in runs:
        records = [record for record in run.log if record.get(meter) is not None]
        line = [((each["epoch"] + 1) * run.flags["steps_per_epoch"], scale * each[meter]) for each in records]
        for step, value in line:
            points[step].append(value)
        if line:
            axis.plot(*zip(*line), color=colour, linewidth=0.6, alpha=0.35)
    if points:
        means = [statistics.fmean(values) for values in points.values()]
        axis.plot(list(points), means, color=colour, marker="o", markersize=2.5, linewidth=1.6, label=label)


def _flags(text):
    """Each flag with its value."""
    return re.split(r" (?=--)", " ".join(text.split()))


def trials_table(lines, names):
    """The Markdown table of a search for settings: each trial's flags besides the shared ones, and its top-1s."""
    found, rows = {(line["name"], line["seed"]): line for line in lines}, []
    seeds = sorted({line["seed"] for line in lines})
    shared = set.intersection(*(set(_flags(line["flags"])) for line in lines)) | set(_flags(f"{SHARED} --no-model-ema"))
    for name in names:
        trials = [found.get((name, seed)) for seed in seeds]
        if any(trials):
            own = " ".join(flag for flag in _flags(next(filter(None, trials))["flags"]) if flag not in shared)
            top1 = " / ".join(f"{trial['log'][-1]['test_acc1']:.1f}" if trial else "-" for trial in trials)
            runs = [_run(trial) for trial in trials if trial]
            figures = [mean_and_deviation(runs, meter) for meter in ("train_pseudo_acc", "train_pseudo_recall")]
            rows.append([name, f"`{own}`", top1, *figures])
    header = ["trial", "flags", f"top-1 %, seeds {' / '.join(map(str, seeds))}", "pseudo-label acc. %", "recall %"]
    return markdown(header, rows, 2)


def report(suite, lines, plot):
    """The tables of a suite, as text; writes its plot.

    Args:
        suite: a key of SUITES but "smoke".
        lines: those of its results.
        plot: path of the plot.
    """
    if suite in TUNED:
        return trials_table(lines, SUITES[suite])
    runs, pairs = runs_of(lines, SUITES[suite]), PAIRS
    if suite == "ablation":
        pairs = [((name, "test_acc1"), ("baseline", "test_acc1")) for name in CHANGES]
    draw({name: seeds for name, seeds in runs.items() if not name.startswith(("cnn-", "vit-"))}, plot)
    return f"{results_table(runs)}\n\n{differences_table(runs, pairs)}"


def write_report(suite, folder, seeds):
    """Write table.md and the plot of a suite into its folder; returns the text of table.md.

    Args:
        seeds: of the smoke suite, whose runs of the first one are compared.
    Raises RuntimeError if a run of the smoke suite changed none of the quantities that it should.
    """
    if suite == "smoke":
        text, unchanged = smoke_table(folder / f"seed{seeds[0]}", CHANGES)
    else:
        text, unchanged = report(suite, read_results(folder / "results.jsonl"), folder / f"{suite}.png"), []
    (folder / "table.md").write_text(text + "\n")
    if unchanged:
        raise RuntimeError(f"No quantity changed that should: {', '.join(unchanged)}; see {folder / 'table.md'}.")
    return text


def machine(lines):
    """A sentence on where the runs of a results.jsonl come from."""
    revisions = ", ".join(dict.fromkeys(line["revision"] for line in lines))
    versions = dict.fromkeys(f"torch {line['torch']}, timm {line['timm']}" for line in lines)
    minutes = sum(line["cpu_seconds"] for line in lines) / 60
    text = f"{len(lines)} runs, {minutes:.0f} minutes of CPU time, {'; '.join(versions)}, revisions {revisions}."
    return textwrap.fill(text, 110)


def write_page(page, results):
    """Put the tables of all results, SUITE-LABELS.jsonl, into a page, and their plots beside it.

    The page has a place for each: all that stands between the lines `<!-- SUITE-LABELS -->` and `<!-- end -->`. Raises
    ValueError where it has none.
    """
    text = page.read_text(encoding="utf-8")
    for path in sorted(results.glob("*.jsonl")):
        lines = read_results(path)
        place = re.compile(rf"(<!-- {path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{page} has no line <!-- {path.stem} --> for the table of {path}: add it.")
        tables = report(path.stem.rsplit("-", 1)[0], lines, page.parent / f"study_{path.stem}.png")
        text = place.sub(lambda found: f"{found[1]}\n{tables}\n\n{machine(lines)}\n\n{found[2]}", text)  # noqa: B023
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write_page(here.parent / "docs/study.md", here / "results")
