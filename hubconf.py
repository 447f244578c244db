"""Entry points of `torch.hub`, one for each network in `models.NAMES`.

    model = torch.hub.load(CLONE, "Semiformer_small_patch16", source="local", pretrained="checkpoint.pth")

This repository has top-level modules with common names, such as `utils` and `models`. A program that has imported other
modules of these names cannot load it in the same process.
"""

from models import build_model as _build_model
from models import pretrained as _pretrained

dependencies = ["torch", "torchvision", "timm", "numpy"]


def _entry(name):
    def entry(pretrained=None, num_classes=None, ema=False, **settings):
        return _network(name, pretrained, num_classes, ema, **settings)

    entry.__name__ = name
    entry.__doc__ = f"""{name}: maps images (N, 3, S, S) to a list of logits (N, classes), one per stream, CNN first.

    Args:
        pretrained: path or URL of a checkpoint, ours or the authors', or of model.safetensors; None: random weights.
        num_classes: classes of the heads; None: those of the file, or 1,000 without a file. If it differs from the
            file's, the heads are initialised at random.
        ema: load the averaged weights (EMA) of the file.
        settings: arguments of `models.build_model`, without a file only: img_size, drop, drop_path, depth, ...

    Returns the network, in eval mode if it was loaded from a file and else in train mode. `network.pretrained_cfg` has
    its input_size, mean and std and, if the file has them, the names of the classes as label_names.
    Raises ValueError or OSError if the file is missing, damaged or of another network.
    """
    return entry


def _network(name, file, num_classes, ema, **settings):
    if file is True:
        raise ValueError(f"No weights are hosted for {name}: pass pretrained=PATH, a checkpoint file.")
    if not file:
        return _build_model(name, 1000 if num_classes is None else num_classes, **settings)
    if settings:
        raise ValueError(f"{', '.join(settings)} cannot be set with pretrained={file}: its settings apply.")
    model = _pretrained.load(file, name, ema=ema)
    if num_classes not in (None, model.num_classes):
        model.network.reset_classifier(num_classes)
    return model.network


globals().update({_name: _entry(_name) for _name in _pretrained.NAMES})
