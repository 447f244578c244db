"""The objective: the published numbers and gradients, slow loops, and corners where a root or norm is 0."""

import json
import math
from argparse import Namespace
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import Recipe, consistency, infonce, objective, smoothed_cross_entropy, triplet
from pseudo_labels import pseudo_label
from tests.trees import parse

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "losses.json").read_text())
FLAGS = json.loads((DATA / "flags.json").read_text())["semi_main"]
DEFAULTS = {flag["dest"]: flag["default"] for flag in FLAGS}
STREAMS = ("conv", "trans")
LABELLED = 4


def close(value, expected):
    """To 1e-9 absolute; floats, or 0-d tensors with or without a graph."""
    value, expected = (x.item() if torch.is_tensor(x) else x for x in (value, expected))
    return abs(value - expected) < 1e-9


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The published numbers


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case, arrays = CASES[name], np.load(DATA / "losses.npz")

    def tensors(what):
        return [torch.from_numpy(arrays[f"input|{what}_{stream}"]) for stream in STREAMS]

    settings = {"semi_start_epoch": 30, "epoch": 30} | case["settings"]
    epoch = settings.pop("epoch")
    recipe = Recipe.from_args(Namespace(**DEFAULTS | settings))
    logits = [tensor.requires_grad_() for tensor in tensors("train")]
    feats = [tensor.requires_grad_() for tensor in tensors("feat_train")]

    strong, targets, weights, features = None, None, None, None
    if recipe.is_semi(epoch):
        strong = [tensor[LABELLED:] for tensor in logits]
        targets, weights = pseudo_label(tensors("weak"), recipe.policy, recipe.threshold, recipe.temperature)
    if recipe.is_consistent(epoch):
        features = tensors("feat_weak"), [tensor[LABELLED:] for tensor in feats]
    labels = torch.from_numpy(arrays["input|targets"])
    loss, parts = objective(
        [tensor[:LABELLED] for tensor in logits], labels, strong, targets, weights, recipe, features
    )
    loss.backward()

    meters = {meter: value for meter, value in case["meters"].items() if meter != "lr"}
    assert set(parts) == set(meters)
    for meter, value in meters.items():
        assert close(parts[meter], value), meter
    for stream, tensor in zip(STREAMS, logits, strict=True):
        assert close(tensor.grad.norm(), case[f"total_grad_norm_{stream}"])
    for stream, tensor in zip(STREAMS, feats, strict=True):
        assert (f"feat_grad_norm_{stream}" in case) == (tensor.grad is not None)
        if tensor.grad is not None:
            assert close(tensor.grad.norm(), case[f"feat_grad_norm_{stream}"])


def test_the_reference_covers_every_phase_and_consistency():
    assert len(CASES) == 43 and {"supervised_warmup", "cnn|masks", "cnn|unlabel_smooth"} <= set(CASES)
    assert sum("loss_consistency" in case["meters"] for case in CASES.values()) == 9


# Recipe


def test_recipe_defaults_are_the_flags_defaults():
    assert Recipe.from_args(Namespace(**DEFAULTS)) == Recipe()
    flags = DEFAULTS | {
        name: getattr(parse(), name) for name in ("pseudo_mixup", "fairness_lambda")
    }  # of later methods
    assert {
        flags["pseudo_type" if name == "policy" else name] == value for name, value in asdict(Recipe()).items()
    } == {True}


def test_recipe_takes_its_policy_from_pseudo_type_and_is_frozen():
    recipe = Recipe.from_args(Namespace(**DEFAULTS | {"pseudo_type": "fuse", "policy": "no", "margin": 0.25}))
    assert recipe == Recipe(policy="fuse", margin=0.25)
    with pytest.raises(FrozenInstanceError):
        recipe.margin = 1.0
    with pytest.raises(AttributeError):
        Recipe.from_args(Namespace())


@pytest.mark.parametrize(
    ("settings", "semi", "consistent"),
    [
        ({}, [0, 1, 2, 3, 4], []),
        ({"semi_start_epoch": 2}, [2, 3, 4], []),
        ({"semi_start_epoch": 2, "supervise_only": True, "dual_consistency": True}, [], []),
        ({"semi_start_epoch": 2, "dual_consistency": True}, [2, 3, 4], [2, 3, 4]),
        ({"semi_start_epoch": 2, "dual_consistency": True, "consistency_start_epoch": 3}, [2, 3, 4], [3, 4]),
        ({"semi_start_epoch": 2, "dual_consistency": True, "consistency_start_epoch": 1}, [2, 3, 4], [2, 3, 4]),
    ],
)
def test_phases(settings, semi, consistent):
    recipe = Recipe(**settings)
    assert [epoch for epoch in range(5) if recipe.is_semi(epoch)] == semi
    assert [epoch for epoch in range(5) if recipe.is_consistent(epoch)] == consistent


# Cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_cross_entropy_against_a_slow_loop(smoothing):
    logits, target = noise(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = []
    for row, true_class in zip(logits.tolist(), target.tolist(), strict=True):
        log_total = math.log(sum(math.exp(value) for value in row))
        expected.append(
            -sum(
                ((1 - smoothing) * (cls == true_class) + smoothing / 5) * (value - log_total)
                for cls, value in enumerate(row)
            )
        )
    for value, slow in zip(smoothed_cross_entropy(logits, target, smoothing, "none"), expected, strict=True):
        assert close(value, slow)
    assert close(smoothed_cross_entropy(logits, target, smoothing), sum(expected) / 6)


def test_soft_targets_are_not_smoothed_again():
    logits = noise(6, 5)
    soft = noise(6, 5, seed=1).softmax(-1)
    expected = -(soft * logits.log_softmax(-1)).sum(-1)
    assert close(smoothed_cross_entropy(logits, soft, 0.1), expected.mean())
    assert torch.allclose(smoothed_cross_entropy(logits, soft, 0.1, "none"), expected, rtol=0, atol=1e-12)
    # timm's mixup hands out float32 targets whatever the logits are.
    assert smoothed_cross_entropy(logits.half(), soft.float(), 0.1).dtype == torch.float32


def test_soft_targets_reach_the_objective():
    logits, soft = [noise(6, 5), noise(6, 5, seed=2)], noise(6, 5, seed=1).softmax(-1)
    _, parts = objective(logits, soft, None, None, None, Recipe(smoothing=0.3))
    for stream, tensor in enumerate(logits):
        assert close(parts[f"loss_{stream}"], -(soft * tensor.log_softmax(-1)).sum(-1).mean() / 2)


# Objective


def step(streams, **settings):
    """(loss, parts, labelled cross-entropies, mean weighted cross-entropies), of plain, whole losses."""
    labelled = [noise(4, 5, seed=stream) for stream in range(streams)]
    strong = [noise(8, 5, seed=10 + stream) for stream in range(streams)]
    labels, targets = torch.tensor([0, 1, 2, 3]), torch.arange(8) % 5
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    smoothing = settings.get("smoothing", 0.1)
    smoothing_u = smoothing if settings.get("unlabel_smooth") else 0.0
    whole = [smoothed_cross_entropy(logits, labels, smoothing).item() for logits in labelled]
    whole_u = [
        (weights * smoothed_cross_entropy(logits, targets, smoothing_u, "none")).sum().item() / 8 for logits in strong
    ]
    return *objective(labelled, labels, strong, targets, weights, Recipe(**settings)), whole, whole_u


RATIOS = {
    "mask_cnn_ratio": 0.3,
    "mask_transformer_ratio": 0.8,
    "mask_cnn_ratio_u": 0.5,
    "mask_transformer_ratio_u": 0.25,
}


@pytest.mark.parametrize("unlabel_smooth", [False, True])
def test_a_single_stream_is_not_halved_and_has_no_ratios(unlabel_smooth):
    loss, parts, (whole,), (whole_u,) = step(1, semi_lambda=4.0, unlabel_smooth=unlabel_smooth, **RATIOS)
    assert list(parts) == ["loss_u", "loss"]
    assert close(parts["loss_u"], whole_u)
    assert close(loss, whole + 4 * whole_u) and close(parts["loss"], loss)


def test_two_streams_are_halved_and_weighted():
    loss, parts, (conv, trans), (conv_u, trans_u) = step(2, semi_lambda=4.0, **RATIOS)
    assert list(parts) == ["loss_0", "loss_1", "loss_0_u", "loss_1_u", "loss"]
    for name, expected in zip(parts, (conv / 2, trans / 2, conv_u / 2, trans_u / 2), strict=False):
        assert close(parts[name], expected), name
    assert close(loss, 0.3 * conv / 2 + 0.8 * trans / 2 + 4 * (0.5 * conv_u / 2 + 0.25 * trans_u / 2))


def test_parts_carry_no_graph_and_no_confident_image_no_gradient():
    logits = noise(4, 5).requires_grad_()
    strong = noise(6, 5).requires_grad_()
    loss, parts = objective(
        [logits],
        torch.zeros(4, dtype=torch.int64),
        [strong],
        torch.zeros(6, dtype=torch.int64),
        torch.zeros(6),
        Recipe(),
    )
    loss.backward()
    assert not any(part.requires_grad for part in parts.values())
    assert strong.grad.abs().max() == 0 and logits.grad.abs().max() > 0 and parts["loss_u"] == 0


def test_the_supervised_phase_of_one_stream_has_one_part():
    loss, parts = objective([noise(4, 5)], torch.arange(4), None, None, None, Recipe())
    assert list(parts) == ["loss"] and close(loss, smoothed_cross_entropy(noise(4, 5), torch.arange(4), 0.1))


def test_other_numbers_of_streams_are_refused():
    with pytest.raises(ValueError, match="one or two streams, not 3"):
        objective([noise(4, 5)] * 3, torch.arange(4), None, None, None, Recipe())
    with pytest.raises(ValueError, match="zip"):
        objective([noise(4, 5)] * 2, torch.arange(4), [noise(4, 5)], torch.arange(4), torch.ones(4), Recipe())


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("kind", ["triplet", "infonce"])
@pytest.mark.parametrize("distance", ["cos", "l2"])
def test_no_host_synchronisation(streams, kind, distance):
    recipe = Recipe(consistency_type=kind, dis_type=distance, anchor_type="both", unlabel_smooth=True)
    with FakeTensorMode():
        labelled, strong, weak, feats = (
            [torch.randn(6, 5, requires_grad=True) for _ in range(streams)] for _ in range(4)
        )
        loss, parts = objective(
            labelled,
            torch.zeros(6, dtype=torch.int64),
            strong,
            torch.zeros(6, dtype=torch.int64),
            torch.ones(6),
            recipe,
            (weak, feats),
        )
        loss.backward()
        assert loss.shape == () and all(part.shape == () for part in parts.values())
        assert all(tensor.grad is not None for tensor in labelled + strong + feats)


# Consistency


def slow_cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_triplet(anchor, other, margin, distance):
    anchor, other = anchor.tolist(), other.tolist()
    total = 0.0
    for i, a in enumerate(anchor):
        for j, b in enumerate(other):
            if i != j and distance == "cos":
                total += max(0.0, margin + slow_cosine(a, b) - slow_cosine(a, other[i]))
            elif i != j:
                total += max(0.0, margin - math.dist(a, b) + math.dist(a, other[i]))
    return total / len(anchor) ** 2


def slow_infonce(anchor, other, temperature):
    total = 0.0
    for i, a in enumerate(anchor.tolist()):
        row = [slow_cosine(a, b) / temperature for b in other.tolist()]
        total += math.log(sum(math.exp(value) for value in row)) - row[i]
    return total / len(anchor)


@pytest.mark.parametrize("distance", ["cos", "l2"])
@pytest.mark.parametrize("margin", [0.0, 0.5, 5.0])
def test_triplet_against_a_slow_loop(distance, margin):
    anchor, other = noise(7, 3), noise(7, 3, seed=1)
    assert close(triplet(anchor, other, margin, distance), slow_triplet(anchor, other, margin, distance))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_infonce_against_a_slow_loop(temperature):
    anchor, other = noise(7, 3), noise(7, 3, seed=1)
    assert close(infonce(anchor, other, temperature), slow_infonce(anchor, other, temperature))


@pytest.mark.parametrize("kind", ["triplet", "infonce"])
def test_consistency_sums_streams_and_anchors_and_spares_the_weak(kind):
    weak = [noise(5, 3, seed=1).requires_grad_(), noise(5, 4, seed=2).requires_grad_()]
    strong = [noise(5, 3, seed=3).requires_grad_(), noise(5, 4, seed=4).requires_grad_()]
    recipe = Recipe(consistency_type=kind, dis_type="l2", margin=0.7, infonce_T=0.4)

    def slow(anchors, others):
        if kind == "infonce":
            return sum(slow_infonce(a, b, 0.4) for a, b in zip(anchors, others, strict=True))
        return sum(slow_triplet(a, b, 0.7, "l2") for a, b in zip(anchors, others, strict=True))

    by_weak, by_strong = slow(weak, strong), slow(strong, weak)
    assert abs(by_weak - by_strong) > 1e-3
    for anchor, expected in (("weak", by_weak), ("strong", by_strong), ("both", by_weak + by_strong)):
        loss = consistency(weak, strong, replace(recipe, anchor_type=anchor))
        assert close(loss, expected)
        loss.backward()
    assert all(tensor.grad is None for tensor in weak)
    assert all(tensor.grad.norm() > 0 for tensor in strong)


LOSSES = {
    "triplet cos": lambda anchor, other: triplet(anchor, other, 0.5, "cos"),
    "triplet l2": lambda anchor, other: triplet(anchor, other, 0.5, "l2"),
    "infonce": lambda anchor, other: infonce(anchor, other, 0.2),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_at_zero_norm_and_zero_distance(loss, dtype):
    some = noise(5, 4, dtype=dtype)
    dead = some.clone()
    dead[1] = 0
    for anchor, other in (
        (torch.zeros_like(some), some),
        (torch.zeros_like(some), torch.zeros_like(some)),
        (some, some.clone()),
        (dead, dead.clone()),
    ):
        anchor, other = anchor.clone().requires_grad_(), other.clone().requires_grad_()
        value = loss(anchor, other)
        value.backward()
        assert value.isfinite() and anchor.grad.isfinite().all() and other.grad.isfinite().all()


def test_zero_distances_have_their_exact_values():
    same = torch.full((4, 3), 0.1, dtype=torch.float32, requires_grad=True)
    value = triplet(same, same.detach(), 0.5, "l2")
    value.backward()
    # Twelve of sixteen pairs leave the whole margin.
    assert value.item() == 0.5 * 12 / 16 and same.grad.abs().max() == 0
    assert infonce(torch.zeros(4, 3), torch.zeros(4, 3), 0.2).item() == pytest.approx(math.log(4))


def test_l2_of_close_rows_far_from_the_origin_is_not_rounding():
    # Rows 0.01 apart at norm 170: the float32 rounding of |a|^2 + |b|^2 - 2ab exceeds the squared distance.
    anchor, other = (100 + 0.01 * noise(30, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    assert triplet(anchor, other, 0.0, "l2").item() == pytest.approx(slow_triplet(anchor, other, 0.0, "l2"))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_and_autocast_are_computed_in_float32(loss):
    anchor, other = noise(9, 6, dtype=torch.bfloat16), noise(9, 6, seed=1, dtype=torch.bfloat16)
    expected = loss(anchor.float(), other.float())
    assert loss(anchor, other).dtype == torch.float32 and loss(anchor, other).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(anchor.float(), other.float()).equal(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency_type": "mse"}, "Unknown consistency type 'mse'; known: triplet, infonce"),
        ({"anchor_type": "none"}, "Unknown anchor type 'none'; known: weak, strong, both"),
        ({"dis_type": "l1"}, "Unknown distance 'l1'; known: cos, l2"),
    ],
)
def test_unknown_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        consistency([noise(3, 2)], [noise(3, 2)], Recipe(**settings))
