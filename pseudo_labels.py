"""From what the weak view says to what the strong view must learn: a target class and a weight per image.

The paper's idea ("Semi-Supervised Vision Transformers", Weng et al., ECCV 2022, Semiformer): two streams of
one network, a CNN and a transformer, look at a weak view, and a *policy* decides which of them teaches
both. A stream is *sure* of an image where the probability of its best class, under softmax(logits / T),
reaches the threshold. U images, C classes. Nothing here waits for the device.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class _Reading(NamedTuple):
    """What one distribution per image says of U images; each field is (U,)."""

    target: Tensor  # int64, the first of equally probable classes
    probability: Tensor  # of that class
    sure: Tensor  # bool


def _read(probabilities: Tensor, threshold: float) -> _Reading:
    probability, target = probabilities.max(dim=-1)
    return _Reading(target, probability, probability >= threshold)


def _follow(conv: Tensor, trans: Tensor, threshold: float, merge) -> tuple[Tensor, Tensor]:
    """One distribution decides alone; `merge` makes it, (U, C), of both streams' logits / T, (U, C) each."""
    said = _read(merge(conv, trans), threshold)
    return said.target, said.sure


def _arbitrate(
    conv: Tensor, trans: Tensor, threshold: float, dispute: str, differ: float, conv_alone: float, trans_alone: float
) -> tuple[Tensor, Tensor]:
    """Both streams are heard: 1 where both are sure and agree, 0 where none is sure, else the given weights.

    `differ`, `conv_alone`, `trans_alone`: the weight where both are sure of different classes, only the CNN
    is sure, only the transformer is. `dispute`: whose class wins the first of these, "conv" or "larger".
    """
    conv, trans = (_read(scaled.softmax(dim=-1), threshold) for scaled in (conv, trans))
    conv_wins = conv.sure
    if dispute == "larger":
        # released code: a tie of probabilities goes to the transformer.
        conv_wins = conv.sure & (~trans.sure | (conv.probability > trans.probability))
    targets = torch.where(conv_wins, conv.target, trans.target)
    both_sure = torch.where(conv.target == trans.target, 1.0, differ)
    one_sure = torch.where(conv.sure, conv_alone, trans_alone)
    weights = torch.where(conv.sure & trans.sure, both_sure, one_sure).masked_fill(~(conv.sure | trans.sure), 0)
    # released code: an image of no weight has target 0; it is what the reference numbers hold.
    return targets.masked_fill(weights == 0, 0), weights


# Every policy: (logits / T of the CNN, of the transformer (U, C), threshold) -> (targets (U,) int64, weights (U,)).
# released code: its fifteen names, in the order of its flag; the first is its default.
POLICIES = {
    "cnn": partial(_follow, merge=lambda conv, trans: conv.softmax(dim=-1)),
    "transformer": partial(_follow, merge=lambda conv, trans: trans.softmax(dim=-1)),
    "fuse": partial(_follow, merge=lambda conv, trans: ((conv + trans) / 2).softmax(dim=-1)),
    "softmax_fuse": partial(_follow, merge=lambda conv, trans: (conv.softmax(dim=-1) + trans.softmax(dim=-1)) / 2),
} | {
    name: partial(_arbitrate, dispute=dispute, differ=differ, conv_alone=conv_alone, trans_alone=trans_alone)
    for name, dispute, differ, conv_alone, trans_alone in (
        ("Vote_equal", "larger", 0.0, 1.0, 1.0),
        ("Vote_cnnBias", "conv", 1.0, 1.0, 1.0),
        ("Vote_larger", "larger", 1.0, 1.0, 1.0),
        ("Vote_larger2", "larger", 1.0, 1.0, 0.0),
        ("Vote_equal2", "larger", 0.0, 1.0, 0.0),
        ("weight_v1", "larger", 0.5, 1.0, 0.0),
        ("weight_v2", "larger", 0.5, 1.0, 0.5),
        ("weight_v3", "larger", 0.5, 0.5, 0.0),
        ("weight_v4", "larger", 0.5, 0.5, 0.5),
        ("weight_v5", "conv", 0.5, 0.5, 0.0),
        ("weight_v6", "conv", 0.5, 1.0, 0.0),
    )
}


def select_targets(
    conv_logits: Tensor, trans_logits: Tensor, policy: str, threshold: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Targets and weights of U unlabelled images, from the weak-view logits of both streams (Semiformer,
    Weng et al., ECCV 2022; the fifteen policies are those of the released code).

    Args:
        conv_logits, trans_logits: (U, C), of the CNN and of the transformer.
        policy: a name of `POLICIES`.
        threshold: the probability, 0..1, from which a stream is sure (met exactly, it is).
        temperature: T > 0; probabilities are softmax(logits / T).

    Returns:
        targets (U,) int64 and weights (U,) in 0, 0.5 or 1, of the logits' dtype but at least float32.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown pseudo-label policy {policy!r}; known: {', '.join(POLICIES)}.")
    conv, trans = (_scale(logits, temperature) for logits in (conv_logits, trans_logits))
    targets, weights = POLICIES[policy](conv, trans, threshold)
    return targets, weights.to(conv.dtype)


def pseudo_label(weak_logits: list[Tensor], policy: str, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """`select_targets` for whatever network there is: its weak-view logits, (U, C) a stream.

    Of two streams (CNN first) the policy chooses. A single stream labels for itself, with its arg-max, T
    and threshold; the policy does not apply and is not looked at. Returns targets (U,) int64 and weights
    (U,) float as there (Weng et al., ECCV 2022, released code).

    Raises:
        ValueError: there are neither one nor two streams, or, with two, the policy is unknown.
    """
    if len(weak_logits) not in (1, 2):
        raise ValueError(f"pseudo-labels come from one stream or two, not {len(weak_logits)}.")
    if len(weak_logits) == 2:
        return select_targets(*weak_logits, policy, threshold, temperature)
    scaled = _scale(weak_logits[0], temperature)
    said = _read(scaled.softmax(dim=-1), threshold)
    return said.target, said.sure.to(scaled.dtype)


def diagnostics(
    targets: Tensor, weights: Tensor, truth: Tensor, weak_logits: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """How good the pseudo-labels of Weng et al. (ECCV 2022) are; the only reader of the true classes.

    Args:
        targets, weights: (U,) each, from `pseudo_label`.
        truth: (U,) int64, the true class, or negative where it is unknown.
        weak_logits: (U, C) a stream, those the pseudo-labels were made of.

    Returns:
        name -> (value, n): value a fraction 0..1 (float, 0-d), n the images it is a fraction of (int64,
        0-d); value is 0 where n is. Both stay on the device. Raises nothing of its own.
        `mask_rate`: images of weight > 0, among all (ours: not in the released code).
        `pseudo_acc`: images whose target is the truth, among those of weight > 0 and known truth.
        `agreement`, for two streams only: images the streams' arg-maxes agree on, among all.
    """
    kept = weights > 0
    everything = torch.ones_like(kept)
    shares = {
        "mask_rate": _share(kept, everything),
        "pseudo_acc": _share(targets == truth, kept & (truth >= 0)),
    }
    if len(weak_logits) == 2:
        conv, trans = (logits.argmax(dim=-1) for logits in weak_logits)
        shares["agreement"] = _share(conv == trans, everything)
    return shares


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """logits / T; half precision would round probabilities across the threshold, so at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def _share(hits: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """(share of `among` that is also in `hits`, size of `among`), both 0-d, of two (U,) masks."""
    n = among.sum()
    return (hits & among).sum() / n.clamp(min=1), n
