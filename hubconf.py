"""Networks for `torch.hub`, an entry each.

    model = torch.hub.load(CLONE, "Semiformer_small_patch16", source="local", pretrained="checkpoint.pth")

The entries are `models.NAMES`. The modules of this repository have short names (`utils`, `models`):
a program with modules of the same names imports them before or after, not both.
"""

from models import build_model as _build_model
from models import pretrained as _pretrained

dependencies = ["torch", "torchvision", "timm", "numpy"]


def _entry(name):
    def entry(pretrained=None, num_classes=None, ema=False, **settings):
        return _network(name, pretrained, num_classes, ema, **settings)

    entry.__name__ = name
    entry.__doc__ = f"""{name}: images (N, 3, S, S) -> list of logits (N, classes), one a stream, CNN first.

    Args:
        pretrained: a checkpoint of ours or the authors', or model.safetensors, a path or URL; None: fresh weights.
        num_classes: of the head(s); None: the file's, without one 1,000. Where the file's differs, heads are fresh.
        ema: the averaged weights of the file.
        settings: of `models.build_model`, without a file: img_size, drop, drop_path, depth, ...
    Returns the network, with a file in eval mode, else in train mode. `network.pretrained_cfg` has its input_size, mean
    and std, and, where the file has them, the names of the classes as label_names.
    Raises ValueError or OSError, one sentence, for a file that is damaged, of another network, or not there.
    """
    return entry


def _network(name, file, num_classes, ema, **settings):
    if file is True:
        raise ValueError(f"No weights are hosted for {name}: pass pretrained=PATH, a checkpoint file.")
    if not file:
        return _build_model(name, 1000 if num_classes is None else num_classes, **settings)
    if settings:
        raise ValueError(f"{', '.join(settings)} cannot be set beside pretrained={file}: the file decides.")
    model = _pretrained.load(file, name, ema=ema)
    if num_classes not in (None, model.num_classes):
        model.network.reset_classifier(num_classes)
    return model.network


globals().update({_name: _entry(_name) for _name in _pretrained.NAMES})
