"""The scripts of later methods: each parses to the settings of its table, and two run, shortened, on a tiny tree."""

import os
import subprocess
import sys

import pytest
import timm
import torch

from options import check, labelled_and_unlabelled
from tests.trees import ROOT, parse, python_calls

# script: (GPUs, labelled and unlabelled images a GPU, lr, threshold, other settings)
SEMIVIT = {"teacher": "ema", "pseudo_mixup": True, "model_ema_decay": 0.9999, "semi_lambda": 5, "layer_decay": 0.75,
           "sched_on_updates": True, "unlabelDataset_exclude_labeledData": True, "weight_decay": 0.05,
           "warmup_epochs": 5, "epochs": 100, "warmup_lr": 0, "min_lr": 1e-6, "smoothing": 0.1}  # fmt: skip
MIXED, PLAIN = {"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0, "cutmix": 0}
TORCHSSL = {"opt": "sgd", "momentum": 0.9, "weight_decay": 3e-4, "semi_lambda": 1, "model_ema_decay": 0.999,
            "labelled_view": "weak", "smoothing": 0, **PLAIN}  # fmt: skip
SUPERVISED = {"epochs": 300, "mixup": 0.8, "cutmix": 1.0, "repeated_aug": True, "weight_decay": 0.05}
RECIPES = {
    "semivit_b_10pct": (16, 80, 5e-4, 0.5, SEMIVIT | MIXED | {"drop_path": 0.1, "steps_per_epoch": 1801}),
    "semivit_b_1pct": (16, 80, 5e-4, 0.6, SEMIVIT | PLAIN | {"drop_path": 0, "reprob": 0}),
    "semivit_l_10pct": (8, 40, 1e-3, 0.6, SEMIVIT | MIXED | {"drop_path": 0.2}),
    "semivit_finetune_b": (64, 0, 5e-4, None, {"layer_decay": 0.65, "drop_path": 0.1, "epochs": 100, **MIXED}),
    "fixmatch_r50": (4, 28, 0.03, 0.95, TORCHSSL | {"confidence": "fixed"}),
    "flexmatch_r50": (4, 28, 0.03, 0.95, TORCHSSL | {"confidence": "flex"}),
    "conformer_s": (128, 0, 1e-3, None, SUPERVISED | {"model": "Conformer_small_patch16"}),
    "deit_s": (128, 0, 1e-3, None, SUPERVISED | {"model": "deit_small_patch16_224"}),
}


def test_every_script_is_in_the_table():
    scripts = {path.stem for path in (ROOT / "script/recipes").glob("*.sh")}
    assert scripts - {"common"} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_flags_are_those_of_the_published_recipe(name, tmp_path):
    labelled, unlabelled, lr, threshold, settings = RECIPES[name]
    given = {"DATA_ROOT": "/data", "SPLIT": "s.txt", "START": "start.pth", "OUTPUT": "out"}
    (call,) = python_calls(f"script/recipes/{name}.sh", tmp_path, "--seed", "7", **given)
    assert call[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    args = parse(*call[5:])
    check(args)
    if unlabelled:
        assert labelled_and_unlabelled(args) == (labelled, unlabelled) and args.threshold == threshold
    else:
        assert args.batch_size == labelled
    assert (args.lr, args.seed, args.resume, args.output_dir) == (lr, 7, "auto", "out")
    assert {key: getattr(args, key) for key in settings} == settings
    if "r50" in name:
        assert args.epochs * args.steps_per_epoch == 2_000_000 and args.model == "resnet50"


def test_several_machines_meet(tmp_path):
    given = {"DATA_ROOT": "/data", "SPLIT": "s.txt", "START": "x", "OUTPUT": "out", "NNODES": 2, "RDZV": "node1:29500"}
    (call,) = python_calls("script/recipes/semivit_l_10pct.sh", tmp_path, **given)
    assert call[2:9] == [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "node1:29500",
        "--nproc_per_node=8",
    ]


@pytest.mark.parametrize("name, short", [
    ("semivit_b_10pct", ["--model", "vit_tiny_patch16_224", "--input-size", 48, "--batch-size", 12]),
    ("flexmatch_r50", ["--model", "resnet18", "--input-size", 40, "--batch-size", 8, "--mu", 0.25]),
])  # fmt: skip
def test_it_runs_shortened(name, short, small_tree, tmp_path):

    torch.save(
        {"model": timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48).state_dict()},
        tmp_path / "x.pth",
    )
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NGPU": "1", "OUTPUT": str(tmp_path / "out")}
    split = tmp_path / "half.txt"
    split.write_text("".join(line for line in (small_tree / "labelled.txt").read_text().splitlines(True)[::2]))
    env |= {"DATA_ROOT": str(small_tree), "SPLIT": str(split), "START": str(tmp_path / "x.pth")}
    words = [*short, "--epochs", 6, "--warmup-epochs", 1, "--steps-per-epoch", 1, "--num_workers", 0, "--device", "cpu"]
    command = ["bash", ROOT / f"script/recipes/{name}.sh", *words, "--threshold", 0.3, "--evaluate-freq", 6]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "out/checkpoint.pth").exists() and "best top-1" in done.stdout
