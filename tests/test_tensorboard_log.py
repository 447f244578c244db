"""--tensorboard: what is drawn at which step, over a resumed run, and what a full disk or a missing package does."""

import argparse
import errno
import importlib.util
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import semi_main
from options import get_args_parser
from tests.trees import make_tree
from training import tensorboard_log

FLAGS = (
    "--data-set SEMI-IMNET --model resnet10t --input-size 40 --drop-path 0 --batch-size 6 --mu 0.34 --threshold 0.3 "
    "--steps-per-epoch 12 --semi-start-epoch 1 --warmup-epochs 0 --mixup 0 --cutmix 0 --num_workers 0 --device cpu "
    "--no-repeated-aug --no-model-ema --resume auto"
)
LINES = [0, 10, 11]  # of an epoch of 12 steps


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    tree = make_tree(tmp_path_factory.mktemp("tree"), classes=2, val=2)
    return [*FLAGS.split(), "--data-path", str(tree), "--data-split-file", str(tree / "labelled.txt")]


def run(words, folder, *more):
    flags = [*words, "--output_dir", str(folder), *more]
    semi_main.main(argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(flags))


def shown(folder):
    """{tag: {step: value}} as TensorBoard shows it; every step once and in order."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for each in points.values():
        assert [step for step, _ in each] == sorted({step for step, _ in each})
    return {tag: dict(each) for tag, each in points.items()}


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_resumed_run_continues_its_curves_and_the_log_is_that_of_a_run_without(words, tmp_path):
    run(words, tmp_path, "--epochs", "2", "--tensorboard")
    first, (supervised, semi) = shown(tmp_path), log(tmp_path)
    steps = [*LINES, *(12 + line for line in LINES)]
    assert list(first["train/loss"]) == list(first["train/lr"]) == list(first["train/grad_norm"]) == steps
    assert list(first["train/mask_rate"]) == list(first["train/loss_u"]) == steps[3:]
    pace = {"images_per_second", "step_seconds", "data_seconds", "memory_gib"}
    parts = {name.removeprefix("train_") for name in semi if name.startswith("train_")} - {"bad_images"}
    assert set(first) >= {f"train/{name}" for name in (parts - {"pseudo_acc"}) | pace | {"grad_norm"}}
    assert all(value > 0 for name in pace for value in first[f"train/{name}"].values())
    for record, step in ((supervised, 11), (semi, 23)):
        for name in ("acc1", "acc5", "loss"):
            assert first[f"test/{name}"][step] == pytest.approx(record[f"test_{name}"], rel=1e-6)
    # Windows of 1, 10 and 1 steps: their means are the epoch's.
    loss = [first["train/loss"][step] for step in steps[3:]]
    assert (loss[0] + 10 * loss[1] + loss[2]) / 12 == pytest.approx(semi["train_loss"], rel=1e-5)

    (tmp_path / "checkpoint.pth").unlink()  # as after a kill in epoch 1, which is repeated
    run(words, tmp_path, "--epochs", "2")
    assert log(tmp_path) == [supervised, semi]  # to the bit, without --tensorboard
    (tmp_path / "checkpoint.pth").unlink()
    run(words, tmp_path, "--epochs", "3", "--tensorboard")
    whole = shown(tmp_path)
    assert list(whole["train/loss"]) == steps + [24 + line for line in LINES]
    assert list(whole["test/acc1"]) == [11, 23, 35]
    assert all(whole["train/loss"][step] == first["train/loss"][step] for step in LINES)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_failure_to_write_is_printed_once_and_the_run_continues(words, tmp_path, monkeypatch, capsys):
    add, calls = SummaryWriter.add_scalar, []

    def full(self, *point):
        calls.append(point)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *point)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run(words, tmp_path, "--epochs", "1", "--tensorboard")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
    assert len(warnings) == 1 and len(calls) == 4 and len(log(tmp_path)) == 1
    assert warnings[0].startswith(f"Warning: Cannot write {tmp_path}/tensorboard (No space left on device): make room")
    assert warnings[0].endswith("The run continues without --tensorboard until it is started again.")


def test_what_is_missing_is_named_at_the_start(words, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^--tensorboard writes below --output_dir: name that folder, or leave"):
        run([*words[:-4], "--tensorboard"], "")
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(OSError, match=f"^Cannot write {tmp_path}/tensorboard .*exists"):
        tensorboard_log.TensorBoardLog(tmp_path / "tensorboard", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--tensorboard needs the package tensorboard: pip install tensorboard"):
        run([*words, "--tensorboard"], tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["tensorboard"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    ours = tensorboard_log.TensorBoardLog(tmp_path / "tensorboard", 0)
    (path,) = (tmp_path / "tensorboard").iterdir()
    size = path.stat().st_size
    monkeypatch.setattr("utils.is_main", lambda: False)
    ours.add("train", 0, {"loss": 1.0})
    assert ours.writer(0) is None and path.stat().st_size == size
    assert tensorboard_log.TensorBoardLog(tmp_path / "other", 0).writer(0) is None and not (tmp_path / "other").exists()
