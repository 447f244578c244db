"""Pseudo labels: a target class and a weight for every unlabelled image, from the logits of its weak view.

The idea of the paper ("Semi-Supervised Vision Transformers", Weng et al., ECCV 2022, Semiformer): both streams of
the network, a CNN and a transformer, predict the class of a weak view, and a *policy* chooses the prediction that
both streams learn from on the strong view. A stream is *confident* about an image if the probability of its most
probable class under softmax(logits / T) reaches the threshold.

Shapes: U unlabelled images, C classes. No function synchronises with the device.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class _Prediction(NamedTuple):
    """The most probable class of U images; each field is (U,)."""

    target: Tensor  # int64, the first of equally probable classes
    probability: Tensor  # of that class
    confident: Tensor  # bool, whether the probability reaches the threshold


def _predict(probabilities: Tensor, threshold: float) -> _Prediction:
    probability, target = probabilities.max(dim=-1)
    return _Prediction(target, probability, probability >= threshold)


def _from_one_distribution(conv: Tensor, trans: Tensor, threshold: float, merge) -> tuple[Tensor, Tensor]:
    """Label by one distribution, (U, C), which `merge` computes from the streams' logits / T, (U, C) each."""
    prediction = _predict(merge(conv, trans), threshold)
    return prediction.target, prediction.confident


def _from_both_streams(
    conv: Tensor, trans: Tensor, threshold: float, winner: str, disagree: float, conv_only: float, trans_only: float
) -> tuple[Tensor, Tensor]:
    """Label by both streams; the weight is 1 where both are confident and agree, 0 where neither is confident.

    Args:
        conv, trans: logits / T, (U, C) each.
        winner: whose class is the target where the streams are confident of different classes: "conv" for the
            CNN's, "larger" for the more probable one.
        disagree, conv_only, trans_only: weights where the streams are confident of different classes, where only
            the CNN is confident, and where only the transformer is.
    """
    conv, trans = (_predict(scaled.softmax(dim=-1), threshold) for scaled in (conv, trans))
    use_conv = conv.confident
    if winner == "larger":
        # released code: of equal probabilities the transformer's class wins.
        use_conv = conv.confident & (~trans.confident | (conv.probability > trans.probability))
    targets = torch.where(use_conv, conv.target, trans.target)
    both, neither = conv.confident & trans.confident, ~(conv.confident | trans.confident)
    weight_of_both = torch.where(conv.target == trans.target, 1.0, disagree)
    weight_of_one = torch.where(conv.confident, conv_only, trans_only)
    weights = torch.where(both, weight_of_both, weight_of_one).masked_fill(neither, 0)
    # released code: images of weight 0 have target 0, also in the reference figures of the tests.
    return targets.masked_fill(weights == 0, 0), weights


# A policy maps (logits / T of the CNN (U, C), of the transformer (U, C), threshold) to (targets (U,), weights (U,)).
# released code: its fifteen names in the order of its flag, whose default is the first.
POLICIES = {
    "cnn": partial(_from_one_distribution, merge=lambda conv, trans: conv.softmax(dim=-1)),
    "transformer": partial(_from_one_distribution, merge=lambda conv, trans: trans.softmax(dim=-1)),
    "fuse": partial(_from_one_distribution, merge=lambda conv, trans: ((conv + trans) / 2).softmax(dim=-1)),
    "softmax_fuse": partial(
        _from_one_distribution, merge=lambda conv, trans: (conv.softmax(dim=-1) + trans.softmax(dim=-1)) / 2
    ),
} | {
    name: partial(_from_both_streams, winner=winner, disagree=disagree, conv_only=conv_only, trans_only=trans_only)
    for name, winner, disagree, conv_only, trans_only in (
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
    """Return the pseudo labels of U unlabelled images, from both streams' logits of their weak views.

    Source: Weng et al., ECCV 2022; the fifteen policies are those of the released code.

    Args:
        conv_logits, trans_logits: logits of the CNN and of the transformer, (U, C) each.
        policy: a key of `POLICIES`.
        threshold: least probability, 0..1, at which a stream is confident (inclusive).
        temperature: T > 0; probabilities are softmax(logits / T).

    Returns:
        targets (U,) int64, and weights (U,) of 0, 0.5 or 1 in the logits' dtype or float32, whichever is wider.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"Unknown pseudo-label policy {policy!r}; known: {', '.join(POLICIES)}.")
    conv, trans = (_scale(logits, temperature) for logits in (conv_logits, trans_logits))
    targets, weights = POLICIES[policy](conv, trans, threshold)
    return targets, weights.to(conv.dtype)


def pseudo_label(weak_logits: list[Tensor], policy: str, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the pseudo labels of U unlabelled images, for networks of one or two streams.

    Two streams are labelled by `select_targets`. A single stream labels for itself: the target is its most probable
    class, the weight is 1 where the probability reaches the threshold and 0 elsewhere, and `policy` is ignored.
    Source: released code of Weng et al., ECCV 2022.

    Args:
        weak_logits: logits of the weak views, (U, C) per stream, CNN first.
        policy, threshold, temperature: as in `select_targets`.

    Returns:
        targets (U,) int64 and weights (U,), as `select_targets` does.

    Raises:
        ValueError: there are not one or two streams, or there are two and the policy is unknown.
    """
    if len(weak_logits) not in (1, 2):
        raise ValueError(f"Pseudo labels need one or two streams, not {len(weak_logits)}.")
    if len(weak_logits) == 2:
        return select_targets(*weak_logits, policy, threshold, temperature)
    scaled = _scale(weak_logits[0], temperature)
    prediction = _predict(scaled.softmax(dim=-1), threshold)
    return prediction.target, prediction.confident.to(scaled.dtype)


def diagnostics(
    targets: Tensor, weights: Tensor, truth: Tensor, weak_logits: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return figures about the quality of pseudo labels. Nothing else reads the true classes of unlabelled images.

    Args:
        targets, weights: (U,) each, from `pseudo_label`.
        truth: true classes (U,) int64, negative where unknown, as for the labelled images among them.
        weak_logits: the logits that the pseudo labels were computed from, (U, C) per stream.

    Returns:
        {name: (fraction, n)}: a fraction 0..1 of n images, both 0-d tensors on the device; it is 0 if n is 0.
        `mask_rate`: fraction of all images that have a weight above 0 (ours: not in the released code).
        `pseudo_acc`: fraction of the images with a weight above 0 and a known class whose target is that class.
        `agreement`, for two streams only: fraction of all images on whose most probable class the streams agree.
    """
    kept = weights > 0
    everything = torch.ones_like(kept)
    figures = {
        "mask_rate": _fraction(kept, everything),
        "pseudo_acc": _fraction(targets == truth, kept & (truth >= 0)),
    }
    if len(weak_logits) == 2:
        conv, trans = (logits.argmax(dim=-1) for logits in weak_logits)
        figures["agreement"] = _fraction(conv == trans, everything)
    return figures


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """logits / T in at least float32, because half precision could round probabilities across the threshold."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def _fraction(hits: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return (fraction of `among` that is also in `hits`, size of `among`), both 0-d, of two boolean masks (U,)."""
    n = among.sum()
    return (hits & among).sum() / n.clamp(min=1), n
