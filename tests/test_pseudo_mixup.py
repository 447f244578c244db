"""Probabilistic pseudo mixup: the reference, a slow version by loops, and what is drawn."""

import math

import numpy as np
import pytest
import torch

import pseudo_mixup
from tests.trees import ROOT

REFERENCE = np.load(ROOT / "tests/data/pseudo_mixup.npz")
CASES = ("mixup", "cutmix", "both")
ARGUMENTS = ("images", "targets", "probabilities", "partner", "cutmix", "box_top_bottom_left_right")


@pytest.mark.parametrize("case", CASES)
def test_the_reference(case):
    given = [torch.from_numpy(REFERENCE[f"{case}|{name}"]) for name in ARGUMENTS]
    expected = [torch.from_numpy(REFERENCE[f"{case}|mixed_{name}"]) for name in ("images", "targets", "probabilities")]
    before = given[0].clone()
    ours = pseudo_mixup.mix(*given, num_classes=expected[1].shape[1], smoothing=0.1)
    for one, other in zip(ours, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    assert torch.equal(given[0], before)


def slow(images, targets, p, partner, cutmix, boxes, classes, smoothing):
    mixed, soft, larger = images.clone(), torch.zeros(len(p), classes, dtype=p.dtype), p.clone()
    for i, j in enumerate(partner.tolist()):
        lam = (p[i] / (p[i] + p[j])).item()
        if cutmix[i]:
            top, bottom, left, right = boxes[i].tolist()
            for y in range(top, bottom):
                for x in range(left, right):
                    mixed[i, :, y, x] = images[j, :, y, x]
            lam = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        else:
            mixed[i] = lam * images[i] + (1 - lam) * images[j]
        for c in range(classes):
            one, other = (smoothing / classes + (1 - smoothing) * (targets[k].item() == c) for k in (i, j))
            soft[i, c] = lam * one + (1 - lam) * other
        larger[i] = max(p[i], p[j])
    return mixed, soft, larger


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_is_mixed_as_by_loops(seed):
    torch.manual_seed(seed)
    images, targets = torch.randn(9, 3, 11, 14, dtype=torch.float64), torch.randint(5, (9,))
    p = torch.rand(9, dtype=torch.float64) * 0.9 + 0.1
    drawn = pseudo_mixup.draw(p, 11, 14)
    ours = pseudo_mixup.mix(images, targets, p, *drawn, num_classes=5, smoothing=0.2)
    for one, other in zip(ours, slow(images, targets, p, *drawn, 5, 0.2), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert torch.allclose(ours[1].sum(1), torch.ones(9, dtype=torch.float64))


def test_the_draws_are_permutations_halves_and_boxes_of_the_right_size():
    torch.manual_seed(0)
    p = torch.full((4000,), 0.6)
    p[::2] = 0.2
    partner, cutmix, boxes = pseudo_mixup.draw(p, 32, 48)
    assert sorted(partner.tolist()) == list(range(4000))
    assert abs(cutmix.float().mean() - 0.5) < 0.03
    assert not boxes[~cutmix].any()
    top, bottom, left, right = boxes[cutmix].unbind(1)
    assert ((0 <= top) & (top <= bottom) & (bottom <= 32) & (0 <= left) & (left <= right) & (right <= 48)).all()
    lam = (p / (p + p[partner]))[cutmix]
    whole = (top > 0) & (bottom < 32) & (left > 0) & (right < 48)  # not cut off
    for share in lam.unique():
        side = math.sqrt(1 - share.item())
        rows = whole & (lam == share)
        assert ((bottom - top)[rows] == 2 * (int(32 * side) // 2)).all()
        assert ((right - left)[rows] == 2 * (int(48 * side) // 2)).all()
    # The centres are everywhere: boxes touch every border.
    assert (top == 0).any() and (bottom == 32).any() and (left == 0).any() and (right == 48).any()


def test_a_seed_decides_the_draws():
    p = torch.rand(20) + 0.1
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(pseudo_mixup.draw(p, 16, 16))
    assert all(map(torch.equal, drawn[0], drawn[1])) and not torch.equal(drawn[0][0], drawn[2][0])


def test_half_precision_images_stay_what_they_are():
    torch.manual_seed(0)
    images, p = torch.randn(6, 3, 8, 8, dtype=torch.bfloat16), torch.rand(6) + 0.1
    mixed, targets, larger = pseudo_mixup.mix(
        images, torch.randint(3, (6,)), p, *pseudo_mixup.draw(p, 8, 8), num_classes=3, smoothing=0.1
    )
    assert (mixed.dtype, targets.dtype, larger.dtype) == (torch.bfloat16, torch.float32, torch.float32)
