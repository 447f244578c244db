"""When, or how much, a pseudo label counts: confidence rules, distribution alignment and fairness.

A rule maps the probabilities of the weak views to a weight for every image. What rules and alignment learn on the way
are buffers, equal on every rank: their sums are taken over all ranks, so that N ranks do what one rank with the N
batches would do. Under float32 probabilities they are float32, under float64 ones float64.

Sources: FixMatch (Sohn et al., NeurIPS 2020), FlexMatch (Zhang et al., NeurIPS 2021), FreeMatch (Wang et al., ICLR
2023), SoftMatch (Chen et al., ICLR 2023), AdaMatch (Berthelot et al., ICLR 2022), ReMixMatch (Berthelot et al., ICLR
2020), in the form of the benchmark USB (Wang et al., NeurIPS 2022).

Shapes: U unlabelled and L labelled images of this rank, C classes. Nothing here synchronises with the device.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import sum_over_ranks


def build(name: str, *, num_classes: int, threshold: float = 0.95, momentum: float = 0.999, n_images: int = 0):
    """Return a confidence rule, a module to be called as `rule(q, index=index, labelled=labelled_q)`.

    q (U, C) are probabilities after alignment, index (U,) int64 is each image's place among the `n_images` unlabelled
    ones (`flex` reads it), labelled_q (L, C) are those of the step's labelled images (`ada` reads them). Who has
    q.max(-1) already passes it as `top`. The rule returns the weights (U,) in q's dtype, and keeps in `level` (0-d) the
    mean of its thresholds or, of `soft`, of its weights.

    Args:
        name: a key of RULES.
        num_classes: C.
        threshold: least probability, 0..1, for `fixed`, `flex` and `ada`, which change it.
        momentum: share of the old value in the moving averages of `free` and `soft`.
    Raises ValueError for an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"Unknown confidence rule {name!r}; known: {', '.join(RULES)}.")
    return RULES[name](num_classes, threshold, momentum, n_images)


class _Learned(nn.Module):
    """A module whose buffers take the dtype of the probabilities. They begin in float64, where 1 / C is exact."""

    level = None

    def _follow(self, q: Tensor) -> None:
        if any(buffer.is_floating_point() and buffer.dtype != q.dtype for buffer in self.buffers()):
            self.to(q.dtype)


def _means_over_ranks(*parts: tuple[Tensor, int]) -> list[Tensor]:
    """The means over the images of all ranks, float64, of (sum over this rank's images, their number); a collective."""
    sums = [each.double() for each, _ in parts]
    counts = [each.new_full((1,), number) for each, (_, number) in zip(sums, parts)]
    flat = torch.cat([*(each.flatten() for each in sums), *counts])
    sum_over_ranks(flat)
    totals = flat[: -len(parts)].split([each.numel() for each in sums])
    return [(total / count).view(each.shape) for total, count, each in zip(totals, flat[-len(parts) :], sums)]


def _summed(values: Tensor) -> tuple[Tensor, int]:
    """(sum over the images, their number) of values of each image, (N, ...)."""
    return values.sum(0, dtype=torch.float64), len(values)


def _highest(q: Tensor, top: tuple[Tensor, Tensor] | None) -> Tensor:
    return q.amax(-1) if top is None else top[0]


class Fixed(_Learned):
    """Weight 1 where the probability reaches the threshold. Sources: FixMatch; Semiformer."""

    def __init__(self, num_classes, threshold, momentum, n_images):
        super().__init__()
        self.threshold = threshold

    def forward(self, q, index=None, labelled=None, top=None):
        """Return the weights (U,), as `build` says."""
        self.level = q.new_full((), self.threshold)
        return (_highest(q, top) >= self.threshold).to(q.dtype)


class Flex(_Learned):
    """FlexMatch: a class of which fewer images were surely labelled has a lower threshold.

    Buffers:
        class_status: (C,) n_c / max(max_c n_c, number of images without a class), where n_c counts the images whose
            last sure class is c.
        last_class: (n_images + 1,) int32, the last class that an image was surely given, -1 at first; the last entry
            is of no image.
        counts: (C + 1,) int64, n_c and the number of images without a class.
    """

    def __init__(self, num_classes, threshold, momentum, n_images):
        super().__init__()
        self.threshold, self.n_images, self.num_classes = threshold, n_images, num_classes
        self.register_buffer("class_status", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("last_class", torch.full((n_images + 1,), -1, dtype=torch.int32))
        self.register_buffer("counts", torch.tensor([0] * num_classes + [n_images]))

    @torch.no_grad()
    def forward(self, q, index, labelled=None, top=None):
        """Return the weights (U,) by the status before this step, as `build` says; then count its images."""
        self._follow(q)
        p, classes = q.max(-1) if top is None else top
        status = self.class_status[classes]
        limits = self.threshold * status / (2 - status)
        self.level = limits.mean()
        self._note(torch.where(p >= self.threshold, index, self.n_images), classes)
        return (p >= limits).to(q.dtype)

    def _note(self, places, classes):
        """Note the classes of the images at these places on all ranks; place n_images is of an image not sure."""
        # ours: of all ranks; the public code notes each rank's own images.
        places, classes = _of_all_ranks(torch.stack([places, classes])).unbind(1)
        places, order = places.flatten().sort(stable=True)
        classes = classes.flatten()[order]
        # Of an image that occurs twice the last one in the order of (rank, place) counts, on every device.
        last = torch.cat([places[1:] != places[:-1], places.new_ones(1, dtype=torch.bool)])
        places = torch.where(last, places, self.n_images)
        classes = torch.where(places < self.n_images, classes, -1)
        before = self.last_class[places].long()
        one = torch.ones_like(classes)
        self.counts.index_add_(0, torch.where(before < 0, self.num_classes, before), -one)
        self.counts.index_add_(0, torch.where(classes < 0, self.num_classes, classes), one)
        self.last_class[places] = classes.int()
        most = self.counts.max().clamp(min=1)
        self.class_status.copy_(self.counts[:-1].to(self.class_status.dtype) / most)


def _of_all_ranks(tensor):
    """The tensors of all ranks, which have one shape, stacked in the order of ranks."""
    if not dist.is_initialized():
        return tensor[None]
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor)
    return torch.stack(tensors)


class Free(_Learned):
    """FreeMatch: a threshold that follows the mean confidence, lowered for the classes that are predicted less.

    Buffers, all of which begin at 1 / C: `global_threshold` (), `class_mean` (C,) the mean probabilities, `class_share`
    (C,) the shares of the predicted classes.
    """

    def __init__(self, num_classes, threshold, momentum, n_images):
        super().__init__()
        self.momentum = momentum
        for name, shape in (("global_threshold", ()), ("class_mean", (num_classes,)), ("class_share", (num_classes,))):
            self.register_buffer(name, torch.full(shape, 1 / num_classes, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, q, index=None, labelled=None, top=None):
        """Return the weights (U,) by averages that include this step, as `build` says."""
        self._follow(q)
        p, classes = q.max(-1) if top is None else top
        predicted = torch.zeros_like(self.class_share).index_add_(0, classes, torch.ones_like(p))
        means = _means_over_ranks(_summed(p), _summed(q), (predicted, len(p)))
        for average, mean in zip((self.global_threshold, self.class_mean, self.class_share), means):
            average.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        limits = (self.global_threshold * self.class_mean / self.class_mean.max())[classes]
        self.level = limits.mean()
        return (p >= limits).to(q.dtype)


class Soft(_Learned):
    """SoftMatch: a weight that falls like a Gaussian below the mean confidence.

    Buffers: `mean` (), at first 1 / C, and `variance` (), at first 1, of the probabilities.
    """

    def __init__(self, num_classes, threshold, momentum, n_images):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.tensor(1 / num_classes, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(1.0, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, q, index=None, labelled=None, top=None):
        """Return the weights (U,), 0..1, by averages that include this step, as `build` says."""
        self._follow(q)
        p = _highest(q, top)
        wide = p.double()
        sums = torch.stack([wide.sum(), wide.square().sum(), wide.new_full((), len(p))])
        sum_over_ranks(sums)
        total, squares, count = sums
        mean = total / count
        variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
        self.mean.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        # One image has no variance.
        changed = self.momentum * self.variance + (1 - self.momentum) * variance
        self.variance.copy_(torch.where(count > 1, changed, self.variance))
        below = (p - self.mean).clamp(max=0)
        # The width is n = 2 standard deviations: exp(-below^2 n^2 / (2 variance)), in USB's notation.
        weights = torch.exp(-2 * below.square() / self.variance)
        self.level = weights.mean()
        return weights


class Ada(_Learned):
    """AdaMatch: the threshold is relative to the mean confidence on the labelled images of the same step."""

    def __init__(self, num_classes, threshold, momentum, n_images):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, q, index=None, labelled=None, top=None):
        """Return the weights (U,), as `build` says."""
        (confidence,) = _means_over_ranks(_summed(labelled.amax(-1)))
        self.level = (self.threshold * confidence).to(q.dtype)
        return (_highest(q, top) >= self.level).to(q.dtype)


# --confidence. Adding a rule is one class and one row.
RULES = {"fixed": Fixed, "flex": Flex, "free": Free, "soft": Soft, "ada": Ada}
TARGETS = ("uniform", "shares", "labelled")


class Alignment(_Learned):
    """Distribution alignment: q' = N(q * r / s), where s is the mean prediction so far and r what it should be.

    Buffers: `model_mean` (C,) is s, set by the first batch and a moving average from then on, `seen` () whether there
    was one, `target` (C,) is r.

    Args:
        target: "uniform", r = 1 / C (SoftMatch); "shares", the class shares of the labelled set (ReMixMatch);
            "labelled", a moving average of the predictions on labelled images, at first 1 / C (AdaMatch).
        num_classes: C.
        momentum: share of the old value in the moving averages.
        shares: (C,) for "shares", which sum to 1.
    Raises ValueError for an unknown target, or for "shares" without shares.
    """

    def __init__(self, target, *, num_classes, momentum=0.999, shares=None):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"Unknown alignment {target!r}; known: {', '.join(TARGETS)}.")
        if (target == "shares") != (shares is not None):
            raise ValueError("The alignment 'shares' needs the class shares, and no other takes them.")
        self.momentum, self.follows_labelled = momentum, target == "labelled"
        even = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
        self.register_buffer("model_mean", torch.zeros_like(even))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("target", even if shares is None else torch.as_tensor(shares, dtype=torch.float64).clone())

    @torch.no_grad()
    def forward(self, q, labelled=None):
        """Return the aligned probabilities (U, C) of q (U, C); "labelled" reads those of labelled images (L, C)."""
        self._follow(q)
        both = (q, labelled) if self.follows_labelled else (q,)
        mean, *of_labelled = (each.to(q.dtype) for each in _means_over_ranks(*map(_summed, both)))
        average = self.momentum * self.model_mean + (1 - self.momentum) * mean
        self.model_mean.copy_(torch.where(self.seen, average, mean))
        self.seen.fill_(True)
        for each in of_labelled:
            self.target.mul_(self.momentum).add_(each, alpha=1 - self.momentum)
        aligned = q * ((self.target + 1e-6) / (self.model_mean + 1e-6))
        return aligned.div_(aligned.sum(-1, keepdim=True))


def fairness(strong_logits: Tensor, weights: Tensor, class_mean: Tensor, class_share: Tensor) -> Tensor:
    """Return FreeMatch's fairness loss (0-d, before its lambda) of this rank's strong images that count.

    With P the mean softmax of these images and H the shares of their predicted classes, it is the sum over classes of
    N(class_mean / class_share) * log(N(P / H) + 1e-12), where N divides by the sum and 1 / 0 counts as 0. It is 0 where
    no image counts. The gradient flows through P alone.

    Args:
        strong_logits: (U, C).
        weights: (U,); an image counts where its weight is above 0.
        class_mean, class_share: (C,), of `Free`.
    """
    logits = strong_logits.to(torch.promote_types(strong_logits.dtype, torch.float32))
    counted = (weights > 0).to(logits.dtype)
    number = counted.sum().clamp(min=1)
    mean = (logits.softmax(-1) * counted[:, None]).sum(0) / number
    predicted = nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).to(logits.dtype)
    shares = (predicted * counted[:, None]).sum(0) / number
    wanted = _normalised(class_mean * _inverse(class_share)).to(logits.dtype)
    loss = (wanted * (_normalised(mean * _inverse(shares)) + 1e-12).log()).sum()
    return torch.where(counted.any(), loss, 0.0)


def _inverse(values):
    return torch.where(values > 0, 1 / values, 0.0)


def _normalised(values):
    total = values.sum()
    return values / torch.where(total > 0, total, 1.0)
