"""The objective of the method: tensors in, scalars out ("Semi-Supervised Vision Transformers", Weng et al.,
ECCV 2022: Semiformer). Streams come as lists, CNN first and transformer second, or a single stream.
Half-precision inputs are computed in float32, float64 stays float64."""

from argparse import Namespace
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """The settings of the method (Weng et al., ECCV 2022); the defaults are those of the released flags."""

    policy: str = "cnn"  # whose pseudo-labels count: a name of pseudo_labels.POLICIES
    threshold: float = 0.7  # probability from which a pseudo-label counts
    temperature: float = 1.0  # of the softmax behind the pseudo-labels
    semi_lambda: float = 10.0  # weight of the unlabelled loss
    smoothing: float = 0.1  # label smoothing, share of the target spread over all classes
    unlabel_smooth: bool = False  # smooth the unlabelled loss too
    mask_cnn_ratio: float = 1.0  # weights of the streams, supervised ...
    mask_transformer_ratio: float = 1.0
    mask_cnn_ratio_u: float = 1.0  # ... and unlabelled
    mask_transformer_ratio_u: float = 1.0
    supervise_only: bool = False
    semi_start_epoch: int = 0
    dual_consistency: bool = False
    consistency_start_epoch: int = -1  # -1: the semi start
    consistency_type: str = "triplet"  # or "infonce"
    consistency_lambda: float = 0.5  # weight of the consistency loss
    infonce_T: float = 1.0  # temperature of InfoNCE
    margin: float = 0.5  # of the triplet loss
    anchor_type: str = "weak"  # "strong" or "both"
    dis_type: str = "cos"  # distance of the triplet loss; or "l2"

    @classmethod
    def from_args(cls, args: Namespace) -> "Recipe":
        """The recipe the flags describe: attributes of the same names, but `policy` is `args.pseudo_type`.

        Raises AttributeError where `args` lacks one. Flag names: the released code of Weng et al., 2022.
        """
        flag = {"policy": "pseudo_type"}
        return cls(**{field.name: getattr(args, flag.get(field.name, field.name)) for field in fields(cls)})

    def is_semi(self, epoch: int) -> bool:
        """Whether unlabelled images are used in this epoch (from 0; paper: after a supervised phase)."""
        return not self.supervise_only and epoch >= self.semi_start_epoch

    def is_consistent(self, epoch: int) -> bool:
        """Whether the consistency loss counts in this epoch (from 0; released code: never before semi)."""
        return self.dual_consistency and self.is_semi(epoch) and epoch >= self.consistency_start_epoch


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float, reduction: str = "mean") -> Tensor:
    """Cross-entropy (nats) against (1 - smoothing) * one-hot + smoothing / C, as in Weng et al., ECCV 2022.

    Args:
        logits: (N, C).
        target: classes (N,) int64; or soft targets (N, C) from mixup, whose smoothing is already inside, so
            that none is added.
        smoothing: 0..1.
        reduction: "mean" (0-d) or "none" (N,), as in `F.cross_entropy`, whose errors are the only ones:
            ValueError for an unknown reduction or a batch mismatch, IndexError for a class out of range.
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step (Weng et al., ECCV 2022): supervised + lambda * unlabelled (+ consistency).

    Args:
        labelled_logits: (B, C) a stream, of the labelled images.
        labels: (B,) int64, or (B, C) soft from mixup.
        strong_logits: (U, C) a stream, of the strong views; None in the supervised phase, where `targets`
            and `weights` are not looked at.
        targets, weights: (U,) int64 and (U,) float, from `pseudo_labels`; the same ones teach every stream.
        recipe: the settings.
        features: (weak, strong), each (U, D) a stream, where the consistency loss counts.

    Returns:
        loss (0-d, nats) and its parts, 0-d, detached, only those that apply: of two streams `loss_0`,
        `loss_1`, `loss_0_u`, `loss_1_u` (CNN, transformer; halved, before ratios and lambda), of one stream
        `loss_u`; then `loss_consistency` (before its lambda) and `loss`.

    Raises:
        ValueError: not one or two streams, lists of different lengths, or an unknown consistency setting.
    """
    streams = len(labelled_logits)
    if streams == 1:
        # released code: ratios between streams mean nothing here, and the supervised loss has no meter.
        names, ratios, ratios_u = ("",), (1.0,), (1.0,)
    elif streams == 2:
        names = ("_0", "_1")
        ratios = (recipe.mask_cnn_ratio, recipe.mask_transformer_ratio)
        ratios_u = (recipe.mask_cnn_ratio_u, recipe.mask_transformer_ratio_u)
    else:
        raise ValueError(f"the objective is for one stream or two, not {streams}.")

    parts = {}
    supervised = [smoothed_cross_entropy(logits, labels, recipe.smoothing) / streams for logits in labelled_logits]
    total = _weighted_sum(ratios, supervised)
    if streams == 2:
        parts |= {f"loss{name}": loss for name, loss in zip(names, supervised, strict=True)}

    if strong_logits is not None:
        # ours: `unlabel_smooth` holds for a single stream too, where the released code ignores it.
        smoothing = recipe.smoothing if recipe.unlabel_smooth else 0.0
        # released code: the mean is over all unlabelled images, not the kept: few sure images count little.
        unlabelled = [
            (weights * smoothed_cross_entropy(logits, targets, smoothing, "none")).mean() / streams
            for logits in strong_logits
        ]
        total = total + recipe.semi_lambda * _weighted_sum(ratios_u, unlabelled)
        parts |= {f"loss{name}_u": loss for name, loss in zip(names, unlabelled, strict=True)}

    if features is not None:
        parts["loss_consistency"] = consistency(*features, recipe)
        total = total + recipe.consistency_lambda * parts["loss_consistency"]

    parts["loss"] = total
    return total, {name: loss.detach() for name, loss in parts.items()}


def consistency(weak_feats: list[Tensor], strong_feats: list[Tensor], recipe: Recipe) -> Tensor:
    """Each image's strong view shall be nearest to its own weak view (released code of Weng et al., 2022).

    Args:
        weak_feats, strong_feats: (U, D) a stream; D may differ between streams. No gradient reaches the weak.
        recipe: consistency_type, anchor_type, dis_type, margin and infonce_T are read.

    Returns:
        0-d: the sum, not the mean, over streams and (anchor_type "both") anchors, before any lambda.

    Raises:
        ValueError: lists of different lengths, or an unknown consistency_type, anchor_type or dis_type.
    """
    if recipe.consistency_type not in ("triplet", "infonce"):
        raise ValueError(f"unknown consistency type {recipe.consistency_type!r}; known: triplet, infonce.")
    if recipe.anchor_type not in ("weak", "strong", "both"):
        raise ValueError(f"unknown anchor type {recipe.anchor_type!r}; known: weak, strong, both.")
    pairs = [(weak.detach(), strong) for weak, strong in zip(weak_feats, strong_feats, strict=True)]
    flipped = [(strong, weak) for weak, strong in pairs]
    anchored = {"weak": pairs, "strong": flipped, "both": pairs + flipped}[recipe.anchor_type]
    if recipe.consistency_type == "infonce":
        return sum(infonce(anchor, other, recipe.infonce_T) for anchor, other in anchored)
    return sum(triplet(anchor, other, recipe.margin, recipe.dis_type) for anchor, other in anchored)


def triplet(anchor: Tensor, other: Tensor, margin: float, distance: str) -> Tensor:
    """(1 / N^2) * sum over i != j of max(0, margin + sim(i, j) - sim(i, i)), 0-d, of N images' views, (N, D).

    sim(i, j) compares row i of `anchor` with row j of `other`: their cosine for the distance "cos", minus
    their Euclidean distance for "l2"; `margin` is in the same unit. Finite, gradient included, at zero norm
    and zero distance. Source: released code of Weng et al., ECCV 2022.

    Raises:
        ValueError: the distance is unknown.
    """
    if distance not in ("cos", "l2"):
        raise ValueError(f"unknown distance {distance!r}; known: cos, l2.")
    similarity = _cosine(anchor, other) if distance == "cos" else -_euclidean(anchor, other)  # (N, N)
    hinge = F.relu(margin + similarity - similarity.diagonal().unsqueeze(1))
    itself = torch.eye(len(hinge), dtype=torch.bool, device=hinge.device)
    # released code: the diagonal is no triplet and adds nothing, yet it is counted in the mean.
    return hinge.masked_fill(itself, 0).mean()


def infonce(anchor: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Cross-entropy (nats, 0-d) of the cosine matrix / temperature of two (N, D) views, against the diagonal.

    A row is an image of `anchor` choosing among all of `other`. Finite, gradient included, at zero norm.
    Raises nothing of its own. Source: released code of Weng et al., ECCV 2022; van den Oord et al., 2018.
    """
    similarity = _cosine(anchor, other) / temperature  # (N, N)
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def _weighted_sum(ratios: tuple[float, ...], losses: list[Tensor]) -> Tensor:
    return sum(ratio * loss for ratio, loss in zip(ratios, losses, strict=True))


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cosine(anchor: Tensor, other: Tensor) -> Tensor:
    # ours: the released code divides by the bare norm, which is NaN for a dead feature. Autocast would run
    # this product in half precision again, whatever the inputs' type.
    with torch.autocast(anchor.device.type, enabled=False):
        unit_anchor, unit_other = (F.normalize(_full_precision(x), dim=-1, eps=1e-6) for x in (anchor, other))
        return unit_anchor @ unit_other.T


def _euclidean(anchor: Tensor, other: Tensor) -> Tensor:
    # ours: |a|^2 + |b|^2 - 2ab rounds, even below 0, for close rows, and the released code takes its root
    # (NaN); this mode subtracts first, so equal rows are at exactly 0, with gradient 0.
    return torch.cdist(_full_precision(anchor), _full_precision(other), compute_mode="donot_use_mm_for_euclid_dist")
