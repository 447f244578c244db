"""Mixed precision, optimizer and learning-rate schedule from the flags, built with PyTorch and timm."""

import math
from functools import partial

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def mixed_precision(choice, device):
    """Return (autocast, gradient scaler, name of the precision) for --amp on a device.

    Args:
        choice: "auto", "bf16", "fp16" or "off". "auto" is bf16 or else fp16 on a GPU, and off on a CPU.
        device: torch.device.

    Returns:
        A function without arguments that returns an autocast context, a GradScaler that is enabled for fp16 only,
        and "bf16", "fp16" or "off".

    Raises ValueError for fp16 without a GPU.
    """
    if choice == "auto":
        if device.type == "cuda":
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            choice = "off"
    if choice == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a CUDA GPU, and --device is {device.type}: use --amp off or bf16.")
    dtype = PRECISIONS[choice]
    autocast = partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=choice == "fp16"), choice


def build_optimizer(args, model):
    """Return timm's optimizer for the flags; biases, 1-d parameters and `model.no_weight_decay()` are not decayed.

    With --layer-decay below 1 every layer of `model.group_matcher()` has groups of its own. Their `lr_scale` is the
    decay to the power of the number of layers that follow; timm's schedules multiply the learning rate by it.

    Raises ValueError for an optimizer that timm does not know or that does not accept the flags, and for a layer decay
    with a network that does not group its parameters into layers.
    """
    settings = optimizer_kwargs(args)
    settings["layer_decay"] = args.layer_decay if args.layer_decay < 1 else None
    if args.layer_decay < 1 and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"--layer-decay: {type(model).__name__} does not say which layer a parameter belongs to: leave it out."
        )
    # timm makes one group where nothing is decayed; with always the same groups a resumed run may change the decay.
    settings["weight_decay"] = args.weight_decay or 1.0
    if args.opt.lower() in ("adam", "adamw"):
        settings["fused"] = True  # one kernel for all parameters, with the same arithmetic
    try:
        optimizer = create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"timm cannot make --opt {args.opt} with these --opt-* flags: {error!r}") from error
    for group in optimizer.param_groups:
        group["weight_decay"] *= bool(args.weight_decay)
    return optimizer


class CosineOnUpdates(Scheduler):
    """A linear warm-up and a cosine that set the learning rate of every optimizer step (`--sched-on-updates`).

    Source: Semi-ViT and MAE. ours: timm's own cosine has no such setting. Its warm-up cuts off the beginning of the
    cosine, and it counts steps, whose number differs between supervised and semi-supervised epochs.

    Args:
        epochs: length of the run, at whose end the rate is `min_lr`.
        warmup_epochs: epochs of the linear warm-up from `warmup_lr` to the optimizer's rate, where the cosine begins.
    """

    def __init__(self, optimizer, epochs, min_lr, warmup_epochs, warmup_lr):
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.epochs, self.min_lr, self.warmup_epochs, self.warmup_lr = epochs, min_lr, warmup_epochs, warmup_lr
        self.step_update(0)

    def _get_lr(self, t):
        """The rate of each parameter group after t epochs, a fraction; `step_update(t)` sets it."""
        if t < self.warmup_epochs:
            return [self.warmup_lr + (lr - self.warmup_lr) * t / self.warmup_epochs for lr in self.base_values]
        share = min((t - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1), 1)
        return [self.min_lr + (lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2 for lr in self.base_values]

    def step(self, epoch, metric=None):
        """Set the rate of the first step after this epoch."""
        self.step_update(epoch + 1, metric)


def build_scheduler(args, optimizer):
    """Return the learning-rate schedule for the flags; call `step(epoch)` with the epoch that has just ended.

    It is timm's, or with --sched-on-updates a `CosineOnUpdates`, whose `step_update` sets the rate of a step.
    """
    if args.sched_on_updates:
        return CosineOnUpdates(optimizer, args.epochs, args.min_lr, args.warmup_epochs, args.warmup_lr)
    settings = scheduler_kwargs(args)
    if args.sched == "plateau" and not args.warmup_epochs:
        settings["warmup_lr"] = args.lr  # timm's plateau schedule starts at warmup_lr even without a warm-up
    scheduler, _ = create_scheduler_v2(optimizer, **settings)
    if args.sched == "plateau":
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs  # timm's factory always sets it to 0
        # timm scales the rates of the other schedules by layer, the lowest ones included.
        scheduler.lr_scheduler.min_lrs = [args.min_lr * group.get("lr_scale", 1) for group in optimizer.param_groups]
    return scheduler


def restore_optimizer(optimizer, saved, path):
    """Give a new optimizer the moments and counters of a saved state; its rates and settings stay those of the flags.

    The optimizer takes a step with zero gradients, in which it allocates its own state. The values are then copied into
    it, so that no tensor of the file is used, whatever its memory looks like. The weights change in that step: load
    them afterwards.

    Args:
        saved: what its `state_dict()` returned, after `validation.check`.
        path: the file's name for the messages.
    Raises ValueError where `saved` is of other parameters or of another kind of optimizer.
    """
    before = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(before[0].get("lookahead_k", 1)):  # Lookahead allocates its own part in this step
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    made, groups = optimizer.state_dict(), saved["param_groups"]
    try:
        sizes = [[len(group["params"]) for group in each] for each in (groups, made["param_groups"])]
        if len(sizes[0]) != len(sizes[1]):
            raise ValueError(
                f"{len(sizes[0])} parameter groups, not {len(sizes[1])}: --layer-decay 1 has others than a smaller one"
            )
        if sizes[0] != sizes[1]:
            raise ValueError(f"groups of {sizes[0]} parameters, not {sizes[1]}")
        state = {}
        for index, own in made["state"].items():
            if index in saved["state"]:  # not that of a parameter that has never had a gradient
                state[index] = _filled(own, saved["state"][index], f"state[{index}]")
        for old, group, there in zip(before, made["param_groups"], groups):
            for key in group:
                # Not the settings of the flags, but what the step has added or counted, such as Lamb's `step`.
                if key != "params" and group[key] != old.get(key):
                    group[key] = _filled(group[key], there.get(key), key)
        rest = {
            key: _filled(own, saved.get(key), key) for key, own in made.items() if key not in ("state", "param_groups")
        }
    except ValueError as error:
        raise ValueError(
            f"The optimizer state in {path} is not of this network and --opt ({error}): keep --opt and --model, or "
            "start from the file's weights with --finetune."
        ) from error
    optimizer.load_state_dict({**rest, "param_groups": made["param_groups"], "state": state})


def _filled(own, saved, name):
    """A part of an optimizer's own state with the values of the saved one; ValueError where that is of another form."""
    if isinstance(own, dict):
        there = set(saved) if isinstance(saved, dict) else set()
        if there - set(own) or {key for key in own if not str(key).startswith("lookahead_")} - there:
            raise ValueError(f"{name} has {sorted(map(str, there))}, not {sorted(map(str, own))}")
        return {key: _filled(own[key], saved[key], f"{name}[{key!r}]") for key in saved}
    if isinstance(own, list | tuple):
        if type(saved) is not type(own) or len(saved) != len(own):
            raise ValueError(f"{name} is no {type(own).__name__} of {len(own)}")
        return type(own)(_filled(*pair, name) for pair in zip(own, saved))
    if torch.is_tensor(own):
        # PyTorch before 1.12 counted steps in plain numbers.
        value = torch.tensor(saved, dtype=own.dtype) if type(saved) in (int, float) else saved
        if not torch.is_tensor(value) or (value.shape, value.dtype) != (own.shape, own.dtype):
            shown = f"{tuple(value.shape)} {value.dtype}" if torch.is_tensor(value) else repr(value)
            raise ValueError(f"{name} is {shown}, not {tuple(own.shape)} {own.dtype}")
        return own.copy_(value)
    if type(saved) is not type(own) or isinstance(own, str) and saved != own:
        raise ValueError(f"{name} is {saved!r}, not {own!r}")
    return saved


def plateau_state(scheduler):
    """What a plateau schedule counts, for the checkpoint (timm does not save it); {} of any other schedule."""
    if not hasattr(scheduler, "lr_scheduler"):
        return {}
    # timm adds noise to the rate of an epoch and restores it before the next.
    held = {"restore_lr": scheduler.restore_lr} if scheduler.restore_lr is not None else {}
    return scheduler.lr_scheduler.state_dict() | held


def restore_schedule(scheduler, epoch, metric, plateau, groups):
    """Set the rates that follow an epoch. Every schedule but plateau computes them from the epoch and the flags.

    Args:
        metric: that of the last step, which timm's schedules keep.
        plateau: the saved `plateau_state`, or None: a plateau schedule then begins at the rate of the flags.
        groups: the saved parameter groups, whose rates a plateau schedule has lowered.
    """
    if epoch < 0:
        return
    if not hasattr(scheduler, "lr_scheduler"):
        scheduler.step(epoch, metric)
        return
    scheduler.update_groups(scheduler.base_values)
    if plateau is not None:
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
            setattr(scheduler.lr_scheduler, name, plateau[name])
        # The share is exactly 1 under the same --lr and --layer-decay; under others the saved rate has been lowered by
        # as much.
        pairs = list(zip(scheduler.optimizer.param_groups, groups))
        highest = [[each.get("initial_lr", 0) * each.get("lr_scale", 1) for each in pair] for pair in pairs]
        shares = [here / (there or here or 1) for here, there in highest]
        for (group, saved), share in zip(pairs, shares):
            group["lr"] = saved["lr"] * share
        held = plateau.get("restore_lr")
        scheduler.restore_lr = held and [rate * share for rate, share in zip(held, shares)]
    if epoch <= scheduler.warmup_t:
        scheduler.step(epoch)


def learning_rates(args):
    """Return the learning rate at the start of every epoch as a list.

    It is that of the last layer, which --layer-decay does not scale. A plateau schedule is assumed to see no plateau.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler = build_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        # released code: step() gets the finished epoch, not the next, so epochs 0 and 1 have the same rate.
        scheduler.step(epoch, metric=epoch)
    return rates
