"""Mixed precision, optimizer and learning-rate schedule from the flags, built with PyTorch and timm."""

from functools import partial

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
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

    Raises ValueError for an optimizer that timm does not know or that does not accept the flags.
    """
    settings = optimizer_kwargs(args)
    if args.opt.lower() in ("adam", "adamw"):
        settings["fused"] = True  # one kernel for all parameters, with the same arithmetic
    try:
        return create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"timm cannot make --opt {args.opt} with these --opt-* flags: {error!r}") from error


def build_scheduler(args, optimizer):
    """Return timm's learning-rate schedule for the flags; call `step(epoch)` with the epoch that has just ended."""
    settings = scheduler_kwargs(args)
    if args.sched == "plateau" and not args.warmup_epochs:
        settings["warmup_lr"] = args.lr  # timm's plateau schedule starts at warmup_lr even without a warm-up
    scheduler, _ = create_scheduler_v2(optimizer, **settings)
    if args.sched == "plateau":
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs  # timm's factory always sets it to 0
    return scheduler


def learning_rates(args):
    """Return the learning rate of every epoch as a list; a plateau schedule is assumed to see no plateau."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler = build_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        # released code: step() gets the finished epoch, not the next, so epochs 0 and 1 have the same rate.
        scheduler.step(epoch, metric=epoch)
    return rates
