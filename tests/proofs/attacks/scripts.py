"""Attacks on the tools, through the files of a run and through their own flags."""

import json
import os
import shutil

from tests.proofs.attacks.images import shown
from tests.proofs.attacks.sandbox import DONE, EITHER, REFUSED, add_run, cases, command, fill


def reading(program, *words, log=None, run=None, spoil=None):
    """Prepare a run whose log.txt or run.json is other bytes, or what a function makes; let a tool read its folder."""

    def prepare(box):
        folder = add_run(box, "run")
        for name, content in (("log.txt", log), ("run.json", run)):
            if content is not None:
                fill(folder / name, content)
        if spoil:
            spoil(folder)
        (box / "out").mkdir()
        return command(program, *words)

    return prepare


def compare(*words, **spoilt):
    """Prepare such a run and show it in a table."""
    return reading("script.compare_runs", "run", *words, **spoilt)


def plot(*words, **spoilt):
    """Prepare such a run and plot it."""
    return reading("script.plot_log", *(words or ("run", "--output", "out/log.png")), **spoilt)


def export(*words, evaluated=None, **spoilt):
    """Prepare such a run, with an eval.json of these bytes or made by this function, and export it."""

    def spoil(folder):
        fill(folder / "eval.json", evaluated)

    given = "--checkpoint", "run/checkpoint.pth", "--output", "out", "--no-onnx"
    return reading("script.export", *given, *words, spoil=evaluated and spoil, **spoilt)


def tool(program, words, make=None):
    """Prepare a sandbox by a function, if there is one, and run a tool with these flags, a text."""

    def prepare(box):
        if make:
            (box / "out").mkdir()
            make(box)
        return command(program, *words.split())

    return prepare


def _record(**values):
    return json.dumps({"epoch": 1, "test_acc1": 50.0} | values).encode() + b"\n"


def _renamed(folder):
    folder.rename(f"{folder}\x1b[2J\n")


GARBAGE, DEEP = bytes(range(256)) * 40, b"[" * 100_000
SPLIT = "data_splits.make_split"
RUNS = [  # (what is wrong with a run, its files, words of the message of compare_runs and plot_log)
    ("no run", {"spoil": shutil.rmtree}, "does not exist"),
    ("an empty log", {"log": b""}, "log.txt is empty"),
    ("a log of garbage", {"log": GARBAGE}, "log.txt, line 1 is not JSON"),
    ("a log nested 100,000 deep", {"log": DEEP}, "log.txt, line 1 is not JSON"),
    ("a log of lists", {"log": b"[1]\n"}, "is not the record of an epoch"),
    ("an epoch of 5,000 digits", {"log": b'{"epoch": ' + b"9" * 5000 + b"}\n"}, "log.txt, line 1 is not JSON"),
    ("an epoch of 300 digits", {"log": _record(epoch=10**300)}, "is not the record of an epoch"),
    ("figures that are texts", {"log": _record(test_acc1="x", train_loss="y")}, "is not the record of an epoch"),
    ("a log that is a FIFO", {"log": os.mkfifo}, "log.txt"),
    ("flags of garbage", {"run": GARBAGE}, "run.json, line 1 is not JSON"),
    ("flags nested 100,000 deep", {"run": DEEP}, "run.json, line 1 is not JSON"),
    ("flags that are a list", {"run": b"[1, 2]"}, "run.json has no flags"),
    ("flags of other types", {"run": b'{"args": {"epochs": "x", "seed": 0}}'}, "run.json has no flags"),
    ("flags that are a FIFO", {"run": os.mkfifo}, "run.json"),
]
EVALUATIONS = {
    "garbage": GARBAGE, "nested 100,000 deep": DEEP, "a list": b"[1]", "a FIFO": os.mkfifo, "a folder": os.mkdir,
    "texts": b'{"epoch": 1, "checkpoint": "checkpoint.pth", "acc1": "x"}',
}  # fmt: skip
FLAGS = [  # (tool, its flags, words of the message)
    *((SPLIT, f"data/train out {words}", expected) for words, expected in (
        ("--fraction nan", "--fraction nan"), ("--fraction 2", "--fraction"), ("--per-class 9", "--per-class asks"),
        ("--fraction 0.5 --seed -1", "--seed -1"), ("--fraction 0.5 --shards 0", "--shards 0"),
        ("--fraction 0.5 --shards 1000000000000", "--shards 1000000000000"), ("", "--fraction"))),
    (SPLIT, "data data/train/a --fraction 1", "lies in data"), (SPLIT, "none out --fraction 1", "no folder none"),
    *(("script.check_images", words, expected) for words, expected in (
        ("none", "There is no folder none"), ("data/labelled.txt", "There is no folder"), ("tmp", "no image below"),
        ("data --workers 0", "--workers 0"), ("data --output data", "data"), ("data --output none/x", "none/x"),
        ("data --output data/val/class0/c0_0.png", "is one of the images"))),
]  # fmt: skip
SHOWN = [
    ("--images 0", "--images 0"), ("--images 9999999", "--images"), ("--data-path none", "none"),
    ("--output a.txt", "end it in .png"), ("--output none/a.png", "none/a.png"), ("--lr nan", "--lr"),
    ("--data-split-file data", "data"), ("--seed 100000000000000000000", "--seed"),
]  # fmt: skip
CASES = cases(
    "scripts",
    *((f"compare_runs: {name}", compare(**spoilt), REFUSED, words) for name, spoilt, words in RUNS),
    *((f"plot_log: {name}", plot(**spoilt), REFUSED, words) for name, spoilt, words in RUNS),
    ("compare_runs: figures that are nan", compare(log=_record(test_acc1=float("nan"))), DONE, "nan"),
    ("compare_runs: one run twice", compare("./run"), REFUSED, "twice"),
    ("compare_runs: an unknown --metric", compare("--metric", "x"), REFUSED, "--metric x"),
    ("plot_log: figures that are infinite", plot(log=_record(test_acc1=float("inf"))), EITHER),
    ("plot_log: --output is no PNG", plot("run", "--output", "out/a.pdf"), REFUSED, "end it in .png"),
    ("plot_log: --output in no folder", plot("run", "--output", "none/a.png"), REFUSED, "none/a.png"),
    ("plot_log: a name of escapes", plot("run\x1b[2J\n", "--output", "out/a.png", spoil=_renamed), DONE),
    *((f"export: eval.json is {name}", export(evaluated=content), REFUSED, "eval.json")
      for name, content in EVALUATIONS.items()),
    *((f"export: run.json is {name}", export(run=content), REFUSED, "run.json")
      for name, content in EVALUATIONS.items() if name not in ("texts", "a folder")),
    ("export: log.txt is garbage", export(log=GARBAGE), DONE, "Exported"),
    ("export: log.txt has lists", export(log=b"[1]\n5\nnull\n" + DEEP), DONE, "Exported"),
    ("export: --output is a file", export("--output", "data/labelled.txt"), REFUSED, "labelled.txt"),
    *((f"show_views {words}", shown(*words.split()), REFUSED, expected) for words, expected in SHOWN),
    *((f"{program.split('.')[1]} {words}", tool(program, words), REFUSED, expected)
      for program, words, expected in FLAGS),
    ("make_split: another list is there", tool(SPLIT, "data/train out --fraction 1", lambda box: (
        (box / "out/all.txt").write_text("x"))), REFUSED, "holds another list"),
    ("make_split: all.txt is a FIFO", tool(SPLIT, "data/train out --fraction 1", lambda box: (
        os.mkfifo(box / "out/all.txt"))), REFUSED, "all.txt"),
    ("check_images: a million workers", tool("script.check_images", "data --workers 1000000"), DONE),
)  # fmt: skip
