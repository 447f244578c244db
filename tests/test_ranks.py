"""Ranks stand and fall together: an error, a kill or a bad loss of one ends the whole job, and says whose it was."""

import os
import subprocess
import sys

import pytest

from tests.trees import ROOT, SMALL, make_tree

# The program, with a fault in its data or its disk. Rank 1 fails in the unlabelled images, rank 0 in its files.
FAULTY = f"""
import os, runpy, signal, sys
from training import checkpoint
import datasets
fault, rank, load = os.environ["FAULT"], os.environ.get("RANK", "1"), datasets.MultiViewDataset.__getitem__

def faulty(self, i):
    item = load(self, i)
    if len(self.transforms) == 2 and rank == "1":
        if fault == "raise":
            raise LookupError("this image is cursed")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "nan":
            item[0].fill_(float("nan"))
    return item

def full(content, path, previous=None):
    raise OSError(f"Cannot write {{path}} (No space left on device)")

datasets.MultiViewDataset.__getitem__ = faulty
if fault == "save":
    checkpoint.save = full
sys.argv[0] = {str(ROOT / "semi_main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "faulty.py").write_text(FAULTY)
    tree = make_tree(folder / "tree", train=4, val=2)
    words = [*SMALL, "--batch-size", "4", "--mu", "0.5", "--steps-per-epoch", "3", "--epochs", "2", "--warmup-epochs"]
    return [folder / "faulty.py", *words, "0", "--data-path", tree, "--data-split-file", tree / "labelled.txt"]


def start(fault, *command, **env):
    command = [sys.executable, *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULT": fault, **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def two_ranks(fault, words, tmp_path):
    """(exit status, stderr) of rank 0 and of rank 1, started without a launcher that would stop the other one."""
    words = [*words, "--output_dir", tmp_path / "out", "--dist_url", f"file://{tmp_path}/meeting"]
    ranks = [start(fault, *words, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    return list(zip([rank.returncode for rank in ranks], said))


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_the_other_rank_ends_too_and_says_in_a_line_why(words, tmp_path, fault):
    (status, peer), (culprits, culprit) = two_ranks(fault, words, tmp_path)
    assert status == 1 and culprits == {"raise": 1, "kill": -9}[fault]
    (line,) = [line for line in peer.splitlines() if line.startswith("[rank0]: ")]
    assert line.startswith("[rank0]: semi_main.py: stopped, because another rank failed: see its error")
    assert "Traceback" not in peer
    if fault == "raise":
        assert "[rank1]: Traceback" in culprit and culprit.rstrip().endswith("LookupError: this image is cursed")


def test_a_loss_that_is_not_finite_stops_both_and_names_the_rank_and_its_images(words, tmp_path):
    for rank, (status, said) in enumerate(two_ranks("nan", words, tmp_path)):
        assert status == 1 and "Traceback" not in said
        assert f"[rank{rank}]: semi_main.py: error: The loss is not finite: epoch 0, step 0, rank 1: loss_0 nan" in said
        assert "labelled images [" in said and "unlabelled images [" in said and "Lower --lr" in said
    assert not (tmp_path / "out/checkpoint.pth").exists()


def test_what_rank_0_cannot_write_stops_both_with_its_sentence(words, tmp_path):
    for rank, (status, said) in enumerate(two_ranks("save", words, tmp_path)):
        assert status == 1
        assert f"[rank{rank}]: " in said and "out/best.pth (No space left on device)" in said


@pytest.mark.parametrize("fault, message", [("raise", "LookupError: this image is cursed"), ("kill", "SIGKILL")])
def test_torchrun_ends_with_the_error_of_the_rank_on_top(words, fault, message):
    job = start(fault, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words)
    said = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and message in said
    first = said.find("[rank1]: Traceback")
    assert fault == "kill" or 0 <= first < (said.find("[rank0]: ") + 1 or len(said))


def test_an_error_in_a_worker_of_the_unlabelled_loader_ends_the_run(words, tmp_path):
    job = start("raise", *words, "--num_workers", "2")
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 1 and "this image is cursed" in said and "in DataLoader worker process" in said
