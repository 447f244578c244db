"""Start-up files: weights another training left behind, taken over before the first step.

Each demands what its flag promises: what does not fit is an error with the file, the flag and the first keys.
"""

import math
import re

import torch
from torch.nn import functional as F

from training import checkpoint
from utils import print_main

NOT_GIVEN = ("", "None")  # released code: a path flag that is not given is the string "None"


def initial_weight_files(args):
    """[(flag, file)] of the start-up files, in the order in which they load.

    Raises ValueError for a `--*-load` without its file and for a file without its flag.
    """
    files = [("--finetune", args.finetune)] if args.finetune not in NOT_GIVEN else []
    for flag in list(LOADS)[1:]:
        name = flag.strip("-").replace("-", "_")
        asked, file = getattr(args, name), getattr(args, f"{name}_file")
        if asked and file in NOT_GIVEN:
            raise ValueError(f"{flag} needs a file: add {flag}-file FILE.")
        if not asked and file not in NOT_GIVEN:
            raise ValueError(f"{flag}-file {file} is read with {flag} only: add {flag}, or leave the file out.")
        files += [(flag, file)] if asked else []
    return files


def load_initial_weights(args, model):
    """Load the start-up files of the flags into the bare network; a later file wins over an earlier one.

    Says what each gave. Raises ValueError or OSError naming flag and file where one is missing or does not fit.
    """
    # ours: the network is in train mode all along; the released code leaves it in eval mode in the supervised
    # phase after --finetune.
    for flag, file in initial_weight_files(args):
        name = f"{flag} {file}"
        try:
            content = checkpoint.read(file)
        except (ValueError, OSError) as error:
            raise type(error)(f"{flag}: {error}") from error
        LOADS[flag](model, checkpoint.weights_in(content, name), name)


def _abbreviated(keys):
    return ", ".join(keys[:6]) + (f", ... ({len(keys)})" if len(keys) > 6 else "")


def _load_except(model, weights, kept, name, unused=()):
    """Load `weights`, which must be all of the network but the keys in `kept`; `unused` ones are only told."""
    own = model.state_dict()
    checkpoint.load_weights(model, {key: own[key] for key in kept} | weights, name)
    left = f"; left as they were: {_abbreviated(kept)}" if kept else ""
    told = f"; not used: {_abbreviated(unused)}" if unused else ""
    print_main(f"{name}: {len(weights)} of {len(own)} tensors taken{left}{told}.")


def _resized(positions, length, prefix, name):
    """Position embedding (1, prefix + h*h, E) -> (1, length, E): the square grid bicubically, the prefix as it is.

    Raises ValueError where a side is no square grid.
    """
    if positions.ndim != 3 or positions.shape[1] == length:
        return positions
    grid = positions[:, prefix:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(length - prefix)
    if not old or old**2 != grid.shape[1] or new**2 != length - prefix:
        raise ValueError(
            f"{name}: pos_embed cannot be resized from {grid.shape[1]} to {length - prefix} patches, for these are "
            "no two square grids; check --model and --input-size."
        )
    grid = grid.float().transpose(1, 2).unflatten(2, (old, old))  # (1, L, E) -> (1, E, h, h)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    print_main(f"{name}: pos_embed resized from {old}x{old} to {new}x{new}.")
    return torch.cat([positions[:, :prefix].float(), grid.flatten(2).transpose(1, 2)], dim=1)


def _layer(key):
    return key.rpartition(".")[0]


def _finetune(model, weights, name):
    """Everything, but heads of another shape; a position embedding of another length is resized."""
    own = model.state_dict()
    if "pos_embed" in own and "pos_embed" in weights:
        # A timm ViT has positions of its class token in front, the PE variant none.
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
        length = own["pos_embed"].shape[1]
        weights = weights | {"pos_embed": _resized(weights["pos_embed"], length, prefix, name)}
    other = {
        _layer(key)
        for key in own
        if checkpoint.is_head(key) and key in weights and weights[key].shape != own[key].shape
    }
    dropped = [key for key in weights if _layer(key) in other]
    kept = [key for key in own if _layer(key) in other]
    _load_except(model, {key: weights[key] for key in weights if key not in dropped}, kept, name, dropped)


def _stream_name(key):
    """What a two-stream network calls a ViT's tensor: blocks.0 -> trans_1, blocks.1 -> conv_trans_2.trans_block."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if not block:
        return f"trans_{key}" if key.startswith("norm.") else key
    i = int(block[1])
    return f"trans_1.{block[2]}" if i == 0 else f"conv_trans_{i + 1}.trans_block.{block[2]}"


def _dino(model, weights, name):
    """A ViT's blocks, norm and class token (PE variant: and positions) into the transformer stream, all of it."""
    # ours: by name. The released code maps by position.
    if not hasattr(model, "trans_1"):
        raise ValueError(f"{name} is for two-stream networks, and this --model has one stream: use --finetune.")
    plain = ("cls_token", "pos_embed", "blocks.", "norm.", "patch_embed.", "head.")
    foreign = [key for key in weights if not key.startswith(plain)]
    if foreign:
        raise ValueError(
            f"{name} is no plain ViT: it holds {_abbreviated(foreign)}; give a state dict with timm's names."
        )
    own = model.state_dict()
    # Patch embedding and head have no counterpart, nor have blocks beyond the network's own: ConvMixer has 11 of 12.
    unused = [key for key in weights if not hasattr(model, _stream_name(key).split(".")[0])]
    taken = {_stream_name(key): weights[key] for key in weights if key not in unused}
    if "pos_embed" in taken:
        # The network adds its positions before the class token joins: the ViT's first one has no place.
        taken["pos_embed"] = _resized(taken["pos_embed"][:, 1:], own["pos_embed"].shape[1], 0, name)
    stream = ("cls_token", "pos_embed", "trans_norm.", "trans_1.")
    kept = [key for key in own if not (key.startswith(stream) or ".trans_block." in key)]
    _load_except(model, taken, kept, name, unused)


def _semiformer(model, weights, name):
    """Everything but the heads."""
    heads = [key for key in weights if "cls_head" in key]
    kept = [key for key in model.state_dict() if "cls_head" in key]
    _load_except(model, {key: weights[key] for key in weights if key not in heads}, kept, name, heads)


def _resnet(model, weights, name):
    """Everything but `fc`; keys with myresnet's `model.` in front (published) and without it (torchvision, timm)."""
    if all(key.startswith("model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    own = list(model.state_dict())
    prefix = "model." if all(key.startswith("model.") for key in own) else ""
    unused = [key for key in weights if key.startswith("fc.")]
    taken = {prefix + key: weights[key] for key in weights if key not in unused}
    # Files older than PyTorch 0.4.1 do not count batches, and no statistic here depends on the count.
    uncounted = [key for key in own if key.endswith("num_batches_tracked") and key not in taken]
    _load_except(model, taken, [key for key in own if key.startswith(f"{prefix}fc.")] + uncounted, name, unused)


def _warmup(model, weights, name):
    """Everything, exactly."""
    _load_except(model, weights, [], name)


LOADS = {
    "--finetune": _finetune,
    "--dino-load": _dino,
    "--semiformer-load": _semiformer,
    "--resnet-load": _resnet,
    "--warmup-model-load": _warmup,
}
