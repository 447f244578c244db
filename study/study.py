"""Test the paper's claims on a small scale, on Fashion-MNIST or MNIST: named runs of semi_main.py, a table, and plots.

    python -m study.study --suite main --data-path FASHION --seeds 0 1 2 [--device cpu] [--output DIR]

The suite `main` compares a ViT, a CNN and Semiformer, each trained on labelled images alone and with pseudo labels.
`ablation` changes one flag of Semiformer at a time. `smoke` does the same for 20 steps and verifies that each flag
changes the quantity it should. Each run has a folder, OUTPUT/SUITE/seedN/NAME. When started again, the study skips
finished runs, resumes the others, and rewrites table.md and the plots. `--tune` evaluates on held-out training images,
to choose settings. Flags after `--` are added to those of every run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from images.fashion import OWN_CLASSES, fashion, write_idx
from study import study_report

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------- named runs

LABELS, VALIDATION = 100, 2000
COMMON = """--data-set FASHION --input-size 64 --amp bf16 --warmup-epochs 0 --mixup 0 --cutmix 0
    --no-repeated-aug --smoothing 0 --drop-path 0 --num_workers 0"""
LENGTH = "--epochs 30 --steps-per-epoch 100 --evaluate-freq 5 --no-model-ema"
SUPERVISED = "--supervise-only --batch-size 8"  # 4 images, as in SEMI, are too few for BatchNorm's statistics
SEMI = "--batch-size 16 --mu 0.25 --threshold 0.9 --semi-lambda 1"
NETWORKS = {  # within 20 % of one another in parameters
    "vit": "--model deit_micro_patch16_224 --lr 1e-3",
    "cnn": "--model conv_micro --lr 1e-3",
    "semiformer": "--model Semiformer_micro_patch16 --lr 1e-3",
}
MAIN = {
    f"{network}-{how}": f"{COMMON} {LENGTH} {flags} {learning}"
    for network, flags in NETWORKS.items()
    for how, learning in (("supervised", SUPERVISED), ("semi", SEMI))
}
# What each flag must change besides the accuracy: meters of the log, or entries of run.json.
POLICIES = """transformer fuse softmax_fuse Vote_equal Vote_cnnBias Vote_larger Vote_larger2 Vote_equal2 weight_v1
    weight_v2 weight_v3 weight_v4 weight_v5 weight_v6""".split()
PSEUDO = ("train_mask_rate", "train_loss_0_u", "train_loss_1_u")
CHANGES = {  # name: (flags, quantities that must differ from the baseline's)
    **{f"policy-{name}": (f"--pseudo-type {name}", PSEUDO) for name in POLICIES},
    "no-fusion": ("--remove-fcu", ("train_loss_0", "train_loss_1")),
    "threshold": ("--threshold 0.5", ("train_mask_rate",)),
    "mu": ("--mu 0.125", ("labelled", "unlabelled")),
    "lambda": ("--semi-lambda 4", ("train_loss",)),
    "smoothing": ("--smoothing 0.1", ("train_loss_0", "train_loss_1")),
    "unlabelled-smoothing": ("--smoothing 0.1 --unlabel-smooth", ("train_loss_0_u", "train_loss_1_u")),
    "ema": ("--model-ema-decay 0.9", ("test_ema_acc1", "test_ema_loss")),
    "consistency-triplet": ("--dual-consistency", ("train_loss_consistency",)),
    "consistency-infonce": ("--dual-consistency --consistency-type infonce", ("train_loss_consistency",)),
    "position-embedding": ("--model Semiformer_PE_micro_patch16", ("n_parameters",)),
    "labelled-excluded": ("--unlabelDataset_exclude_labeledData", ("unlabelled_images",)),
}
BASE = MAIN["semiformer-semi"].replace("--no-model-ema", "--model-ema-decay 0.99")
ABLATION = {"baseline": BASE} | {name: f"{BASE} {flags}" for name, (flags, _) in CHANGES.items()}
# The temperature is so low that an untrained network is confident of some images. The log has a line every five steps.
BRIEF = "--epochs 4 --steps-per-epoch 5 --evaluate-freq 1 --batch-size 16 --temperature 0.15 --threshold 0.7"
SMOKE = {"baseline": f"{BASE} {BRIEF}"} | {name: f"{BASE} {BRIEF} {flags}" for name, (flags, _) in CHANGES.items()}
SUITES = {"main": MAIN, "ablation": ABLATION, "smoke": SMOKE}


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


# ---------------------------------------------------------------------------------------------- running


def finished(folder, flags):
    """Whether the run in this folder reached its last epoch. Raises ValueError if it had other flags."""
    record = folder / "study.json"
    if not record.is_file():
        return False
    earlier = json.loads(record.read_text())
    if earlier["flags"] != flags:
        raise ValueError(
            f"{folder} was run with other flags ({earlier['flags']}): remove it or choose another --output."
        )
    return earlier["finished"]


def run(folder, flags, threads):
    """Run semi_main.py with these flags to its end, resuming where it stopped. Raises RuntimeError if it fails.

    Writes study.json: the flags, whether the run finished, and the wall and CPU seconds of all its attempts.
    """
    if finished(folder, flags):
        return
    folder.mkdir(parents=True, exist_ok=True)
    record, start = folder / "study.json", time.time()
    earlier = json.loads(record.read_text()) if record.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}
    command = [sys.executable, str(ROOT / "semi_main.py"), *flags.split()]
    command += ["--output_dir", str(folder), "--resume", "auto"]
    with open(folder / "out.txt", "a", encoding="utf-8") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        # Unlike process.wait(), wait4 returns the CPU time, which means more than wall time on a shared machine.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    spent = {"seconds": time.time() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    entry = {"flags": flags, "finished": status == 0} | {name: earlier[name] + spent[name] for name in spent}
    record.write_text(json.dumps(entry, indent=2) + "\n")
    print(f"{folder}: {'done' if status == 0 else 'failed'} after {entry['seconds']:.0f} s", flush=True)
    if status:
        lines = (folder / "out.txt").read_text().strip().splitlines() or [""]
        cause = next((line for line in reversed(lines) if "error: " in line), lines[-1])
        raise RuntimeError(f"{folder} ended with status {process.returncode}: {cause} (see its out.txt)")


def run_all(args, folder, data):
    """Run the suite's runs for every seed, `--jobs` at a time."""
    jobs = []
    for seed in args.seeds:
        split = folder / f"seed{seed}/labelled.txt"
        write_labelled(split, data, args.labels, seed)
        for name, flags in SUITES[args.suite].items():
            if not args.only or name in args.only:
                more = f"--device {args.device} --data-path {data} --data-split-file {split} --seed {seed}"
                jobs.append((split.parent / name, " ".join(f"{flags} {more} {' '.join(args.flags)}".split())))
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run, *job, threads) for job in jobs]:
            future.result()


def main():
    """Run what is missing, write the report, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="main", help="the suite to run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of labelled images and training")
    parser.add_argument(
        "--data-path", required=True, help="folder of Fashion-MNIST's idx files, downloaded there if missing"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for every run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "output/study", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs, which share the CPU cores evenly")
    parser.add_argument("--labels", type=int, default=LABELS, help="number of labelled images, a multiple of 10")
    parser.add_argument("--tune", action="store_true", help=f"evaluate on {VALIDATION} held-out training images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these runs of the suite")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of semi_main.py for every run")
    args = parser.parse_args()
    folder = (args.output / args.suite).resolve()
    try:
        data = Path(args.data_path).resolve()
        if args.tune or args.suite == "smoke":
            part = folder / "part"
            if not part.is_dir():
                write_part(part, data, *((55_000, VALIDATION) if args.tune else (400, 100)))
            data = part
        run_all(args, folder, data)
        print(study_report.write_report(args.suite, folder, SUITES[args.suite], args.seeds, CHANGES))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"study.py: error: {error}")


if __name__ == "__main__":
    main()
