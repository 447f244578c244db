"""From a checkpoint file to the network in it, ready for use: shared by predict.py, script/export.py and hubconf.py."""

from dataclasses import dataclass
from typing import Any

import timm

from datasets import evaluation_view, fixmatch_colours
from images.files import read_regular
from images.transforms import IMAGENET
from models import NAMES, build_model, check_hosted, check_name  # noqa: F401  (NAMES: re-exported)
from training import checkpoint
from utils import preserved_cpu_generators


@dataclass(frozen=True)
class Pretrained:
    """A network with the weights of a file, and what else the file holds about it.

    Attributes:
        network: as built by `models.build_model`, on the CPU, in eval mode; its `pretrained_cfg` has the input's
            size, mean and standard deviation and the class names.
        name: timm's name of it. num_classes: size of its heads. input_size: side of its images in pixels.
        classes: names in the order of their indices, or None.
        data_set: the --data-set of its training, "" where unknown.
        content: everything in the file, as returned by `checkpoint.read`.
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


def _reconcile(path, flag, given, known, otherwise):
    """The value of a flag: as given, else as the checkpoint has it. ValueError where the two differ."""
    if None not in (given, known) and given != known:
        raise ValueError(f"{path} was trained with {flag} {known}, not {given}: leave {flag} out.")
    return next((value for value in (given, known) if value is not None), otherwise)


def _count_classes(name, weights, path):
    about = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    heads = about.classifier if about else None
    head = f"{heads if isinstance(heads, str) or not heads else heads[0]}.weight"
    if head not in weights:
        raise ValueError(f"{path} is of another network than {name}, because it has no {head}: check --model.")
    return len(weights[head])


def load(path, name=None, input_size=None, classes=None, ema=False):
    """Load the Pretrained in a checkpoint of ours or of the authors, or in an exported safetensors file.

    Args:
        path: a file, or the https URL of one. Nothing pickled in it is executed.
        name, input_size: network and side of its images, needed where the file is a bare state dict (default 224 px).
        classes: class names, instead of the file's own.
        ema: load the averaged weights.
    Raises OSError or ValueError naming the file: it is unreadable or of another network, `name` or `input_size`
    differ from its own, it has no averaged weights, or `classes` are of another number.
    """
    content = checkpoint.read(path)
    flags = checkpoint.flags_in(content, path)
    name = _reconcile(path, "--model", name, flags.get("model"), None)
    if name is None:
        raise ValueError(f"{path} does not say which network it is of: name it with --model.")
    check_name(name)
    size = _reconcile(path, "--input-size", input_size, flags.get("input_size"), 224)
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
    """Entries of timm's `pretrained_cfg` for a trained network: its evaluation view and its classes."""
    colours = fixmatch_colours(data_set)
    mean, std = colours or IMAGENET
    whole = {"crop_pct": 1.0, "crop_mode": "squash"} if colours or size <= 32 else {"crop_pct": 0.875}
    names = {"label_names": tuple(classes)} if classes else {}
    return {"input_size": (3, size, size), "mean": mean, "std": std, "num_classes": num_classes, **whole, **names}


def hosted_weights(name, input_size=224):
    """Return the weights that timm hosts for a network, a state dict with the classes that they were trained on.

    They come from the cache of huggingface_hub or torch.hub, or are downloaded into it. Position embeddings are resized
    to the input size, as timm does it.
    Raises ValueError for a network without hosted weights; OSError where they can be had from neither.
    """
    from safetensors import SafetensorError  # a package that timm requires

    check_hosted(name)
    classes = timm.models.get_pretrained_cfg(name).num_classes
    try:
        with preserved_cpu_generators():
            # With their own number of classes, because with another one timm loads what fits and passes over the rest.
            return build_model(name, classes, input_size, pretrained=True).state_dict()
    except (OSError, SafetensorError, *checkpoint.DAMAGE) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"--pretrained: the weights that timm hosts for {name} can be had neither from its cache nor from the "
            f"network ({reason}): start once where there is a network, or name a file by --finetune."
        ) from error


def add_flags(parser):
    """Add the flags by which a tool names a checkpoint; `from_flags` reads them."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE",
        help="checkpoint.pth of a run, the authors' file or an exported model.safetensors; a path or URL")  # fmt: skip
    add("--classes", metavar="FILE", help="text file of class names, one a line, where the checkpoint has none")
    add("--model", metavar="NAME", help="name of the network, where the checkpoint is a bare state dict")
    add("--input-size", type=int, metavar="PIXELS", help="side of its images, likewise (default: 224)")
    add("--ema", action="store_true", help="use the averaged weights (EMA) instead of the raw ones")


def from_flags(args):
    """Load the Pretrained of the flags of `add_flags`. Raises as `load`, and where --classes cannot be read."""
    return load(args.checkpoint, args.model, args.input_size, args.classes and _names(args.classes), args.ema)


def _names(path):
    try:
        names = [line.strip() for line in read_regular(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"Cannot read --classes {path} ({reason}): give a text file, one name a line.") from error
    if not names:
        raise ValueError(f"--classes {path} is empty: write one name a line.")
    return names
