"""script/export.py: what is written loads back to the bit, the card tells what is known, ONNX must agree."""

import hashlib
import importlib
import json
import os
import sys

import pytest
import torch
from torch import nn

from models import build_model, pretrained
from script import export
from tests.trees import SMALL, parse
from training import checkpoint

NAME = "Semiformer_micro_patch16"


@pytest.fixture
def run(tmp_path):
    """The output folder of a run of 10 epochs, stopped after 2."""
    torch.manual_seed(0)
    model = build_model(NAME, 3).to(memory_format=torch.channels_last).train()
    model(torch.randn(4, 3, 48, 48))
    (tmp_path / "list.txt").write_text("a.png\n")
    words = [*SMALL, "--lr", "0.25", "--data-split-file", str(tmp_path / "list.txt")]
    args = parse(*words)
    content = {"model": model.state_dict(), "model_ema": build_model(NAME, 3).state_dict(), "epoch": 1, "args": args}
    torch.save({**content, "classes": ["a", "b", "c"]}, tmp_path / "checkpoint.pth")
    lines = [{"epoch": e, "test_acc1": 50.0 + e, "test_ema_acc1": 30.0 + e} for e in range(2)]
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch"')
    (tmp_path / "run.json").write_text(json.dumps({"environment": {"revision": "abc1234", "torch": "2.15.0"}}))
    return tmp_path


def test_the_exported_weights_load_back_to_the_bit_with_names_and_flags(run, capsys):
    export.main(["--checkpoint", str(run / "checkpoint.pth"), "--output", str(run / "out"), "--no-onnx"])
    assert sorted(path.name for path in (run / "out").iterdir()) == ["README.md", "model.safetensors"]
    first, second = (pretrained.load(run / name) for name in ("checkpoint.pth", "out/model.safetensors"))
    own, read = first.network.state_dict(), second.network.state_dict()
    assert list(own) == list(read) and all(torch.equal(own[key], read[key]) for key in own)
    assert second.classes == ["a", "b", "c"] and second.input_size == 48 and second.content["epoch"] == 1
    before, after = (checkpoint.flags_in(each.content, "x") for each in (first, second))
    assert after == json.loads(json.dumps(before))
    other = build_model(NAME, 3)
    checkpoint.load_weights(other, checkpoint.weights_in(second.content, "x"), "x")  # as --finetune and --eval do
    assert torch.equal(other.conv1.weight, own["conv1.weight"])


@pytest.mark.parametrize("name, content, words", [
    ("eval.json", "[1]", "eval.json holds no JSON object"), ("run.json", "5", "run.json holds no JSON object"),
    ("eval.json", "[" * 100_000, "Cannot read .*eval.json"), ("run.json", os.mkfifo, "run.json .*not a regular file"),
    ("eval.json", os.mkdir, "Cannot read .*eval.json"), ("eval.json", os.mkfifo, "eval.json .*not a regular file"),
    ("eval.json", '{"epoch": 1, "checkpoint": "checkpoint.pth", "acc1": "x"}', "of checkpoint.pth in .*, eval.json, a"),
    ("log.txt", '{"epoch": 1, "test_acc1": [3]}', "of checkpoint.pth in .*, log.txt, epoch 1, are no numbers"),
])  # fmt: skip
def test_files_beside_the_checkpoint_that_are_not_ours_are_one_sentence(run, name, content, words):
    (run / name).unlink(missing_ok=True)
    content(run / name) if callable(content) else (run / name).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        export.main(["--checkpoint", str(run / "checkpoint.pth"), "--output", str(run / "out"), "--no-onnx"])
    assert "move" in str(caught.value)


def test_lines_of_a_log_that_are_no_records_are_passed_over(run):
    with open(run / "log.txt", "a") as log:
        log.write("\n[1]\n5\nnull\n" + "[" * 100_000 + "\n")
    (run / "run.json").write_text('{"environment": [1]}')
    (run / "eval.json").write_text('{"epoch": 1, "checkpoint": 5}')
    export.main(["--checkpoint", str(run / "checkpoint.pth"), "--output", str(run), "--no-onnx"])
    text = (run / "README.md").read_text()
    assert "| top-1, summed logits, % | 51 |" in text and "| git revision of the run | not available |" in text


def test_the_card_tells_what_is_known_and_what_is_not(run):
    def card(*words):
        export.main(["--checkpoint", str(run / "checkpoint.pth"), "--output", str(run), "--no-onnx", *words])
        return (run / "README.md").read_text()

    text = card()
    digest = hashlib.sha256(b"a.png\n").hexdigest()
    for words in ("| `lr` | `0.25` |", "| top-1, summed logits, % | 51 |", "From log.txt, epoch 1.", "| abc1234 |",
                  f"`list.txt`, sha256 {digest}", "| python of the run | not available |", "raw, `checkpoint.pth`",
                  "| model.onnx | not exported |"):  # fmt: skip
        assert words in text, words
    assert "`epochs`" not in text and "`seed`" not in text  # at their defaults
    (run / "eval.json").write_text(json.dumps({"checkpoint": "x/checkpoint.pth", "epoch": 1, "acc1": 52.5}))
    assert "| top-1, summed logits, % | 52.5 |\n\nFrom eval.json." in card()
    assert "not available: neither eval.json nor log.txt" in card("--ema")
    (run / "eval.json").write_text(json.dumps({"checkpoint": "x/best.pth", "epoch": 1, "acc1": 52.5}))
    assert "| top-1, summed logits, % | 31 |" in card("--ema")
    for name in ("eval.json", "log.txt", "run.json", "list.txt"):
        (run / name).unlink()
    text = card()
    assert "not available: neither" in text and "sha256 not available, the file does not exist" in text
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match="Cannot read .*run.json"):
        card()


class Small(nn.Module):
    """Two streams of one layer each, as far as ONNX can tell."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))

    def forward(self, images):
        return [head(images.mean((2, 3))) for head in self.heads]


def test_the_fused_network_as_onnx_agrees_for_any_number_of_images(run):
    runtime = pytest.importorskip("onnxruntime")
    model = pretrained.load(run / "checkpoint.pth").network
    assert export.export_onnx(model, 48, run / "model.onnx") <= 1e-4
    session = runtime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    assert ([x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]) == (["images"], ["logits"])
    assert [x.shape for x in (*session.get_inputs(), *session.get_outputs())] == [["batch", 3, 48, 48], ["batch", 3]]
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 48, 48)
        with torch.no_grad():
            ours = sum(model(images))
        assert torch.allclose(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), ours, atol=1e-4)
    assert not list(run.glob("*.tmp")) and not list(run.glob("*.data"))


class Counting(Small):
    """Its graph holds the number of images of the example."""

    def forward(self, images):
        return [logits.reshape(len(images), -1) for logits in super().forward(images)]


def test_a_network_that_fixes_the_number_of_images_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="takes 3 images only: pass --no-onnx|cannot export this network as ONNX"):
        export.export_onnx(Counting(), 8, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_that_differs_is_refused_and_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="The ONNX network differs from PyTorch's by .*: not kept"):
        export.export_onnx(Small(), 8, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="ONNX needs onnx, onnxscript, onnxruntime: pip install onnx .* --no-onnx"):
        export.export_onnx(Small(), 8, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="Safetensors files need the package safetensors: pip install safetensors"):
        checkpoint.save_safetensors({}, {}, tmp_path / "a.safetensors")
