"""The training state: what a checkpoint holds, how it is saved and how it is loaded."""

import argparse
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from training import optimization, validation
from training.downloads import fetch
from utils import atomic, print_main, sync_folder, write_atomic, writing

# Classes that a published file may hold beside tensors and plain containers. None of these runs code when unpickled.
SAFE_CLASSES = [argparse.Namespace, pathlib.Path, pathlib.PosixPath, pathlib.PurePosixPath]

LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how files of PyTorch before 1.6 begin

STATE_KEYS = ("optimizer", "lr_scheduler", "epoch")  # a complete training state has these beside its weights

HEADS = {"head", "head_dist", "fc", "classifier", "conv_cls_head", "trans_cls_head"}


@dataclass
class TrainState:
    """Everything that a run needs to resume. Random states are not saved: every epoch derives its own seeds.

    Attributes:
        model: the bare network.
        optimizer, scheduler, scaler: torch's, timm's, torch's GradScaler (disabled outside fp16).
        ema: timm's ModelEmaV3, or None.
        epoch: last finished epoch, -1 before the first.
        best: {"acc1": best top-1 in percent, "epoch": its epoch}, of the raw weights.
        classes: names of the classes, in the order of their indices.
        bad_images: {name of a training set: its BadImages}, whose known unreadable images are saved.
        labeller: pseudo_labels.PseudoLabeller, whose buffers are saved, or None.
        pending: the training meters of `epoch` while it has not been evaluated and logged, else None.
    """

    model: Any
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None
    ema: Any = None
    epoch: int = -1
    best: dict = field(default_factory=lambda: {"acc1": 0.0, "epoch": -1})
    classes: tuple = ()
    bad_images: dict = field(default_factory=dict)
    labeller: Any = None
    pending: dict | None = None

    def to_dict(self, args):
        """A checkpoint's content: the published keys `model optimizer lr_scheduler epoch model_ema args`, and ours."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "classes": list(self.classes),
            "bad_images": {name: sorted(images.known) for name, images in self.bad_images.items()},
            "args": args,
        }
        if self.ema is not None:
            content["model_ema"] = self.ema.module.state_dict()
        if self.labeller is not None and self.labeller.state_dict():
            content["labeller"] = {"kind": self.labeller.kind, "state": self.labeller.state_dict()}
        if self.pending is not None:
            content["pending"] = self.pending
        if plateau := optimization.plateau_state(self.scheduler):
            content["plateau"] = plateau
        return content

    def from_dict(self, content, path):
        """Load a checkpoint's content: its weights and, where it has optimizer, schedule and epoch, the whole state.

        Moments, counters and the position in the schedule come from the content; rates and all other settings of the
        optimizer and the schedule stay those that this state was built with.

        `path` is the file's name for the messages. Raises ValueError, before anything is used, where a part is not what
        `to_dict` writes or does not belong to this network and optimizer, or where the classes have other names.
        """
        validation.check(content, path)
        if differing := class_mismatch(classes_in(content), self.classes):
            raise ValueError(
                f"{path} is of other classes than the data, {differing}: check --data-path, or --finetune it."
            )
        weights = weights_in(content, path)
        parts = {path: (self.model, weights)}
        if self.ema is not None and "model_ema" in content:
            parts[f"{path} (model_ema)"] = (self.ema.module, content["model_ema"])
        learned = self._labels_learned(content, path)
        if learned:
            parts[f"{path} (labeller)"] = (self.labeller, learned)
        for name, (model, tensors) in parts.items():
            # The state of the labels begins in float64 and becomes what the probabilities are.
            check_fit(model, tensors, name, same_types=model is not self.labeller)
        lacking = [key for key in STATE_KEYS if key not in content]
        if not lacking:
            # First, because it lets the optimizer take a step, which changes the weights.
            optimization.restore_optimizer(self.optimizer, content["optimizer"], path)
        for model, tensors in parts.values():
            model.load_state_dict(tensors)
        if self.ema is not None and "model_ema" not in content:
            print_main(f"{path} holds no model_ema: the moving average starts from its weights.")
            self.ema.module.load_state_dict(self.model.state_dict())
        if lacking:
            print_main(f"{path} lacks {', '.join(lacking)}: its weights are used, the rest starts anew.")
            return
        self.epoch = content["epoch"]
        self.best = content.get("best", self.best)
        self.pending = content.get("pending")
        metric, groups = content["lr_scheduler"].get("metric"), content["optimizer"]["param_groups"]
        optimization.restore_schedule(self.scheduler, self.epoch, metric, content.get("plateau"), groups)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        for name, indices in content.get("bad_images", {}).items():
            if name in self.bad_images:
                self.bad_images[name].restore(indices)

    def _labels_learned(self, content, path):
        """The saved state of the labeller, None where it begins anew, which is printed."""
        if self.labeller is None or not self.labeller.state_dict():
            return None
        saved = content.get("labeller", {"kind": "pseudo labels without a state"})
        if saved["kind"] != self.labeller.kind:
            print_main(f"{path} holds the state of {saved['kind']}: that of {self.labeller.kind} starts anew.")
            return None
        return saved["state"]


def save(content, path, previous=None):
    """Write a checkpoint; `path` is complete at any moment, and the file that it held becomes `previous`, if given.

    Raises OSError naming the file where it cannot be written; the files that were there stay as they are.
    """
    with writing(path), atomic(path, previous and partial(_keep, path, previous)) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # On a full disk, and where Ctrl-C interrupts it, torch.save itself reports an "unexpected pos".
            if isinstance(error.__context__, OSError | KeyboardInterrupt):
                raise error.__context__ from error
            raise


def save_again(content, written, path, previous=None):
    """Let `path` name a file just written with this content too: as a hard link, or saved where there are none."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(written, temporary)
    except OSError:  # some file systems (exFAT, some network ones) have no hard links
        save(content, path, previous)
        return
    try:
        with writing(path):
            if previous:
                _keep(path, previous)
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path))
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def _keep(path, previous):
    """Let `previous` name the file that `path` names, without a moment in which either name is missing."""
    if not os.path.exists(path):
        return
    temporary = f"{previous}.tmp"
    with suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
        os.replace(temporary, previous)
    except OSError:
        # Some file systems (exFAT, some network ones) have no hard links. There `path` is missing until it is
        # replaced, and a run that is killed in between resumes from `previous`.
        os.replace(path, previous)
    with suppress(FileNotFoundError):
        os.remove(temporary)  # renaming one hard link onto another of the same file leaves both


def _check_sums(path):
    """Verify the checksums of a zip file, which torch.load ignores: a flipped bit would become a wrong weight.

    It takes 0.3 s per GB. Files of PyTorch before 1.6 are not zip files and have no checksums. PyTorch compresses
    nothing, so entries that are larger than the file are made to exhaust the memory.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile("its entries are larger than the file")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def check_complete(path, name):
    """Raise ValueError or OSError, with the reason, where a downloaded file is cut off, damaged, or no checkpoint.

    Zip files have checksums and an end, and safetensors files tell their length. A file of PyTorch before 1.6 has
    neither, and is loaded. `name` is the one that the file will have.
    """
    if name.endswith(".safetensors"):
        package = _safetensors()
        try:
            with package.safe_open(path, framework="pt"):
                return
        except package.SafetensorError as error:
            raise ValueError(f"it is damaged or no safetensors file: {error}") from error
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
    if start == LEGACY:
        read(path)
    elif not zipfile.is_zipfile(path):
        raise ValueError("its end is missing" if start.startswith(b"PK") else "it is no PyTorch file")
    else:
        try:
            _check_sums(path)
        except DAMAGE as error:
            raise ValueError(f"it is damaged: {error}") from error


# The errors that the readers of zip files, pickles and tensors raise on damaged bytes.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ArithmeticError,
          MemoryError, struct.error, zlib.error, zipfile.BadZipFile)  # fmt: skip


def read(path):
    """Read a checkpoint, a path or URL, into CPU memory, without executing anything pickled in it.

    A name that ends in .safetensors means a file of `save_safetensors`. Raises OSError or ValueError naming the file
    where it is missing, unreadable or damaged, or holds other classes than SAFE_CLASSES.
    """
    path = fetch(path, check_complete)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if str(path).endswith(".safetensors"):
        return _read_safetensors(path)
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message recommends to load the file unsafely.
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"Refused to load {path}: it holds {foreign[1]}, more than weights and plain values; "
                "save its state dict alone where you trust it."
            ) from error
        raise ValueError(f"Cannot read the checkpoint {path}, it is damaged or no PyTorch file.") from error
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"Cannot read the checkpoint {path} ({reason}): it is damaged, or not allowed.") from error
    except DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Cannot read the checkpoint {path}, it is damaged or no PyTorch file: {reason}") from error


def _safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ValueError("Safetensors files need the package safetensors: pip install safetensors.") from error
    return safetensors


def save_safetensors(weights, about, path):
    """Write a state dict as a safetensors file.

    Args:
        about: what `read` returns beside the weights, {"classes", "epoch", "args": a dict}.
    Raises OSError naming the file, ValueError where the package is missing.
    """
    tensors = {key: value.contiguous() for key, value in weights.items()}
    metadata = {"format": "pt", "semiformer": json.dumps(about, default=str)}  # transformers expects a format
    write_atomic(path, _safetensors().torch.save(tensors, metadata), "--output")


def _read_safetensors(path):
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("semiformer", "{}"))
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (package.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Cannot read {path}, it is damaged or no safetensors file: {error}") from error
    validation.check(about, path)
    flags = {"args": argparse.Namespace(**about["args"])} if "args" in about else {}
    return {**about, "model": weights, **flags}


def weights_in(content, path, key="model"):
    """The state dict in a checkpoint's content: its entry `key`, or for "model" the content itself if it has none.

    Raises ValueError naming the file where there is none, or where a tensor is not finite or not in the CPU's memory.
    """
    weights = content.get(key, content if key == "model" else None) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise ValueError(f"{path} holds no state dict: neither under {key!r} nor as the file itself.")
    if fault := validation.weights_fault(weights):
        raise ValueError(f"{path} cannot be used: {key}{fault}.")
    return weights


def classes_in(content):
    """The class names in a checkpoint's content, a list; None in a bare state dict and in the authors' files."""
    classes = content.get("classes") if isinstance(content, dict) else None
    named = isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
    return classes if named else None


def flags_in(content, path):
    """The flags of the training run in a checkpoint's content, a dict; {} where there are none.

    Raises ValueError naming the file where they are not what a command line gives.
    """
    if not isinstance(content, dict) or "args" not in content:
        return {}
    validation.check(content, path, ["args"])
    args = content["args"]
    return dict(vars(args) if isinstance(args, argparse.Namespace) else args or {})


def class_mismatch(there, here):
    """A description of the first class that a checkpoint and the data name differently; "" where there is none."""
    for i, (old, new) in enumerate(zip(there or (), here or ())):
        if old != new:
            return f"whose class {i} is {old!r} there and {new!r} here"
    return ""


def is_head(key):
    """Whether the tensor of this name belongs to a classification head, of our networks or of timm's."""
    return not HEADS.isdisjoint(key.split("."))


def load_weights(model, weights, path):
    """Load a state dict that must fit exactly. Raises ValueError as `check_fit`."""
    check_fit(model, weights, path)
    model.load_state_dict(weights)


def check_fit(model, weights, path, same_types=False):
    """Raise ValueError naming the classes, keys or shapes in which a state dict differs from the network's own.

    With `same_types` the tensors must have the network's types too, as those of a training state have.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    extra = [key for key in weights if key not in own]
    if missing or extra:
        raise ValueError(
            f"{path} is of another network: it lacks {len(missing)} tensors of this one {missing[:2]} "
            f"and has {len(extra)} others {extra[:2]}; check --model and its flags."
        )
    other = {
        key: (tuple(weights[key].shape), tuple(own[key].shape)) for key in own if weights[key].shape != own[key].shape
    }
    if other and all(is_head(key) for key in other):
        there, here = next(iter(other.values()))
        raise ValueError(f"The head in {path} has {there[0]} classes, but the data has {here[0]} class folders.")
    if not other and same_types:
        other = {key: (weights[key].dtype, own[key].dtype) for key in own if weights[key].dtype != own[key].dtype}
    if other:
        key, (there, here) = next(iter(other.items()))
        raise ValueError(
            f"{path} is of another network: {key} is {there} there, {here} here; check --model and its flags."
        )
