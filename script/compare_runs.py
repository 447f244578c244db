"""Print a Markdown table of several training runs: the flags that differ, and the results as mean ± standard deviation.

    python -m script.compare_runs output/*/ [--metric acc1]

A RUN is an --output_dir of semi_main.py; other files and folders are named on stderr and left out. Runs share a row if
they stopped after the same epoch and differ only in the seed, the output folder, and the seed's number in a path
(data/seed0, data/seed1). Rows of runs that did not reach their last epoch are marked unfinished. Results are those of
the last line of the log; the standard deviation over the runs of a row, where there are several, is that of the sample
(n - 1).
"""

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import printable

IGNORED_FLAGS = ("output_dir", "resume", "seed", "num_workers", "tensorboard")
COLUMNS = {
    "test_acc1": "top-1 %",
    "test_acc1_head1": "CNN %",
    "test_acc1_head2": "transformer %",
    "test_ema_acc1": "EMA %",
    "train_pseudo_acc": "pseudo-label acc. %",
    "train_mask_rate": "mask rate %",
}
SHARES = ("train_pseudo_acc", "train_pseudo_recall", "train_pseudo_largest", "train_mask_rate",
          "train_agreement")  # logged as 0..1, shown in percent  # fmt: skip
MISSING = "-"


@dataclass(frozen=True)
class Run:
    """A training run's output folder, its resolved flags, and its log, one record for each evaluated epoch."""

    folder: Path
    flags: dict
    log: list

    @property
    def last(self):
        """The record of the last evaluated epoch."""
        return self.log[-1]

    @property
    def unfinished(self):
        """Whether the last evaluated epoch is not the last of --epochs."""
        return self.last["epoch"] < self.flags["epochs"] - 1


def _read_text(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the --output_dir of a run that has evaluated an epoch.")
    return path.read_text(encoding="utf-8", errors="replace")


def read_flags(path):
    """The flags in a run.json, with the resolved values of world_size and amp.

    Raises FileNotFoundError if there is no such file, ValueError if semi_main.py did not write it.
    """
    try:
        record = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # a number may have too many digits, lists may be nested too deep
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}, line {line} is not JSON: restore the file or leave the run out.") from error
    flags = record.get("args") if isinstance(record, dict) else None
    if not isinstance(flags, dict) or not all(isinstance(flags.get(name), int) for name in ("epochs", "seed")):
        raise ValueError(f"{path} has no flags with epochs and seed: give the --output_dir of semi_main.py.")
    return flags | {name: record[name] for name in ("world_size", "amp") if name in record}


def is_figure(value):
    """Whether a JSON value is a number that a table can show, or null."""
    return value is None or isinstance(value, float) or type(value) is int and abs(value) < 2**62


def _is_record(record):
    """Whether a JSON value is what semi_main.py logs of an epoch: its number, and figures that may be missing."""
    if not isinstance(record, dict) or type(record.get("epoch")) is not int or record["epoch"] < 0:
        return False
    return all(map(is_figure, record.values()))


def read_log(path):
    """The records in a log.txt. If an epoch was trained again, its last record replaces the earlier ones.

    Raises FileNotFoundError if there is no such file, ValueError if it is empty or a line is not a record.
    """
    records = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: correct or remove the line.") from error
        if not _is_record(record):
            raise ValueError(f"{path}, line {number} is not the record of an epoch: correct or remove the line.")
        records = [earlier for earlier in records if earlier["epoch"] < record["epoch"]] + [record]
    if not records:
        raise ValueError(f"{path} is empty: wait until the run has evaluated an epoch, or leave it out.")
    return records


def read_runs(folders):
    """The Run of each folder. Raises ValueError for a folder given twice, and the errors of the readers."""
    folders = [Path(folder) for folder in folders]
    repeated = [folder for i, folder in enumerate(folders) if folder.resolve() in {x.resolve() for x in folders[:i]}]
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice: name each run once.")
    return [Run(folder, read_flags(folder / "run.json"), read_log(folder / "log.txt")) for folder in folders]


def why_no_run(folder):
    """Why a path is not the folder of a run that has evaluated an epoch, in words; None if it may be one."""
    if not folder.is_dir():
        return "it is no folder"
    for name in ("run.json", "log.txt"):
        if not (folder / name).is_file():
            return f"it has no {name}"
    return None if (folder / "log.txt").stat().st_size else "its log.txt is empty"


def runs_among(paths):
    """The Run of each path that is a run's folder; the other files and folders are named on stderr, a line each.

    Raises FileNotFoundError for a path that does not exist, ValueError if none is a run, and the errors of `read_runs`.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give an --output_dir of semi_main.py.")
    skipped = {path: reason for path in paths if (reason := why_no_run(path))}
    if len(skipped) == len(set(paths)):
        first, reason = next(iter(skipped.items()))
        none = f"{first} is not" if len(skipped) == 1 else f"None of these {len(skipped)} paths, such as {first}, is"
        raise ValueError(
            f"{none} the folder of a run that has evaluated an epoch, because {reason}: give an --output_dir of "
            "semi_main.py."
        )
    for path, reason in skipped.items():
        print(printable(f"Left out {path}, because {reason}."), file=sys.stderr)
    return read_runs([path for path in paths if path not in skipped])


def short_names(folders):
    """The shortest ends of the folders' paths, of the same number of parts, that are all different."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def without_seed(value, seed):
    """Replace the seed's number in a path, alone or after 'seed', by '{seed}'; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    return re.sub(rf"(^|[/_-]|seed)0*{seed}(?![a-zA-Z0-9]|\.\d)", r"\1{seed}", value)


def differing_flags(runs):
    """{flag: its value in each run} of the flags that differ by more than the seed's number in a path."""
    differing = {}
    for flag in dict.fromkeys(flag for run in runs for flag in run.flags if flag not in IGNORED_FLAGS):
        plain = [run.flags.get(flag, MISSING) for run in runs]
        masked = [without_seed(value, run.flags["seed"]) for value, run in zip(plain, runs)]
        values = min(plain, masked, key=lambda values: len(set(map(repr, values))))
        if len(set(map(repr, values))) > 1:
            differing[flag] = values
    return differing


def _sort_key(value):
    """A sort key for flag values: None first, then numbers, then everything else as text."""
    if value is None:
        return 0, 0, ""
    return (1, value, "") if isinstance(value, int | float) else (2, 0, str(value))


def group_runs(runs):
    """Group the runs into rows: (names of the differing flags, [(their values, runs of the row)]), sorted."""
    flags, groups = differing_flags(runs), {}
    for i, run in enumerate(runs):
        values = tuple(values[i] for values in flags.values())
        # Runs that stopped at different epochs are not averaged.
        groups.setdefault((repr(values), run.last["epoch"]), (values, []))[1].append(run)
    rows = sorted(groups.values(), key=lambda row: (*map(_sort_key, row[0]), row[1][0].last["epoch"]))
    return list(flags), rows


def mean_and_deviation(runs, meter):
    """Mean ± sample standard deviation of a meter at the runs' last epoch, as text; '-' where there is no value.

    Of a single value, the value alone.
    """
    scale, digits = (100, ".2f") if meter in SHARES else (1, ".2f" if "_acc" in meter else ".4g")
    values = [scale * run.last[meter] for run in runs if run.last.get(meter) is not None]
    if not values:
        return MISSING
    deviation = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 and math.isfinite(sum(values)) else ""
    coverage = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
    return f"{statistics.fmean(values):{digits}}{deviation}{coverage}"


def markdown(header, rows, left):
    """A Markdown table with padded columns; the first `left` columns are left-aligned, the others right-aligned."""
    rows = [[printable(cell, kept="").replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    rows = [[f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def compare(runs, metrics=()):
    """The Markdown table of the runs, with all COLUMNS or with the given meters of the log.

    Meters may be named without their prefix 'test_'. Raises ValueError for a meter that is in none of the logs.
    """
    known = {name for run in runs for name in run.last}
    columns = {} if metrics else COLUMNS
    for metric in metrics:
        name = f"test_{metric}" if f"test_{metric}" in known else metric
        if name not in known:
            raise ValueError(f"--metric {metric} is not in the last lines of these logs: choose from {sorted(known)}.")
        columns[name] = COLUMNS.get(name, name)
    flags, rows = group_runs(runs)
    names = dict(zip((run.folder for run in runs), short_names([run.folder for run in runs])))
    body = []
    for values, members in rows:
        # Folders that differ by the seed's number share a name; others are listed.
        called = dict.fromkeys(without_seed(names[run.folder], run.flags["seed"]) for run in members)
        name = ", ".join(called) if len(members) > 1 else names[members[0].folder]
        seeds = ", ".join(str(seed) for seed in sorted(run.flags["seed"] for run in members))
        epochs = members[0].last["epoch"] + 1
        epochs = f"{epochs} of {members[0].flags['epochs']}, unfinished" if members[0].unfinished else epochs
        body.append(
            [name, *values, len(members), seeds, epochs, *(mean_and_deviation(members, name) for name in columns)]
        )
    return markdown(["run", *flags, "n", "seeds", "epochs run", *columns.values()], body, 1 + len(flags))


def main(argv=None):
    """Read the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training run")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="show only this meter of the log; repeatable"
    )
    args = parser.parse_args(argv)
    try:
        print(compare(runs_among(args.runs), args.metric))
    except (ValueError, OSError) as error:
        sys.exit(printable(f"compare_runs.py: error: {error}"))


if __name__ == "__main__":
    main()
