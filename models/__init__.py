"""Every network by name: importing this package registers ours with timm."""

import difflib

import timm

from models import baselines, convmixer, semiformer  # noqa: F401  (importing is registering)
from models.baselines import MyResNet, single_stream
from models.blocks import channels_last, fold_batchnorm, update_statistics_once  # noqa: F401  (two are re-exported)

NAMES = [*semiformer.default_cfgs, *convmixer.default_cfgs, *baselines.default_cfgs]  # our own networks


def has_two_streams(name):
    """Whether the network of this name has a CNN and a transformer stream."""
    return name.startswith(("Semiformer_", "Conformer_"))


def check_name(name):
    """Raise ValueError, suggesting similar names, where neither we nor timm have a network of this name.

    A name of timm may end in a dot and the tag of its hosted weights, which must be one of that network.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"Unknown --model {name!r}" + (f": did you mean {', '.join(close)}?" if close else "."))
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        raise ValueError(f"Unknown --model {name!r}: {error}") from error


def check_hosted(name):
    """Raise ValueError where timm hosts no weights for the network of this name."""
    check_name(name)
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"--pretrained: no weights are hosted for {name}: leave it out, or name a file by --finetune.")


def build_model(
    name, num_classes, img_size=224, drop=0.0, drop_path=0.0, drop_block=None, remove_fcu=False, **overrides
):
    """Build any network with the common interface `model(images) -> list of logits`, one tensor per stream.

    Args:
        name: one of ours, or any timm classifier.
        num_classes: size of the head(s).
        img_size: input side in pixels; passed to the networks whose position embedding depends on it.
        drop, drop_path, drop_block: dropout, stochastic depth and DropBlock rates.
        remove_fcu: no exchange of features between the streams; for two-stream networks only.
        overrides: constructor arguments, e.g. `depth=6`.
    Raises ValueError for an unknown name, `remove_fcu` or `drop_block` with the wrong kind of network, and a
    setting the network does not have.
    """
    check_name(name)
    settings = dict(overrides, num_classes=num_classes)
    if has_two_streams(name):
        if drop_block is not None:
            raise ValueError(f"--drop-block does not apply to the two-stream network {name}: leave it out.")
        return timm.create_model(name, drop_rate=drop, drop_path_rate=drop_path, remove_fcu=remove_fcu, **settings)
    if remove_fcu:
        raise ValueError(f"--remove-fcu removes the fusion of a two-stream network, and {name} has none.")
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if name.startswith("deit_"):
        # released code (timm 0.3.2): dropout after the position embedding and in the blocks, but not before the head.
        rates = dict(pos_drop_rate=drop, proj_drop_rate=drop, drop_path_rate=drop_path)
        settings["img_size"] = img_size
    else:
        rates = dict(drop_rate=drop, drop_path_rate=drop_path, drop_block_rate=drop_block)
        if cfg is not None and cfg.fixed_input_size:
            settings["img_size"] = img_size
    # Rates of zero are left out, because not every network has each of them.
    settings.update({key: rate for key, rate in rates.items() if rate})
    try:
        model = timm.create_model(name, **settings)
    except TypeError as error:
        raise ValueError(f"{name} lacks a setting it was given ({error}): set the flag's rate to 0.") from error
    return model if isinstance(model, MyResNet) else single_stream(model)


def enable_grad_checkpointing(model):
    """Compute activations again in backward instead of keeping them (`--grad-checkpointing`), in place.

    Running statistics are still updated once per step. Raises ValueError for a network that does not support it.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        name = type(model).__name__
        raise ValueError(f"--grad-checkpointing: {name} has no blocks to compute again; leave it out.") from error
    update_statistics_once(model)
