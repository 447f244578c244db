"""A checkpoint file -> the network in it, ready for use: what predict.py, script/export.py and hubconf.py share."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from images.transforms import FIXMATCH, IMAGENET, evaluation_view
from models import NAMES, build_model, check_name  # noqa: F401  (NAMES: re-exported)
from training import checkpoint


@dataclass(frozen=True)
class Pretrained:
    """A network with the weights of a file, and what the file says of it.

    Attributes:
        network: of `models.build_model`, on the CPU, in eval mode; its `pretrained_cfg` tells input and class names.
        name: what timm calls it. num_classes: of its head(s). input_size: side of its images in pixels.
        classes: names in the order of their indices, or None.
        data_set: the --data-set it was trained on, "" if that is not known.
        content: all that the file holds, as `checkpoint.read` gives it.
    """

    network: Any
    name: str
    num_classes: int
    input_size: int
    classes: list | None
    data_set: str
    content: dict

    @property
    def view(self):
        """PIL.Image (RGB) -> float tensor (3, input_size, input_size), as in `semi_main.py --eval`."""
        return evaluation_view(self.data_set, self.input_size)


def flags_in(content):
    """The flags of the training run that a checkpoint holds, a dict; {} where it holds none."""
    args = content.get("args") if isinstance(content, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def _agreed(path, flag, given, known, otherwise):
    """The value of a flag or of the checkpoint; ValueError where they contradict each other."""
    if None not in (given, known) and given != known:
        raise ValueError(f"{path} was trained with {flag} {known}, not {given}: leave {flag} out.")
    return next((value for value in (given, known) if value is not None), otherwise)


def _count_classes(name, weights, path):
    about = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    heads = about.classifier if about else None
    head = f"{heads if isinstance(heads, str) or not heads else heads[0]}.weight"
    if head not in weights:
        raise ValueError(f"{path} is of another network than {name}, for it has no {head}: check --model.")
    return len(weights[head])


def load(path, name=None, input_size=None, classes=None, ema=False):
    """The Pretrained of a checkpoint of ours or the authors', a path or URL, or of an exported safetensors file.

    Args:
        name, input_size: where the file does not tell (a bare state dict): the network, and its side, 224 px.
        classes: names, in place of the file's own.
        ema: take the averaged weights.
    Raises OSError or ValueError naming the file: not readable, of another network, no or other flags, no average,
    another number of names than of classes. Nothing pickled is executed.
    """
    content = checkpoint.read(path)
    flags = flags_in(content)
    name = _agreed(path, "--model", name, flags.get("model"), None)
    if name is None:
        raise ValueError(f"{path} does not say which network it is of: name it with --model.")
    check_name(name)
    size = _agreed(path, "--input-size", input_size, flags.get("input_size"), 224)
    weights = checkpoint.weights_in(content, path)
    if ema:
        if "model_ema" not in content:
            raise ValueError(f"{path} holds no averaged weights (model_ema): leave --ema out.")
        weights = content["model_ema"]
    count = _count_classes(name, weights, path)
    classes = classes or checkpoint.classes_in(content)
    if classes and len(classes) != count:
        raise ValueError(f"{len(classes)} names do not fit the {count} classes of {path}: give one name a class.")
    network = build_model(name, count, size, remove_fcu=flags.get("remove_fcu", False)).eval()
    checkpoint.load_weights(network, weights, path)
    data_set = flags.get("data_set", "")
    network.pretrained_cfg |= _description(data_set, size, count, classes)
    return Pretrained(network, name, count, size, classes, data_set, content)


def _description(data_set, size, num_classes, classes):
    """What timm's `pretrained_cfg` says of a trained network: the evaluation view and the classes."""
    mean, std = FIXMATCH.get(data_set, IMAGENET)
    whole = {"crop_pct": 1.0, "crop_mode": "squash"} if data_set in FIXMATCH or size <= 32 else {"crop_pct": 0.875}
    names = {"label_names": tuple(classes)} if classes else {}
    return {"input_size": (3, size, size), "mean": mean, "std": std, "num_classes": num_classes, **whole, **names}


def add_flags(parser):
    """The flags by which a tool takes a checkpoint, for `from_flags`."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE",
        help="checkpoint.pth of a run, the authors' file or an exported model.safetensors; a path or URL")  # fmt: skip
    add("--classes", metavar="FILE", help="names of the classes, one a line, where the checkpoint has none")
    add("--model", metavar="NAME", help="the network, only where the checkpoint does not tell (a bare state dict)")
    add("--input-size", type=int, metavar="PIXELS", help="side of its images, likewise (224)")
    add("--ema", action="store_true", help="the averaged weights instead of the raw ones")


def from_flags(args):
    """The Pretrained that the flags of `add_flags` ask for. Raises as `load`, and where --classes cannot be read."""
    return load(args.checkpoint, args.model, args.input_size, args.classes and _names(args.classes), args.ema)


def _names(path):
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"Cannot read --classes {path} ({reason}): give a text file, one name a line.") from error
    if not names:
        raise ValueError(f"--classes {path} is empty: write one name a line.")
    return names
