"""One Markdown table of several training runs: the flags that differ and the results, mean ± deviation over seeds.

    python -m script.compare_runs output/*/ [--metric acc1]

A RUN is an --output_dir of semi_main.py. Runs that differ in nothing but the seed, the folder of the results and
the seed's number in a path (data/seed0, data/seed1) share a row; so do runs stopped after the same epoch, marked
unfinished. Results are those of the last log line, the deviation is the sample's (n - 1).
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = ("output_dir", "resume", "seed", "num_workers", "tensorboard")
COLUMNS = {
    "test_acc1": "top-1 %",
    "test_acc1_head1": "CNN %",
    "test_acc1_head2": "transformer %",
    "test_ema_acc1": "EMA %",
    "train_pseudo_acc": "pseudo-label acc. %",
    "train_mask_rate": "mask rate %",
}
SHARES = ("train_pseudo_acc", "train_mask_rate", "train_agreement")  # logged as 0..1, shown in percent
NOTHING = "-"


@dataclass(frozen=True)
class Run:
    """What a training run left in its folder: the flags in force and a record an evaluated epoch."""

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


def _text(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the --output_dir of a run that has evaluated an epoch.")
    return path.read_text(encoding="utf-8", errors="replace")


def read_flags(path):
    """The flags of a run.json, world_size and amp as they came out.

    Raises FileNotFoundError where there is none, ValueError where semi_main.py did not write it.
    """
    try:
        record = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON: restore the file or leave the run out.") from error
    flags = record.get("args") if isinstance(record, dict) else None
    if not isinstance(flags, dict) or not all(isinstance(flags.get(name), int) for name in ("epochs", "seed")):
        raise ValueError(f"{path} has no flags with epochs and seed: give the --output_dir of semi_main.py.")
    return flags | {name: record[name] for name in ("world_size", "amp") if name in record}


def read_log(path):
    """The records of a log.txt; where an epoch was trained again, the later attempt replaces the earlier.

    Raises FileNotFoundError where there is none, ValueError where it is empty or a line is not a record.
    """
    records = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: mend or remove the line.") from error
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise ValueError(f"{path}, line {number} is not the record of an epoch: mend or remove the line.")
        records = [earlier for earlier in records if earlier["epoch"] < record["epoch"]] + [record]
    if not records:
        raise ValueError(f"{path} is empty: wait until the run has evaluated an epoch, or leave it out.")
    return records


def read_runs(folders):
    """The Run of each folder. Raises ValueError for a folder given twice, and what the readers raise."""
    folders = [Path(folder) for folder in folders]
    twice = [folder for i, folder in enumerate(folders) if folder.resolve() in {x.resolve() for x in folders[:i]}]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: name each run once.")
    return [Run(folder, read_flags(folder / "run.json"), read_log(folder / "log.txt")) for folder in folders]


def without_seed(value, seed):
    """A path with the seed's number, where it stands alone or after 'seed', as {seed}; other values as they are."""
    if not isinstance(value, str):
        return value
    return re.sub(rf"(^|[/_-]|seed)0*{seed}(?![a-zA-Z0-9]|\.\d)", r"\1{seed}", value)


def differing_flags(runs):
    """{flag: its value in each run}, of the flags that differ otherwise than along with the seed."""
    found = {}
    for flag in dict.fromkeys(flag for run in runs for flag in run.flags if flag not in LEFT_OUT):
        plain = [run.flags.get(flag, NOTHING) for run in runs]
        masked = [without_seed(value, run.flags["seed"]) for value, run in zip(plain, runs)]
        values = min(plain, masked, key=lambda values: len(set(map(repr, values))))
        if len(set(map(repr, values))) > 1:
            found[flag] = values
    return found


def _order(value):
    """A sort key for flag values: None, then numbers, then everything else as text."""
    if value is None:
        return 0, 0, ""
    return (1, value, "") if isinstance(value, int | float) else (2, 0, str(value))


def groups(runs):
    """(names of the differing flags, [(their values, runs)] sorted by the values, then by epochs trained)."""
    flags, found = differing_flags(runs), {}
    for i, run in enumerate(runs):
        values = tuple(values[i] for values in flags.values())
        # A mean over runs stopped at different epochs says nothing: each has its own row.
        found.setdefault((repr(values), run.last["epoch"]), (values, []))[1].append(run)
    rows = sorted(found.values(), key=lambda row: (*map(_order, row[0]), row[1][0].last["epoch"]))
    return list(flags), rows


def result(runs, meter):
    """Mean ± sample standard deviation of a meter at the runs' last epoch, as text; '-' for what there is not."""
    scale, digits = (100, ".2f") if meter in SHARES else (1, ".2f" if "_acc" in meter else ".4g")
    values = [scale * run.last[meter] for run in runs if run.last.get(meter) is not None]
    if not values:
        return NOTHING
    deviation = format(statistics.stdev(values), digits) if len(values) > 1 else NOTHING
    some = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
    return f"{statistics.fmean(values):{digits}} ± {deviation}{some}"


def markdown(header, rows, left):
    """A Markdown table with its columns padded; the first `left` columns are left-aligned, the others right."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    rows = [[f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def compare(runs, metrics=()):
    """The table of the runs, of all COLUMNS or of these meters of the log, with or without their 'test_'.

    Raises ValueError for a meter that is in none of the logs.
    """
    known = {name for run in runs for name in run.last}
    columns = {} if metrics else COLUMNS
    for metric in metrics:
        name = f"test_{metric}" if f"test_{metric}" in known else metric
        if name not in known:
            raise ValueError(f"--metric {metric} is not in the last lines of these logs: choose of {sorted(known)}.")
        columns[name] = COLUMNS.get(name, name)
    flags, rows = groups(runs)
    body = []
    for values, members in rows:
        seeds = ", ".join(str(seed) for seed in sorted(run.flags["seed"] for run in members))
        epochs = members[0].last["epoch"] + 1
        epochs = f"{epochs} of {members[0].flags['epochs']}, unfinished" if members[0].unfinished else epochs
        body.append([*values, len(members), seeds, epochs, *(result(members, name) for name in columns)])
    return markdown([*flags, "n", "seeds", "epochs run", *columns.values()], body, len(flags))


def main(words=None):
    """Parse, read the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training run")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="show this meter of the log only; repeatable"
    )
    args = parser.parse_args(words)
    try:
        print(compare(read_runs(args.runs), args.metric))
    except (ValueError, OSError) as error:
        sys.exit(f"compare_runs.py: error: {error}")


if __name__ == "__main__":
    main()
