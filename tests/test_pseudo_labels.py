"""Pseudo-labels: the published numbers, an obvious slow version of every policy, what the truth may do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.published_formulation import arbitrate
from pseudo_labels import POLICIES, diagnostics, pseudo_label, select_targets

DATA = Path(__file__).parent / "data"
NAMES = [
    "cnn",
    "transformer",
    "fuse",
    "softmax_fuse",
    "Vote_equal",
    "Vote_cnnBias",
    "Vote_larger",
    "Vote_larger2",
    "Vote_equal2",
    "weight_v1",
    "weight_v2",
    "weight_v3",
    "weight_v4",
    "weight_v5",
    "weight_v6",
]
REFERENCE = json.loads((DATA / "losses.json").read_text())
CASES = {name: case for name, case in REFERENCE.items() if "targets" in case}  # not the supervised phase
C = 10


def test_the_names_are_the_published_ones_in_order():
    flags = {flag["dest"]: flag for flag in json.loads((DATA / "flags.json").read_text())["semi_main"]}
    assert list(POLICIES) == NAMES == flags["pseudo_type"]["choices"]


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    arrays = np.load(DATA / "losses.npz")
    conv, trans = (torch.from_numpy(arrays[f"input|weak_{stream}"]) for stream in ("conv", "trans"))
    settings = CASES[name]["settings"]
    targets, weights = select_targets(
        conv, trans, settings["pseudo_type"], settings["threshold"], settings.get("temperature", 1.0)
    )
    assert targets.dtype == torch.int64 and weights.dtype == torch.float64
    assert targets.tolist() == CASES[name]["targets"]
    assert weights.tolist() == CASES[name]["weights"]


def test_every_policy_has_its_reference():
    assert {case["settings"]["pseudo_type"] for case in CASES.values()} == set(NAMES)
    assert len(CASES) >= 30


def slow_image(policy, conv_logits, trans_logits, threshold, temperature):
    """One image, (C,) logits a stream: the table of the specification, row by row."""

    def read(probabilities):
        values = probabilities.tolist()
        return values.index(max(values)), max(values)

    def soften(logits):
        return torch.softmax(logits / temperature, dim=0)

    # A float32 probability is compared with the threshold in float32, as torch does.
    threshold = torch.tensor(threshold, dtype=conv_logits.dtype).item()
    c_class, c_prob = read(soften(conv_logits))
    t_class, t_prob = read(soften(trans_logits))

    if policy in ("cnn", "transformer", "fuse", "softmax_fuse"):
        if policy == "cnn":
            target, prob = c_class, c_prob
        elif policy == "transformer":
            target, prob = t_class, t_prob
        elif policy == "fuse":
            target, prob = read(soften((conv_logits + trans_logits) / 2))
        else:
            target, prob = read((soften(conv_logits) + soften(trans_logits)) / 2)
        return target, 1.0 if prob >= threshold else 0.0

    return arbitrate(policy, (c_class, c_prob, c_prob >= threshold), (t_class, t_prob, t_prob >= threshold))


def edges():
    """(conv, trans), (n, C) float64: ties between and within streams; both, one, none confident; 0.5, 1 met."""

    def row(*peaks, floor=-1000.0):
        logits = torch.full((C,), floor, dtype=torch.float64)
        for cls, value in peaks:
            logits[cls] = value
        return logits

    pairs = [
        (row((3, 2.0), (5, 0.0)), row((5, 2.0), (3, 0.0))),  # equal probability 0.88, different classes
        (row((3, 2.0), (5, 0.0)), row((3, 2.0), (5, 0.0))),  # equal probability, same class
        (row((7, 1.0), (2, 1.0)), row((4, 1.0), (1, 1.0))),  # ties within each stream: exactly 0.5
        (row((7, 1.0), (2, 1.0)), row((2, 9.0), (1, 1.0))),
        (row((8, 5.0), (9, 1.0)), row((1, 1.0), (0, 1.0))),
        (row((6, 0.0)), row((6, 0.0))),  # exactly 1.0, agreeing
        (row((6, 0.0)), row((2, 0.0))),  # exactly 1.0, differing
        (row((6, 4.0), (1, 0.0)), row((2, 3.0), (1, 0.0))),  # differing, CNN more probable
        (row((6, 3.0), (1, 0.0)), row((2, 4.0), (1, 0.0))),  # differing, transformer more probable
        (row(floor=0.0), row(floor=0.0)),  # all classes equal: 0.1, the first wins
        (row((9, 6.0), floor=0.0), row(floor=0.0)),  # only the CNN
        (row(floor=0.0), row((9, 6.0), floor=0.0)),  # only the transformer
    ]
    return torch.stack([conv for conv, _ in pairs]), torch.stack([trans for _, trans in pairs])


def scattered(seed=0, n=300):
    """(conv, trans), (n, C) float64: every mixture of confident, unconfident, agreeing and differing occurs."""
    rng = torch.Generator().manual_seed(seed)
    conv, trans, common = (torch.randn(n, C, generator=rng, dtype=torch.float64) for _ in range(3))
    scale = 4 * torch.rand(n, 1, generator=rng, dtype=torch.float64)
    return scale * (conv + common), scale * (trans + common)


def test_the_edges_are_what_they_claim():
    conv, trans = (logits.softmax(-1).max(-1) for logits in edges())
    assert conv.values[0] == trans.values[0] and conv.indices[0] != trans.indices[0]
    assert conv.values[2] == trans.values[2] == 0.5
    assert conv.values[6] == trans.values[6] == 1.0
    assert conv.indices[2] == 2 and trans.indices[2] == 1


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_equals_slow_version(policy, dtype):
    for conv, trans in (edges(), scattered()):
        conv, trans = conv.to(dtype), trans.to(dtype)
        # 0 makes all confident, 1.01 none, 1 and 0.5 are met exactly by edges, the last by one random image.
        met = conv.softmax(-1).max(-1).values[0].item()
        for threshold in (0.0, 0.3, 0.5, 0.7, 1.0, 1.01, met):
            for temperature in (0.5, 1.0, 2.0):
                targets, weights = select_targets(conv, trans, policy, threshold, temperature)
                expected = [slow_image(policy, c, t, threshold, temperature) for c, t in zip(conv, trans, strict=True)]
                assert targets.dtype == torch.int64 and weights.dtype == dtype
                assert targets.tolist() == [target for target, _ in expected], (threshold, temperature)
                assert weights.tolist() == [weight for _, weight in expected], (threshold, temperature)


def test_scattered_reaches_every_weight():
    reached = {policy: set(select_targets(*scattered(), policy, 0.7, 1.0)[1].tolist()) for policy in NAMES}
    halves = {policy for policy, weights in reached.items() if 0.5 in weights}
    assert halves == {name for name in NAMES if name.startswith("weight")}
    assert all({0.0, 1.0} <= weights for weights in reached.values())


@pytest.mark.parametrize("policy", NAMES)
def test_bounds_of_the_threshold(policy):
    conv, trans = scattered()
    assert select_targets(conv, trans, policy, 1.01, 1.0)[1].sum() == 0
    targets, weights = select_targets(conv, conv, policy, 0.0, 1.0)
    assert (weights == 1).all() and targets.equal(conv.argmax(-1))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    conv, trans = (logits.to(half) for logits in scattered())
    targets, weights = select_targets(conv, trans, "weight_v2", 0.7, 0.7)
    expected = select_targets(conv.float(), trans.float(), "weight_v2", 0.7, 0.7)
    assert weights.dtype == torch.float32
    assert targets.equal(expected[0]) and weights.equal(expected[1])


def test_unknown_policy_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="Unknown pseudo-label policy 'vote'; known: cnn, trans.*_v6"):
        select_targets(*scattered(), "vote", 0.7, 1.0)


def test_two_streams_are_select_targets():
    streams = scattered()
    for listed, direct in zip(
        pseudo_label(list(streams), "fuse", 0.6, 2.0), select_targets(*streams, "fuse", 0.6, 2.0), strict=True
    ):
        assert listed.equal(direct)


def test_a_single_stream_labels_for_itself():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    # softmax at T = 2: 1 / (1 + e^-1) = 0.731, 1 / (1 + e^-0.5) = 0.622, 0.5
    targets, weights = pseudo_label([logits], "transformer", 0.63, 2.0)
    assert targets.tolist() == [1, 0, 0] and weights.tolist() == [1.0, 0.0, 0.0]
    targets, weights = pseudo_label([logits.half()], "no such policy, and none needed", 0.5, 2.0)
    assert weights.tolist() == [1.0, 1.0, 1.0] and weights.dtype == torch.float32


@pytest.mark.parametrize("streams", [0, 3])
def test_other_numbers_of_streams_are_refused(streams):
    with pytest.raises(ValueError, match=f"one or two streams, not {streams}"):
        pseudo_label([torch.zeros(2, C)] * streams, "cnn", 0.7, 1.0)


def test_diagnostics_against_hand_counts():
    targets = torch.tensor([0, 1, 2, 3, 1])
    weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0])
    truth = torch.tensor([0, 2, 2, 3, -1])
    conv = torch.eye(5)[[0, 1, 2, 3, 1]]
    trans = torch.eye(5)[[0, 1, 2, 4, 0]]
    numbers = diagnostics(targets, weights, truth, [conv, trans])
    assert {name: value.shape + n.shape for name, (value, n) in numbers.items()} == dict.fromkeys(numbers, ())
    plain = {name: (value.item(), n.item()) for name, (value, n) in numbers.items()}
    assert plain == {
        "mask_rate": (pytest.approx(4 / 5), 5),
        "pseudo_acc": (pytest.approx(2 / 3), 3),
        "pseudo_recall": (pytest.approx(2 / 4), 4),
        "agreement": (pytest.approx(3 / 5), 5),
    }
    assert list(diagnostics(targets, weights, truth, [conv])) == ["mask_rate", "pseudo_acc", "pseudo_recall"]


def test_unknown_truth_counts_for_nothing():
    # Target 0 of a weightless image and truth -1 must neither be a hit nor a miss.
    targets, weights = select_targets(*scattered(), "Vote_equal", 0.7, 1.0)
    value, n = diagnostics(targets, weights, torch.full_like(targets, -1), list(scattered()))["pseudo_acc"]
    assert (value.item(), n.item()) == (0.0, 0)
    value, n = diagnostics(targets, torch.zeros_like(weights), targets, list(scattered()))["pseudo_acc"]
    assert (value.item(), n.item()) == (0.0, 0)


def test_a_host_synchronisation_would_raise_here():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(3).sum().item()


@pytest.mark.parametrize("policy", NAMES)
def test_no_host_synchronisation(policy):
    with FakeTensorMode():
        streams = [torch.randn(7, C), torch.randn(7, C)]
        for logits in (streams, streams[:1]):
            targets, weights = pseudo_label(logits, policy, 0.7, 1.0)
            assert targets.shape == weights.shape == (7,)
            for value, n in diagnostics(targets, weights, torch.zeros(7, dtype=torch.int64), logits).values():
                assert value.shape == n.shape == ()
