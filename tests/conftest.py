"""Fixtures of several test files. The image trees are written once for all tests of a process; no test changes them."""

import pytest
import torch

from tests.trees import SMALL, make_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """3 classes of 12 images to train with, 8 of them labelled, and 7 to evaluate."""
    return make_tree(tmp_path_factory.mktemp("tree"), train=12, val=7, labelled=8)


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """3 classes of 4 images to train with, all of them labelled, and 2 to evaluate."""
    return make_tree(tmp_path_factory.mktemp("small_tree"), train=4, val=2)


@pytest.fixture(scope="session")
def words(small_tree):
    """The flags of a run of one step an epoch, supervised in epoch 0 and semi-supervised after it."""
    tiny = ["--batch-size", "4", "--mu", "0.5", "--steps-per-epoch", "1", "--warmup-epochs", "0"]
    data = ["--data-path", small_tree, "--data-split-file", small_tree / "labelled.txt", "--semi-start-epoch", "1"]
    # The smallest of timm's networks, because most of the time goes into checkpoints: they are saved a hundred times.
    return [*SMALL, *tiny, *data, "--model-ema-decay", "0.5", "--model", "lcnet_035"]


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes with one thread for the tests of a file, so that their sums do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
