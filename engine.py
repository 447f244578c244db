"""The training step, its epoch, and the evaluation. Knows no file and no flag."""

import itertools
import math
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.nn import functional as F

from losses import objective
from pseudo_labels import diagnostics, pseudo_label
from utils import Meters, Progress, gather, world_and_rank


@contextmanager
def evaluating(model):
    """The model in eval mode, and back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def _streams(out):
    """(logits, features or None) of a network's output.

    Features are asked for in the whole run or never, so that a compiled network keeps one graph.
    """
    return (out["output"], out["feat"]) if isinstance(out, dict) else (out, None)


def _split(streams, n):
    return [x[:n] for x in streams], [x[n:] for x in streams]


def train_step(
    state,
    student,
    teacher,
    labelled,
    unlabelled,
    recipe,
    *,
    autocast,
    consistent=False,
    mixup=None,
    clip_grad=None,
    micro_batch=(0, 1),
    with_norm=False,
):
    """The loss of a batch and its gradient; then, with the last batch of its group, the optimizer step.

    The step of the paper's section 3. A group of several batches advances by the mean of their losses.

    Args:
        state: TrainState; its optimizer, scaler and EMA advance.
        student: callable that trains, DDP-wrapped or compiled; in train mode.
        teacher: bare network that labels the weak views (published: the same weights).
        labelled: (images (L, 3, H, W), labels (L,) int64, ...).
        unlabelled: (strong (U, 3, H, W), weak (U, 3, H, W), true classes (U,), ...), or None: supervised only.
        autocast: makes the context of the forward passes and the losses.
        consistent: add the consistency loss.
        micro_batch: (place, size): the batch's place in its group, from 0, and how many the group has.
        with_norm: measure the gradient.
    Returns (parts, diagnosis): {name: 0-d tensor} and {name: (0-d tensor, count)}, both on the device; under fp16
    the diagnosis of a step has `skipped`, 1.0 where the scaler left it out, else 0.0; `with_norm` it has `grad_norm`,
    the L2 norm of the gradient before clipping, of count 0 where that is not finite.
    """
    place, size = micro_batch
    # DDP exchanges the gradients of a group once, with its last batch.
    accumulating = place < size - 1 and hasattr(student, "no_sync")
    with student.no_sync() if accumulating else nullcontext():
        loss, parts, diagnosis = _loss(student, teacher, labelled, unlabelled, recipe, autocast, consistent, mixup)
        if place == 0:
            state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss / size).backward()
    if place == size - 1:
        diagnosis |= _update(state, clip_grad, with_norm)
    return parts, diagnosis


def _loss(student, teacher, labelled, unlabelled, recipe, autocast, consistent, mixup):
    """(loss, its parts, diagnosis) of a batch."""
    images, labels = labelled[:2]
    if mixup is not None:
        images, labels = mixup(images, labels)
    strong_logits = targets = weights = features = None
    diagnosis = {}
    with autocast():
        if unlabelled is None:
            labelled_logits = _streams(student(images, ret_feat=recipe.dual_consistency))[0]
        else:
            strong, weak, truth = unlabelled[:3]
            # paper: one train-mode forward for both, so BatchNorm sees labelled and strong images together...
            logits, seen = _streams(student(torch.cat([images, strong]), ret_feat=recipe.dual_consistency))
            # ...and the weak ones come after it, on running statistics this step has already updated.
            with torch.no_grad(), evaluating(teacher):
                weak_logits, weak_features = _streams(teacher(weak, ret_feat=recipe.dual_consistency))
            labelled_logits, strong_logits = _split(logits, len(images))
            if consistent:
                features = weak_features, _split(seen, len(images))[1]
            targets, weights = pseudo_label(weak_logits, recipe.policy, recipe.threshold, recipe.temperature)
            diagnosis = diagnostics(targets, weights, truth, weak_logits)
        loss, parts = objective(labelled_logits, labels, strong_logits, targets, weights, recipe, features)
    return loss, parts, diagnosis


def _update(state, clip_grad, with_norm):
    """Clip, step and EMA; the diagnosis of a step, where there is a gradient scaler or `with_norm`."""
    diagnosis, norm = {}, None
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    elif with_norm:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / (scale or 1)
    if with_norm:
        diagnosis["grad_norm"] = norm.nan_to_num(posinf=0), norm.isfinite()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if scale is not None:
        # fp16 overflows now and then: the scaler leaves the step out and halves its scale. `scaler.step` waits for
        # the device to know it, so asking costs nothing more.
        diagnosis["skipped"] = float(state.scaler.get_scale() < scale), 1
    if state.ema is not None:
        state.ema.update(state.model)
    return diagnosis


class Watch:
    """Stops all ranks together where a loss is not finite, and names the step, the parts and the images.

    Steps cost nothing: what they leave stays on the device until `check`, which must come every `window` steps.
    """

    def __init__(self, epoch, window):
        self.epoch, self.steps = epoch, deque(maxlen=window)

    def add(self, step, parts, labelled, unlabelled):
        """Keep a step: its loss parts, and the indices of its batches' images (the last of each, where there)."""
        images = {"labelled": labelled[2:], "unlabelled": unlabelled[3:] if unlabelled is not None else ()}
        self.steps.append((step, parts, images))

    def check(self):
        """Raise FloatingPointError on every rank if any rank's loss was not finite since the last check."""
        reports = [report for report in gather(self._first_bad()) if report is not None]
        self.steps.clear()
        if reports:
            # The gradients are shared, so the other ranks' losses break one step after the culprit's.
            step, rank, words = min(reports)
            raise FloatingPointError(
                f"The loss is not finite: epoch {self.epoch}, step {step}, rank {rank}: {words}. "
                "Lower --lr, set --clip-grad or use --amp off."
            )

    def _first_bad(self):
        """(step, rank, loss parts and images in words) of this rank's first loss that is not finite, or None."""
        losses = torch.stack([parts["loss"] for _, parts, _ in self.steps]).tolist()  # waits for the device, once
        for loss, (step, parts, images) in zip(losses, self.steps):
            if not math.isfinite(loss):
                words = [f"{name} {value.item():.4g}" for name, value in parts.items()]
                words += [f"{name} images {index.tolist()}" for name, rest in images.items() for index in rest]
                return step, world_and_rank()[1], ", ".join(words)
        return None


def _report(report, recent, step, seconds, waiting):
    """Hand the means since the last report on, with the pace of all ranks; and begin anew."""
    means = recent.means()
    rate = means.pop("images") * world_and_rank()[0] / seconds
    recent.clear()
    report(step, means | {"images_per_second": rate, "step_seconds": seconds, "data_seconds": waiting})


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
    accum_iter=1,
    print_freq=10,
    report=None,
):
    """Train for one epoch; `labelled` and `unlabelled` (or None) yield batches on the device, `steps` of them.

    The optimizer steps once for `accum_iter` batches, and once for those left at the end.

    `report(step, scalars)`, where given, is called with every printed line: {name: mean over this process's steps since
    the last call, or None}, the meters below and `grad_norm` (before clipping), `images_per_second` (of all ranks,
    labelled and unlabelled, one counted once), `step_seconds` and, of these, `data_seconds` of waiting for the loaders.

    Returns {meter: mean over all ranks and steps}: lr, the loss parts and, semi-supervised, the diagnostics; under
    fp16 `skipped`, the share of the steps the gradient scaler left out.
    Raises FloatingPointError on all ranks together, at most `print_freq` steps after a loss was not finite.
    """
    student.train()
    state.model.train()
    meters, recent, watch = Meters(), Meters(), Watch(epoch, print_freq)
    consistent = unlabelled is not None and recipe.is_consistent(epoch)
    reported = report and partial(_report, report, recent)
    progress = Progress(f"Epoch {epoch}", steps, print_freq, meters.means, reported)
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
            micro_batch=(step % accum_iter, min(accum_iter, steps - step // accum_iter * accum_iter)),
            with_norm=report is not None,
        )
        watch.add(step, parts, with_labels, without)
        norm = {"grad_norm": diagnosis.pop("grad_norm")} if "grad_norm" in diagnosis else {}
        lr = state.optimizer.param_groups[0]["lr"]
        figures = {name: (value, 1) for name, value in {"lr": lr, **parts}.items()} | diagnosis
        meters.add(figures)
        if report:
            images = len(with_labels[0]) + (len(without[0]) if without else 0)
            recent.add(figures | norm | {"images": (images, 1)})
        if step % print_freq == 0 or step == steps - 1:
            watch.check()
    return meters.means_over_ranks()


def _ranked(scores):
    """The classes of the five top scores (of all, if fewer), best first: (N, 5)."""
    return scores.topk(min(5, scores.shape[1]), dim=1).indices


def _correct(ranked, target):
    """Percent of the images whose class is the first, and among all of `ranked`."""
    hits = 100.0 * (ranked == target[:, None]).double()
    return hits[:, 0].mean(), hits.sum(1).mean()


@torch.no_grad()
def evaluate(model, batches, *, autocast, observe=None):
    """Exact accuracy and loss over all ranks' shards; every image counts once.

    Args:
        model: bare network. batches: yields (images, labels, ...) on the device, this rank's share.
        observe: called with each batch's scores, {name: (N, C)}, their best classes, {name: (N, 5)} or fewer, best
            first, and its labels (N,); the names are what follows `acc1` below.
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
            ranked = {name: _ranked(score) for name, score in scores.items()}
            for name, classes in ranked.items():
                top1, top5 = _correct(classes, target)
                meters.update(len(target), **{f"acc1{name}": top1, f"acc5{name}": top5})
            if observe:
                observe(scores, ranked, target)
    return {**meters.means_over_ranks(), "images": meters.count_over_ranks("loss")}
