"""Confidence rules, alignment and fairness: the reference numbers, checks by hand, slow versions, two ranks, resume."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import confidence
from tests.equality import same
from tests.trees import ROOT

DATA = ROOT / "tests/data"
INPUT = {key: torch.from_numpy(value) for key, value in np.load(DATA / "confidence.npz").items()}
EXPECTED = np.load(DATA / "confidence_expected.npz")
STEPS = len(INPUT["weak"])


def inputs(step):
    """(q, index, labelled q, strong logits) of a step."""
    return (
        INPUT["weak"][step].softmax(-1),
        INPUT["index"][step],
        INPUT["labelled"][step].softmax(-1),
        INPUT["strong"][step],
    )


def expected(key, *figures):
    """The figures of a case by step."""
    return [[torch.from_numpy(EXPECTED[f"{key}|{figure}"])[step] for figure in figures] for step in range(STEPS)]


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def exact_weights(ours, theirs):
    hard = (theirs == 0) | (theirs == 1)
    return close(ours, theirs) and torch.equal(ours[hard], theirs[hard])


@pytest.mark.parametrize("threshold", [0.7, 0.95])
def test_flex_is_the_reference(threshold):
    rule = confidence.build("flex", num_classes=10, threshold=threshold, n_images=48)
    for step, (weights, status) in enumerate(
        expected(f"flex|threshold={threshold}|warmup=True", "weights", "class_status")
    ):
        q, index, _, _ = inputs(step)
        assert torch.equal(rule(q, index=index), weights), step
        assert close(rule.class_status, status)


@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_free_and_its_fairness_are_the_reference(momentum):
    rule = confidence.build("free", num_classes=10, momentum=momentum)
    figures = ("weights", "global", "class_mean", "class_share", "fairness")
    for step, (weights, level, mean, share, loss) in enumerate(
        expected(f"free|momentum={momentum}|quantile=False|clip=False", *figures)
    ):
        q, _, _, strong = inputs(step)
        ours = rule(q)
        assert torch.equal(ours, weights), step
        assert close(rule.global_threshold, level) and close(rule.class_mean, mean) and close(rule.class_share, share)
        assert close(confidence.fairness(strong, ours, rule.class_mean, rule.class_share), loss), step


@pytest.mark.parametrize("momentum", [0.9, 0.999])
@pytest.mark.parametrize("aligned", [False, True])
def test_soft_is_the_reference(momentum, aligned):
    rule = confidence.build("soft", num_classes=10, momentum=momentum)
    align = confidence.Alignment("uniform", num_classes=10, momentum=momentum)
    for step, (weights, mean, variance) in enumerate(
        expected(f"soft|momentum={momentum}|align={aligned}", "weights", "mean", "variance")
    ):
        q = inputs(step)[0]
        assert exact_weights(rule(align(q) if aligned else q), weights), step
        assert close(rule.mean, mean) and close(rule.variance, variance)


@pytest.mark.parametrize("threshold", [0.7, 0.95])
def test_ada_is_the_reference(threshold):
    rule = confidence.build("ada", num_classes=10, threshold=threshold)
    for step, (weights,) in enumerate(expected(f"ada|threshold={threshold}", "weights")):
        q, _, labelled, _ = inputs(step)
        assert torch.equal(rule(q, labelled=labelled), weights), step


@pytest.mark.parametrize("momentum", [0.9, 0.999])
@pytest.mark.parametrize("target, name", [("uniform", "uniform"), ("labelled", "model"), ("shares", "gt")])
def test_alignment_is_the_reference(momentum, target, name):
    shares = torch.arange(1, 11) / 55 if target == "shares" else None
    if shares is not None:
        shares = torch.arange(1, 11, dtype=torch.float64) / 55
    align = confidence.Alignment(target, num_classes=10, momentum=momentum, shares=shares)
    for step, (aligned, mean, goal) in enumerate(
        expected(f"align|momentum={momentum}|to={name}", "aligned", "model_mean", "target")
    ):
        q, _, labelled, _ = inputs(step)
        assert close(align(q, labelled=labelled), aligned), step
        assert close(align.model_mean, mean) and close(align.target, goal)


# ------------------------------------------------------------------------------- by hand


def test_alignment_by_hand():
    align = confidence.Alignment("uniform", num_classes=3)
    q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    ours = align(q)
    expected_rows = torch.tensor([[0.443, 0.304, 0.253], [0.248, 0.356, 0.396]], dtype=torch.float64)
    assert torch.allclose(align.model_mean, torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64))
    assert torch.allclose(ours[0], expected_rows[0], atol=5e-4)
    assert ours.argmax(1).tolist() == [0, 2]


def test_fairness_by_hand():
    strong = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
    mean, share = (torch.tensor(x, dtype=torch.float64) for x in ([0.36, 0.325, 0.315], [0.4, 0.3, 0.3]))
    loss = confidence.fairness(strong, torch.ones(2, dtype=torch.float64), mean, share)
    assert loss.item() == pytest.approx(-10.0151, abs=5e-5)
    assert confidence.fairness(strong, torch.zeros(2), mean, share).item() == 0


def test_the_gradient_of_fairness_flows_through_the_mean_alone():
    """Against a slow version in which the shares are plain numbers."""
    torch.manual_seed(0)
    strong = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1, 0, 1, 1, 0.5, 0, 1, 1, 1], dtype=torch.float64)
    mean, share = torch.rand(4, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad(confidence.fairness(strong, weights, mean, share), strong)
    rows = [i for i, weight in enumerate(weights.tolist()) if weight > 0]
    average = strong[rows].softmax(1).mean(0)
    histogram = [sum(strong[i].argmax().item() == c for i in rows) / len(rows) for c in range(4)]
    wanted = [g / h if h else 0.0 for g, h in zip(mean.tolist(), share.tolist())]
    fair = [average[c] / histogram[c] if histogram[c] else 0 * average[c] for c in range(4)]
    slow = sum(w / sum(wanted) * torch.log(f / sum(fair) + 1e-12) for w, f in zip(wanted, fair))
    (theirs,) = torch.autograd.grad(slow, strong)
    assert torch.allclose(ours, theirs, rtol=1e-10) and torch.isfinite(ours).all()
    assert torch.equal(ours[1], torch.zeros(4, dtype=torch.float64))


def test_no_image_that_counts_gives_a_finite_gradient():
    strong = torch.randn(3, 4, requires_grad=True)
    confidence.fairness(strong, torch.zeros(3), torch.full((4,), 0.25), torch.full((4,), 0.25)).backward()
    assert torch.equal(strong.grad, torch.zeros(3, 4))


def test_soft_leaves_its_variance_at_one_image():
    rule = confidence.build("soft", num_classes=4, momentum=0.5)
    rule(torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64))
    assert rule.variance.item() == 1 and rule.mean.item() == pytest.approx((0.25 + 0.7) / 2)


class SlowFlex:
    """FlexMatch with lists and loops."""

    def __init__(self, classes, threshold, images):
        self.threshold, self.last, self.status = threshold, [-1] * images, [0.0] * classes

    def __call__(self, q, index):
        weights = []
        for row in q.tolist():
            status = self.status[row.index(max(row))]
            weights.append(float(max(row) >= self.threshold * status / (2 - status)))
        for row, image in zip(q.tolist(), index.tolist()):
            if max(row) >= self.threshold:
                self.last[image] = row.index(max(row))
        counts = [self.last.count(c) for c in range(len(self.status))]
        most = max(*counts, self.last.count(-1))
        self.status = [n / most for n in counts]
        return weights


def test_flex_equals_a_slow_version_also_where_an_image_occurs_twice():
    torch.manual_seed(0)
    rule, slow = confidence.build("flex", num_classes=3, threshold=0.6, n_images=7), SlowFlex(3, 0.6, 7)
    for _ in range(60):
        q, index = (2 * torch.randn(12, 3, dtype=torch.float64)).softmax(1), torch.randint(7, (12,))
        assert rule(q, index=index).tolist() == slow(q, index)
        assert rule.class_status.tolist() == pytest.approx(slow.status, abs=1e-12)
        assert rule.last_class.tolist() == [*slow.last, -1] and rule.counts.sum() == 7


def test_float32_in_float32_out_and_unknown_names():
    for name in confidence.RULES:
        rule = confidence.build(name, num_classes=10, n_images=48)
        q, index, labelled, _ = inputs(0)
        weights = rule(q.float(), index=index, labelled=labelled.float())
        assert weights.dtype == torch.float32 and rule.level.ndim == 0
        assert {buffer.dtype for buffer in rule.buffers() if buffer.is_floating_point()} <= {torch.float32}
    with pytest.raises(ValueError, match="Unknown confidence rule 'x'; known: fixed, flex, free, soft, ada"):
        confidence.build("x", num_classes=3)
    with pytest.raises(ValueError, match="Unknown alignment 'none'; known: uniform, shares, labelled"):
        confidence.Alignment("none", num_classes=3)
    with pytest.raises(ValueError, match="needs the class shares"):
        confidence.Alignment("shares", num_classes=3)


# ------------------------------------------------------------------------------- resume and ranks

MODULES = [
    *(
        partial(confidence.build, name, num_classes=10, threshold=0.7, momentum=0.9, n_images=48)
        for name in confidence.RULES
    ),
    partial(confidence.Alignment, "uniform", num_classes=10, momentum=0.9),
    partial(confidence.Alignment, "labelled", num_classes=10, momentum=0.9),
]
NAMES = [*confidence.RULES, "align uniform", "align labelled"]


def advance(module, steps, part=slice(None), dtype=torch.float32):
    """The outputs of some steps; `part` of a step's images."""
    outputs = []
    for step in steps:
        q, index, labelled, _ = inputs(step)
        given = {"labelled": labelled[part].to(dtype)}
        if not isinstance(module, confidence.Alignment):
            given["index"] = index[part]
        outputs.append(module(q[part].to(dtype), **given))
    return outputs


@pytest.mark.parametrize("make", MODULES, ids=NAMES)
def test_a_saved_state_goes_on_to_the_bit(make):
    whole, first, second = make(), make(), make()
    together = advance(whole, range(20))
    before = advance(first, range(8))
    second.load_state_dict(first.state_dict())
    assert same(before + advance(second, range(8, 20)), together)
    assert same(second.state_dict(), whole.state_dict())


def _rank(rank, folder, number):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    half = slice(0, 8) if rank == 0 else slice(8, 16)
    module = MODULES[number]()
    outputs = []
    for step in range(20):
        q, index, labelled, _ = inputs(step)
        given = {"labelled": labelled[:4] if rank == 0 else labelled[4:]}
        if not isinstance(module, confidence.Alignment):
            given["index"] = index[half]
        outputs.append(module(q[half], **given))
    torch.save((torch.stack(outputs), module.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("number", range(len(MODULES)), ids=NAMES)
def test_two_ranks_do_what_one_with_all_the_images_does(tmp_path, number):
    from tests.trees import FORKSERVER

    processes = [FORKSERVER.Process(target=_rank, args=(rank, tmp_path, number)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    whole = MODULES[number]()
    expected_outputs = torch.stack(advance(whole, range(20), dtype=torch.float64))
    (one, state), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.allclose(torch.cat([one, two], dim=1), expected_outputs, rtol=0, atol=1e-12)
    assert same(state, other)
    for name, value in whole.state_dict().items():
        assert torch.allclose(state[name].double(), value.double(), rtol=0, atol=1e-12), name


def test_state_is_buffers_alone():
    for make in MODULES:
        module = make()
        assert isinstance(module, nn.Module) and not list(module.parameters())
        assert set(module.state_dict()) == {name for name, _ in module.named_buffers()}
