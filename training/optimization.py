"""Precision, optimizer and learning rate, as the flags want them: PyTorch's and timm's, with DeiT's settings."""

from functools import partial

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def mixed_precision(choice, device):
    """(autocast context factory, gradient scaler) for --amp; ValueError where the device cannot."""
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
    """timm's optimizer of the flags; no decay on biases, 1-d parameters and `no_weight_decay`.

    Raises ValueError for an optimizer timm does not know or that refuses the flags' settings.
    """
    settings = optimizer_kwargs(args)
    if args.opt.lower() in ("adam", "adamw"):
        settings["fused"] = True  # one kernel for all parameters, the same sums
    try:
        return create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"timm cannot make --opt {args.opt} with these --opt-* flags: {error!r}") from error


def build_scheduler(args, optimizer):
    """timm's schedule of the flags, stepped once an epoch, after it, with the epoch's own index."""
    settings = scheduler_kwargs(args)
    if args.sched == "plateau" and not args.warmup_epochs:
        settings["warmup_lr"] = args.lr  # timm's plateau starts from it even without a warm-up.
    scheduler, _ = create_scheduler_v2(optimizer, **settings)
    if args.sched == "plateau":
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs  # timm's factory always sets 0.
    return scheduler


def learning_rates(args):
    """The learning rate in force in each epoch, (epochs,); a plateau schedule is shown without any plateau."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler = build_scheduler(args, optimizer)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        # released code: the index is the finished epoch's, so epochs 0 and 1 share the first value.
        scheduler.step(epoch, metric=epoch)
    return rates
