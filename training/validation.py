"""What the entries of a checkpoint must be: one table of rules, applied before anything of the file is used."""

import argparse
import math
import reprlib
from pathlib import PurePath

import torch

PLAIN = bool | int | float | str | PurePath | None


def _shown(value):
    """A value as a few words on one line."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    return " ".join(reprlib.repr(value).split())


def check(content, path, keys=None):
    """Raise ValueError, one sentence naming file and key, where an entry is not what `TrainState.to_dict` writes.

    Args:
        content: what was read from the file.
        path: its name for the message.
        keys: the entries to check; None: all of RULES. Whether an entry may be missing is for the caller to decide.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_shown(content)} and no training state, so another file is needed.")
    for key in keys or RULES:
        if key in content and (fault := RULES[key](content[key])):
            raise ValueError(f"{path} is damaged or no checkpoint of ours, so another file is needed: {key}{fault}")


def not_finite(value, name=""):
    """The name of the first floating-point tensor or number below `value` that is not finite, "" if there is none.

    Tensors on a GPU are judged together, so that this waits for the device once.
    """
    names, verdicts = [], []
    for place, leaf in _leaves(value, name):
        if torch.is_tensor(leaf):
            if leaf.is_floating_point():
                names.append(place)
                verdicts.append(leaf.isfinite().all())
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            return place
    good = torch.stack(verdicts).tolist() if verdicts else []
    return next((place for place, finite in zip(names, good) if not finite), "")


def weights_fault(weights, dense=False):
    """Why a state dict of a file cannot be loaded, as the end of a sentence; "" where it can.

    Its tensors must be finite ones in the memory of the CPU. Unless they must be `dense`, they may be views, because
    they are only copied.
    """
    if not isinstance(weights, dict) or not weights:
        return _is_not(weights, "a state dict")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            return f"[{_shown(name)}]" + _is_not(tensor, "a tensor with a name")
        if fault := _tensor_fault(tensor, dense):
            return f"[{name!r}]{fault}"
    if place := not_finite(weights):
        return f"{place} is not finite"
    return ""


def _tensor_fault(tensor, dense=False):
    kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
        return f" is a tensor of {kind}, not a dense one of real numbers on the CPU"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f" has {tensor.numel():,} elements, but the file holds fewer"
    if dense and not _is_dense(tensor):
        return f" is a view of another tensor, shape {tuple(tensor.shape)}, stride {tensor.stride()}"
    return ""


def _is_dense(tensor):
    """Whether the elements follow each other in memory, in whatever order the dimensions are."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _leaves(value, name):
    """(name, leaf) of everything in nested dictionaries and lists, each of which is entered once.

    A file can nest them without end and name one of them many times, so what lies deeper than 8 levels is a leaf.
    """
    pending, entered = [(name, value, 0)], set()
    while pending:
        place, each, depth = pending.pop()
        if not isinstance(each, dict | list | tuple) or depth > 8:
            yield place, each
        elif id(each) not in entered:
            entered.add(id(each))
            children = each.items() if isinstance(each, dict) else enumerate(each)
            pending += [(f"{place}[{_shown(key)}]", child, depth + 1) for key, child in children][::-1]


# --------------------------------------------------------------- rules: value -> the end of a sentence on what is wrong


def _is_not(value, wanted):
    return f" is {_shown(value)}, not {wanted}"


def _whole(value, least):
    """Whether a value is an integer from `least` to 2**62, and no bool."""
    return type(value) is int and least <= value < 2**62


def _number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _tensors_and_numbers(value):
    for place, leaf in _leaves(value, ""):
        if torch.is_tensor(leaf):
            if fault := _tensor_fault(leaf, dense=True):
                return place + fault
        elif not isinstance(leaf, PLAIN):
            return place + _is_not(leaf, "a tensor or a number")
    if place := not_finite(value):
        return f"{place} is not finite"
    return ""


def _state_dict(value):
    return weights_fault(value, dense=True)


def _optimizer(value):
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return _is_not(value, "an optimizer's state")
    groups = value.get("param_groups")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        return "['param_groups']" + _is_not(groups, "a list of parameter groups")
    places = []
    for group in groups:
        if not isinstance(group.get("params"), list):
            return "['param_groups']" + _is_not(group.get("params"), "a list of parameters")
        for rate in (group.get("lr"), group.get("initial_lr", 0.0), group.get("lr_scale", 1.0)):
            if not _number(rate) or rate < 0:
                return "['param_groups']" + _is_not(rate, "a learning rate")
        places += group["params"]
    if not all(_whole(place, 0) for place in places) or len(set(places)) != len(places):
        return "['param_groups'] names parameters that are no numbers, or twice the same"
    for place, state in value["state"].items():
        if place not in places or not isinstance(state, dict):
            return f"['state'][{_shown(place)}]" + _is_not(state, "the state of a parameter")
        for name, tensor in state.items():
            if "sq" in str(name) and torch.is_tensor(tensor) and not _tensor_fault(tensor) and (tensor < 0).any():
                return f"['state'][{place}][{name!r}] is a mean of squares below 0"
    return _tensors_and_numbers(value)


def _best(value):
    if isinstance(value, dict) and set(value) == {"acc1", "epoch"}:
        if _number(value["acc1"]) and 0 <= value["acc1"] <= 100 and _whole(value["epoch"], -1):
            return ""
    return _is_not(value, "the best top-1 in percent and its epoch")


def _scaler(value):
    rules = {
        "scale": lambda x: _number(x) and x > 0,
        "growth_factor": lambda x: _number(x) and x >= 1,
        "backoff_factor": lambda x: _number(x) and 0 < x <= 1,
        "growth_interval": lambda x: _whole(x, 1),
        "_growth_tracker": lambda x: _whole(x, 0),
    }
    if value == {} or isinstance(value, dict) and set(value) == set(rules):
        if all(rules[key](number) for key, number in value.items()):
            return ""
    return _is_not(value, "the state of a gradient scaler")


def _plateau(value):
    if isinstance(value, dict) and type(value.get("best")) in (int, float) and not math.isnan(value["best"]):
        if all(_whole(value.get(key), 0) for key in ("num_bad_epochs", "cooldown_counter", "last_epoch")):
            held = value.get("restore_lr")
            if held is None or isinstance(held, list) and all(map(_number, held)):
                return ""
    return _is_not(value, "the state of a plateau schedule")


def _bad_images(value):
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        if all(isinstance(each, list) and all(_whole(index, 0) for index in each) for each in value.values()):
            return ""
    return _is_not(value, "the numbers of the unreadable images of each set")


# Flags that decide what network is built from a file; every other flag is only compared.
_TYPES = {"model": str, "data_set": str, "data_backend": str, "input_size": int, "remove_fcu": bool}


def _args(value):
    flags = vars(value) if isinstance(value, argparse.Namespace) else {} if value is None else value
    if not isinstance(flags, dict):
        return _is_not(value, "the flags of a run")
    for name, setting in flags.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
            return f" has {_shown(name)}, which is no flag's name"
        if type(setting) is not _TYPES.get(name, type(setting)) or name == "input_size" and not 1 <= setting <= 10**4:
            return f"[{name!r}]" + _is_not(setting, "a value of that flag")
        for each in setting if isinstance(setting, list | tuple) else [setting]:
            if not isinstance(each, PLAIN):
                return f"[{name!r}]" + _is_not(setting, "a flag's value")
    return ""


def _labeller(value):
    if isinstance(value, dict) and set(value) == {"kind", "state"} and isinstance(value["kind"], str):
        fault = _state_dict(value["state"])
        return fault and f"['state']{fault}"
    return _is_not(value, "the state of the pseudo labels")


def _schedule(value):
    # Of a schedule only the last metric is loaded: the rest follows from the epoch and the flags.
    if isinstance(value, dict) and (value.get("metric") is None or _number(value["metric"])):
        return ""
    return _is_not(value, "a schedule's state")


def _pending(value):
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        if all(number is None or _number(number) for number in value.values()):
            return ""
    return _is_not(value, "the means of an epoch")


RULES = {
    "args": _args,
    "epoch": lambda value: "" if _whole(value, -1) else _is_not(value, "a whole number from -1"),
    "best": _best,
    "classes": lambda value: "" if isinstance(value, list) and all(isinstance(name, str) for name in value)
    else _is_not(value, "a list of names"),
    "bad_images": _bad_images,
    "pending": _pending,
    "labeller": _labeller,
    "scaler": _scaler,
    "plateau": _plateau,
    "lr_scheduler": _schedule,
    "model": _state_dict,
    "model_ema": _state_dict,
    "optimizer": _optimizer,
}  # fmt: skip
