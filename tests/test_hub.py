"""hubconf.py: torch.hub finds every network of ours and gives it the weights of a file."""

import argparse
import subprocess
import sys

import pytest
import torch

import hubconf
from models import NAMES, build_model
from tests.trees import ROOT
from training import checkpoint

NAME = "Semiformer_micro_patch16"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    args = argparse.Namespace(model=NAME, input_size=32, remove_fcu=False)
    content = {"model": build_model(NAME, 3).state_dict(), "args": args, "classes": ["a", "b", "c"]}
    torch.save(content, path := tmp_path_factory.mktemp("run") / "checkpoint.pth")
    return path


def load(name=NAME, **settings):
    return torch.hub.load(str(ROOT), name, source="local", **settings)


def test_every_network_of_ours_is_an_entry_with_help():
    entries = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert entries == sorted(NAMES) and len(NAMES) == 18  # as torch.hub.list does
    assert getattr(hubconf, NAME).__doc__.startswith(f"{NAME}: maps images (N, 3, S, S) to")


def test_a_file_decides_on_weights_classes_and_input(file):
    model = load(pretrained=str(file))
    assert not model.training and model.pretrained_cfg["label_names"] == ("a", "b", "c")
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    own = checkpoint.read(file)["model"]
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    other = load(pretrained=str(file), num_classes=7)
    assert [tuple(x.shape) for x in other(torch.zeros(1, 3, 32, 32))] == [(1, 7)] * 2
    assert torch.equal(other.conv1.weight, model.conv1.weight)


def test_without_a_file_the_network_is_fresh():
    model = load("deit_micro_patch16_224", num_classes=4, img_size=32)
    assert model.training and model(torch.zeros(2, 3, 32, 32))[0].shape == (2, 4)


@pytest.mark.parametrize("name, settings, message", [
    (NAME, {"pretrained": True}, f"No weights are hosted for {NAME}: pass pretrained=PATH"),
    (NAME, {"pretrained": "none.pth"}, "There is no checkpoint none.pth"),
    ("conv_micro", {}, f"was trained with --model {NAME}, not conv_micro"),
    (NAME, {"drop_path": 0.1}, "drop_path cannot be set with pretrained=.*: its settings apply"),
    (NAME, {"ema": True}, "holds no averaged weights"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(file, name, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        load(name, **{"pretrained": str(file), **settings})


def test_it_loads_from_another_folder(file, tmp_path):
    program = f"import torch; m = torch.hub.load({str(ROOT)!r}, {NAME!r}, source='local', pretrained={str(file)!r})"
    program += "; print([tuple(x.shape) for x in m(torch.zeros(2, 3, 32, 32))])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[(2, 3), (2, 3)]\n", done.stderr
