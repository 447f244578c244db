"""An error, a kill or a bad loss on one rank ends the whole job, and the messages name the rank."""

import json
import os
import subprocess
import sys

import pytest

from tests.trees import ROOT, SMALL, forked, ranks

# semi_main.py with a fault: rank 1 cannot read its unlabelled images, or rank 0 cannot save a checkpoint.
FAULTY = f"""
import os, runpy, signal, sys
from training import checkpoint
import datasets
from tests.trees import BrokenViews
fault, rank, load = os.environ["FAULT"], os.environ.get("RANK", "1"), datasets.MultiViewDataset.load

def faulty(self, i):
    item, unreadable = load(self, i)
    if len(self.transforms) == 2 and rank == "1":
        if fault == "raise":
            raise LookupError("this image is unreadable")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "nan":
            item[0].fill_(float("nan"))
    return item, unreadable

def full(content, path, previous=None):
    raise OSError(f"Cannot write {{path}} (No space left on device)")

datasets.MultiViewDataset.load = faulty
if fault == "worker":  # a worker knows nothing of what this process replaces, but imports the class of its data set
    datasets.MultiViewDataset = BrokenViews
if fault == "save":
    checkpoint.save = full
sys.argv[0] = {str(ROOT / "semi_main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def words(small_tree, tmp_path_factory):
    program = tmp_path_factory.mktemp("ranks") / "faulty.py"
    program.write_text(FAULTY)
    words = [*SMALL, "--batch-size", "4", "--mu", "0.5", "--steps-per-epoch", "3", "--epochs", "2", "--warmup-epochs"]
    return [program, *words, "0", "--data-path", small_tree, "--data-split-file", small_tree / "labelled.txt"]


def start(*command, **env):
    """A process of its own, as users start it."""
    command = [sys.executable, *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def two_ranks(fault, words, tmp_path, whole=False):
    """(exit status, stderr) of rank 0 and of rank 1, started without a launcher that would stop the other one.

    whole: as processes of their own, which end as Python ends.
    """
    words = [*words, "--output_dir", tmp_path / "out", "--dist_url", f"file://{tmp_path}/meeting"]
    environments = [{**env, "FAULT": fault} for env in ranks(2)]
    if not whole:
        return [(done.returncode, done.stderr) for done in forked(*words, environments=environments, timeout=120)]
    processes = [start(*words, **env) for env in environments]
    printed = [process.communicate(timeout=120)[1] for process in processes]
    return list(zip([process.returncode for process in processes], printed))


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_the_other_rank_ends_too_and_prints_why_in_one_line(words, tmp_path, fault):
    (status, peer), (culprits, culprit) = two_ranks(fault, words, tmp_path, whole=fault == "raise")
    assert status == 1 and culprits == {"raise": 1, "kill": -9}[fault]
    (line,) = [line for line in peer.splitlines() if line.startswith("[rank0]: ")]
    assert line.startswith("[rank0]: semi_main.py: stopped, because another rank failed: see its error")
    assert "Traceback" not in peer
    if fault == "raise":
        assert "[rank1]: Traceback" in culprit and culprit.rstrip().endswith("LookupError: this image is unreadable")


def test_a_compiled_network_has_the_gradients_of_the_eager_one_under_ddp(tmp_path):
    """Two batches, of which the first exchanges nothing; with activations computed again and without."""
    script = ROOT / "tests/ranks_ddp.py"
    environments = [env | {"OMP_NUM_THREADS": "1"} for env in ranks(2)]
    done = forked(script, tmp_path, f"file://{tmp_path}/meeting", environments=environments, timeout=300)
    assert [each.returncode for each in done] == [0, 0], done
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and all(first["same"].values())
    assert first["differences"].pop("True False") == 0 and max(first["differences"].values()) < 1e-12
    # Split, so that the first gradients are exchanged during backward; not so where activations are computed again.
    assert first["graphs"]["False"] > 1 and first["graphs"]["True"] == 1


def test_a_loss_that_is_not_finite_stops_both_and_names_the_rank_and_its_images(words, tmp_path):
    for rank, (status, printed) in enumerate(two_ranks("nan", words, tmp_path)):
        assert status == 1 and "Traceback" not in printed
        error = f"[rank{rank}]: semi_main.py: error: The loss is not finite: epoch 0, step 0, rank 1: loss_0 nan"
        assert error in printed
        assert "labelled images [" in printed and "unlabelled images [" in printed and "Lower --lr" in printed
    assert not (tmp_path / "out/checkpoint.pth").exists()


def test_what_rank_0_cannot_write_stops_both_with_its_sentence(words, tmp_path):
    for rank, (status, printed) in enumerate(two_ranks("save", words, tmp_path)):
        assert status == 1
        assert f"[rank{rank}]: " in printed and "out/checkpoint.pth (No space left on device)" in printed


@pytest.mark.parametrize("fault, message", [
    ("raise", "LookupError: this image is unreadable"), pytest.param("kill", "SIGKILL", marks=pytest.mark.proof),
])  # fmt: skip
def test_torchrun_ends_with_the_error_of_the_rank_on_top(words, fault, message):
    job = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words, FAULT=fault)
    printed = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and message in printed
    first = printed.find("[rank1]: Traceback")
    assert fault == "kill" or 0 <= first < (printed.find("[rank0]: ") + 1 or len(printed))


def test_an_error_in_a_worker_of_the_unlabelled_loader_ends_the_run(words):
    (done,) = forked(*words, "--num_workers", "2", environments=[{"FAULT": "worker"}])
    assert done.returncode == 1 and "this image is unreadable" in done.stderr
    assert "in DataLoader worker process" in done.stderr
