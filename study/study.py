"""The study: named runs of semi_main.py on a small data set, with tables and plots.

    python -m study.study --suite methods --data-path FASHION --seeds 0 1 2 [--device cpu] [--output DIR]

The suites, in study/suites.py: `methods` compares Semiformer with labelled images alone, with the published pseudo
labels and with those of later methods, and with a CNN and a ViT alone; `trials` is the search for the settings;
`clipart` and `clipart-trials` are the same on colour pictures; `ablation` changes one flag of Semiformer at a time;
`smoke` does the same for 20 steps and verifies that each flag changes the quantity it should.

A suite has a folder, OUTPUT/SUITE-LABELS, with a folder for each run, seedN/NAME. When a run ends, its log becomes a
line of results.jsonl there. When started again, the study skips the runs that have a line, resumes the others, and
rewrites table.md and the plot. `--tune` evaluates on held-out training images, to choose settings.
Flags after `--` are added to those of every run.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from images.fashion import OWN_CLASSES, fashion, write_idx
from script.compare_runs import read_flags, read_log
from study import study_report
from study.make_clipart import write_clipart
from study.suites import LABELS, SUITES, TUNED, VALIDATION
from utils import environment

ROOT = Path(__file__).resolve().parents[1]
_WRITING = threading.Lock()


# ---------------------------------------------------------------------------------------------- data


def write_part(folder, source, train, val):
    """Write a data set in Fashion-MNIST's format from the training images of another: [0, train) and the last `val`."""
    samples = fashion(source, "train")
    folder.mkdir(parents=True)
    for prefix, places in (("train", slice(0, train)), ("t10k", slice(-val, None))):
        write_idx(folder, f"{prefix}-images-idx3-ubyte", samples.source.images[places])
        write_idx(folder, f"{prefix}-labels-idx1-ubyte", samples.targets[places].astype(np.uint8))
    (folder / OWN_CLASSES).write_text("\n".join(samples.classes) + "\n", encoding="utf-8")


def write_labelled(path, source, labels, seed):
    """Write a split file of `labels` training images, drawn by the seed, the same number of each class."""
    targets, rng = fashion(source, "train").targets, np.random.default_rng(seed)
    drawn = [rng.choice(np.flatnonzero(targets == c), labels // 10, replace=False) for c in range(10)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in np.sort(np.concatenate(drawn))))


def prepare(suite, folder, source, labels, seed, tune):
    """Make the data of a suite and a seed where they are missing; returns (data path, split file)."""
    own = folder / f"seed{seed}"
    if suite.startswith("clipart"):
        data, split = own / "data", own / "data/labelled.txt"
        if not split.is_file():  # it is written last
            write_clipart(data, labels, seed, tune, source)
        return data, split
    if tune or suite == "smoke":
        part = folder / "part"
        if not part.is_dir():
            write_part(part, source, *((55_000, VALIDATION) if tune else (400, 100)))
        source = part
    write_labelled(own / "labelled.txt", source, labels, seed)
    return source, own / "labelled.txt"


# ---------------------------------------------------------------------------------------------- running


def finished(results, name, seed, flags):
    """Whether the results have a line of this run. Raises ValueError if it is of other flags."""
    for line in study_report.read_results(results):
        if (line["name"], line["seed"]) == (name, seed):
            if line["flags"] != flags:
                raise ValueError(
                    f"{results} has {name}, seed {seed}, with other flags ({line['flags']}): remove its line and its "
                    "folder, or choose another --output."
                )
            return True
    return False


def run(folder, flags, places, threads):
    """Run semi_main.py with these flags to its end, resuming where it stopped. Raises RuntimeError if it fails.

    Args:
        places: more flags, which are not part of the results: of the data, the device and the seed.
    Returns {"seconds", "cpu_seconds"} of all its attempts, wall and CPU, which are kept in spent.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, start = folder / "spent.json", time.time()
    earlier = json.loads(record.read_text()) if record.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}
    command = [sys.executable, str(ROOT / "semi_main.py"), *flags.split(), *places]
    command += ["--output_dir", str(folder), "--resume", "auto"]
    with open(folder / "out.txt", "a", encoding="utf-8") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        # Unlike process.wait(), wait4 returns the CPU time, which means more than wall time on a shared machine.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    spent = {"seconds": time.time() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    entry = {name: earlier[name] + spent[name] for name in spent}
    record.write_text(json.dumps(entry) + "\n")
    print(f"{folder}: {'done' if status == 0 else 'failed'} after {entry['seconds']:.0f} s", flush=True)
    if status:
        lines = (folder / "out.txt").read_text().strip().splitlines() or [""]
        cause = next((line for line in reversed(lines) if "error: " in line), lines[-1])
        raise RuntimeError(f"{folder} ended with status {process.returncode}: {cause} (see its out.txt)")
    return entry


def run_all(args, folder, tune):
    """Run the suite's runs for every seed, `--jobs` at a time, and add a line to the results for each that ends."""
    results, threads = folder / "results.jsonl", max(1, (os.cpu_count() or 1) // args.jobs)

    def run_and_record(name, seed, flags, data, split):
        if finished(results, name, seed, flags):
            return
        run_folder = folder / f"seed{seed}" / name
        places = ["--device", args.device, "--data-path", str(data), "--data-split-file", str(split)]
        spent = run(run_folder, flags, [*places, "--seed", str(seed)], threads)
        line = {"name": name, "seed": seed, "labels": args.labels, "flags": flags} | spent
        versions = {key: value for key, value in environment().items() if key in ("revision", "torch", "timm")}
        line |= versions | {"args": study_report.kept_flags(read_flags(run_folder / "run.json"))}
        line |= {"log": study_report.kept_figures(read_log(run_folder / "log.txt"))}
        with _WRITING, open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    jobs = []
    for seed in args.seeds:
        places = prepare(args.suite, folder, Path(args.data_path).resolve(), args.labels, seed, tune)
        for name, flags in SUITES[args.suite].items():
            if not args.only or name in args.only:
                jobs.append((name, seed, " ".join(f"{flags} {' '.join(args.flags)}".split()), *places))
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run_and_record, *job) for job in jobs]:
            future.result()


def main():
    """Run what is missing, write the report, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="methods", help="the suite to run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of labelled images and training")
    parser.add_argument(
        "--data-path",
        required=True,
        help="folder of Fashion-MNIST's idx files, downloaded there if missing; for the suites clipart and "
        "clipart-trials, the folder png of Debian's openclipart-png",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for every run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "output/study", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, which share the CPU cores evenly")
    parser.add_argument("--labels", type=int, help="number of labelled images, a multiple of 10 (default: the suite's)")
    parser.add_argument("--tune", action="store_true", help=f"evaluate on {VALIDATION} held-out training images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these runs of the suite")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of semi_main.py for every run")
    args = parser.parse_args()
    args.labels = args.labels or LABELS[args.suite]
    tune = args.tune or args.suite in TUNED
    folder = (args.output / f"{args.suite}-{args.labels}{'-tune' * args.tune}").resolve()
    try:
        run_all(args, folder, tune)
        print(study_report.write_report(args.suite, folder, args.seeds))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"study.py: error: {error}")


if __name__ == "__main__":
    main()
