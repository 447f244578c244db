"""Pseudo labels: a target class and a weight for every unlabelled image, from the logits of its weak view.

The idea of the paper ("Semi-Supervised Vision Transformers", Weng et al., ECCV 2022, Semiformer): both streams of
the network, a CNN and a transformer, predict the class of a weak view, and a *policy* chooses the prediction that
both streams learn from on the strong view. A stream is *confident* about an image if the probability of its most
probable class under softmax(logits / T) reaches the threshold.

Shapes: U unlabelled images, C classes. No function synchronises with the device.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import confidence
from utils import sum_over_ranks


class Prediction(NamedTuple):
    """The most probable class of U images; each field is (U,)."""

    target: Tensor  # int64, the first of equally probable classes
    probability: Tensor  # of that class
    weight: Tensor  # how much it counts: bool, or 0 to 1


class Policy(NamedTuple):
    """A value of --pseudo-type: which distributions it reads, and how their predictions become one label.

    Attributes:
        distributions: one or two functions of (logits / T of the CNN, of the transformer), (U, C) each, that return
            probabilities (U, C).
        decide: a function of as many Predictions that returns targets (U,) and weights (U,).
    """

    distributions: tuple[Callable, ...]
    decide: Callable


def _cnn(conv: Tensor, trans: Tensor) -> Tensor:
    return conv.softmax(dim=-1)


def _transformer(conv: Tensor, trans: Tensor) -> Tensor:
    return trans.softmax(dim=-1)


def _only(prediction: Prediction) -> tuple[Tensor, Tensor]:
    return prediction.target, prediction.weight


def _from_both_streams(
    conv: Prediction, trans: Prediction, *, winner: str, disagree: float, conv_only: float, trans_only: float
) -> tuple[Tensor, Tensor]:
    """Label by both streams; the weight is 1 where both are confident and agree, 0 where neither is confident.

    Args:
        conv, trans: their predictions; a stream is confident where its weight is above 0.
        winner: whose class is the target where the streams are confident of different classes: "conv" for the
            CNN's, "larger" for the more probable one.
        disagree, conv_only, trans_only: weights where the streams are confident of different classes, where only
            the CNN is confident, and where only the transformer is.
    """
    conv_sure, trans_sure = conv.weight > 0, trans.weight > 0
    use_conv = conv_sure
    if winner == "larger":
        # released code: of equal probabilities the transformer's class wins.
        use_conv = conv_sure & (~trans_sure | (conv.probability > trans.probability))
    targets = torch.where(use_conv, conv.target, trans.target)
    both, neither = conv_sure & trans_sure, ~(conv_sure | trans_sure)
    weight_of_both = torch.where(conv.target == trans.target, 1.0, disagree)
    weight_of_one = torch.where(conv_sure, conv_only, trans_only)
    weights = torch.where(both, weight_of_both, weight_of_one).masked_fill(neither, 0)
    # released code: images of weight 0 have target 0, also in the reference figures of the tests.
    return targets.masked_fill(weights == 0, 0), weights


# released code: its fifteen names in the order of its flag, whose default is the first.
POLICIES = {
    "cnn": Policy((_cnn,), _only),
    "transformer": Policy((_transformer,), _only),
    "fuse": Policy((lambda conv, trans: ((conv + trans) / 2).softmax(dim=-1),), _only),
    "softmax_fuse": Policy((lambda conv, trans: (conv.softmax(dim=-1) + trans.softmax(dim=-1)) / 2,), _only),
} | {
    name: Policy(
        (_cnn, _transformer),
        partial(_from_both_streams, winner=winner, disagree=disagree, conv_only=conv_only, trans_only=trans_only),
    )
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
_ONE_STREAM = Policy((lambda logits: logits.softmax(dim=-1),), _only)


def policy_of(name: str, streams: int) -> Policy:
    """The Policy of a name; a single stream labels for itself, whatever the name (released code).

    Raises ValueError for an unknown name, or where there are not one or two streams.
    """
    if streams == 1:
        return _ONE_STREAM
    if streams != 2:
        raise ValueError(f"Pseudo labels need one or two streams, not {streams}.")
    if name not in POLICIES:
        raise ValueError(f"Unknown pseudo-label policy {name!r}; known: {', '.join(POLICIES)}.")
    return POLICIES[name]


class Labels(NamedTuple):
    """Pseudo labels of U images; each field is (U,)."""

    targets: Tensor  # int64
    weights: Tensor
    probability: Tensor | None  # of the target; None where two distributions decide


class PseudoLabeller(nn.Module):
    """From the logits of weak views to pseudo labels: policy, distribution alignment and confidence rule.

    Its buffers are all that alignment and rules learn, one of each for every distribution that the policy reads: a
    part of the checkpoint. With the defaults there are none, and it labels as `pseudo_label` does.

    Args:
        policy: a key of POLICIES, ignored for one stream.
        threshold, temperature: as in `pseudo_label`.
        streams: of the network, 1 or 2.
        num_classes: C.
        rule: a key of confidence.RULES.
        align: "none" or one of confidence.TARGETS.
        momentum: of both, see confidence.
        shares: class shares of the labelled set, (C,), for the alignment "shares".
        images: indices of the unlabelled images, ascending, (N,) int64: their places among all images of the data set.
    """

    def __init__(
        self, policy, threshold, temperature, *, streams=2, num_classes=0, rule="fixed", align="none", momentum=0.999,
        shares=None, images=None,
    ):  # fmt: skip
        super().__init__()
        self.policy, self.temperature, self.rule, self.align = policy_of(policy, streams), temperature, rule, align
        number, n_images = len(self.policy.distributions), 0 if images is None else len(images)
        self.rules = nn.ModuleList(
            confidence.build(rule, num_classes=num_classes, threshold=threshold, momentum=momentum, n_images=n_images)
            for _ in range(number)
        )
        self.alignments = nn.ModuleList(
            confidence.Alignment(align, num_classes=num_classes, momentum=momentum, shares=shares)
            for _ in range(number if align != "none" else 0)
        )
        # The batch tells an image's index in the data set; the rule counts the unlabelled images alone.
        self.register_buffer("images", None if images is None else torch.as_tensor(images), persistent=False)
        self._counted = None

    @property
    def kind(self):
        """What its state belongs to, as text: another kind cannot go on with it."""
        number = 0 if self.images is None else len(self.images)
        return f"--confidence {self.rule} --align {self.align}, {len(self.rules)} distributions, {number} images"

    def forward(self, weak_logits, index=None, labelled_logits=None):
        """Return the Labels of U images.

        Args:
            weak_logits: (U, C) per stream, CNN first.
            index: (U,) int64, the images' indices in the data set; for `flex`.
            labelled_logits: (L, C) per stream, of the same step; for `ada` and the alignment "labelled".
        """
        weak = self._distributions(weak_logits)
        reads_labelled = labelled_logits is not None and (self.rule == "ada" or self.align == "labelled")
        labelled = self._distributions([x.detach() for x in labelled_logits]) if reads_labelled else [None] * len(weak)
        place = None if self.images is None else torch.searchsorted(self.images, index)
        predictions = []
        for i, (q, known) in enumerate(zip(weak, labelled)):
            aligned = self.alignments[i](q, labelled=known) if self.alignments else q
            probability, target = top = aligned.max(dim=-1)
            weights = self.rules[i](aligned, index=place, labelled=known, top=top)
            if self.rule == "soft" and self.alignments:
                target = q.argmax(dim=-1)  # SoftMatch weighs by the aligned probabilities and keeps the class
            predictions.append(Prediction(target, probability, weights))
        targets, weights = self.policy.decide(*predictions)
        weights = weights.to(weak[0].dtype)
        self._count(targets, weights, weak[0].shape[1])
        return Labels(targets, weights, predictions[0].probability if len(predictions) == 1 else None)

    def _distributions(self, logits):
        scaled = [_scale(x, self.temperature) for x in logits]
        return [distribution(*scaled) for distribution in self.policy.distributions]

    def fairness(self, strong_logits, weights):
        """The mean over the streams of `confidence.fairness` of their strong logits, (U, C) per stream; 0-d."""
        rules = list(self.rules) if len(self.rules) == len(strong_logits) else [self.rules[0]] * len(strong_logits)
        losses = [
            confidence.fairness(logits, weights, rule.class_mean, rule.class_share)
            for logits, rule in zip(strong_logits, rules)
        ]
        return sum(losses) / len(losses)

    def level(self):
        """{figure of the last step: (0-d tensor, 1)}: the mean threshold of a rule that learns, or the mean weight."""
        if self.rule == "fixed":
            return {}
        level = torch.stack([rule.level for rule in self.rules]).mean()
        return {"mean_weight" if self.rule == "soft" else "threshold": (level, 1)}

    def _count(self, targets, weights, num_classes):
        if self._counted is None:
            self._counted = torch.zeros(num_classes, dtype=torch.int64, device=targets.device)
        self._counted.index_add_(0, targets, (weights > 0).long())

    def concentration(self):
        """{figure: value} of the classes of the labels that counted on all ranks since the last call.

        `pseudo_entropy` is the entropy of their shares in nats, log C where all classes are equally frequent;
        `pseudo_largest` is the share of the most frequent class. Both are None where no label counted. Every rank must
        call it.
        """
        if self._counted is None:
            return {}
        counts, self._counted = self._counted, None
        sum_over_ranks(counts)
        shares = counts.double() / counts.sum().clamp(min=1)
        if not counts.any():
            return {"pseudo_entropy": None, "pseudo_largest": None}
        return {"pseudo_entropy": torch.special.entr(shares).sum().item(), "pseudo_largest": shares.max().item()}


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
    return pseudo_label([conv_logits, trans_logits], policy, threshold, temperature)


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
    labels = PseudoLabeller(policy, threshold, temperature, streams=len(weak_logits))(weak_logits)
    return labels.targets, labels.weights


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
        `pseudo_recall`: fraction of the images with a known class that have a weight above 0 and that class as target.
        `agreement`, for two streams only: fraction of all images on whose most probable class the streams agree.
    """
    kept = weights > 0
    everything = torch.ones_like(kept)
    figures = {
        "mask_rate": _fraction(kept, everything),
        "pseudo_acc": _fraction(targets == truth, kept & (truth >= 0)),
        "pseudo_recall": _fraction(kept & (targets == truth), truth >= 0),
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
