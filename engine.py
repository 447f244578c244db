"""The training step, its epoch, and the evaluation. Knows no file and no flag."""

import itertools
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from losses import objective
from pseudo_labels import diagnostics, pseudo_label
from utils import Meters, Progress, gather


@contextmanager
def evaluating(model):
    """The model in eval mode, and back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def _split(streams, n):
    return [x[:n] for x in streams], [x[n:] for x in streams]


def train_step(
    state, student, teacher, labelled, unlabelled, recipe, *, autocast, consistent=False, mixup=None, clip_grad=None
):
    """One optimizer step of the paper's section 3.

    Args:
        state: TrainState; its optimizer, scaler and EMA advance.
        student: callable that trains, DDP-wrapped or compiled; in train mode.
        teacher: bare network that labels the weak views (published: the same weights).
        labelled: (images (L, 3, H, W), labels (L,) int64, ...).
        unlabelled: (strong (U, 3, H, W), weak (U, 3, H, W), true classes (U,), ...), or None: supervised only.
        autocast: makes the context of the forward passes and the losses.
        consistent: add the consistency loss.
    Returns (parts, diagnosis): {name: 0-d tensor} and {name: (0-d tensor, count)}, both on the device.
    """
    images, labels = labelled[:2]
    if mixup is not None:
        images, labels = mixup(images, labels)
    strong_logits = targets = weights = features = None
    diagnosis = {}
    with autocast():
        if unlabelled is None:
            labelled_logits = student(images)
        else:
            strong, weak, truth = unlabelled[:3]
            # paper: one train-mode forward for both, so BatchNorm sees labelled and strong images together...
            out = student(torch.cat([images, strong]), ret_feat=consistent)
            # ...and the weak ones come after it, on running statistics this step has already updated.
            with torch.no_grad(), evaluating(teacher):
                weak_out = teacher(weak, ret_feat=consistent)
            logits, weak_logits = (out["output"], weak_out["output"]) if consistent else (out, weak_out)
            labelled_logits, strong_logits = _split(logits, len(images))
            if consistent:
                features = weak_out["feat"], _split(out["feat"], len(images))[1]
            targets, weights = pseudo_label(weak_logits, recipe.policy, recipe.threshold, recipe.temperature)
            diagnosis = diagnostics(targets, weights, truth, weak_logits)
        loss, parts = objective(labelled_logits, labels, strong_logits, targets, weights, recipe, features)

    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update(state.model)
    return parts, diagnosis


def _stop_together(meters, epoch, step):
    """Raise on every rank if any rank's summed loss is no longer finite; one small exchange."""
    broken = [rank for rank, finite in enumerate(gather(meters.is_finite("loss"))) if not finite]
    if broken:
        raise FloatingPointError(
            f"The loss is not finite: epoch {epoch}, at or before step {step}, on rank(s) {broken}. "
            "Lower --lr, set --clip-grad or use --amp off."
        )


def train_one_epoch(
    state,
    student,
    teacher,
    labelled,
    unlabelled,
    recipe,
    *,
    epoch,
    steps,
    autocast,
    mixup=None,
    clip_grad=None,
    print_freq=10,
):
    """Train for one epoch; `labelled` and `unlabelled` (or None) yield batches on the device, `steps` of them.

    Returns {meter: mean over all ranks and steps}: lr, the loss parts and, semi-supervised, the diagnostics.
    Raises FloatingPointError on all ranks together when a loss is not finite.
    """
    student.train()
    state.model.train()
    meters = Meters()
    consistent = unlabelled is not None and recipe.is_consistent(epoch)
    progress = Progress(f"Epoch {epoch}", steps, print_freq, meters.means)
    batches = zip(labelled, unlabelled if unlabelled is not None else itertools.repeat(None))
    for step, (with_labels, without) in enumerate(progress(batches)):
        parts, diagnosis = train_step(
            state,
            student,
            teacher,
            with_labels,
            without,
            recipe,
            autocast=autocast,
            consistent=consistent,
            mixup=mixup,
            clip_grad=clip_grad,
        )
        meters.update(lr=state.optimizer.param_groups[0]["lr"], **parts)
        for name, (value, count) in diagnosis.items():
            meters.update(count, **{name: value})
        if step % print_freq == 0 or step == steps - 1:
            _stop_together(meters, epoch, step)
    return meters.means_over_ranks()


def _correct(scores, target):
    """Percent of the images whose class is the top score, and among the top five (or all, if fewer)."""
    hits = 100.0 * (scores.topk(min(5, scores.shape[1]), dim=1).indices == target[:, None]).double()
    return hits[:, 0].mean(), hits.sum(1).mean()


@torch.no_grad()
def evaluate(model, batches, *, autocast):
    """Exact accuracy and loss over all ranks' shards; every image counts once.

    Args:
        model: bare network. batches: yields (images, labels, ...) on the device, this rank's share.
    Returns {meter: value}: `loss acc1 acc5` and, for two streams, `loss_0 loss_1` (halved cross-entropy of CNN
    and transformer), `acc1_head1 acc5_head1` (CNN), `..._head2` (transformer) and `..._softmax` (mean of the
    softmaxes); `acc1` is that of the summed logits. Accuracies in percent. And `images`, their number.
    """
    meters = Meters()
    with evaluating(model):
        for images, target, *_ in batches:
            with autocast():
                logits = model(images)
            logits = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
            losses = [F.cross_entropy(x, target) / len(logits) for x in logits]
            scores = {"": sum(logits)}
            if len(logits) > 1:
                scores.update({f"_head{i}": x for i, x in enumerate(logits, 1)})
                scores["_softmax"] = sum(x.softmax(1) for x in logits)
                meters.update(len(target), **{f"loss_{i}": loss for i, loss in enumerate(losses)})
            meters.update(len(target), loss=sum(losses))
            for name, score in scores.items():
                top1, top5 = _correct(score, target)
                meters.update(len(target), **{f"acc1{name}": top1, f"acc5{name}": top5})
    return {**meters.means_over_ranks(), "images": meters.count_over_ranks("loss")}
