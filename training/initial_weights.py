"""Initial weights: --pretrained, --finetune, --dino-load, --semiformer-load, --resnet-load and --warmup-model-load.

What a flag promises to load must be in the file and fit; else an error names the flag, the file and the first keys.
"""

import math
import re

from timm.layers import resample_abs_pos_embed

from training import checkpoint
from utils import given, print_main


def initial_weight_files(args):
    """[(flag, file)] of the flags, in the order in which they are loaded.

    Raises ValueError for a `--*-load` without its file and for a file without its flag.
    """
    files = [("--finetune", args.finetune)] if given(args.finetune) else []
    for flag in list(LOADERS)[1:]:
        name = flag.strip("-").replace("-", "_")
        asked, file = getattr(args, name), getattr(args, f"{name}_file")
        if asked and not given(file):
            raise ValueError(f"{flag} needs a file: add {flag}-file FILE.")
        if not asked and given(file):
            raise ValueError(f"{flag}-file {file} is read with {flag} only: add {flag}, or leave the file out.")
        files += [(flag, file)] if asked else []
    return files


def load_initial_weights(args, model, hosted=None):
    """Load the files of the flags into the bare network. Where two have the same tensor, the later file wins.

    Prints what each file contributed.

    Args:
        hosted: the state dict of --pretrained, which is loaded before the files; None without it.
    Raises ValueError or OSError naming flag and file where one is missing or does not fit.
    """
    if hosted is not None:
        _finetune(model, hosted, f"--pretrained {args.model}")
    # ours: the network stays in train mode; the released code leaves it in eval mode in the supervised phase after
    # --finetune.
    for flag, file in initial_weight_files(args):
        try:
            content = checkpoint.read(file)
        except (ValueError, OSError) as error:
            raise type(error)(f"{flag}: {error}") from error
        entry = _entry(content) if flag == "--finetune" else "model"
        name = f"{flag} {file}" + (f" ({entry})" if entry != "model" else "")
        LOADERS[flag](model, checkpoint.weights_in(content, name, entry), name)


# Where the files of pre-trained encoders have the state dict, and what wraps the network in its keys, outermost first.
ENTRIES = ("model", "teacher", "student", "state_dict")
PREFIXES = ("module.", "teacher.", "student.", "backbone.", "encoder.")
# Parts that only the pre-training has: MAE's decoder, DINO's projection heads, the token of masked patches.
PRETRAINING = re.compile(r"decoder_|(dino_|ibot_)?head\.(mlp|last_layer)\.|mask_token$")


def _entry(content):
    """The entry of a file with the state dict: the first of ENTRIES that it has, or "model", which may be the file."""
    held = content if isinstance(content, dict) else {}
    return next((entry for entry in ENTRIES if isinstance(held.get(entry), dict)), "model")


def _unwrapped(weights, own, name):
    """(tensors under the names that they have in the network alone, names of those that only the pre-training has).

    A prefix with which tensors of the network `own` begin is none of a wrapper. Raises ValueError where two tensors get
    the same name.
    """
    prefixes = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in own)]
    has_teacher = any(key.startswith("teacher.") for key in weights)
    bare, left = {}, []
    for key, value in weights.items():
        inner = key
        for prefix in prefixes:
            inner = inner.removeprefix(prefix)
        if has_teacher and key.startswith("student.") or PRETRAINING.match(inner) and inner not in own:
            left.append(key)
        elif inner in bare:
            raise ValueError(f"{name} holds {inner} twice, once as {key}: save the state dict of one network alone.")
        else:
            bare[inner] = value
    return bare, left


def _abbreviated(keys):
    return ", ".join(keys[:6]) + (f", ... ({len(keys)})" if len(keys) > 6 else "")


def _load_except(model, weights, kept, name, unused=()):
    """Load `weights`, which must be all of the network's tensors but those in `kept`; `unused` is printed."""
    own = model.state_dict()
    checkpoint.load_weights(model, {key: own[key] for key in kept} | weights, name)
    left = f"; left as they were: {_abbreviated(kept)}" if kept else ""
    ignored = f"; not used: {_abbreviated(unused)}" if unused else ""
    print_main(f"{name}: {len(weights)} of {len(own)} tensors taken{left}{ignored}.")


def _resized(positions, length, prefix, name):
    """Position embedding (1, prefix + h*h, E) -> (1, length, E): the square grid bicubically, the prefix unchanged.

    Raises ValueError where either grid is not square.
    """
    if positions.ndim != 3 or positions.shape[1] == length:
        return positions
    patches = positions.shape[1] - prefix
    old, new = math.isqrt(max(patches, 0)), math.isqrt(length - prefix)
    if not old or old**2 != patches or new**2 != length - prefix:
        raise ValueError(
            f"{name}: pos_embed cannot be resized from {patches} to {length - prefix} patches, for these are "
            "no two square grids; check --model and --input-size."
        )
    print_main(f"{name}: pos_embed resized from {old}x{old} to {new}x{new}.")
    return resample_abs_pos_embed(positions.float(), [new, new], num_prefix_tokens=prefix, antialias=False)


def _layer(key):
    return key.rpartition(".")[0]


def _missing_heads(model, weights):
    """Names of the tensors of those classifiers of which a file has none."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, list | tuple) else [heads]
    places = [f"{place}." for place, module in model.named_modules() if any(module is head for head in heads)]
    return [
        key
        for place in places
        if not any(key.startswith(place) for key in weights)
        for key in model.state_dict()
        if key.startswith(place)
    ]


def _finetune(model, weights, name):
    """Load everything but heads that are missing or of another shape; positions of another number are resized.

    The file may be of the network or of an encoder that was trained without labels and has no head.
    """
    own = model.state_dict()
    weights, unused = _unwrapped(weights, own, name)
    missing = _missing_heads(model, weights)
    kept = list(missing)
    if "fc_norm.weight" in own and "norm.weight" not in own and "fc_norm.weight" not in weights:
        # As in MAE: the norm of all tokens is none of their mean's, which begins anew.
        kept += [key for key in own if key.startswith("fc_norm.")]
        unused += [key for key in weights if key.startswith("norm.")]
    if "pos_embed" in own and "pos_embed" in weights:
        # The position embedding of a timm ViT begins with that of its class token; the PE variant has none for it.
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
        length = own["pos_embed"].shape[1]
        weights = weights | {"pos_embed": _resized(weights["pos_embed"], length, prefix, name)}
    other = {
        _layer(key)
        for key in own
        if checkpoint.is_head(key) and key in weights and weights[key].shape != own[key].shape
    }
    unused += [key for key in weights if _layer(key) in other]
    kept += [key for key in own if _layer(key) in other]
    _load_except(model, {key: weights[key] for key in weights if key not in unused}, kept, name, unused)
    if missing:
        print_main(f"{name} has no head: the network's own stays, drawn anew unless an earlier flag has loaded it.")


def _stream_name(key):
    """The name in a two-stream network of a ViT's tensor: blocks.0 -> trans_1, blocks.1 -> conv_trans_2.trans_block."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if not block:
        return f"trans_{key}" if key.startswith("norm.") else key
    i = int(block[1])
    return f"trans_1.{block[2]}" if i == 0 else f"conv_trans_{i + 1}.trans_block.{block[2]}"


def _dino(model, weights, name):
    """Load a ViT's blocks, norm, class token (PE variant: and positions) into the whole transformer stream."""
    # ours: mapped by name; the released code maps by position.
    if not hasattr(model, "trans_1"):
        raise ValueError(f"{name} is for two-stream networks, and this --model has one stream: use --finetune.")
    plain = ("cls_token", "pos_embed", "blocks.", "norm.", "patch_embed.", "head.")
    foreign = [key for key in weights if not key.startswith(plain)]
    if foreign:
        raise ValueError(
            f"{name} is no plain ViT: it holds {_abbreviated(foreign)}; give a state dict with timm's names."
        )
    own = model.state_dict()
    # The patch embedding and the head have no counterpart, nor has a block more than the network has (ConvMixer: 11).
    unused = [key for key in weights if not hasattr(model, _stream_name(key).split(".")[0])]
    taken = {_stream_name(key): weights[key] for key in weights if key not in unused}
    if "pos_embed" in taken:
        # The network adds positions before it prepends the class token, so the ViT's first position is left out.
        taken["pos_embed"] = _resized(taken["pos_embed"][:, 1:], own["pos_embed"].shape[1], 0, name)
    stream = ("cls_token", "pos_embed", "trans_norm.", "trans_1.")
    kept = [key for key in own if not (key.startswith(stream) or ".trans_block." in key)]
    _load_except(model, taken, kept, name, unused)


def _semiformer(model, weights, name):
    """Load everything but the heads."""
    heads = [key for key in weights if "cls_head" in key]
    kept = [key for key in model.state_dict() if "cls_head" in key]
    _load_except(model, {key: weights[key] for key in weights if key not in heads}, kept, name, heads)


def _resnet(model, weights, name):
    """Load everything but `fc`; keys may have myresnet's prefix `model.` (published) or not (torchvision, timm)."""
    if all(key.startswith("model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    own = list(model.state_dict())
    prefix = "model." if all(key.startswith("model.") for key in own) else ""
    unused = [key for key in weights if key.startswith("fc.")]
    taken = {prefix + key: weights[key] for key in weights if key not in unused}
    # Files older than PyTorch 0.4.1 have no counts of batches, and no statistic here depends on them.
    uncounted = [key for key in own if key.endswith("num_batches_tracked") and key not in taken]
    _load_except(model, taken, [key for key in own if key.startswith(f"{prefix}fc.")] + uncounted, name, unused)


def _warmup(model, weights, name):
    """Load everything; the file must fit exactly."""
    _load_except(model, weights, [], name)


LOADERS = {
    "--finetune": _finetune,
    "--dino-load": _dino,
    "--semiformer-load": _semiformer,
    "--resnet-load": _resnet,
    "--warmup-model-load": _warmup,
}
