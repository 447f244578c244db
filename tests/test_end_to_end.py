"""semi_main.py on one rank and on several: it trains, resumes, evaluates, and names bad input."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from script import compare_runs, plot_log
from semi_main import main
from tests.equality import same
from tests.trees import ROOT, SMALL, forked, make_tree, parse, ranks, semi_main
from training import checkpoint
from utils import is_ours

RUN = [*SMALL, "--batch-size", "6", "--mu", "0.34", "--threshold", "0.3", "--warmup-epochs", "0",
       "--model-ema-decay", "0.5"]  # fmt: skip


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def meters(record, prefix):
    return {k[len(prefix) :]: v for k, v in record.items() if k.startswith(prefix)}


def run_main(*words):
    main(parse(*words))


@pytest.fixture(scope="module")
def data(tree):
    """The flags of a short run on the tree."""
    return [*RUN, "--data-path", tree, "--data-split-file", tree / "labelled.txt"]


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """Two epochs on two ranks, one supervised, one semi-supervised, then stopped: the folder and what it printed."""
    out = tmp_path_factory.mktemp("out")
    words = [*data, "--semi-start-epoch", "1", "--sched", "step"]
    done = semi_main(*words, "--epochs", "2", "--output_dir", out, processes=2)
    return out, words, done


def test_two_ranks_train_two_epochs_and_leave_what_a_user_needs(two_ranks):
    out, _, done = two_ranks
    assert sorted(os.listdir(out)) == [
        "best.pth",
        "checkpoint.prev.pth",
        "checkpoint.pth",
        "epoch_0_checkpoint.pth",
        "log.txt",
        "run.json",
        "run.lock",
    ]
    first, second = log(out)
    assert (first["epoch"], second["epoch"]) == (0, 1) and "train_loss_0_u" not in first
    published = {
        "train_bad_images",
        "train_lr",
        "train_loss",
        "train_loss_0",
        "train_loss_1",
        "train_loss_0_u",
        "train_loss_1_u",
        "n_parameters",
    }
    diagnostics = {"train_mask_rate", "train_pseudo_acc", "train_pseudo_recall", "train_agreement"}
    diagnostics |= {"train_pseudo_entropy", "train_pseudo_largest"}
    tests = {
        f"test_{p}{m}"
        for p in ("", "ema_")
        for m in (
            "loss",
            "loss_0",
            "loss_1",
            "acc1",
            "acc5",
            "acc1_head1",
            "acc5_head1",
            "acc1_head2",
            "acc5_head2",
            "acc1_softmax",
            "acc5_softmax",
        )
    }
    assert set(second) == published | diagnostics | tests | {"epoch"}
    assert 0 < second["train_mask_rate"] <= 1
    printed = done.stdout
    assert "supervised: 6 + 0 images a process and step, 12 in all on 2 process(es); 2 steps an epoch" in printed
    assert "semi-supervised: 2 + 4 images a process and step, 12 in all on 2 process(es); 6 steps an epoch" in printed
    assert "learning rate: 0.0005 in epoch 0, 0.0005 in epoch 1" in printed
    assert "eta:" in printed and "parameters" in printed
    record = json.loads((out / "run.json").read_text())
    assert record["args"]["mu"] == 0.34 and record["environment"]["torch"] == torch.__version__
    assert record["phases"]["semi-supervised"]["steps_per_epoch"] == 6


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_logged_figures_are_those_of_the_checkpoint_on_any_number_of_ranks(two_ranks, tmp_path, processes):
    out, words, _ = two_ranks
    semi_main(*words, "--eval", "--resume", out / "checkpoint.pth", "--output_dir", tmp_path, processes=processes)
    result, record = json.loads((tmp_path / "eval.json").read_text()), log(out)[-1]
    assert (result["images"], result["classes"], result["epoch"]) == (21, 3, 1)
    for ours, prefix in ((result, "test_"), (result["ema"], "test_ema_")):
        for name, value in meters(record, prefix).items():
            if not name.startswith("ema_"):
                assert ours[name] == pytest.approx(value, **({"rel": 1e-6} if "loss" in name else {"abs": 1e-9})), name
    for ours, prefix in ((result, ""), (result["ema"], "ema_")):
        with open(tmp_path / f"{prefix}per_class.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["images"] for row in rows] == ["7"] * 3 and 0 < ours["ece"] < 1
        assert sum(float(row["top1_cnn"]) for row in rows) / 3 == pytest.approx(ours["acc1_head1"], abs=1e-3)


def test_a_stopped_run_resumes_and_ends_as_one_never_stopped(two_ranks, tmp_path):
    out, words, _ = two_ranks
    whole, part = tmp_path / "whole", tmp_path / "part"
    shutil.copytree(out, part)
    semi_main(*words, "--epochs", "3", "--output_dir", whole, processes=2)
    semi_main(*words, "--epochs", "3", "--output_dir", part, "--resume", part / "checkpoint.pth", processes=2)
    assert log(whole) == log(part) and len(log(part)) == 3
    one, other = (checkpoint.read(folder / "checkpoint.pth") for folder in (whole, part))
    assert all(same(one[key], other[key]) for key in one if key != "args") and list(one) == list(other)


def test_eval_needs_val_and_the_checkpoint_alone_and_a_published_file_does(two_ranks, tree, tmp_path, capsys):
    out, _, _ = two_ranks
    (tmp_path / "data").mkdir()
    (tmp_path / "data/val").symlink_to(tree / "val")
    content = checkpoint.read(out / "checkpoint.pth")
    del content["scaler"], content["best"]
    content["classes"] = ["class0", "dog", "class2"]  # a warning, not an error: the authors' file has no names
    torch.save(content, tmp_path / "semiformer.pth")
    words = [*SMALL, "--eval", "--batch-size", "6", "--resume", tmp_path / "semiformer.pth"]
    run_main(*words, "--data-path", tmp_path / "data", "--data-split-file", "nowhere.txt", "--output_dir", tmp_path)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["acc1"] == pytest.approx(log(out)[-1]["test_acc1"]) and "ema" in result
    printed = capsys.readouterr().out
    assert f"raw top-1 {result['acc1']:.3f}" in printed and "whose class 1 is 'dog' there and 'class1' here" in printed


def test_pseudo_labels_without_a_known_class_have_no_accuracy(tree, tmp_path, capsys):
    (tmp_path / "images").symlink_to(tree)
    rows = [f"images/train/class{c}/c{c}_{i}.png{f',class{c}' if i < 8 else ''}" for c in range(3) for i in range(12)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "val.csv").write_text("\n".join(f"images/val/class{c}/c{c}_0.png,class{c}" for c in range(3)))
    words = [*RUN, "--data-path", tmp_path, "--epochs", "1", "--steps-per-epoch", "2", "--threshold", "0"]
    run_main(*words, "--output_dir", tmp_path / "out", "--tensorboard")
    (record,) = log(tmp_path / "out")
    assert record["train_pseudo_acc"] is None and record["train_mask_rate"] == 1
    assert "mask_rate" in (printed := capsys.readouterr().out) and "pseudo_acc" not in printed
    (run,) = compare_runs.read_runs([tmp_path / "out"])
    assert compare_runs.mean_and_deviation([run], "train_pseudo_acc") == "-"
    assert plot_log.points(run.log, "train_pseudo_acc") == ((), ())


@pytest.mark.parametrize("acc1, images, amp, status", [
    (75.5, 50_000, "off", 0), (75.41, 50_000, "bf16", 0), (75.39, 50_000, "bf16", 1), (75.39, 50_000, "off", 1),
    (70.0, 40_000, "off", 0)])  # fmt: skip
def test_eval_script_judges_float32_on_the_whole_validation_set(tmp_path, acc1, images, amp, status):
    """A stand-in for Python evaluates: in `amp` it measures 70 %, with --amp off the given top-1."""
    fake = tmp_path / "python"
    mixed, exact = (json.dumps({"acc1": top1, "images": images, "classes": 1000, "amp": precision})
                    for top1, precision in ((70.0, amp), (acc1, "off")))  # fmt: skip
    first = exact if amp == "off" else mixed
    fake.write_text(
        f'#!/bin/sh\nif [ "$1" = - ]; then exec {sys.executable} "$@"; fi\n'
        f"case \"$*\" in *\"--amp off\"*) echo '{exact}';; *) echo '{first}';; esac > {tmp_path}/eval.json\n"
    )
    fake.chmod(0o755)
    env = {**os.environ, "CHECKPOINT": "x", "DATA_ROOT": "y", "PYTHON": str(fake), "OUTPUT": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / "script/eval.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    said = done.stdout.splitlines()
    assert said[-1].startswith(f"ours {acc1:.2f} (published 75.5)  {images} images, 1000 classes")
    assert said[:-1] == (["ours in bf16 70.00"] if amp == "bf16" else [])


@pytest.mark.parametrize("exclude", [False, True])
def test_two_gloo_ranks_share_the_images_out(data, tmp_path, exclude):
    words = [*data, "--dist_url", f"file://{tmp_path}/meeting"]
    words += ["--unlabelDataset_exclude_labeledData"] if exclude else []
    done = forked(ROOT / "tests/ranks_indices.py", tmp_path, *words, environments=ranks(2))
    assert [rank.returncode for rank in done] == [0, 0], done
    shares = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    labelled, unlabelled = (sorted(shares[0][name] + shares[1][name]) for name in ("labelled", "unlabelled"))
    # 3 classes x 12 images in the order of the folder, the first 8 names of each class labelled.
    names = sorted(f"class{c}/c{c}_{i}.png" for c in range(3) for i in range(12))
    expected = [i for i, name in enumerate(names) if int(name.split("_")[1][:-4]) < 8]
    assert labelled == expected
    assert unlabelled == sorted(set(range(36)) - set(expected)) if exclude else unlabelled == list(range(36))


def test_ddp_survives_a_removed_fusion(data, tmp_path):
    words = [*data, "--remove-fcu", "--epochs", "1", "--steps-per-epoch", "3"]
    semi_main(*words, "--output_dir", tmp_path, processes=2)
    fused = checkpoint.read(tmp_path / "checkpoint.pth")["model"]
    assert any("squeeze_block" in key for key in fused) and len(log(tmp_path)) == 1


def test_two_slurm_tasks_make_a_process_group(data, tmp_path):
    words = [*data, "--epochs", "1", "--steps-per-epoch", "2", "--use_submitit", "true", "--output_dir", tmp_path]
    # The port follows from the job's number, which is not that of test_submitit: both may run at the same time.
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4712", "MASTER_ADDR": "127.0.0.1"}
    tasks = [{**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    first, second = forked(ROOT / "semi_main.py", *words, environments=tasks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "12 in all on 2 process(es)" in first.stdout and second.stdout == ""


BAD = [
    (
        "missing data",
        ["--data-path", "nowhere"],
        "There is no folder nowhere/train: --data-path must hold train/ and val/",
    ),
    ("empty class", ["--data-path", "EMPTY"], "The class folder .*train/class9 holds no image"),
    ("absent entry", ["--data-split-file", "ABSENT"], r"absent.txt, line 1: 'c7_99.png' is not among the 36 images"),
    (
        "leaving entry",
        ["--data-split-file", "LEAVING"],
        r"leaving.txt, line 1: '../val/class0/c0_0.png' leaves the data folder",
    ),
    (
        "absolute entry",
        ["--data-split-file", "ABSOLUTE"],
        r"absolute.txt, line 1: '/etc/passwd' leaves the data folder",
    ),
    ("no labelled", ["--mu", "0.1"], r"--mu 0.1 leaves no labelled image in a batch of 6 \(--batch-size\)"),
    ("no unlabelled", ["--mu", "1.0"], r"--mu 1.0 leaves no unlabelled image in a batch of 6"),
    (
        "odd mixup",
        ["--mixup", "0.8", "--mu", "0.5"],
        "the labelled batch must be even: --batch-size 6 with --mu 0.5 gives 3",
    ),
    ("other classes", ["--resume", "OTHER"], "The head in .*other.pth has 9 classes, but the data has 3 class folders"),
    (
        "other model",
        ["--resume", "OTHER", "--model", "resnet18", "--drop-path", "0"],
        "other.pth is of another network: it lacks",
    ),
    (
        "too few",
        ["--batch-size", "200"],
        "24 labelled images a process do not make one batch of 68: lower --batch-size",
    ),
    ("unknown model", ["--model", "semiformer"], "Unknown --model 'semiformer'"),
    ("unknown policy", ["--pseudo-type", "vote"], "argument --pseudo-type: invalid choice: 'vote'"),
    ("no checkpoint", ["--eval", "--resume", "none.pth"], "There is no checkpoint none.pth"),
    ("nothing to evaluate", ["--eval"], "--eval needs --resume CHECKPOINT"),
    ("no effect", ["--cross-attn"], "--cross-attn had no effect in the published code"),
    ("drop block", ["--drop-block", "0.1"], "--drop-block does not apply to the two-stream network Semiformer_micro"),
    (
        "fusion of one stream",
        ["--model", "resnet18", "--remove-fcu"],
        "--remove-fcu removes the fusion .* resnet18 has none",
    ),
    ("optimizer", ["--opt", "nonsense"], "timm cannot make --opt nonsense with these"),
    ("schedule", ["--sched", "none"], "--sched none must be one of cosine, tanh, step, poly, plateau"),
    ("size", ["--input-size", "50"], "50x50 images do not divide into 16-pixel patches"),
]


@pytest.fixture(scope="module")
def bad_files(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    empty = make_tree(folder / "empty")
    (empty / "train/class9").mkdir()
    for name, line in (
        ("absent", "c7_99.png,0,0"),
        ("leaving", "../val/class0/c0_0.png,0,0"),
        ("absolute", "/etc/passwd,0,0"),
    ):
        (folder / f"{name}.txt").write_text(line + "\n")
    from models import build_model

    torch.save({"model": build_model("Semiformer_micro_patch16", 9).state_dict()}, folder / "other.pth")
    return {"EMPTY": empty, "OTHER": folder / "other.pth"} | {
        n.upper(): folder / f"{n}.txt" for n in ("absent", "leaving", "absolute")
    }


@pytest.mark.parametrize("words,message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_sentence_naming_the_culprit(data, bad_files, tmp_path, capsys, words, message):
    given = [*data, "--epochs", "1", "--output_dir", tmp_path]
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        run_main(*given, *(bad_files.get(word, word) for word in words))
    printed = capsys.readouterr().err if caught.type is SystemExit else str(caught.value)
    assert re.search(message, printed), printed
    assert caught.type is SystemExit and caught.value.code == 2 or "\n" not in printed


def test_bad_input_ends_the_program_with_a_sentence_and_no_traceback(tree):
    words = [*RUN, "--data-path", tree / "nowhere"]
    command = [sys.executable, ROOT / "semi_main.py", *map(str, words)]
    for done in (subprocess.run(command, capture_output=True, text=True), semi_main(*words, processes=2, check=False)):
        assert done.returncode == 1
        assert "semi_main.py: error: There is no folder" in done.stderr
        assert 'File "' not in done.stderr.split("error:")[0]


def test_a_librarys_error_keeps_its_traceback():
    with pytest.raises(ValueError) as library:
        json.loads("{")
    with pytest.raises(ValueError) as ours:
        run_main(*RUN, "--mu", "0.01")
    assert (is_ours(library.value), is_ours(ours.value)) == (False, True)
