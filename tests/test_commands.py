"""Every published command line, shortened to two epochs of two steps on a tiny tree: it ends, and it resumes."""

import json
import os
import subprocess
import sys

import pytest

from tests.trees import ROOT, SMALL, make_tree

SHORT = [*SMALL, "--batch-size", "8", "--mu", "0.25", "--semi-start-epoch", "1", "--steps-per-epoch", "2"]
SLURM = sorted(path.name for path in (ROOT / "script").glob("submitit_1to*.sh"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), train=10, val=4, labelled=8)


def run(script, tree, *words, **settings):
    env = {**os.environ, "DATA_ROOT": str(tree), "SPLIT": str(tree / "labelled.txt"), "PYTHON": sys.executable}
    env |= {"OMP_NUM_THREADS": "1", "NGPU": "1", **{key: str(value) for key, value in settings.items()}}
    command = ["bash", ROOT / "script" / script, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_the_ddp_example_ends_resumes_is_evaluated_and_forks(tree, tmp_path):
    base, fork = tmp_path / "base", tmp_path / "fork"
    run("run_ddp_example.sh", tree, *SHORT, "--epochs", "2", "--evaluate-freq", "1", OUTPUT=base)
    run("run_ddp_example.sh", tree, *SHORT, "--epochs", "3", "--evaluate-freq", "1", OUTPUT=base)
    assert epochs(base) == [0, 1, 2]
    last = json.loads((base / "log.txt").read_text().splitlines()[-1])
    evaluated = run("eval.sh", tree, *SMALL, CHECKPOINT=base / "checkpoint.pth", OUTPUT=tmp_path)
    assert f"ours {last['test_acc1']:.2f} (published 75.5)" in evaluated
    words = [*SHORT, "--epochs", "2", "--evaluate-freq", "1", "--threshold", "0.1"]
    run("fork_ablation.sh", tree, *words, FORK=base / "epoch_0_checkpoint.pth", OUTPUT=fork)
    run("fork_ablation.sh", tree, *words, "--epochs", "3", FORK=base / "epoch_0_checkpoint.pth", OUTPUT=fork)
    assert epochs(fork) == [1, 2]


def test_there_are_five_slurm_scripts():
    assert len(SLURM) == 5


@pytest.mark.parametrize("script", SLURM)
def test_slurm_scripts_end_and_resume(tree, tmp_path, script):
    words = [*SHORT, "--local", "--nodes", "1", "--ngpus", "1", "--evaluate-freq", "1"]
    run(script, tree, *words, "--epochs", "2", SHARED_FOLDER=tmp_path)
    (first,) = (path.parent for path in tmp_path.glob("*/checkpoint.pth"))
    assert epochs(first) == [0, 1]
    run(script, tree, *words, "--epochs", "3", "--resume_jobid", first.name, SHARED_FOLDER=tmp_path)
    (second,) = (path.parent for path in tmp_path.glob("*/checkpoint.pth") if path.parent != first)
    assert epochs(second) == [2]
