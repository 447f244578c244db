"""Attacks through checkpoint files: on a resume, an evaluation, --finetune, predict.py and the export."""

import os
import zipfile

import numpy as np
import torch

from tests.proofs.attacks.sandbox import DONE, REFUSED, Executing, add_run, cases, command, fill, train

FILE = "out/checkpoint.pth"


def resumes(box):
    """Resume from the checkpoint of the sandbox."""
    return train("--epochs", 3, "--resume", FILE)


def evaluates(box):
    """Evaluate it, with the flags of its run."""
    return command("semi_main.py", *"--eval --data-path data --device cpu --num_workers 0 --resume".split(), FILE)


def finetunes(box):
    """Start from its weights, in another output folder."""
    return train("--output_dir", "new", "--finetune", FILE, may_write=("new",))


def predicts(box):
    """Classify images with it."""
    return command("predict.py", "data/val", "--checkpoint", FILE)


def exports(box):
    """Export it."""
    return command("script.export", "--checkpoint", FILE, "--output", "out/exported", "--no-onnx")


def changed(place, value, then=resumes):
    """Prepare a checkpoint of a run in which the entry at `place` is `value`, or what that function makes of it."""

    def prepare(box):
        path = add_run(box, "out", "checkpoint.pth") / "checkpoint.pth"
        content = torch.load(path, weights_only=False)  # ours; checkpoint.read is not for several threads
        *folders, last = [int(part) if part.isdigit() else part for part in place.split("/")]
        part = content
        for name in folders:
            part = part[name] if isinstance(part[name], dict | list) else vars(part[name])
        part[last] = value(part.get(last)) if callable(value) else value
        torch.save(content, path)
        return then(box)

    return prepare


def written(content, then=resumes, name="checkpoint.pth", **how):
    """Prepare a file of this content, bytes, or what torch.save makes of it; a function gets the path and writes it."""

    def prepare(box):
        add_run(box, "out", "log.txt")
        path = box / "out" / name
        if callable(content) or isinstance(content, bytes):
            fill(path, content)
        else:
            torch.save(content, path, **how)
        return then(box)

    return prepare


def rewritten(change, then=resumes, **how):
    """Prepare the checkpoint of a run, saved anew and its bytes changed."""

    def prepare(box):
        path = add_run(box, "out", "checkpoint.pth") / "checkpoint.pth"
        torch.save(torch.load(path, weights_only=False), path, **how)
        path.write_bytes(change(path.read_bytes()))
        return then(box)

    return prepare


def _zipped(pickled):
    """A function that writes a PyTorch file of this pickle, bytes."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
                archive.writestr(f"archive/{name}", content)

    return write


def _bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(300_000_000))


def _safetensors(about):
    """A function that writes a safetensors file with this text as its metadata of ours."""

    def write(path):
        import safetensors.torch

        content = safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt", "semiformer": about})
        path.write_bytes(content)

    return write


def _from_safetensors(box):
    return command("predict.py", "data/val", "--checkpoint", "out/a.safetensors", "--model", "lcnet_035")


def _nested(depth):
    return b"\x80\x02}X\x05\x00\x00\x00model" + b"]" * depth + b"a" * (depth - 1) + b"s."


def _many_times():
    laughs = [0.0] * 10
    for _ in range(30):
        laughs = [laughs] * 10
    return laughs


def _itself():
    value = []
    value.append(value)
    return value


MOMENT, WEIGHT = "optimizer/state/0/exp_avg", "model/conv_stem.weight"
ENTRIES = [  # (name, place, value, words of the message)
    ("epoch is a text", "epoch", "3", "epoch is '3', not a whole number"),
    ("epoch is nan", "epoch", float("nan"), "epoch is nan"),
    ("epoch is a tensor", "epoch", torch.tensor(3), "epoch is a tensor"),
    ("epoch is 2**70", "epoch", 2**70, "epoch is 118059"),
    ("epoch is -5", "epoch", -5, "epoch is -5"),
    ("best is empty", "best", {}, "best is {}"),
    ("best top-1 is nan", "best", {"acc1": float("nan"), "epoch": 1}, "best is"),
    ("classes are no names", "classes", ["a", 5], "classes is"),
    ("classes have other names", "classes", ["a", "b", "c"], "is of other classes than the data"),
    ("args is a list", "args", ["--lr", 1], "args is"),
    ("args has a method's name", "args", {"__class__": 1}, "which is no flag's name"),
    ("a flag is a dictionary", "args", {"lr": {"x": 1}}, r"args\['lr'\] is"),
    ("pending is a text", "pending", {"loss": "low"}, "pending is"),
    ("unreadable images are below 0", "bad_images", {"labelled": [-1]}, "bad_images is"),
    ("half of a scaler", "scaler", {"scale": 1.0}, "scaler is"),
    ("no schedule", "lr_scheduler", None, "lr_scheduler is None"),
    ("half of a plateau", "plateau", {"best": 1.0}, "plateau is"),
    ("model_ema is 5", "model_ema", 5, "model_ema is 5, not a state dict"),
    ("the average of another network", "model_ema/conv_stem.weight", torch.zeros(4), "of another network"),
    ("an average that is not finite", "model_ema/conv_stem.weight", lambda w: w / 0, "is not finite"),
    ("a head of more classes", "model/classifier.bias", torch.zeros(1000), "The head in .* has 1000 classes"),
    ("no weights", "model", [], r"model is \[\]"),
    ("a sparse weight", WEIGHT, lambda w: w.to_sparse(), "sparse_coo"),
    ("a weight on meta", WEIGHT, lambda w: w.to("meta"), "on meta"),
    ("a complex weight", WEIGHT, lambda w: w.to(torch.complex64), "complex64"),
    ("a weight of one element, repeated", WEIGHT, lambda w: torch.zeros(1, 1, 1, 1).expand(w.shape), "holds fewer"),
    ("a weight that is not finite", WEIGHT, lambda w: w.fill_(torch.inf), "is not finite"),
    ("no optimizer", "optimizer", [], "optimizer is"),
    ("a moment of another shape", MOMENT, lambda m: m[:-1], "is .* torch.float32, not"),
    ("a moment with gaps", MOMENT, lambda m: torch.zeros(2 * len(m))[::2], "is a view of another tensor"),
    ("a moment of one element", MOMENT, torch.zeros(300)[7:8], r"is \(1,\)"),
    ("a sparse moment", MOMENT, lambda m: m.to_sparse(), "sparse"),
    ("a moment on meta", MOMENT, lambda m: m.to("meta"), "on meta"),
    ("a moment that is a text", MOMENT, "x", "is 'x'"),
    ("a moment that contains itself", MOMENT, _itself(), "checkpoint.pth"),
    ("a moment of 10**30 numbers in few bytes", MOMENT, _many_times(), "checkpoint.pth"),
    ("squares below 0", "optimizer/state/0/exp_avg_sq", lambda m: m - 1, "mean of squares below 0"),
    ("a step that is nan", "optimizer/state/0/step", torch.full((), torch.nan), "is not finite"),
    ("a moment more", "optimizer/state/0/more", torch.zeros(5), "'more'"),
    ("parameters twice", "optimizer/param_groups/0/params", [0, 0, 1], "twice the same"),
    ("a rate that is a text", "optimizer/param_groups/0/lr", "fast", "not a learning rate"),
]  # fmt: skip
CASES = cases(
    "training state",
    *((name, changed(place, value), REFUSED, words) for name, place, value, words in ENTRIES),
    ("a moment that is part of a large tensor", changed(MOMENT, lambda m: torch.zeros(9999)[: len(m)]), DONE),
    ("a pickle that executes", written({"model": Executing()}), REFUSED, "Refused to load .*system"),
    ("an old file that executes", written(Executing(), _use_new_zipfile_serialization=False), REFUSED,
     "Refused to load"),
    ("an array that executes", written({"model": np.array([Executing()])}), REFUSED, "Refused to load"),
    ("a network in place of weights", written({"model": torch.nn.Linear(2, 2)}), REFUSED, "Refused to load"),
    ("a bomb of zeros", written(_bomb), REFUSED, "its entries are larger than the file"),
    ("lists nested 100,000 deep", written(_zipped(_nested(100_000))), REFUSED, "checkpoint.pth"),
    ("a pickle that refers to nothing", written(_zipped(b"\x80\x02h\x05.")), REFUSED, "damaged or no"),
    ("an empty file", written(b""), REFUSED, "damaged"),
    ("a web page", written(b"<!DOCTYPE html><html>404"), REFUSED, "damaged or no PyTorch file"),
    ("a file cut off", rewritten(lambda content: content[:-4000]), REFUSED, "damaged"),
    ("a file without its beginning", rewritten(lambda content: content[4000:]), REFUSED, "damaged"),
    ("a flipped bit", rewritten(lambda c: c[:500_000] + bytes([c[500_000] ^ 4]) + c[500_001:]), REFUSED,
     "does not match its checksum"),
    ("a file as of PyTorch 1.5", rewritten(bytes, _use_new_zipfile_serialization=False), DONE),
    ("such a file, cut off", rewritten(lambda c: c[:-9], _use_new_zipfile_serialization=False), REFUSED,
     "damaged"),
    ("a FIFO", written(os.mkfifo), REFUSED, "There is no checkpoint"),
    ("a folder", written(os.mkdir), REFUSED, "There is no checkpoint"),
    ("a link to /dev/zero", written(lambda path: path.symlink_to("/dev/zero")), REFUSED, "another run"),
    ("a link to /proc/self/mem", written(lambda path: path.symlink_to("/proc/self/mem")), REFUSED, ""),
    ("a link to itself", written(lambda path: path.symlink_to("checkpoint.pth")), REFUSED, "There is no"),
    ("weights that are nan, evaluated", changed("model_ema/conv_stem.weight", lambda w: w / 0, evaluates),
     REFUSED, "is not finite"),
    ("--model 5, evaluated", changed("args/model", 5, evaluates), REFUSED, "model"),
    ("an unknown data set, evaluated", changed("args/data_set", "MNIST", evaluates), REFUSED, "MNIST"),
    ("--input-size 100000, evaluated", changed("args/input_size", 100_000, evaluates), REFUSED, "size"),
    ("a sparse weight, finetuned", changed(WEIGHT, lambda w: w.to_sparse(), finetunes), REFUSED, "sparse"),
    ("an executing file, finetuned", written(Executing(), finetunes), REFUSED, "Refused to load"),
    ("a state without moments, finetuned", changed("optimizer", [], finetunes), DONE),
    ("an executing file, predict.py", written(Executing(), predicts), REFUSED, "Refused to load"),
    ("--model ../../x, predict.py", changed("args/model", "../../x", predicts), REFUSED, "model"),
    ("--model 5, predict.py", changed("args/model", 5, predicts), REFUSED, "model"),
    ("--input-size '48', predict.py", changed("args/input_size", "48", predicts), REFUSED, "size"),
    ("--input-size 100000, predict.py", changed("args/input_size", 100_000, predicts), REFUSED, "size"),
    ("--data-set [], predict.py", changed("args/data_set", [], predicts), REFUSED, "data_set"),
    ("four names for three classes, predict.py", changed("classes", list("abcd"), predicts), REFUSED, "fit"),
    ("a name with an escape, predict.py", changed("classes", ["\x1b[2J\n", "b", "c"], predicts)),
    ("epoch is a list, exported", changed("epoch", [1], exports)),
    ("args has a method's name, exported", changed("args", {"__class__": 1}, exports), REFUSED, "args|which network"),
    ("no weights, exported", changed("model", {}, exports), REFUSED, "holds no state dict"),
    ("safetensors: flags that are none",
     written(_safetensors('{"args": {"__class__": 1}}'), _from_safetensors, "a.safetensors"), REFUSED, "args"),
    ("safetensors: metadata nested 100,000 deep",
     written(_safetensors("[" * 100_000), _from_safetensors, "a.safetensors"), REFUSED, "damaged"),
    ("safetensors: a header of 2**63 bytes",
     written((2**63).to_bytes(8, "little") + b"{}", _from_safetensors, "a.safetensors"), REFUSED, "damaged"),
    ("safetensors: a FIFO", written(os.mkfifo, _from_safetensors, "a.safetensors"), REFUSED, "There is no"),
)  # fmt: skip
