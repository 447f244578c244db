"""The training step in all its variants, ours and the published one, and the proof that they compute the same."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3

import engine
import models
import semi_main
from benchmarks import published_formulation as published
from losses import Recipe
from options import get_args_parser
from pseudo_labels import POLICIES, PseudoLabeller, select_targets
from tests.equality import same
from training import optimization
from training.checkpoint import TrainState

DECAY, TOLERANCE = 0.99996, 1e-8
RECIPE = Recipe(threshold=0.0, semi_lambda=4.0, unlabel_smooth=True)  # run_ddp_example.sh's, with every image confident


class Variant(NamedTuple):
    """A way to compute a training step: ours, or the published one with some of our optimizations.

    `teacher`, `rule` and `align` are the values of --teacher, --confidence and --align, of ours alone; `ddp`, of ours
    too, needs a process group.
    """

    ours: bool = False
    bf16: bool = False
    fp16: bool = False
    ddp: bool = False
    compiled: bool = False
    checkpointed: bool = False
    optimizations: tuple = ()
    teacher: str = "student"
    rule: str = "fixed"
    align: str = "none"


VARIANTS = {
    "published fp32": Variant(),
    "ours fp32": Variant(ours=True),
    "published bf16": Variant(bf16=True),
    "ours bf16": Variant(ours=True, bf16=True),
    "ours bf16 --compile": Variant(ours=True, bf16=True, compiled=True),
    "ours fp16": Variant(ours=True, fp16=True),
    "ours fp32 under DDP": Variant(ours=True, ddp=True),
    "ours bf16 under DDP": Variant(ours=True, bf16=True, ddp=True),
    "ours bf16 --compile under DDP": Variant(ours=True, bf16=True, compiled=True, ddp=True),
    "ours fp32 --grad-checkpointing": Variant(ours=True, checkpointed=True),
    "ours bf16 --grad-checkpointing": Variant(ours=True, bf16=True, checkpointed=True),
    **{
        name: Variant(optimizations=(name,))
        for name in ("pool first", "enlarge last", "channels_last", "SDPA", "fused AdamW", "foreach EMA")
    },
    "bf16": Variant(bf16=True),
    "compile": Variant(compiled=True),
    "ema, free, shares": Variant(ours=True, teacher="ema", rule="free", align="shares"),
    "soft, uniform": Variant(ours=True, rule="soft", align="uniform"),
}


def flags(*words):
    """Parse flags of semi_main.py."""
    return argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(list(map(str, words)))


def has_bf16(device):
    """Whether the device computes bf16 fast: a CUDA GPU, or a CPU with avx512_bf16."""
    return device.type == "cuda" or "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def network(args, dtype=torch.float32):
    """Build the network of --model as a training does, in train mode, with the same weights at every call."""
    torch.manual_seed(0)
    given = flags("--model", args.model, "--input-size", args.input_size)
    return semi_main._network(given, args.classes, args.device).to(dtype).train()


def batch(args, labelled, unlabelled, dtype=torch.float32):
    """A batch of noise on the device: (images, labels), (strong, weak, true classes)."""
    rng = torch.Generator().manual_seed(1)
    side = (3, args.input_size, args.input_size)
    images, strong, weak = (
        torch.randn(n, *side, generator=rng, dtype=dtype) for n in (labelled, unlabelled, unlabelled)
    )
    labels, truth = (torch.randint(args.classes, (n,), generator=rng) for n in (labelled, unlabelled))
    pairs = (images, labels), (strong, weak, truth)
    return tuple(tuple(tensor.to(args.device) for tensor in pair) for pair in pairs)


def build_labeller(args, policy, rule, align, threshold=0.7, images=None):
    """Build the PseudoLabeller of a rule and an alignment; the classes are equally frequent in the labelled set."""
    shares = torch.full((args.classes,), 1 / args.classes) if align == "shares" else None
    labeller = PseudoLabeller(
        policy, threshold, 1.0, num_classes=args.classes, rule=rule, align=align, shares=shares, images=images
    )
    return labeller.to(args.device)


def build_step(args, variant, dtype=torch.float32, sizes=None, recipe=RECIPE):
    """Build a variant's training step: (a function without arguments that returns the loss parts, network, EMA)."""
    precision = "bf16" if variant.bf16 else "fp16" if variant.fp16 else "off"
    autocast, scaler, _ = optimization.mixed_precision(precision, args.device)
    labelled, unlabelled = batch(args, *(sizes or args.sizes), dtype)
    given, model = flags("--opt", "adamw", "--lr", "1e-3"), network(args, dtype)
    if not variant.ours:
        model = published.as_published(model, variant.optimizations)
    elif variant.checkpointed:
        models.enable_grad_checkpointing(model)
    average = ModelEmaV3 if variant.ours or "foreach EMA" in variant.optimizations else published.PerTensorEma
    fused = variant.ours or "fused AdamW" in variant.optimizations
    ema = average(model, decay=DECAY)
    optimizer = (optimization.build_optimizer if fused else published.adamw)(given, model)
    if variant.compiled:
        model.compile(backend=args.backend)
    if variant.ours:
        labeller = build_labeller(args, recipe.policy, variant.rule, variant.align, threshold=recipe.threshold)
        state = TrainState(model, optimizer, None, scaler, ema, labeller=labeller)
        teacher = ema.module if variant.teacher == "ema" else model
        student = semi_main._distributed(model, args.device) if variant.ddp else model
        step = partial(engine.train_step, state, student, teacher, labelled, unlabelled, recipe, autocast=autocast)
        return lambda: step()[0], model, ema
    step = partial(published.train_step, model, optimizer, ema, labelled, unlabelled, recipe, autocast)
    return step, model, ema


# -------------------------------------------------------------------------------- the proof


def _largest_difference(what, ours, theirs, tolerance=TOLERANCE):
    """Largest relative difference of two {name: tensor}. Raises ValueError if one is above the tolerance."""
    # The floor excludes gradients that are mathematically zero (a bias before BatchNorm) and noise in both.
    floor = 1e-6 * max(float(tensor.norm()) for tensor in theirs.values())
    found = {name: float((ours[name] - t).norm() / t.norm().clamp(min=floor)) for name, t in theirs.items()}
    for name, difference in found.items():
        if not difference <= tolerance:  # also if it is NaN
            raise ValueError(
                f"The published formulation does not compute what ours does: {what} differ by {difference:.1e} in "
                f"{name}, so that times cannot be compared; correct benchmarks/published_formulation.py."
            )
    return max(found.values())


def random_logits(args, n=95):
    """Logits (n, classes) of both streams: confident and unconfident, agreeing and disagreeing in all combinations."""
    rng = torch.Generator().manual_seed(2)
    classes = torch.randint(args.classes, (2, n), generator=rng)
    classes[1, ::2] = classes[0, ::2]
    conv, trans = torch.randn(2, n, args.classes, generator=rng)
    for logits, peak in ((conv, classes[0]), (trans, classes[1])):
        logits[torch.arange(n), peak] += 16 * torch.rand(n, generator=rng)
    return conv.to(args.device), trans.to(args.device)


def prove(args):
    """Prove in float64 that a step of ours and a published one compute the same; returns a sentence.

    Loss parts, gradients, parameters, statistics, averages and evaluation logits (with and without folded BatchNorm)
    are compared by the norm of the difference relative to the norm, targets and weights of all policies exactly.
    Raises ValueError if something differs.
    """
    found, sizes, recipe = {}, (2, 3), replace(RECIPE, policy="weight_v2")
    both = [build_step(args, Variant(ours=ours), torch.float64, sizes, recipe) for ours in (True, False)]
    parts = []
    for step, *_ in both:
        torch.manual_seed(3)  # stochastic depth drops the same paths
        parts.append(step())
    found["loss"] = _largest_difference("loss parts", *parts)

    def compare(what, tensors):
        # BatchNorm's counter of batches is an integer, which the published average rounds down; nothing reads it.
        pair = [{name: t for name, t in tensors(model, ema) if t.is_floating_point()} for _, model, ema in both]
        found[what] = _largest_difference(what, *pair)

    compare("gradients", lambda model, _: ((name, p.grad) for name, p in model.named_parameters()))
    compare("parameters and statistics", lambda model, _: model.state_dict().items())
    compare("averages", lambda _, ema: ema.module.state_dict().items())
    images = batch(args, 4, 1, torch.float64)[0][0]
    with torch.no_grad():  # after the step, because before it there are only statistics of 0 and 1 to fold
        logits = [dict(enumerate(model.eval()(images))) for _, model, _ in both]
        folded = dict(enumerate(models.fold_batchnorm(both[0][1])(images)))
    found["evaluation logits"] = max(
        _largest_difference("evaluation logits", each, logits[1]) for each in (logits[0], folded)
    )
    for policy in POLICIES:
        selected = [f(*random_logits(args), policy, 0.7, 1.0) for f in (select_targets, published.select_targets)]
        if not same(*selected):
            raise ValueError(f"The published policy {policy} labels other images than ours: correct one of the two.")
    figures = ", ".join(f"{what} {worst:.0e}" for what, worst in found.items())
    return (
        f"Both compute the same in float64 ({args.model}, {args.input_size} px, {sizes[0]} + {sizes[1]} images). "
        f"Largest differences relative to the norm: {figures}; all {len(POLICIES)} policies label alike."
    )
