"""The labeller in the step: policies with rules and alignment, pseudo mixup, the EMA teacher, resume, two ranks."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch

import confidence
import semi_main
from engine import train_step
from losses import Recipe, objective
from models import build_model
from options import check
from pseudo_labels import POLICIES, PseudoLabeller, pseudo_label
from tests.equality import same
from tests.test_resume import assert_same_checkpoint, run
from tests.trees import SMALL, parse
from tests.trees import semi_main as run_semi_main
from training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = [name for name, policy in POLICIES.items() if len(policy.distributions) == 2]


def logits(seed, n=12, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, classes, dtype=torch.float64, generator=generator) for _ in range(2)]


def labeller(policy="cnn", **settings):
    return PseudoLabeller(policy, 0.6, 1.0, num_classes=5, **{"images": torch.arange(12), "momentum": 0.9} | settings)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_default_labels_as_published(policy):
    made = labeller(policy)
    assert not made.state_dict() and made.level() == {}
    for seed in range(5):
        labels = made(logits(seed), torch.arange(12))
        targets, weights = pseudo_label(logits(seed), policy, 0.6, 1.0)
        assert torch.equal(labels.targets, targets) and torch.equal(labels.weights, weights)


@pytest.mark.parametrize("rule", ["fixed", "flex", "free", "ada"])
@pytest.mark.parametrize("policy", ["cnn", "softmax_fuse", *BOTH])
def test_each_distribution_has_its_own_state_and_asks_its_own_rule(policy, rule):
    """Against one rule and one alignment a distribution, called by hand, and the policy's own table."""
    made = labeller(policy, rule=rule, align="labelled")
    number = 2 if policy in BOTH else 1
    rules = [confidence.build(rule, num_classes=5, threshold=0.6, momentum=0.9, n_images=12) for _ in range(number)]
    aligns = [confidence.Alignment("labelled", num_classes=5, momentum=0.9) for _ in range(number)]
    merge = {"cnn": lambda c, t: [c], "softmax_fuse": lambda c, t: [(c + t) / 2]}.get(policy, lambda c, t: [c, t])
    for seed in range(8):
        index = torch.randint(12, (12,), generator=torch.Generator().manual_seed(seed))
        known = [x[:4] for x in logits(100 + seed)]
        labels = made(logits(seed), index, labelled_logits=known)
        weak, labelled = ([x.softmax(1) for x in each] for each in (logits(seed), known))
        aligned = [a(q, labelled=k) for a, q, k in zip(aligns, merge(*weak), merge(*labelled))]
        weights = [r(q, index=index, labelled=k) for r, q, k in zip(rules, aligned, merge(*labelled))]
        if number == 1:
            assert torch.equal(labels.targets, aligned[0].argmax(1)) and torch.equal(labels.weights, weights[0])
        else:
            # The published policy, of which a stream is confident where its probability is lifted above a threshold.
            sure = [torch.where(w[:, None] > 0, q, q / 10) for q, w in zip(aligned, weights)]
            for i in range(12):
                conv, trans = (s[i].max().item() if w[i] else 0.0 for s, w in zip(sure, weights))
                assert (labels.weights[i] > 0) <= bool(conv or trans)
                if labels.weights[i] > 0 and not (conv and trans):
                    assert labels.targets[i] == aligned[0 if conv else 1][i].argmax()
    assert same(made.rules[0].state_dict(), rules[0].state_dict())
    assert same(made.alignments[-1].state_dict(), aligns[-1].state_dict())


def test_soft_weighs_by_the_aligned_and_targets_the_plain_probabilities():
    made, rule = labeller(rule="soft", align="uniform"), confidence.build("soft", num_classes=5, momentum=0.9)
    align = confidence.Alignment("uniform", num_classes=5, momentum=0.9)
    changed = 0
    for seed in range(10):
        labels = made(logits(seed), torch.arange(12))
        q = logits(seed)[0].softmax(1)
        aligned = align(q)
        assert torch.equal(labels.targets, q.argmax(1)) and torch.equal(labels.weights, rule(aligned))
        changed += (aligned.argmax(1) != q.argmax(1)).sum().item()
    assert changed > 0 and set(made.level()) == {"mean_weight"}


def test_flex_finds_its_place_among_the_unlabelled_images_alone():
    """Two sets, of which one has only every third image of the data set."""
    images = torch.arange(12) * 3 + 1
    whole, sparse = labeller(rule="flex"), labeller(rule="flex", images=images)
    for seed in range(6):
        places = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        one, other = whole(logits(seed), places), sparse(logits(seed), images[places])
        assert torch.equal(one.weights, other.weights)
    assert same(whole.state_dict(), sparse.state_dict())


def test_the_classes_that_count_are_concentrated_or_not():
    made = PseudoLabeller("cnn", 0.6, 1.0, num_classes=4)
    sure = 50 * torch.eye(4)
    made([sure[[0, 0, 0, 1]], sure[[0, 0, 0, 1]]])
    made([torch.zeros(2, 4), torch.zeros(2, 4)])  # not sure, so they do not count
    figures = made.concentration()
    assert figures["pseudo_largest"] == 0.75
    assert figures["pseudo_entropy"] == pytest.approx(
        -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item()
    )
    assert made.concentration() == {}
    made([torch.zeros(2, 4), torch.zeros(2, 4)])
    assert made.concentration() == {"pseudo_entropy": None, "pseudo_largest": None}


# ------------------------------------------------------------------------------- the step


def state_of(teacher="student"):
    torch.manual_seed(0)
    model = build_model("Semiformer_micro_patch16", 5, 32)
    average = semi_main.ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return checkpoint.TrainState(model, optimizer, None, scaler, average)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 7, 3, 32, 32, generator=generator)
    return (images[0][:3], torch.tensor([0, 1, 4])), (images[1], images[2], torch.arange(7) % 5, torch.arange(7))


@pytest.mark.parametrize("settings", [
    {"rule": "fixed"}, {"rule": "flex"}, {"rule": "free", "fairness": 0.5}, {"rule": "soft", "align": "uniform"},
    {"rule": "ada", "align": "labelled"}, {"rule": "free", "policy": "Vote_larger", "fairness": 0.5}, {"mixup": True},
], ids=str)  # fmt: skip
def test_a_step_with_each_rule_moves_the_weights_and_counts(settings):
    state, policy = state_of(), settings.get("policy", "cnn")
    recipe = Recipe(
        policy=policy, threshold=0.25, pseudo_mixup="mixup" in settings, fairness_lambda=settings.get("fairness", 0.0)
    )
    state.labeller = PseudoLabeller(
        policy, 0.25, 1.0, num_classes=5, rule=settings.get("rule", "fixed"), align=settings.get("align", "none"),
        momentum=0.9, images=torch.arange(7),
    )  # fmt: skip
    before = [p.clone() for p in state.model.parameters()]
    state.model.train()
    torch.manual_seed(1)
    parts, diagnosis = train_step(state, state.model, state.model, *batch(1), recipe, autocast=nullcontext)
    assert parts["loss"].isfinite() and not all(map(torch.equal, before, state.model.parameters()))
    assert ("loss_fairness" in parts) == ("fairness" in settings)
    assert {"mask_rate", "pseudo_acc", "pseudo_recall"} <= set(diagnosis)
    level = {"fixed": set(), "soft": {"mean_weight"}}.get(settings.get("rule", "fixed"), {"threshold"})
    assert set(diagnosis) & {"mean_weight", "threshold"} == level


def test_the_objective_adds_fairness_once():
    given = [logits(0, 3), torch.tensor([0, 1, 2]), logits(1), torch.zeros(12, dtype=torch.int64), torch.ones(12)]
    plain, _ = objective(*given, Recipe(fairness_lambda=0.5))
    fair, parts = objective(*given, Recipe(fairness_lambda=0.5), None, torch.tensor(-4.0))
    assert fair.item() == pytest.approx(plain.item() - 2) and parts["loss_fairness"] == -4


def test_the_average_labels_where_it_is_the_teacher():
    """The labels are those of the averaged network, whatever the student's."""
    state, seen = state_of(), []
    with torch.no_grad():
        for p in state.ema.module.parameters():
            p.mul_(1.5)
    made = PseudoLabeller("cnn", 0.0, 1.0, num_classes=5)
    made.register_forward_hook(lambda m, args, out: seen.append(out.targets))
    state.labeller = made
    labelled, unlabelled = batch(2)
    state.model.train()
    before = {name: buffer.clone() for name, buffer in state.ema.module.named_buffers()}
    expected = state.ema.module(unlabelled[1])[0].argmax(1)
    train_step(state, state.model, state.ema.module, labelled, unlabelled, Recipe(threshold=0.0), autocast=nullcontext)
    assert torch.equal(seen[0], expected) and not state.ema.module.training
    assert any(not torch.equal(before[name], buffer) for name, buffer in state.ema.module.named_buffers())  # updated


# ------------------------------------------------------------------------------- flags, resume, ranks


@pytest.mark.parametrize("line, message", [
    ("--pseudo-mixup --confidence free", "--pseudo-mixup weighs the mixed images by --threshold"),
    ("--pseudo-mixup --align labelled", "--align labelled has nothing"),
    ("--pseudo-mixup --pseudo-type Vote_larger", "--pseudo-mixup needs one probability an image"),
    ("--pseudo-mixup --dual-consistency", "--dual-consistency cannot compare"),
    ("--confidence soft --pseudo-type weight_v1", "--confidence soft has no confident stream"),
    ("--fairness-lambda 0.1", "--fairness-lambda needs the averages of --confidence free, not of fixed"),
    ("--teacher ema --no-model-ema", "--teacher ema needs the average"),
    ("--teacher ema --model-ema-force-cpu", "--model-ema-force-cpu keeps it off the device"),
    ("--confidence-momentum 1.5", "--confidence-momentum 1.5 must be from 0 to 1"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(line, message):
    with pytest.raises(ValueError, match=message):
        check(parse(*SMALL, "--batch-size", 8, *line.split()))


METHODS = [
    "--confidence flex", "--confidence free --fairness-lambda 0.01 --align shares", "--confidence soft --align uniform",
    "--confidence ada --align labelled", "--teacher ema --pseudo-mixup",
]  # fmt: skip


@pytest.mark.parametrize("line", METHODS)
def test_a_run_stopped_half_way_and_resumed_ends_in_the_same_bits(words, tmp_path, line):
    given = [*words, *line.split(), "--threshold", "0.3", "--steps-per-epoch", "2", "--epochs", "3"]
    run(given, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.copy(tmp_path / "whole/checkpoint.prev.pth", tmp_path / "resumed/checkpoint.pth")
    made = run(given, "--output_dir", tmp_path / "resumed", "--resume", "auto")
    assert made.resumed.endswith("resumed/checkpoint.pth")
    assert_same_checkpoint(tmp_path / "resumed/checkpoint.pth", tmp_path / "whole/checkpoint.pth")
    logs = [(tmp_path / name / "log.txt").read_bytes() for name in ("whole", "resumed")]
    assert logs[0] == logs[1]
    content = checkpoint.read(tmp_path / "whole/checkpoint.pth")
    assert ("labeller" in content) == ("--confidence" in line)


@pytest.mark.parametrize("line", METHODS)
def test_two_ranks_resume_in_the_same_bits(words, tmp_path, line):
    given = [*words, *line.split(), "--threshold", "0.3", "--steps-per-epoch", "2", "--epochs", "3"]
    run_semi_main(*given, "--output_dir", tmp_path / "whole", processes=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.copy(tmp_path / "whole/checkpoint.prev.pth", tmp_path / "resumed/checkpoint.pth")
    run_semi_main(*given, "--output_dir", tmp_path / "resumed", "--resume", "auto", processes=2)
    assert_same_checkpoint(tmp_path / "resumed/checkpoint.pth", tmp_path / "whole/checkpoint.pth")


def test_a_fork_to_another_rule_starts_its_state_anew_and_says_so(words, tmp_path, capsys):
    run([*words, "--confidence", "free", "--epochs", "2"], "--output_dir", tmp_path / "base")
    for line, kept in (
        ("--confidence flex", False),
        ("--confidence free --align uniform", False),
        ("--confidence free", True),
    ):
        args = parse(*words, *line.split(), "--epochs", 3, "--resume", tmp_path / "base/checkpoint.pth")
        made = semi_main.Run(args, torch.device("cpu"))
        assert ("starts anew" in capsys.readouterr().out) == (not kept)
        level = made.state.labeller.rules[0].state_dict().get("global_threshold")
        assert line == "--confidence flex" or (level.item() == 1 / 3) == (not kept)
    plain = semi_main.Run(
        parse(*words, "--epochs", 3, "--resume", tmp_path / "base/checkpoint.pth"), torch.device("cpu")
    )
    assert plain.state.epoch == 1


def test_collapsed_labels_are_warned_of(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        semi_main.PseudoLabeller, "concentration", lambda self: {"pseudo_entropy": 0.1, "pseudo_largest": 0.9}
    )
    run([*words, "--epochs", "2"], "--output_dir", tmp_path)
    assert "Warning: 90% of the pseudo labels that count are of one class, although" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[1])["train_pseudo_largest"] == 0.9


def test_a_damaged_state_of_the_labels_is_named(words, tmp_path):
    run([*words, "--confidence", "free", "--epochs", "2"], "--output_dir", tmp_path)
    content = checkpoint.read(tmp_path / "checkpoint.pth")
    for part, words_of_it in (
        ({"kind": 3, "state": {}}, "labeller is"),
        ({**content["labeller"], "state": {"rules.0.class_mean": torch.full((3,), torch.nan)}}, "is not finite"),
        (
            {**content["labeller"], "state": content["labeller"]["state"] | {"rules.0.class_mean": torch.zeros(9)}},
            "(labeller)",
        ),
    ):
        torch.save(content | {"labeller": part}, tmp_path / "bad.pth")
        args = parse(*words, "--confidence", "free", "--epochs", 3, "--resume", tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="bad.pth") as caught:
            semi_main.Run(args, torch.device("cpu"))
        assert words_of_it in str(caught.value)
