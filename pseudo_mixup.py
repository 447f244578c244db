"""Probabilistic pseudo mixup: unlabelled images are mixed with each other by how sure their pseudo labels are.

Source: Cai et al., "Semi-supervised Vision Transformers at Scale" (Semi-ViT), NeurIPS 2022.
"""

import torch
from torch import Tensor


def draw(p: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw how each of U images is mixed, on the device of p and without synchronising with it.

    The partners are a random permutation. An image is mixed by cutmix with probability one half, else by mixup. The box
    of cutmix has the share 1 - lam of the image's area, its centre is anywhere, and it is cut off at the border.

    Args:
        p: probabilities of the pseudo labels, (U,), above 0.
        height, width: of the images in pixels.
    Returns (partner (U,) int64, cutmix (U,) bool, boxes (U, 4) int64: top, bottom, left and right, 0 for mixup).
    """
    partner, device = torch.rand(len(p), device=p.device).argsort(), p.device
    cutmix = torch.rand(len(p), device=device) < 0.5
    side = (1 - p / (p + p[partner])).sqrt()
    edges = []
    for size in (height, width):
        half = (size * side).long() // 2
        centre = torch.randint(size, p.shape, device=device)
        edges += [(centre - half).clamp(0, size), (centre + half).clamp(0, size)]
    return partner, cutmix, torch.stack(edges, dim=1) * cutmix[:, None]


def mix(
    images: Tensor,
    targets: Tensor,
    p: Tensor,
    partner: Tensor,
    cutmix: Tensor,
    boxes: Tensor,
    *,
    num_classes: int,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each of U images with its partner: lam = p / (p + p of the partner).

    By mixup the pixels are lam * its own + (1 - lam) * the partner's. By cutmix the partner's pixels fill the box, and
    lam becomes the share of the area that is left. The target is mixed by lam as well, after both one-hot targets were
    smoothed: an image whose class is sure carries one whose class is not.

    Args:
        images: (U, 3, H, W).
        targets: pseudo labels (U,) int64.
        p: their probabilities (U,).
        partner, cutmix, boxes: as `draw` returns them.
        num_classes: C.
        smoothing: 0..1, the share of a target that is spread over all classes.
    Returns (images (U, 3, H, W), targets (U, C), the larger p of each pair (U,)), new tensors.
    """
    height, width = images.shape[-2:]
    top, bottom, left, right = boxes.unbind(1)
    rows, columns = torch.arange(height, device=p.device), torch.arange(width, device=p.device)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (U, 1, H, W)

    lam = p / (p + p[partner])
    area = ((bottom - top) * (right - left)).to(p.dtype)
    lam = torch.where(cutmix, 1 - area / (height * width), lam)
    # The partner's share of every pixel.
    share = torch.where(cutmix[:, None, None, None], inside.to(p.dtype), (1 - lam)[:, None, None, None])
    share = share.to(images.dtype)
    mixed = images * (1 - share) + images[partner] * share

    hot = torch.nn.functional.one_hot(targets, num_classes).to(p.dtype)
    smooth = hot * (1 - smoothing) + smoothing / num_classes
    mixed_targets = lam[:, None] * smooth + (1 - lam)[:, None] * smooth[partner]
    return mixed, mixed_targets, torch.maximum(p, p[partner])
