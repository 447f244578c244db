"""Layer decay and the schedule per optimizer step, against reference numbers and obvious slow versions."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import semi_main
from engine import train_one_epoch
from losses import Recipe
from models import build_model
from tests.reference import load
from tests.test_resume import Killed, assert_same_checkpoint, run
from tests.trees import parse
from training.checkpoint import TrainState
from training.optimization import build_optimizer, build_scheduler, learning_rates, restore_optimizer, restore_schedule

REFERENCE = load("semivit.json")
CONVMIXER = "Semiformer_convmixer_12depth"
VITS = [key for key in REFERENCE if "|" in key and "lr" not in key]
((ON_UPDATES, RATES),) = [(key, table) for key, table in REFERENCE.items() if key not in VITS]
SEMIVIT = "--sched-on-updates --lr 5e-4 --min-lr 1e-6 --warmup-lr 0 --warmup-epochs 5 --epochs 100".split()


def meta(name, **settings):
    """A network without memory, whose parameters have names and shapes only."""
    with torch.device("meta"):
        return build_model(name, 10, **settings)


def groups_of(model, *words):
    """{name of a parameter: (scale of its rate, weight decay)}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(parse(*words), model).param_groups
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == set(names.values()) and len(names) == sum(len(group["params"]) for group in groups)
    return found


# -------------------------------------------------------------------------------- layer decay


@pytest.mark.parametrize("key", VITS)
def test_every_parameter_of_a_vit_has_the_published_scale_and_decay(key):
    name, decay = key.split("|")
    model = meta(name)
    ours = groups_of(model, "--layer-decay", decay, "--weight-decay", 0.05)
    expected = {each: tuple(pair) for each, pair in REFERENCE[key].items()}
    assert set(ours) == set(expected)
    for each in expected:
        assert ours[each] == pytest.approx(expected[each], rel=1e-9, abs=0), each
    # Without weight decay the groups are the same, so that a resumed run may change it.
    words = [["--layer-decay", decay, "--weight-decay", decay_of] for decay_of in (0.05, 0)]
    decayed, plain = (build_optimizer(parse(*each), model).param_groups for each in words)
    assert [[*map(id, one["params"])] for one in decayed] == [[*map(id, other["params"])] for other in plain]
    assert {group["weight_decay"] for group in plain} == {0}


def stage(name):
    """The stage of a parameter of a two-stream network, from its name; None: after all stages."""
    part = name.split(".")[0]
    if part in ("cls_token", "pos_embed", "conv1", "bn1", "trans_patch_conv", "convmix1_embed"):
        return 0
    return None if part in ("trans_norm", "trans_cls_head", "conv_cls_head") else int(part.split("_")[-1])


@pytest.mark.parametrize(
    "name",
    ["Semiformer_small_patch16", "Semiformer_PE_micro_patch16", "Conformer_tiny_patch16", CONVMIXER],
)
def test_a_stage_of_both_streams_is_one_layer(name):
    ours = groups_of(meta(name), "--layer-decay", 0.5, "--weight-decay", 0.1)
    stages = {each: stage(each) for each in ours}
    last = max(filter(None, stages.values())) + 1
    assert {*stages.values()} == {None, *range(last)}
    for each, number in stages.items():
        assert ours[each][0] == 0.5 ** (last - (last if number is None else number)), each


def test_the_blocks_of_our_single_stream_networks_are_layers():
    ours = groups_of(meta("conv_micro"), "--layer-decay", 0.5)
    for start, layer in {"stem.": 0, **{f"blocks.{i}.": i + 1 for i in range(5)}, "head.": 6}.items():
        found = {scale for name, (scale, _) in ours.items() if name.startswith(start)}
        assert found == {0.5 ** (6 - layer)}, start
    plain = groups_of(meta("resnet50"), "--layer-decay", 0.5)
    expected = {f"model.{name}": pair for name, pair in plain.items()}
    assert groups_of(meta("myresnet50"), "--layer-decay", 0.5) == expected
    assert len({scale for scale, _ in plain.values()}) == 1 + 3 + 4 + 6 + 3 + 1


@pytest.mark.parametrize(
    "name, settings",
    [
        ("vit_base_patch16_clsgap_224", dict(depth=2)),
        ("cait_xxs24_224", dict(depth=2)),
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1))),
    ],
)
def test_what_follows_the_last_block_has_the_whole_rate(name, settings):
    """timm joins the final norm to the last block, in patterns (ViT, Swin) and in a function of the name (CaiT)."""
    ours = groups_of(meta(name, **settings), "--layer-decay", 0.5)
    after = {each for each in ours if re.match(r"(fc_)?norm\.|head\.", each)}
    assert {each for each, (scale, _) in ours.items() if scale == 1} == after and len(after) == 4


def test_a_network_that_does_not_group_its_layers_is_one_sentence():
    with pytest.raises(ValueError) as error:
        build_optimizer(parse("--layer-decay", 0.9), meta("pit_ti_224"))
    expected = "--layer-decay: PoolingVisionTransformer does not say which layer a parameter belongs to: leave it out."
    assert str(error.value) == expected
    build_optimizer(parse("--layer-decay", 1), meta("pit_ti_224"))


def test_by_default_there_are_two_groups_without_a_scale():
    groups = build_optimizer(parse(), meta("deit_tiny_patch16_224")).param_groups
    assert [group["weight_decay"] for group in groups] == [0, 0.05]
    assert not any("lr_scale" in group for group in groups)


SCHEDULES = ("cosine", "step --decay-epochs 2", "poly", "tanh", "plateau --patience-epochs 0 --cooldown-epochs 0")


@pytest.mark.parametrize("sched", [*SCHEDULES, "cosine --sched-on-updates"])
def test_every_schedule_scales_the_rates_and_the_plan_has_the_whole_one(sched):
    words = ["--sched", *sched.split(), "--epochs", 9, "--warmup-epochs", 2, "--lr", 1, "--min-lr", 0.3]
    args = parse("--layer-decay", 0.5, *words)
    optimizer = build_optimizer(args, build_model("conv_micro", 3))
    scheduler, seen = build_scheduler(args, optimizer), []
    for epoch in range(9):
        rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({scale: rates[1] * scale for scale in rates}, rel=1e-12)
        seen.append(rates[1])
        scheduler.step(epoch, metric=float(epoch))
    assert seen == learning_rates(args) and len(set(seen)) > 2
    if "plateau" in sched:
        for epoch in range(9, 20):
            scheduler.step(epoch, metric=0.0)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({scale: rates[1] * scale for scale in rates}, rel=1e-12)
    assert "plateau" not in sched or rates[1] == 0.3  # so each layer's is its share of --min-lr


def trained(words):
    """(network, optimizer, schedule) after two steps and two epochs of the schedule."""
    args = parse(*words)
    torch.manual_seed(0)
    model = build_model("conv_micro", 3)
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    for epoch in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step(epoch, metric=0.0)
    return model, optimizer, scheduler


@pytest.mark.parametrize("sched", ["cosine", "plateau", "cosine --sched-on-updates"])
def test_a_resumed_run_may_change_the_decay_and_keeps_its_moments(sched):
    words = ["--sched", *sched.split(), "--warmup-epochs", 0, "--patience-epochs", 0, "--cooldown-epochs", 0]
    _, old, schedule = trained([*words, "--layer-decay", 0.75])
    _, expected, _ = trained([*words, "--layer-decay", 0.5])
    saved = old.state_dict()
    args = parse(*words, "--layer-decay", 0.5)
    model = build_model("conv_micro", 3)
    new = build_optimizer(args, model)
    again = build_scheduler(args, new)
    restore_optimizer(new, saved, "a.pth")
    plateau = schedule.lr_scheduler.state_dict() if "plateau" in sched else None
    restore_schedule(again, 1, 0.0, plateau, saved["param_groups"])
    for group, other in zip(new.param_groups, expected.param_groups):
        assert group["lr_scale"] == other["lr_scale"] and group["lr"] == pytest.approx(other["lr"], rel=1e-12)
    made = new.state_dict()["state"]
    assert all(torch.equal(made[i][key], saved["state"][i][key]) for i in made for key in made[i]) and len(made) > 9


@pytest.mark.parametrize("before, now, counts", [(1, 0.75, (2, 14)), (0.75, 1, (14, 2))])
def test_a_resumed_run_can_neither_begin_nor_end_the_decay(before, now, counts):
    _, optimizer, _ = trained(["--layer-decay", before])
    other = build_optimizer(parse("--layer-decay", now), build_model("conv_micro", 3))
    with pytest.raises(ValueError) as error:
        restore_optimizer(other, optimizer.state_dict(), "a.pth")
    assert str(error.value) == (
        "The optimizer state in a.pth is not of this network and --opt ({} parameter groups, not {}: --layer-decay 1 "
        "has others than a smaller one): keep --opt and --model, or start from the file's weights with --finetune."
    ).format(*counts)


# -------------------------------------------------------------------------------- schedule per optimizer step


def scheduled(*words):
    """An optimizer of one parameter and its schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=parse(*words).lr)
    return optimizer, build_scheduler(parse(*words), optimizer)


def slow_rate(e, lr, min_lr, warmup_lr, warmup, epochs):
    """The definition of the issue, for one moment e in epochs."""
    if e < warmup:
        return warmup_lr + (lr - warmup_lr) * e / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (e - warmup) / (epochs - warmup))) / 2


def test_the_rates_are_the_reference_ones():
    optimizer, scheduler = scheduled(*SEMIVIT)
    assert optimizer.param_groups[0]["lr"] == 0  # of the first step, before any call
    for e, rate in RATES.items():
        scheduler.step_update(float(e))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9, abs=0), e
        assert slow_rate(float(e), 5e-4, 1e-6, 0, 5, 100) == pytest.approx(rate, rel=1e-9, abs=0)
    assert "warmup_epochs=5" in ON_UPDATES and len(RATES) == 11


def test_the_plan_has_the_rate_at_the_start_of_each_epoch():
    rates = learning_rates(parse(*SEMIVIT))
    assert rates == pytest.approx([slow_rate(e, 5e-4, 1e-6, 0, 5, 100) for e in range(100)], rel=1e-12, abs=0)
    assert max(rates) == rates[5] == 5e-4


@pytest.mark.parametrize("warmup, expected", [(0, [1, 0.5, 0]), (2, [0, 0.5, 1]), (4, [0, 0.25, 0.5])])
def test_no_warm_up_and_one_to_the_end_or_beyond(warmup, expected):
    words = ["--sched-on-updates", "--lr", 1, "--min-lr", 0, "--warmup-lr", 0, "--epochs", 2, "--warmup-epochs", warmup]
    optimizer, scheduler = scheduled(*words)
    for e, rate in zip((0, 1, 2), expected):
        scheduler.step_update(e)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12)
    scheduler.step(7)  # a checkpoint of a longer run
    assert optimizer.param_groups[0]["lr"] <= 1


class Net(nn.Module):
    """A stream of one layer, in two groups of layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem"}

    def forward(self, images, ret_feat=False):
        return [self.head(self.stem(images.flatten(1)))]


@pytest.mark.parametrize("steps, accum", [(5, 1), (6, 3), (7, 3), (2, 5)])
def test_each_optimizer_step_has_its_own_rate_and_the_log_the_whole_one(steps, accum):
    words = ["--sched-on-updates", "--layer-decay", 0.5, "--lr", 0.1, "--warmup-lr", 0.01, "--epochs", 3]
    args = parse(*words, "--min-lr", 0.02, "--warmup-epochs", 1)
    model = Net()
    optimizer = build_optimizer(args, model)
    state = TrainState(model, optimizer, build_scheduler(args, optimizer), torch.amp.GradScaler(enabled=False))
    seen, step = [], optimizer.step

    def watched(*given):
        seen.append(sorted({group["lr"] for group in optimizer.param_groups}))
        return step(*given)

    optimizer.step = watched
    updates, expected = math.ceil(steps / accum), []
    for epoch in range(3):
        batches = [(torch.randn(4, 3, 2, 2), torch.randint(4, (4,))) for _ in range(steps)]
        meters = train_one_epoch(
            state, model, model, batches, None, Recipe(), epoch=epoch, steps=steps, autocast=nullcontext,
            accum_iter=accum,
        )  # fmt: skip
        rates = [slow_rate(epoch + k / updates, 0.1, 0.02, 0.01, 1, 3) for k in range(updates)]
        expected += rates
        assert meters["lr"] == pytest.approx(sum(rates[k // accum] for k in range(steps)) / steps, rel=1e-12)
        state.scheduler.step(epoch)
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(slow_rate(epoch + 1, 0.1, 0.02, 0.01, 1, 3), rel=1e-12)
    assert seen == [pytest.approx([rate / 2, rate], rel=1e-12) for rate in expected]


@pytest.fixture(scope="module")
def on_updates(words):
    """A run of a supervised and a semi-supervised epoch, whose optimizer steps are of two batches and of one."""
    more = ["--sched-on-updates", "--layer-decay", 0.75, "--steps-per-epoch", 3, "--accum-iter", 2, "--epochs", 2]
    return [*words, *more, "--warmup-epochs", 1]


@pytest.fixture(scope="module")
def whole(on_updates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(on_updates, "--output_dir", folder)
    return folder


@pytest.mark.parametrize("method, epoch", [("step_schedule", 0), ("train_epoch", 1)])
def test_a_killed_and_resumed_run_ends_as_one_never_killed(on_updates, whole, tmp_path, monkeypatch, method, epoch):
    """Between the steps of an epoch and its evaluation, and before an epoch."""
    given, real = [*on_updates, "--output_dir", tmp_path, "--resume", "auto"], getattr(semi_main.Run, method)

    def killed(self, number, *more):
        if number == epoch:
            raise Killed
        return real(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(semi_main.Run, method, killed)
        with pytest.raises(Killed):
            run(given)
    run(given)
    assert (tmp_path / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in ("checkpoint.pth", "checkpoint.prev.pth", "best.pth"):
        assert_same_checkpoint(tmp_path / name, whole / name)


def test_the_plan_says_when_the_rates_hold_and_how_the_layers_differ(on_updates, whole, tmp_path, capsys):
    run(on_updates, "--output_dir", whole, "--resume", "auto")
    printed = capsys.readouterr().out
    assert "learning rate: 1e-06 at the start of epoch 0, 0.0005 at the start of epoch 1\n" in printed
    (scale,) = re.findall(r"^layer decay 0.75: (\d+ layers, \S+) to 1 of that rate$", printed, re.MULTILINE)
    layers = int(scale.split()[0])
    assert scale == f"{layers} layers, {0.75 ** (layers - 1):.3g}" and layers > 9
