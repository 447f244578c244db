"""The losses of the method ("Semi-Supervised Vision Transformers", Weng et al., ECCV 2022: Semiformer).

Logits and features are lists with one tensor per stream: the CNN's first, then the transformer's; or a single one.
The losses of half-precision inputs are computed in float32, those of float64 in float64.
"""

from argparse import Namespace
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """The settings of the method (Weng et al., ECCV 2022); the defaults are those of the released flags."""

    policy: str = "cnn"  # how pseudo labels are chosen: a key of pseudo_labels.POLICIES
    threshold: float = 0.7  # least probability of a pseudo label that counts
    temperature: float = 1.0  # of the softmax of the pseudo labels
    semi_lambda: float = 10.0  # weight of the unlabelled loss
    smoothing: float = 0.1  # label smoothing: share of the target that is spread over all classes
    unlabel_smooth: bool = False  # label smoothing in the unlabelled loss as well
    mask_cnn_ratio: float = 1.0  # weights of the streams in the supervised loss
    mask_transformer_ratio: float = 1.0
    mask_cnn_ratio_u: float = 1.0  # weights of the streams in the unlabelled loss
    mask_transformer_ratio_u: float = 1.0
    supervise_only: bool = False  # never use unlabelled images
    semi_start_epoch: int = 0  # first epoch that uses unlabelled images
    dual_consistency: bool = False  # add the consistency loss
    consistency_start_epoch: int = -1  # first epoch of the consistency loss; -1: semi_start_epoch
    consistency_type: str = "triplet"  # or "infonce"
    consistency_lambda: float = 0.5  # weight of the consistency loss
    infonce_T: float = 1.0  # temperature of InfoNCE
    margin: float = 0.5  # of the triplet loss
    anchor_type: str = "weak"  # view that is the anchor; or "strong", "both"
    dis_type: str = "cos"  # distance of the triplet loss; or "l2"
    pseudo_mixup: bool = False  # mix the strong images with each other by their pseudo labels (Semi-ViT)
    fairness_lambda: float = 0.0  # weight of FreeMatch's fairness loss

    @classmethod
    def from_args(cls, args: Namespace) -> "Recipe":
        """Take every setting from the flag of the same name, and `policy` from `args.pseudo_type`.

        The flags' names are those of the released code, which lacks the last two: they may be missing. Raises
        AttributeError if `args` lacks another.
        """
        flag, later = {"policy": "pseudo_type"}, ("pseudo_mixup", "fairness_lambda")
        names = [field.name for field in fields(cls) if field.name not in later or hasattr(args, field.name)]
        return cls(**{name: getattr(args, flag.get(name, name)) for name in names})

    def is_semi(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, uses unlabelled images (paper: after a supervised phase)."""
        return not self.supervise_only and epoch >= self.semi_start_epoch

    def is_consistent(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, has the consistency loss (released code: only if `is_semi`)."""
        return self.dual_consistency and self.is_semi(epoch) and epoch >= self.consistency_start_epoch


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy (nats) with label smoothing, as in Weng et al., ECCV 2022.

    Args:
        logits: (N, C).
        target: classes (N,) int64, or soft targets (N, C), to which mixup has already applied the smoothing.
        smoothing: 0..1; the target distribution is (1 - smoothing) * one-hot + smoothing / C.
        reduction: "mean" (0-d) or "none" (N,).

    Raises the errors of `F.cross_entropy`: ValueError for an unknown reduction or for batches of different sizes,
    IndexError for a class out of range.
    """
    logits = _full_precision(logits)
    if target.is_floating_point():
        return F.cross_entropy(logits, target.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)


def objective(
    labelled_logits: list[Tensor],
    labels: Tensor,
    strong_logits: list[Tensor] | None,
    targets: Tensor | None,
    weights: Tensor | None,
    recipe: Recipe,
    features: tuple[list[Tensor], list[Tensor]] | None = None,
    fairness: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one step (Weng et al., ECCV 2022): supervised + lambda * unlabelled (+ consistency).

    Args:
        labelled_logits: logits of the labelled images, (B, C) per stream.
        labels: (B,) int64, or soft labels (B, C) from mixup.
        strong_logits: logits of the strong views, (U, C) per stream; None in the supervised phase, in which
            `targets` and `weights` are ignored.
        targets, weights: pseudo labels, (U,) int64 and (U,) float, shared by all streams; targets of pseudo mixup are
            (U, C).
        recipe: the settings.
        features: (weak, strong), each (U, D) per stream, if the epoch has the consistency loss.
        fairness: FreeMatch's loss, 0-d, the mean over the streams, if it is on.

    Returns:
        The loss (0-d, nats), and a dict of those of its parts that apply, detached: for two streams `loss_0`,
        `loss_1`, `loss_0_u` and `loss_1_u` (CNN and transformer, halved, without ratios and lambda), for one stream
        `loss_u`; then `loss_consistency` and `loss_fairness` (without their lambdas) and `loss`.

    Raises:
        ValueError: there are not one or two streams, the lists differ in length, or a consistency setting is unknown.
    """
    streams = len(labelled_logits)
    if streams == 1:
        # released code: a single stream has no ratios, and its supervised loss is not logged.
        names, ratios, ratios_u = ("",), (1.0,), (1.0,)
    elif streams == 2:
        names = ("_0", "_1")
        ratios = (recipe.mask_cnn_ratio, recipe.mask_transformer_ratio)
        ratios_u = (recipe.mask_cnn_ratio_u, recipe.mask_transformer_ratio_u)
    else:
        raise ValueError(f"The objective needs one or two streams, not {streams}.")

    parts = {}
    supervised = [smoothed_cross_entropy(logits, labels, recipe.smoothing) / streams for logits in labelled_logits]
    total = _weighted_sum(ratios, supervised)
    if streams == 2:
        parts |= {f"loss{name}": loss for name, loss in zip(names, supervised, strict=True)}

    if strong_logits is not None:
        # ours: `unlabel_smooth` applies to a single stream too; the released code ignores it there.
        smoothing = recipe.smoothing if recipe.unlabel_smooth else 0.0
        # released code: the mean is over all unlabelled images, so the loss is small while few have a weight above 0.
        unlabelled = [
            (weights * smoothed_cross_entropy(logits, targets, smoothing, "none")).mean() / streams
            for logits in strong_logits
        ]
        total = total + recipe.semi_lambda * _weighted_sum(ratios_u, unlabelled)
        parts |= {f"loss{name}_u": loss for name, loss in zip(names, unlabelled, strict=True)}

    if features is not None:
        parts["loss_consistency"] = consistency(*features, recipe)
        total = total + recipe.consistency_lambda * parts["loss_consistency"]

    if fairness is not None:
        parts["loss_fairness"] = fairness
        total = total + recipe.fairness_lambda * fairness

    parts["loss"] = total
    return total, {name: loss.detach() for name, loss in parts.items()}


def consistency(weak_feats: list[Tensor], strong_feats: list[Tensor], recipe: Recipe) -> Tensor:
    """Return the contrastive loss that pulls an image's strong view to its weak view and away from other images.

    Source: released code of Weng et al., ECCV 2022.

    Args:
        weak_feats, strong_feats: (U, D) per stream; D may differ between streams. The weak features are detached.
        recipe: the settings consistency_type, anchor_type, dis_type, margin and infonce_T.

    Returns:
        The sum, not the mean, over the streams and for anchor_type "both" over both anchors; 0-d, without lambda.

    Raises:
        ValueError: the lists differ in length, or consistency_type, anchor_type or dis_type is unknown.
    """
    if recipe.consistency_type not in ("triplet", "infonce"):
        raise ValueError(f"Unknown consistency type {recipe.consistency_type!r}; known: triplet, infonce.")
    if recipe.anchor_type not in ("weak", "strong", "both"):
        raise ValueError(f"Unknown anchor type {recipe.anchor_type!r}; known: weak, strong, both.")
    pairs = [(weak.detach(), strong) for weak, strong in zip(weak_feats, strong_feats, strict=True)]
    swapped = [(strong, weak) for weak, strong in pairs]
    pairs = {"weak": pairs, "strong": swapped, "both": pairs + swapped}[recipe.anchor_type]
    if recipe.consistency_type == "infonce":
        return sum(infonce(anchor, other, recipe.infonce_T) for anchor, other in pairs)
    return sum(triplet(anchor, other, recipe.margin, recipe.dis_type) for anchor, other in pairs)


def triplet(anchor: Tensor, other: Tensor, margin: float, distance: str) -> Tensor:
    """Return the triplet loss (1 / N^2) * sum over i != j of max(0, margin + sim(i, j) - sim(i, i)), 0-d.

    sim(i, j) is the similarity of row i of `anchor` and row j of `other`. Loss and gradient are finite at zero norm
    and at zero distance. Source: released code of Weng et al., ECCV 2022.

    Args:
        anchor, other: features (N, D) of two views of N images.
        margin: in units of sim.
        distance: "cos" (sim is the cosine) or "l2" (sim is minus the Euclidean distance).

    Raises:
        ValueError: the distance is unknown.
    """
    if distance not in ("cos", "l2"):
        raise ValueError(f"Unknown distance {distance!r}; known: cos, l2.")
    similarity = _cosine(anchor, other) if distance == "cos" else -_euclidean(anchor, other)  # (N, N)
    hinge = F.relu(margin + similarity - similarity.diagonal().unsqueeze(1))
    diagonal = torch.eye(len(hinge), dtype=torch.bool, device=hinge.device)
    # released code: the diagonal holds no triplets and is set to 0, but still counts in the mean.
    return hinge.masked_fill(diagonal, 0).mean()


def infonce(anchor: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE (nats, 0-d): the cross-entropy of classifying each row of `anchor` as the same row of `other`.

    The logits are the cosines of all pairs of rows, divided by the temperature. Loss and gradient are finite at zero
    norm. Source: released code of Weng et al., ECCV 2022; van den Oord et al., 2018.

    Args:
        anchor, other: features (N, D) of two views of N images.
    """
    similarity = _cosine(anchor, other) / temperature  # (N, N)
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def _weighted_sum(ratios: tuple[float, ...], losses: list[Tensor]) -> Tensor:
    return sum(ratio * loss for ratio, loss in zip(ratios, losses, strict=True))


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cosine(anchor: Tensor, other: Tensor) -> Tensor:
    # ours: the released code divides by the norm itself, which gives NaN for an all-zero row. Autocast is disabled
    # because it would compute the product in half precision, whatever the inputs' dtype.
    with torch.autocast(anchor.device.type, enabled=False):
        unit_anchor, unit_other = (F.normalize(_full_precision(x), dim=-1, eps=1e-6) for x in (anchor, other))
        return unit_anchor @ unit_other.T


def _euclidean(anchor: Tensor, other: Tensor) -> Tensor:
    # ours: the released code computes sqrt(|a|^2 + |b|^2 - 2ab), which is NaN when rounding makes the sum negative
    # for close rows. This mode of cdist subtracts first: equal rows have distance 0 and gradient 0.
    return torch.cdist(_full_precision(anchor), _full_precision(other), compute_mode="donot_use_mm_for_euclid_dist")
