"""Demonstrate the paper's claim on scikit-learn's digits: pseudo labels help where there are few labels.

    bash script/demo.sh [--seeds 0 1 2] [--output DIR] [--labels 40] [-- FLAGS]

For each seed: write the digits as a folder in ImageNet layout, train on the labelled images alone, then on the same
ones and the other training images without their labels, for as many optimizer steps. Each training is `semi_main.py`
in two processes under torchrun; FLAGS are added to both. The settings were chosen on seeds 10 to 14 with `--tune`,
which evaluates on 300 images of the training part; docs/demo.md has the trials. Results are those on the 500 test
images, after the last step.
"""

import argparse
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from script.compare_runs import markdown
from study.make_digits import divide, write_digits

ROOT = Path(__file__).resolve().parent.parent
STEPS, EPOCHS, PROCESSES = 100, 8, 2
MINUTES = 4  # of a seed, on two CPU cores
# Digits have no mirror image, and a crop of less than most of one shows another digit, or none.
COMMON = """--device cpu --data-set SEMI-IMNET --model Semiformer_micro_patch16 --input-size 48 --evaluate-freq 1
    --lr 1e-3 --warmup-epochs 0 --drop-path 0 --mixup 0 --cutmix 0 --no-repeated-aug --smoothing 0 --aa none
    --color-jitter 0 --hflip 0 --scale 0.7 1 --model-ema-decay 0.99 --num_workers 0"""
RUNS = {  # name: (title, flags)
    "supervised": ("labelled images only", "--supervise-only --batch-size 8"),
    # The first confident predictions of a network that has hardly trained are often wrong and mostly of one class,
    # and training on them confirms them. So pseudo labels begin after three epochs and must be very confident.
    "semi": ("with pseudo labels", "--batch-size 32 --mu 0.25 --semi-start-epoch 3 --threshold 0.95 --semi-lambda 1"),
}
COLUMNS = {"test_acc1": "both streams", "test_acc1_head1": "CNN stream", "test_acc1_head2": "transformer stream"}


def read_log(folder):
    """The records of a run's log.txt so far."""
    path = folder / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def train(folder, title, flags):
    """Run semi_main.py to its end with a progress bar; returns the records of its log.txt.

    Raises RuntimeError with the cause where it fails; out.txt has all of its output.
    """
    folder.mkdir(parents=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command = [*launcher, str(ROOT / "semi_main.py"), *flags, "--output_dir", str(folder)]
    bar = tqdm(total=EPOCHS * STEPS, desc=title, bar_format="{desc}: {bar:30} {n_fmt}/{total_fmt} steps{postfix}")
    with open(folder / "out.txt", "wb") as out, bar:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        running = True
        while running:
            time.sleep(0.5)
            running = process.poll() is None
            log = read_log(folder)
            if len(log) * STEPS > bar.n:
                bar.set_postfix_str(f"top-1 {log[-1]['test_acc1']:.1f} %", refresh=False)
                bar.n = len(log) * STEPS
                bar.refresh()
    if process.returncode:
        lines = (folder / "out.txt").read_text(errors="replace").strip().splitlines()
        cause = next((line for line in lines if "error: " in line), lines[-1])  # torchrun's own report follows it
        raise RuntimeError(f"{title.strip()} failed: {cause} (all of its output is in {folder / 'out.txt'})")
    return log


def run_seed(folder, seed, labels, tune, more=()):
    """Train both runs of a seed; returns {name of the run: records of its log.txt}."""
    write_digits(folder / "data", labels, seed, tune)
    data = ["--data-path", str(folder / "data"), "--data-split-file", str(folder / "data/labelled.txt")]
    length = ["--epochs", str(EPOCHS), "--steps-per-epoch", str(STEPS), "--seed", str(seed)]
    return {
        name: train(folder / name, f"seed {seed}, {title:20}", [*COMMON.split(), *flags.split(), *data, *length, *more])
        for name, (title, flags) in RUNS.items()
    }


def mean_and_error(values):
    """Mean and, of several values, its standard error, as text."""
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}"


def table(results):
    """A Markdown table of the final top-1, a row a run and one of the differences, as means over the seeds."""
    final = {name: {key: np.array([logs[name][-1][key] for logs in results]) for key in COLUMNS} for name in RUNS}
    rows = [[title, *(mean_and_error(final[name][key]) for key in COLUMNS)] for name, (title, _) in RUNS.items()]
    gains = [final["semi"][key] - final["supervised"][key] for key in COLUMNS]
    rows.append(["difference", *(("+" if gain.mean() >= 0 else "") + mean_and_error(gain) for gain in gains)])
    return markdown(["top-1, %", *COLUMNS.values()], rows, 1), gains


def conclusion(gains):
    """A sentence about the gains of both streams together, the CNN and the transformer, an array of seeds each."""
    both, cnn, transformer = (gain.mean() for gain in gains)
    if both <= 0:
        return "Here the pseudo labels did not help: docs/troubleshooting.md explains what to look at."
    sentence = f"The pseudo labels are worth {both:.1f} points of top-1."
    if transformer > cnn:
        sentence += (
            " The transformer, which learns least from few labels, gains most: the CNN labels more images for it."
        )
    return sentence


def draw(results, picture):
    """Plot top-1 over optimizer steps, of the summed logits and of each stream, with a line for each seed."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    colours = {"supervised": ("#D55E00", "--"), "semi": ("#0072B2", "-")}
    for axis, (meter, title) in zip(axes, COLUMNS.items()):
        for name, (colour, style) in colours.items():
            for i, logs in enumerate(results):
                steps = [(record["epoch"] + 1) * STEPS for record in logs[name]]
                axis.plot(steps, [record[meter] for record in logs[name]], style, color=colour, marker="o",
                          markersize=3, label=RUNS[name][0] if i == 0 else None)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1, %")
    axes[0].legend(loc="lower right")
    figure.savefig(picture, dpi=110)


def introduction(args):
    """What the demonstration is about to do."""
    train_images, test_images = map(len, divide(1797, args.tune))
    return textwrap.fill(
        f"Semiformer learns handwritten digits from {args.labels} labelled images: first from these alone, then from "
        f"the same {args.labels} and {train_images - args.labels:,} images without labels. Both trainings take "
        f"{EPOCHS * STEPS} optimizer steps and are evaluated on {test_images} other images. "
        f"A seed takes about {MINUTES} minutes on two CPU cores.",
        width=100,
    )


def main():
    """Run every seed, plot, and print the results; the last line has the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of labelled images and training")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for data, runs and picture")
    parser.add_argument("--labels", type=int, default=40, help="labelled images, a multiple of 10")
    parser.add_argument("--tune", action="store_true", help="evaluate on training images, to choose settings")
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: flags of semi_main.py for both trainings")
    args = parser.parse_args()
    start, folders, results = time.time(), [args.output / f"seed{seed}" for seed in args.seeds], []
    if old := [folder for folder in folders if folder.exists()]:
        sys.exit(f"demo.py: error: {old[0]} exists from an earlier run: remove it or choose another --output.")
    print(introduction(args), "\n", flush=True)
    try:
        for seed, folder in zip(args.seeds, folders):
            results.append(run_seed(folder, seed, args.labels, args.tune, args.flags))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"demo.py: error: {error}")
    picture = args.output / "curves.png"
    draw(results, picture)
    text, gains = table(results)
    print(f"\n{text}\n\n{conclusion(gains)}\n\nThe curves are in {picture}. What to try next:\n")
    for command, purpose in (
        (f"python -m script.plot_log {folders[0] / 'semi'}", "losses and pseudo labels of a training"),
        ("bash script/demo.sh --seeds 1 2 3", "other labelled images"),
        ("docs/own_data.md", "your own images"),
    ):
        print(f"  {command:55} {purpose}")
    print()
    mean = {name: np.mean([logs[name][-1]["test_acc1"] for logs in results]) for name in RUNS}
    print(
        f"supervised={mean['supervised']:.1f} semi={mean['semi']:.1f} steps={STEPS * EPOCHS} "
        f"seconds={time.time() - start:.0f} picture={picture}"
    )


if __name__ == "__main__":
    main()
