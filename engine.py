"""The training step, the training epoch and the evaluation. They know no file and no flag."""

import itertools
import math
from collections import deque
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch.nn import functional as F

import pseudo_mixup
from losses import objective
from pseudo_labels import PseudoLabeller, diagnostics
from utils import EpochLog, Meters, gather, world_and_rank


@contextmanager
def evaluating(model):
    """Put the model into eval mode inside the block, and back into its former mode after it."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def _streams(out):
    """(logits, features or None) of a network's output.

    A run asks for features in every step or in none, so that a compiled network keeps one graph.
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
    """Compute the loss of a batch and its gradient and, after the last batch of a group, take the optimizer step.

    This is the paper's method. A group of several batches takes one step with the mean of their losses.

    Args:
        state: TrainState; its model, optimizer, scaler, EMA and labeller are updated. Without a labeller the pseudo
            labels are those of `recipe`.
        student: the network that trains, DDP-wrapped or compiled, in train mode.
        teacher: the bare network that labels the weak views (published: with the same weights), or its average.
        labelled: (images (L, 3, H, W), labels (L,) int64, ...).
        unlabelled: (strong (U, 3, H, W), weak (U, 3, H, W), true classes (U,), ...), or None: supervised only.
        autocast: factory of the context for the forward passes and the losses.
        consistent: whether to add the consistency loss.
        mixup: timm's Mixup for the labelled images, or None.
        clip_grad: largest L2 norm of the gradient; None: no clipping.
        micro_batch: (place of the batch in its group, from 0; number of batches in the group).
        with_norm: whether to measure the gradient.
    Returns (parts, diagnosis): {name: 0-d tensor} and {name: (0-d tensor, count)}, both on the device. Under fp16 the
    diagnosis of a step contains `skipped`, 1.0 where the gradient scaler skipped it, else 0.0. With `with_norm` it
    contains `grad_norm`, the L2 norm of the gradient before clipping, with count 0 where it is not finite.
    """
    place, size = micro_batch
    # DDP exchanges gradients only with the last batch of a group.
    accumulating = place < size - 1 and hasattr(student, "no_sync")
    with student.no_sync() if accumulating else nullcontext():
        loss, parts, diagnosis = _loss(
            student, teacher, state.labeller, labelled, unlabelled, recipe, autocast, consistent, mixup
        )
        if place == 0:
            state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss / size).backward()
    if place == size - 1:
        diagnosis |= _update(state, clip_grad, with_norm)
    return parts, diagnosis


def _loss(student, teacher, labeller, labelled, unlabelled, recipe, autocast, consistent, mixup):
    """(loss, its parts, diagnosis) of a batch."""
    images, labels = labelled[:2]
    if mixup is not None:
        images, labels = mixup(images, labels)
    strong_logits = targets = weights = features = fairness = None
    diagnosis = {}
    with autocast():
        if unlabelled is None:
            labelled_logits = _streams(student(images, ret_feat=recipe.dual_consistency))[0]
        else:
            strong, weak, truth, *index = unlabelled[:4]

            def label(labelled_logits=None):
                with torch.no_grad(), evaluating(teacher):
                    logits, features = _streams(teacher(weak, ret_feat=recipe.dual_consistency))
                settings = recipe.policy, recipe.threshold, recipe.temperature
                made = labeller or PseudoLabeller(*settings, streams=len(logits))
                return logits, features, made(logits, *index, labelled_logits=labelled_logits)

            if recipe.pseudo_mixup:
                # Semi-ViT: the labels come first, because they decide how the strong images are mixed.
                weak_logits, weak_features, pseudo = label()
                strong, targets, weights = _pseudo_mixed(strong, pseudo, weak_logits[0].shape[1], recipe)
            # paper: one forward pass for both, so that BatchNorm normalises labelled and strong images together ...
            logits, seen = _streams(student(torch.cat([images, strong]), ret_feat=recipe.dual_consistency))
            labelled_logits, strong_logits = _split(logits, len(images))
            if not recipe.pseudo_mixup:
                # ... and the weak images after it, with running statistics that already include this step.
                weak_logits, weak_features, pseudo = label(labelled_logits)
                targets, weights = pseudo.targets, pseudo.weights
            if consistent:
                features = weak_features, _split(seen, len(images))[1]
            if recipe.fairness_lambda:
                fairness = labeller.fairness(strong_logits, weights)
            diagnosis = diagnostics(pseudo.targets, weights, truth, weak_logits) | (
                labeller.level() if labeller else {}
            )
        loss, parts = objective(labelled_logits, labels, strong_logits, targets, weights, recipe, features, fairness)
    return loss, parts, diagnosis


def _pseudo_mixed(strong, labels, num_classes, recipe):
    """Mix the strong images by their labels: (images, soft targets (U, C), weights (U,))."""
    drawn = pseudo_mixup.draw(labels.probability, *strong.shape[-2:])
    images, targets, probability = pseudo_mixup.mix(
        strong, labels.targets, labels.probability, *drawn, num_classes=num_classes, smoothing=recipe.smoothing
    )
    return images, targets, (probability >= recipe.threshold).to(probability.dtype)


def _update(state, clip_grad, with_norm):
    """Clip the gradient, step the optimizer and update the EMA; returns the step's part of the diagnosis."""
    diagnosis, norm, scaled = {}, None, state.scaler.is_enabled()
    scale = _scale(state) if scaled else 1
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    elif with_norm:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / scale
    if with_norm:
        diagnosis["grad_norm"] = norm.nan_to_num(posinf=0), norm.isfinite()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if scaled:  # where fp16 overflows, the scaler skips the step and halves its scale
        diagnosis["skipped"] = (_scale(state) < scale).double(), 1
    if state.ema is not None:
        state.ema.update(state.model)
    return diagnosis


def _scale(state):
    """The gradient scaler's factor, 0-d on the device; its `get_scale` would wait for the device."""
    return state.scaler.scale(torch.ones((), device=next(state.model.parameters()).device))


class Watch:
    """Stops all ranks together when a loss is not finite; the error names the step, the loss parts and the images.

    The losses stay on the device until `check`, which must be called at least every `window` steps.
    """

    def __init__(self, epoch, window):
        self.epoch, self.steps = epoch, deque(maxlen=window)

    def add(self, step, parts, labelled, unlabelled):
        """Remember a step: its loss parts and the indices of its images, which are the last tensors of the batches."""
        images = {"labelled": labelled[2:], "unlabelled": unlabelled[3:] if unlabelled is not None else ()}
        self.steps.append((step, parts, images))

    def check(self):
        """Raise FloatingPointError on every rank if a loss of any rank since the last check was not finite."""
        reports = [report for report in gather(self._first_bad()) if report is not None]
        self.steps.clear()
        if reports:
            # Gradients are averaged, so the losses of the other ranks break one step after the first one.
            step, rank, words = min(reports)
            raise FloatingPointError(
                f"The loss is not finite: epoch {self.epoch}, step {step}, rank {rank}: {words}. "
                "Lower --lr, set --clip-grad or use --amp off."
            )

    def _first_bad(self):
        """(step, rank, description of loss parts and images) of this rank's first loss that is not finite, or None."""
        losses = torch.stack([parts["loss"] for _, parts, _ in self.steps]).tolist()  # waits for the device
        for loss, (step, parts, images) in zip(losses, self.steps):
            if not math.isfinite(loss):
                words = [f"{name} {value.item():.4g}" for name, value in parts.items()]
                words += [f"{name} images {index.tolist()}" for name, rest in images.items() for index in rest]
                return step, world_and_rank()[1], ", ".join(words)
        return None


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
    write=None,
):
    """Train for one epoch of `steps` batches.

    Args:
        state, student, teacher, recipe, autocast, mixup, clip_grad: as for `train_step`.
        labelled, unlabelled: iterables of batches on the device, `steps` of each; unlabelled None: supervised only.
        accum_iter: batches per optimizer step; the epoch's last step takes those that are left.
        print_freq, write: as for `utils.EpochLog`; with `write` the scalars include `grad_norm`.
    Returns {meter: mean over all ranks and steps}: lr, the loss parts and, with unlabelled images, the diagnostics of
    the pseudo labels; under fp16 also `skipped`, the share of steps that the gradient scaler skipped.
    Raises FloatingPointError on all ranks together, at most `print_freq` steps after a loss was not finite.
    """
    student.train()
    state.model.train()
    log, watch = EpochLog(epoch, steps, print_freq, write), Watch(epoch, print_freq)
    consistent = unlabelled is not None and recipe.is_consistent(epoch)
    batches = zip(labelled, unlabelled if unlabelled is not None else itertools.repeat(None))
    for step, (with_labels, without) in enumerate(log.timed(batches)):
        if not state.scheduler.t_in_epochs:
            state.scheduler.step_update(epoch + step // accum_iter / math.ceil(steps / accum_iter))
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
            with_norm=write is not None,
        )
        watch.add(step, parts, with_labels, without)
        lr = max(group["lr"] for group in state.optimizer.param_groups)  # --layer-decay lowers it for early layers
        images = len(with_labels[0]) + (len(without[0]) if without else 0)
        log.add({name: (value, 1) for name, value in {"lr": lr, **parts}.items()} | diagnosis, images)
        if log.is_due(step):
            watch.check()
            log.print_line(step)
    return log.means()


def _ranked(scores):
    """The classes of the five highest scores, or of all if there are fewer, best first: (N, 5)."""
    return scores.topk(min(5, scores.shape[1]), dim=1).indices


def _correct(ranked, target):
    """Percentages of the images whose class is the first of `ranked`, and any of `ranked`."""
    hits = 100.0 * (ranked == target[:, None]).double()
    return hits[:, 0].mean(), hits.sum(1).mean()


def evaluate(model, batches, *, autocast, observe=None):
    """Measure accuracy and loss over the images of all ranks, each of which counts exactly once.

    Args:
        model: the bare network.
        batches: iterable of (images, labels, ...) on the device, this rank's share.
        observe: called with each batch's scores, {name: (N, C)}, their best classes, {name: (N, 5)} or fewer, best
            first, and its labels (N,). A name is the part of a meter's name below that follows `acc1`.
    Returns {meter: value}: `loss`, `acc1` and `acc5` of the summed logits; for two streams also `loss_0` and `loss_1`
    (halved cross-entropy of CNN and transformer), `acc1_head1` and `acc5_head1` (CNN), `..._head2` (transformer) and
    `..._softmax` (mean of the two softmaxes); and `images`, their number. Accuracies are in percent.
    """
    return evaluate_together([model], batches, autocast=autocast, observe=observe)[0]


@torch.no_grad()
def evaluate_together(models, batches, *, autocast, observe=None):
    """`evaluate` of several networks in one pass over the images; returns the meters of each."""
    meters = [Meters() for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for images, target, *_ in batches:
            for model, own in zip(models, meters):
                with autocast():
                    logits = model(images)
                _measure(logits, target, own, observe)
    return [{**own.means_over_ranks(), "images": own.count_over_ranks("loss")} for own in meters]


def _measure(logits, target, meters, observe):
    """Add the accuracies and losses of a batch to the meters."""
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
