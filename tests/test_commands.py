"""The published command lines for one machine, shortened: they end, go on, are evaluated, and fork."""

import json
import os
import subprocess
import sys

import pytest

import semi_main
from options import recorded
from tests.trees import ROOT, SMALL, parse, python_calls
from training import checkpoint

SHORT = [*SMALL, "--batch-size", "8", "--mu", "0.25", "--semi-start-epoch", "1", "--steps-per-epoch", "2",
         "--evaluate-freq", "1"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def data(tree):
    return {"DATA_ROOT": str(tree), "SPLIT": str(tree / "labelled.txt")}


def run(script, *words, **settings):
    """Run a script as a user does; what it printed."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env |= {key: str(value) for key, value in settings.items()}
    command = ["bash", ROOT / "script" / script, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def flags(script, folder, *words, processes=8, **settings):
    """The flags that a script gives to semi_main.py, which it starts with torchrun."""
    (call,) = python_calls(f"script/{script}", folder, *words, **settings)
    assert call[:5] == [*TORCHRUN, f"--nproc_per_node={processes}", f"{ROOT}/semi_main.py"]
    return parse(*call[5:])


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_the_ddp_example_has_the_published_hyper_parameters(data, tmp_path):
    args = vars(flags("run_ddp_example.sh", tmp_path, **data))
    published = {
        "model": "Semiformer_small_patch16",
        "batch_size": 108,
        "lr": 1e-3,
        "epochs": 600,
        "mu": 0.125,
        "threshold": 0.7,
        "temperature": 1.0,
        "semi_lambda": 4.0,
        "semi_start_epoch": 30,
        "pseudo_type": "cnn",
        "unlabel_smooth": True,
        "evaluate_freq": 4,
        "smoothing": 0.1,
    }
    assert {key: args[key] for key in published} == published


@pytest.mark.parametrize("script", [
    "run_ddp_example.sh", "recipes/fixmatch_r50.sh", "submitit_1to7_300ep_2nodes.sh"])  # fmt: skip
@pytest.mark.parametrize("settings, expected", [
    ({}, (False, "pil")), ({"COMPILE": 1}, (True, "pil")), ({"FAST": 1}, (False, "fast")),
    ({"COMPILE": 1, "FAST": 1}, (True, "fast")), ({"COMPILE": 0, "FAST": 0}, (False, "pil"))])  # fmt: skip
def test_two_settings_make_a_script_faster(tmp_path, script, settings, expected):
    given = {"DATA_ROOT": "d", "SPLIT": "s", "OUTPUT": "o", **settings}
    (last,) = python_calls(f"script/{script}", tmp_path, **given)
    assert ("--compile" in last, "fast" if "fast" in last else "pil") == expected


def test_the_ddp_example_ends_resumes_is_evaluated_and_forks(data, tmp_path):
    base, fork = tmp_path / "base", tmp_path / "fork"
    words = [*SHORT, "--epochs", "2"]
    run("run_ddp_example.sh", *words, NGPU=2, OUTPUT=base, **data)
    assert epochs(base) == [0, 1] and (base / "checkpoint.pth").is_file()
    args = recorded(flags("run_ddp_example.sh", tmp_path, *words, processes=2, NGPU=2, OUTPUT=base, **data))
    assert json.loads((base / "run.json").read_text())["args"] == vars(args)

    last = json.loads((base / "log.txt").read_text().splitlines()[-1])
    settings = {"CHECKPOINT": base / "checkpoint.pth", "DATA_ROOT": data["DATA_ROOT"], "OUTPUT": tmp_path}
    evaluated = run("eval.sh", *SMALL, **settings)
    assert f"ours {last['test_acc1']:.2f} (published 75.5)  21 images, 3 classes" in evaluated

    # Torchrun need not be started again: from here on the scripts' flags are run in this process.
    args = flags("run_ddp_example.sh", tmp_path, *SHORT, "--epochs", "3", OUTPUT=base, **data)
    semi_main.main(args)
    assert epochs(base) == [0, 1, 2]
    assert json.loads((base / "run.json").read_text())["args"] == vars(recorded(args))
    assert checkpoint.read(base / "checkpoint.pth")["args"] == recorded(args)
    words = [*SHORT, "--threshold", "0.1"]
    for count in ("2", "3"):
        settings = {"FORK": base / "epoch_0_checkpoint.pth", "OUTPUT": fork, **data}
        semi_main.main(flags("fork_ablation.sh", tmp_path, *words, "--epochs", count, **settings))
    assert epochs(fork) == [1, 2]
