"""The step, the epoch and the evaluation against the published numbers and obvious slow versions."""

import argparse
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

import engine
from engine import evaluate, evaluating, train_one_epoch, train_step
from losses import Recipe
from models import build_model, fold_batchnorm
from options import get_args_parser
from tests.forms import FORMS, published
from tests.reference import fill, images, load
from training import optimization
from training.checkpoint import TrainState

torch.set_num_threads(2)
TRACE, RATES = load("trace.json"), load("lr.json")


def flags(*words):
    return argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(list(words))


def state_of(model, *words, ema=0.9):
    args = flags("--lr", "1e-3", *words)
    optimizer = optimization.build_optimizer(args, model)
    average = ModelEmaV3(model, decay=ema) if ema else None
    return TrainState(
        model, optimizer, optimization.build_scheduler(args, optimizer), torch.amp.GradScaler(enabled=False), average
    )


def trace_batches(k):
    rng = np.random.Generator(np.random.PCG64(31000 + k))
    labelled = torch.from_numpy(rng.standard_normal((3, 3, 64, 64)))
    labels = torch.from_numpy(rng.integers(0, 10, 3))
    strong, weak = (torch.from_numpy(rng.standard_normal((5, 3, 64, 64))) for _ in range(2))
    return (labelled, labels), (strong, weak, torch.full((5,), -1))


@pytest.mark.parametrize("form", FORMS)
def test_six_steps_equal_the_published_ones(form):
    model = FORMS[form](
        fill(build_model("Semiformer_small_patch16", 10, channel_ratio=1, embed_dim=96, num_heads=3), 31)
    )
    state = state_of(model, "--warmup-epochs", "0")
    if form == "published":
        args = flags("--lr", "1e-3", "--warmup-epochs", "0")
        state.optimizer, state.ema = published.adamw(args, model), published.PerTensorEma(model, 0.9)
        state.scheduler = optimization.build_scheduler(args, state.optimizer)
    assert state.optimizer.defaults["eps"] == 1e-8 and type(state.optimizer).__name__ == "AdamW"
    recipe = Recipe(threshold=0.6, semi_lambda=4.0, unlabel_smooth=True, semi_start_epoch=30)
    # Another order of the sums moves them more from step to step: AdamW makes a step of lr of whatever rounding leaves
    # of a gradient that is zero by calculus.
    tolerance = 1e-7 if form == "ours" else 1e-6
    for k, reference in enumerate(TRACE["trace"]):
        labelled, unlabelled = trace_batches(k)
        model.train()
        parts, _ = train_step(
            state, model, model, labelled, unlabelled if k >= 2 else None, recipe, autocast=nullcontext
        )
        assert state.optimizer.param_groups[0]["lr"] == reference["lr"]
        assert {"lr", *parts} == set(reference)
        for name, value in reference.items():
            assert name == "lr" or parts[name].item() == pytest.approx(value, rel=tolerance), (k, name)

    def norms(tensors):
        return {name: tensor.double().norm().item() for name, tensor in tensors}

    assert norms(model.named_parameters()) == pytest.approx(TRACE["param_norms"], rel=1e-6)
    assert norms(state.ema.module.named_parameters()) == pytest.approx(TRACE["ema_param_norms"], rel=1e-6)
    assert norms(model.named_buffers()) == pytest.approx(TRACE["buffer_norms"], rel=1e-6)
    with torch.no_grad():
        ours = model.eval()(images(31099, size=64))
    for logits, reference in zip(ours, TRACE["final_logits"]):
        assert np.allclose(logits, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", RATES)
def test_learning_rates_are_the_published_ones(case):
    epochs, lr = (part.split("=")[1] for part in case.split(","))
    ours = optimization.learning_rates(flags("--epochs", epochs, "--lr", lr))
    assert ours == pytest.approx(RATES[case], rel=1e-12, abs=0)


def test_weight_decay_spares_biases_vectors_and_the_class_token():
    model = build_model("Semiformer_PE_small_patch16", 10, depth=3)
    optimizer = optimization.build_optimizer(flags("--weight-decay", "0.05"), model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    spared = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    expected = {n for n, p in model.named_parameters() if p.ndim == 1 or n.endswith(".bias") or n == "cls_token"}
    assert spared == expected and decayed == set(names.values()) - expected and "pos_embed" in decayed


class Linear(nn.Module):
    """Two streams of one linear layer each, fast enough for slow references."""

    def __init__(self, classes=4, streams=2):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(12, classes) for _ in range(streams))
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x, ret_feat=False):
        x = self.norm(x.flatten(1))
        out = [head(x) for head in self.heads]
        return {"output": out, "feat": [x] * len(out)} if ret_feat else out


def batches(n=3, seed=0, labelled=4, unlabelled=6):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield (
            (torch.randn(labelled, 3, 2, 2, generator=g), torch.randint(4, (labelled,), generator=g)),
            (
                *(torch.randn(unlabelled, 3, 2, 2, generator=g) for _ in range(2)),
                torch.randint(4, (unlabelled,), generator=g),
            ),
        )


def steps(recipe, truth=None, semi=True, streams=2, **settings):
    torch.manual_seed(1)
    model = Linear(streams=streams)
    state = state_of(model)
    history = []
    for labelled, unlabelled in batches():
        if truth is not None:
            unlabelled = (*unlabelled[:2], torch.full_like(unlabelled[2], truth))
        model.train()
        history.append(train_step(state, model, model, labelled, unlabelled if semi else None, recipe,
                                  autocast=nullcontext, **settings))  # fmt: skip
    return state, history


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("consistent", [False, True])
def test_true_classes_of_unlabelled_images_never_leak(streams, consistent):
    recipe = Recipe(threshold=0.3, dual_consistency=consistent)
    known, with_truth = steps(recipe, streams=streams, consistent=consistent)
    unknown, without = steps(recipe, truth=-1, streams=streams, consistent=consistent)
    for (parts, diagnosis), (same, blind) in zip(with_truth, without):
        assert all(torch.equal(parts[name], same[name]) for name in parts) and set(parts) == set(same)
        assert diagnosis["pseudo_acc"][1] > 0 and blind["pseudo_acc"][1] == 0
        assert torch.equal(diagnosis["mask_rate"][0], blind["mask_rate"][0])
    for one, other in ((known.model, unknown.model), (known.ema.module, unknown.ema.module)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_weak_images_come_after_the_running_statistics_moved_and_leave_them_alone():
    torch.manual_seed(0)
    model, seen = Linear(), []
    state = state_of(model)
    model.norm.register_forward_hook(lambda m, i, o: seen.append((m.training, len(i[0]), m.running_mean.clone())))
    (labelled, unlabelled), *_ = batches(1)
    before = model.norm.running_mean.clone()
    train_step(state, model, model, labelled, unlabelled, Recipe(), autocast=nullcontext)
    assert [(training, n) for training, n, _ in seen] == [(True, 10), (False, 6)]
    assert torch.equal(seen[0][2], seen[1][2]) and not torch.equal(seen[0][2], before)
    assert torch.equal(model.norm.running_mean, seen[1][2]) and model.training


def test_clip_grad_bounds_the_norm_the_optimizer_sees():
    torch.manual_seed(0)
    model = Linear()
    state = state_of(model, "--opt", "momentum", "--momentum", "0", "--weight-decay", "0", ema=None)
    (labelled, _), *_ = batches(1)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for group in state.optimizer.param_groups:
        group["lr"] = 1.0
    train_step(state, model, model, labelled, None, Recipe(), autocast=nullcontext, clip_grad=0.01)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_mixup_touches_the_labelled_images_only_and_mixes_with_the_reverse():
    seen = []
    model = Linear()
    state = state_of(model, ema=None)
    (labelled, unlabelled), *_ = batches(1)

    def student(x, ret_feat=False):
        seen.append(x.clone())
        return model(x)

    np.random.seed(0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=4)
    original = labelled[0].clone()
    parts, _ = train_step(
        state, student, model, labelled, unlabelled, Recipe(threshold=0.0), autocast=nullcontext, mixup=mixup
    )
    np.random.seed(0)
    np.random.rand(), (lam := np.random.beta(0.8, 0.8))
    assert torch.allclose(seen[0][:4], lam * original + (1 - lam) * original.flip(0), atol=1e-6)
    assert torch.equal(seen[0][4:], unlabelled[0])


def test_an_epoch_reports_means_over_its_steps_and_stops_on_a_loss_that_is_not_finite():
    recipe = Recipe(threshold=0.3)
    _, history = steps(recipe)
    torch.manual_seed(1)
    model = Linear()
    run = partial(train_one_epoch, state_of(model), model, model, recipe=recipe, epoch=0, steps=3, autocast=nullcontext)
    both = list(batches())
    meters = run([b[0] for b in both], [b[1] for b in both])
    for name in ("loss", "loss_0", "loss_1_u"):
        assert meters[name] == pytest.approx(np.mean([parts[name].item() for parts, _ in history]), rel=1e-6)
    kept = [(d["pseudo_acc"][0].item(), d["pseudo_acc"][1].item()) for _, d in history]
    assert meters["pseudo_acc"] == pytest.approx(sum(v * n for v, n in kept) / sum(n for _, n in kept), rel=1e-6)
    both[1][0][0][0, 0, 0, 0] = float("nan")
    labelled = [(*b[0], torch.arange(4) + 10 * k) for k, b in enumerate(both)]
    unlabelled = [(*b[1], torch.arange(6) + 100 * k) for k, b in enumerate(both)]
    named = (
        r"not finite: epoch 0, step 1, rank 0: loss_0 nan, .*, loss nan, "
        r"labelled images \[10, 11, 12, 13\], unlabelled images \[100, 101, 102, 103, 104, 105\]\. Lower --lr"
    )
    with pytest.raises(FloatingPointError, match=named):
        run(labelled, unlabelled)


def test_a_bad_loss_stops_at_the_next_line_and_the_first_rank_to_have_one_is_named(monkeypatch):
    """17 steps, lines at 0, 10 and 16: a loss of step 12 is told at the end, one of step 3 at 10."""
    other, watched = [], []
    monkeypatch.setattr(engine, "gather", lambda own: (watched.append(own), [own, *other])[1])
    torch.manual_seed(1)
    model = Linear()
    run = partial(train_one_epoch, state_of(model), model, model, recipe=Recipe(), epoch=2, steps=17)
    data = [(*labelled, torch.arange(4)) for labelled, _ in batches(17)]
    run(data, None, autocast=nullcontext)
    assert watched == [None, None, None]
    with pytest.raises(FloatingPointError, match="epoch 2, step 11, rank 3: loss nan. Lower"):
        other.append((11, 3, "loss nan"))
        run(data, None, autocast=nullcontext)
    other.clear(), watched.clear(), data[12][0].fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 12, rank 0: loss_0 nan, loss_1 nan, loss nan, labelled"):
        run(data, None, autocast=nullcontext)
    assert watched[:2] == [None, None] and watched[2][:2] == (12, 0) and len(watched) == 3


def test_the_scalers_skipped_steps_are_counted_and_no_failure():
    torch.manual_seed(1)
    model, calls = Linear(), []
    state = state_of(model, ema=None)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def overflow(gradient):
        calls.append(None)
        return gradient * float("inf") if len(calls) in (3, 4, 9) else gradient

    model.heads[0].bias.register_hook(overflow)
    data = [labelled for labelled, _ in batches(20)]
    meters = train_one_epoch(state, model, model, data, None, Recipe(), epoch=0, steps=20, autocast=nullcontext)
    assert meters["skipped"] == pytest.approx(3 / 20) and state.scaler.get_scale() == 2.0**7
    assert np.isfinite(meters["loss"]) and all(p.isfinite().all() for p in model.parameters())


def test_evaluation_equals_a_slow_loop_over_images_and_weighs_images_not_batches():
    torch.manual_seed(0)
    model = Linear(classes=7).double()
    data = [(torch.randn(n, 3, 2, 2, dtype=torch.float64), torch.randint(7, (n,)), torch.arange(n)) for n in (5, 5, 2)]
    ours = evaluate(model.train(), data, autocast=nullcontext)
    assert model.training
    sums, total = dict.fromkeys(ours, 0.0), 0
    with torch.no_grad(), evaluating(model):
        for image, target in ((x[i : i + 1], int(t[i])) for x, t, _ in data for i in range(len(x))):
            conv, trans = (logits[0] for logits in model(image))
            both = (conv.softmax(0) + trans.softmax(0)) / 2
            for name, score in {"": conv + trans, "_head1": conv, "_head2": trans, "_softmax": both}.items():
                ranked = score.argsort(descending=True).tolist()
                sums[f"acc1{name}"] += 100 * (ranked[0] == target)
                sums[f"acc5{name}"] += 100 * (target in ranked[:5])
            halves = [F.cross_entropy(x[None], torch.tensor([target])).item() / 2 for x in (conv, trans)]
            sums["loss_0"], sums["loss_1"] = sums["loss_0"] + halves[0], sums["loss_1"] + halves[1]
            sums["loss"] += sum(halves)
            total += 1
    assert ours.pop("images") == total == 12
    sums.pop("images")
    assert ours == pytest.approx({name: value / total for name, value in sums.items()}, rel=1e-12)


def test_networks_that_see_each_batch_together_are_measured_as_alone():
    torch.manual_seed(0)
    models = [Linear(classes=7), Linear(classes=7), Linear(classes=7, streams=1)]
    data = [(torch.randn(n, 3, 2, 2), torch.randint(7, (n,))) for n in (5, 5, 2)]
    together = engine.evaluate_together([model.train() for model in models], iter(data), autocast=nullcontext)
    assert all(model.training for model in models) and together[0] != together[1]
    assert together == [evaluate(model, data, autocast=nullcontext) for model in models]


def test_evaluation_of_one_stream_and_of_fewer_classes_than_five():
    model = Linear(classes=3, streams=1)
    meters = evaluate(model, [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))], autocast=nullcontext)
    assert set(meters) == {"loss", "acc1", "acc5", "images"} and meters["acc5"] == 100.0


def test_precision_follows_the_device_and_the_flag():
    cpu = torch.device("cpu")
    autocast, scaler, name = optimization.mixed_precision("auto", cpu)
    assert name == "off" and not scaler.is_enabled()
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    autocast, scaler, name = optimization.mixed_precision("bf16", cpu)
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--amp fp16 needs a CUDA GPU, and --device is cpu"):
        optimization.mixed_precision("fp16", cpu)


def train_on(data, accum_iter, steps):
    """Weights, EMA and meters after an epoch of a DeiT in float64, whose batches do not depend on one another."""
    torch.manual_seed(0)
    model = build_model("deit_tiny_patch16_224", 4, 32, depth=1).double()
    state = state_of(model, "--warmup-epochs", "0")
    labelled, unlabelled = zip(*data)
    recipe = Recipe(threshold=0.4, semi_lambda=4.0)
    meters = train_one_epoch(state, model, model, labelled, unlabelled, recipe, epoch=0, steps=steps,
                             autocast=nullcontext, clip_grad=1.0, accum_iter=accum_iter)  # fmt: skip
    return [*model.state_dict().values(), *state.ema.module.state_dict().values()], meters


def test_accumulated_batches_are_one_large_batch_and_the_last_group_is_what_is_left():
    g = torch.Generator().manual_seed(0)

    def views(n):
        return torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float64)

    def whole(parts):
        return tuple(torch.cat(tensors) for tensors in zip(*parts))

    small = [((views(2), torch.randint(4, (2,), generator=g)), (views(3), views(3), torch.zeros(3))) for _ in range(5)]
    groups = small[:3], small[3:]
    large = [(whole([x for x, _ in group]), whole([x for _, x in group])) for group in groups]
    ours, meters = train_on(small, accum_iter=3, steps=5)
    reference, _ = train_on(large, accum_iter=1, steps=2)
    alone, _ = train_on(small, accum_iter=1, steps=5)
    assert 0 < meters["mask_rate"] < 1
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(ours, reference))
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, alone))


def test_ranks_exchange_gradients_once_a_group():
    model, inside, backward = Linear(), [], []

    class Wrapped:
        def train(self):
            model.train()

        def __call__(self, x, ret_feat=False):
            return model(x, ret_feat)

        @contextmanager
        def no_sync(self):
            inside.append(None)
            yield
            inside.clear()

    model.heads[0].weight.register_hook(lambda _: backward.append(not inside))
    data = [labelled for labelled, _ in batches(5)]
    train_one_epoch(state_of(model), Wrapped(), model, data, None, Recipe(), epoch=0, steps=5,
                    autocast=nullcontext, accum_iter=3)  # fmt: skip
    assert backward == [False, False, True, False, True]


def test_a_compiled_network_has_a_graph_to_train_and_one_to_label_in_the_whole_run():
    """A warm-up, short groups and evaluations with a short batch make no third one, nor does the consistency loss."""
    counters = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    model = build_model("Semiformer_micro_patch16", 4, 32)
    state = state_of(model)
    model.compile(backend="eager")
    recipe = Recipe(threshold=0.26, dual_consistency=True, semi_start_epoch=1, consistency_start_epoch=2)
    before, graphs = counters["unique_graphs"], []
    for epoch in range(3):
        labelled = [(torch.randn(n, 3, 32, 32), torch.randint(4, (n,))) for n in [6 if epoch == 0 else 2] * 3]
        unlabelled = [(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.zeros(4)) for _ in range(3)]
        train_one_epoch(state, model, model, labelled, unlabelled if epoch else None, recipe, epoch=epoch, steps=3,
                        autocast=nullcontext, accum_iter=2)  # fmt: skip
        for network in (model, state.ema.module):
            evaluate(
                fold_batchnorm(network), [labelled[0], (labelled[0][0][:1], labelled[0][1][:1])], autocast=nullcontext
            )
        graphs.append(counters["unique_graphs"] - before)
    assert graphs == [1, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_never_waits_for_the_gpu():
    model = build_model("Semiformer_micro_patch16", 4, 32).cuda()
    state, recipe = state_of(model), Recipe(dual_consistency=True)
    labelled = torch.randn(2, 3, 32, 32, device="cuda"), torch.tensor([0, 1], device="cuda")
    unlabelled = *torch.randn(2, 4, 3, 32, 32, device="cuda"), torch.zeros(4, device="cuda")
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    for _ in range(2):  # the first makes the optimizer's state
        train_step(state, model, model, labelled, unlabelled, recipe, autocast=autocast, consistent=True, clip_grad=1.0)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip_grad", [None, 0.01])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_the_gradient_norm_is_that_before_clipping_and_of_the_unscaled_gradient(clip_grad, scale):
    torch.manual_seed(0)
    model = Linear()
    state, ((labelled, _), *_) = state_of(model, ema=None), list(batches(1))
    if scale:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    logits = model.train()(labelled[0])
    sum(F.cross_entropy(x, labelled[1], label_smoothing=0.1) / 2 for x in logits).backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    settings = dict(autocast=nullcontext, clip_grad=clip_grad)
    _, diagnosis = train_step(state, model, model, labelled, None, Recipe(), with_norm=True, **settings)
    norm, count = diagnosis["grad_norm"]
    assert norm.item() == pytest.approx(expected, rel=1e-6) and count.item() == 1
    assert "grad_norm" not in train_step(state, model, model, labelled, None, Recipe(), **settings)[1]
    labelled[0][0] = float("inf")
    norm, count = train_step(state, model, model, labelled, None, Recipe(), with_norm=True, **settings)[1]["grad_norm"]
    assert (norm.item(), count.item()) == (0, 0)


def test_a_report_comes_with_the_lines_and_has_the_means_since_the_last():
    def epoch(**settings):
        torch.manual_seed(1)
        model, data = Linear(), list(batches(12))
        state = state_of(model)
        sets = [[labelled for labelled, _ in data], [unlabelled for _, unlabelled in data]]
        return train_one_epoch(state, model, model, *sets, Recipe(threshold=0.3), epoch=0, steps=12,
                               autocast=nullcontext, **settings), state  # fmt: skip

    seen, single = [], []
    meters, state = epoch(write=lambda step, scalars: seen.append((step, scalars)))
    epoch(write=lambda step, scalars: single.append(scalars), print_freq=1)
    without, same = epoch()
    assert meters == without and "grad_norm" not in meters
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), same.model.parameters()))
    assert [step for step, _ in seen] == [0, 10, 11] and len(single) == 12
    names = set(meters) | {"grad_norm", "images_per_second", "step_seconds", "data_seconds"}
    assert all(set(scalars) == names for _, scalars in seen)
    for name in ("loss", "loss_1_u", "mask_rate", "agreement", "grad_norm", "lr"):
        mean = np.mean([scalars[name] for scalars in single[1:11]])
        assert seen[1][1][name] == pytest.approx(mean, rel=1e-9), name
    pace = seen[1][1]
    assert pace["images_per_second"] == pytest.approx(10 / pace["step_seconds"])  # 4 labelled and 6 unlabelled
    assert 0 <= pace["data_seconds"] <= pace["step_seconds"]
