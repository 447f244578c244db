"""The flag set is frozen here: the published one, and the few named changes."""

import argparse
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import options
import predict
import run_with_submitit
import semi_main
from options import boolean, check, get_args_parser, labelled_and_unlabelled, recorded, requested_amp
from samplers import Passes, training_order
from training.optimization import learning_rates
from utils import seed_everything

PUBLISHED = json.loads((Path(__file__).parent / "data" / "flags.json").read_text())["semi_main"]
NO_EFFECT = ("--opt-level", "--cross-attn", "--cnn2trans", "--trans2cnn", "--resplit")
KEPT = [row for row in PUBLISHED if row["flags"][0] not in NO_EFFECT]
NEW = {
    "--accum-iter",
    "--align",
    "--amp",
    "--compile",
    "--confidence",
    "--confidence-momentum",
    "--data-backend",
    "--deterministic",
    "--fairness-lambda",
    "--grad-checkpointing",
    "--hflip",
    "--labelled-view",
    "--layer-decay",
    "--max-bad-images",
    "--overwrite",
    "--pseudo-mixup",
    "--pretrained",
    "--scale",
    "--sched-on-updates",
    "--steps-per-epoch",
    "--teacher",
    "--tensorboard",
    "--unlabelled-path",
}
SEMI = "--data-set SEMI-IMNET "
SCRIPT = SEMI + "--batch-size 108 --mu 0.125 --mixup 0 --cutmix 0 --threshold 0.7 --semi-lambda 4"


def parse(line=""):
    return get_args_parser().parse_args(line.split())


def actions():
    return {flag: action for action in get_args_parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize("row", KEPT, ids=lambda row: row["flags"][0])
def test_published_flag_is_kept(row):
    action = actions()[row["flags"][0]]
    ours = {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "default": action.default,
        "type": action.type and action.type.__name__,
        "nargs": action.nargs,
        "choices": action.choices and list(action.choices),
        "action": type(action).__name__.lstrip("_"),
    }
    expected = dict(row)
    if row["flags"] == ["--device"]:
        expected["default"] = "cuda" if torch.cuda.is_available() else "cpu"
    if row["flags"] == ["--use_submitit"]:
        expected["type"] = "boolean"
    if row["flags"] == ["--data-set"]:
        expected["choices"] = ["FASHION", *expected["choices"]]
    assert ours == expected
    assert type(ours["default"]) is type(expected["default"])


def test_no_flag_is_missing_and_the_new_ones_are_named():
    published = {flag for row in PUBLISHED for flag in row["flags"]}
    assert set(actions()) - published == NEW
    assert published <= set(actions())


def test_new_flags():
    args = parse()
    assert (args.amp, args.steps_per_epoch, args.unlabelled_path) == (None, 0, "")
    assert (args.max_bad_images, parse("--max-bad-images 3").max_bad_images) == (0.001, 3)
    assert (args.accum_iter, args.compile, args.grad_checkpointing) == (1, False, False)
    assert (parse().tensorboard, parse("--tensorboard").tensorboard) == (False, True)
    assert parse("--steps-per-epoch 7").steps_per_epoch == 7
    assert (parse().deterministic, parse("--deterministic").deterministic) == (False, True)
    assert (parse().data_backend, parse("--data-backend fast").data_backend) == ("pil", "fast")
    assert list(actions()["--amp"].choices) == ["auto", "off", "fp16", "bf16"]
    assert (parse().layer_decay, parse("--layer-decay 0.75").layer_decay) == (1, 0.75)
    assert (parse().sched_on_updates, parse("--sched-on-updates").sched_on_updates) == (False, True)
    assert (parse().pretrained, parse("--pretrained").pretrained) == (False, True)


def test_defaults_of_a_namespace_are_the_published_ones():
    expected = {row["dest"]: row["default"] for row in KEPT}
    expected |= {"amp": None, "max_bad_images": 0.001, "steps_per_epoch": 0, "unlabelled_path": ""}
    expected |= {"accum_iter": 1, "compile": False, "data_backend": "pil", "grad_checkpointing": False}
    expected |= {"deterministic": False, "tensorboard": False, "overwrite": False, "hflip": 0.5, "scale": [0.08, 1.0]}
    expected |= {"teacher": "student", "confidence": "fixed", "align": "none", "confidence_momentum": 0.999}
    expected |= {"fairness_lambda": 0.0, "pseudo_mixup": False, "labelled_view": None}
    expected |= {"layer_decay": 1.0, "sched_on_updates": False}
    expected |= {"layer_decay": 1.0, "sched_on_updates": False, "pretrained": False}
    expected |= {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    assert vars(recorded(parse())) == expected


def test_every_flag_has_help_with_its_default():
    for flag, action in actions().items():
        if flag in NO_EFFECT:
            assert action.help is argparse.SUPPRESS
        else:
            assert len(action.help.replace("(default: %(default)s)", "").split()) >= 3, flag
            assert "%(default)s" in action.help, flag
    assert "labelled / (labelled + unlabelled)" in actions()["--mu"].help
    assert "(default: 0.166666667)" in get_args_parser().format_help()


# -------------------------------------------------------------------------------- the command line


def semi_main_parser():
    return options.Parser("semi_main.py", parents=[get_args_parser()])


def refusal(parser, line, capsys):
    """What a parser prints for a wrong command line, as lines."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(line.split())
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    return printed.err.splitlines()


@pytest.mark.parametrize("line, message", [
    ("--thresold 0.8", "unrecognized flag --thresold: did you mean --threshold?"),
    ("--thresold=0.8", "unrecognized flag --thresold: did you mean --threshold?"),
    ("--outptu-dir x", "unrecognized flag --outptu-dir: did you mean --output_dir?"),
    ("--semi 3", "unrecognized flag --semi: did you mean --semi-start-epoch, --semi-lambda, --semiformer-load?"),
    ("--opt-lev O1", "unrecognized flag --opt-lev: did you mean --opt-eps?"),  # --opt-level is hidden
    ("--nonsense", "unrecognized flag --nonsense"),
    ("nonsense", "unrecognized arguments: nonsense"),
    ("--mu x", "argument --mu: invalid float value: 'x'"),
    ("--epochs", "argument --epochs: expected one argument"),
    ("--opt-level O1", "--opt-level had no effect in the published code and does nothing here: leave it out"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_two_lines(line, message, capsys):
    first, second = refusal(semi_main_parser(), line, capsys)
    assert second == "see semi_main.py --help"
    assert first == f"semi_main.py: error: {message}"


@pytest.mark.parametrize("parser, line, name", [
    (run_with_submitit.get_args_parser(), "--node 3", "run_with_submitit.py"),
    (run_with_submitit.get_args_parser(), "--amp fp8", "run_with_submitit.py"),
    (predict._parser(), "x.png --chekpoint a.pth", "predict.py"),
    (predict._parser(), "", "predict.py"),
])  # fmt: skip
def test_so_it_is_in_the_other_programs(parser, line, name, capsys):
    first, second = refusal(parser, line, capsys)
    assert first.startswith(f"{name}: error: ") and second == f"see {name} --help"


def test_a_flag_is_never_completed(capsys):
    for flag in ("--thresh", "--batch", "--ev", "--resum"):
        assert f"unrecognized flag {flag}: did you mean " in refusal(get_args_parser(), f"{flag} 1", capsys)[0]


def test_dashes_and_underscores_are_the_same_and_shown_once():
    for parser in (semi_main_parser(), run_with_submitit.get_args_parser(), predict._parser()):
        text = parser.format_help()
        for action in parser._actions:
            for flag in action.option_strings:
                dashed, scored = flag.replace("_", "-"), f"--{flag[2:].replace('-', '_')}"
                if flag != "-h":
                    assert not any(re.search(rf"{spelled}\b", text) for spelled in {dashed, scored} - {flag})
                    assert parser._as_declared([dashed, "a_-b", f"{scored}=a_-b"]) == [flag, "a_-b", f"{flag}=a_-b"]
    args = parse("--output-dir a_b-c --batch_size 3 --num-workers=0 --unlabelDataset-exclude-labeledData --no_amp")
    assert (args.output_dir, args.batch_size, args.num_workers) == ("a_b-c", 3, 0)
    assert args.unlabelDataset_exclude_labeledData and args.no_amp
    assert run_with_submitit.get_args_parser().parse_args(["--job-dir", "x", "--use-volta32"]).job_dir == "x"


def test_a_value_may_look_like_a_flag_where_argparse_lets_it():
    args = run_with_submitit.get_args_parser().parse_args(["--comment", "--no flag", "--job_dir=--batch_size"])
    assert (args.comment, args.job_dir) == ("--no flag", "--batch_size")
    assert predict._parser().parse_args(["--checkpoint", "a", "--", "--batch_size"]).images == ["--batch_size"]


def test_given_names_the_flags_of_the_command_line_whatever_their_values():
    assert parse().given == []
    line = "--batch_size 64 --no-model-ema --scale 0.08 1 --output-dir= --lr 1 --lr 2"
    assert parse(line).given == ["batch_size", "lr", "model_ema", "output_dir", "scale"]
    assert semi_main_parser().parse_args(line.split()).given == parse(line).given
    assert predict._parser().parse_args(["x", "--checkpoint", "a"]).given == ["checkpoint", "images"]
    launched = run_with_submitit.get_args_parser().parse_args(["--threshold", "0.7", "--nodes", "1"])
    assert launched.given == ["nodes", "threshold"]
    assert run_with_submitit._replace(launched, resume="auto").given == ["nodes", "threshold"]
    assert options.given(parse(line)) == parse(line).given


def test_recorded_flags_are_a_plain_namespace_without_given():
    args = parse("--lr 1")
    assert type(recorded(args)) is argparse.Namespace
    assert vars(recorded(args)) == {name: value for name, value in vars(args).items() if name != "given"}
    assert recorded(recorded(args)) == recorded(args) and args.given == ["lr"]


def test_of_a_namespace_made_by_hand_what_differs_from_its_default_was_given():
    args = argparse.Namespace(**{**vars(recorded(parse())), "epochs": 3, "batch_size": 64, "other": 5})
    assert options.given(args) == ["epochs"]
    check(args)


def test_parser_serves_as_a_parent():
    child = argparse.ArgumentParser("submitit", parents=[get_args_parser()])
    assert child.parse_args(["--epochs", "3"]).epochs == 3
    assert "--ngpus" not in child.format_help() and "process group" in child.format_help()


@pytest.mark.parametrize("line", ["--opt-level O1", *NO_EFFECT[1:]])
def test_flags_without_effect_are_refused(line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2
    assert f"{line.split()[0]} had no effect in the published code" in capsys.readouterr().err


def test_flags_without_effect_are_in_no_namespace():
    assert not {flag.strip("-").replace("-", "_") for flag in NO_EFFECT} & set(vars(parse()))


@pytest.mark.parametrize(
    "text, value",
    [
        ("true", True),
        ("True", True),
        ("1", True),
        ("YES", True),
        ("false", False),
        ("False", False),
        ("0", False),
        ("no", False),
    ],
)
def test_boolean(text, value):
    assert boolean(text) is value
    assert parse(f"--use_submitit {text}").use_submitit is value


def test_boolean_refuses_other_words(capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither true nor false"):
        boolean("maybe")
    with pytest.raises(SystemExit):
        parse("--use_submitit maybe")
    assert "write true or false" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, precision",
    [
        ("", "auto"),
        ("--amp auto", "auto"),
        ("--amp off", "off"),
        ("--amp fp16", "fp16"),
        ("--amp bf16", "bf16"),
        ("--use-native-amp", "auto"),
        ("--no-amp", "off"),
        ("--use-native-amp --amp auto", "auto"),
        ("--no-amp --amp off", "off"),
    ],
)
def test_amp_flags_that_agree(line, precision):
    assert requested_amp(parse(line)) == precision


@pytest.mark.parametrize(
    "line, one, other",
    [
        ("--use-native-amp --no-amp", "--use-native-amp", "--no-amp"),
        ("--use-native-amp --amp off", "--use-native-amp", "--amp off"),
        ("--use-native-amp --amp bf16", "--use-native-amp", "--amp bf16"),
        ("--no-amp --amp auto", "--no-amp", "--amp auto"),
        ("--no-amp --amp fp16", "--no-amp", "--amp fp16"),
        ("--no-amp --amp bf16", "--no-amp", "--amp bf16"),
        ("--use-native-amp --no-amp --amp auto", "--use-native-amp", "--no-amp"),
        ("--use-native-amp --no-amp --amp off", "--use-native-amp", "--no-amp"),
    ],
)
def test_amp_flags_that_disagree(line, one, other):
    for refuse in (requested_amp, check):
        with pytest.raises(ValueError, match=f"^{one} and {other} disagree"):
            refuse(parse(line))


@pytest.mark.parametrize(
    "line, counts",
    [
        ("--batch-size 108 --mu 0.125", (13, 95)),
        ("--batch-size 108", (18, 90)),
        ("", (10, 54)),
        (f"--batch-size 108 --mu {1 / 6}", (18, 90)),
        ("--batch-size 108 --mu 0.16667", (18, 90)),
    ],
)
def test_labelled_and_unlabelled(line, counts):
    assert labelled_and_unlabelled(parse(line)) == counts


POLICIES = """rand rand-m9-n3-mstd0.5 rand-m7-mmax10-p0.3-mstd101-inc1 rand-m9-tweights rand-n2-t3aw rand-t3a v0 v0r
    original originalr 3a original-mstd0.5 augmix augmix-m5-w4-d2-b1-a2 none None""".split()
NO_POLICIES = """rand-m9-mstdx rand-m rand-m9- rand-m9.5 rand-m9-tfoo rand-n99-tweights random Rand-m9 v1 v0-m3
    original-z original-tweights augmix-q3 augmix-a0 nonsense""".split()
EVEN = "mixup and cutmix mix a batch with its own reverse, so the labelled batch must be even: "


@pytest.mark.parametrize(
    "line, message",
    [
        ("--epochs 0", "--epochs 0 must be at least 1"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--evaluate-freq 0", "--evaluate-freq 0 must be at least 1"),
        ("--input-size 0", "--input-size 0 must be"),
        ("--steps-per-epoch -1", "--steps-per-epoch -1 must be 0 or more"),
        ("--num_workers -1", "--num_workers -1 must"),
        ("--threshold 1.1", "--threshold 1.1 must be from 0 to 1"),
        ("--threshold -0.1", "--threshold -0.1 must"),
        ("--threshold nan", "--threshold nan must"),
        ("--temperature 0", "--temperature 0.0 must be above 0"),
        ("--infonce-T -1", "--infonce-T -1.0 must be above 0"),
        ("--smoothing 1", "--smoothing 1.0 must be 0 or more and below 1"),
        ("--smoothing -0.1", "--smoothing -0.1 must"),
        ("--drop 1", "--drop 1.0 must"),
        ("--drop -0.1", "--drop -0.1 must"),
        ("--drop-path 1", "--drop-path 1.0 must"),
        ("--mask-cnn-ratio -1", "--mask-cnn-ratio -1.0 must be 0 or more"),
        ("--mask-transformer-ratio -1", "--mask-transformer-ratio -1.0 must"),
        ("--mask-cnn-ratio-u -1", "--mask-cnn-ratio-u -1.0 must"),
        ("--mask-transformer-ratio-u -1", "--mask-transformer-ratio-u -1.0 must"),
        ("--semi-lambda -1", "--semi-lambda -1.0 must"),
        ("--consistency-lambda -1", "--consistency-lambda -1.0 must"),
        ("--max-bad-images -1", "--max-bad-images -1.0 must be a share from 0 to below 1 or a whole number"),
        ("--max-bad-images 1.5", "--max-bad-images 1.5 must be"),
        ("--max-bad-images inf", "--max-bad-images inf must be"),
        ("--max-bad-images nan", "--max-bad-images nan must be"),
        ("--lr inf", "--lr inf must be a finite number"),
        ("--opt-eps nan", "--opt-eps nan must be a finite number"),
        ("--opt-betas 0.9 nan", "--opt-betas nan must be"),
        ("--eval --mu nan", "--mu nan must be"),
        ("--select-ratio 0", "--select-ratio 0.0 must be above 0 and at most 1"),
        ("--select-ratio 2", "--select-ratio 2"),
        ("--layer-decay 0", "--layer-decay 0.0 must be above 0 and at most 1"),
        ("--layer-decay 1.1", "--layer-decay 1.1 must be"),
        ("--layer-decay nan", "--layer-decay nan must be"),
        ("--sched-on-updates --sched step", "--sched-on-updates is for --sched cosine: leave it out with --sched step"),
        ("--sched-on-updates --sched plateau", "--sched-on-updates is for --sched cosine: leave it out with --sch"),
        ("--sched-on-updates --lr-noise 0.5", "--lr-noise changes the rate once an epoch: leave out either it or --sc"),
        ("--pretrained --model conv_micro", "--pretrained: no weights are hosted for conv_micro: leave it out, or "),
        ("--pretrained --model resnet18.none", "Unknown --model 'resnet18.none': Invalid pretrained tag (none)"),
        ("--device tpu", "--device tpu must be cpu, cuda or cuda:N, the N-th GPU counted from 0"),
        ("--eval --device CPU", "--device CPU must be"),
        ("--device cuda:", "--device cuda: must be"),
        ("--device cuda:-1", "--device cuda:-1 must be"),
        ("--device cuda:01", "--device cuda:01 must be"),
        ("--device=", "--device  must be"),
        (f"--seed {2**63}", f"--seed {2**63} must be from -2**63 to 2**63 - 1"),
        (f"--seed {-(2**63) - 1}", f"--seed {-(2**63) - 1} must be"),
        (f"--output_dir {__file__}", f"--output_dir {__file__} cannot be a folder, because {__file__} is a file: "),
        (f"--eval --output_dir {__file__}/a/b", f"--output_dir {__file__}/a/b cannot be a folder, because {__file__} "),
        ("--aa rand-x", "--aa 'rand-x' is no policy in timm's notation (its part 'x' means nothing): write one like "),
        *[(f"--aa {policy}", f"--aa {policy!r} is no policy in timm's notation ") for policy in NO_POLICIES],
        (
            "--pseudo-type fuse",
            "--pseudo-type fuse chooses between the streams of a two-stream network, and deit_base_",
        ),
        ("--pseudo-type fuse --model resnet18", "--pseudo-type fuse chooses between the streams of a two-stream "),
        ("--pseudo-type fuse --model Semifomer_small", "Unknown --model 'Semifomer_small'"),
        (SEMI + "--mu 1.5", "--mu 1.5 must be above 0 and below 1"),
        (SEMI + "--mu -0.5", "--mu -0.5 must be"),
        (SEMI + "--mu 0", "--mu 0.0 leaves no labelled image in a batch of 64 (--batch-size): raise --mu"),
        (SEMI + "--batch-size 4 --mu 0.2", "--mu 0.2 leaves no labelled image in a batch of 4 (--batch-size): "),
        (SEMI + "--mu 1", "--mu 1.0 leaves no unlabelled image in a batch of 64 (--batch-size): lower --mu"),
        (
            SEMI + "--batch-size 108 --mu 0.125",
            EVEN + "--batch-size 108 with --mu 0.125 gives 13; change them or pass --mixup 0 --cutmix 0",
        ),
        (SEMI + "--batch-size 108 --mu 0.125 --mixup 0", EVEN),
        (SEMI + "--batch-size 108 --mu 0.125 --cutmix 0", EVEN),
        (SEMI + "--batch-size 108 --mu 0.125 --mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", EVEN),
        (SEMI + "--batch-size 65 --semi-start-epoch 1", EVEN + "--batch-size 65 is odd"),
        (SEMI + "--batch-size 65 --supervise-only", EVEN + "--batch-size 65 is odd"),
        ("--batch-size 65", EVEN + "--batch-size 65 is odd"),
    ],
)
def test_check_refuses_and_names_the_flag(line, message):
    with pytest.raises(ValueError) as refusal:
        check(parse(line))
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "line",
    [
        "",
        SEMI,
        SCRIPT,
        SCRIPT + " --semi-start-epoch 30 --epochs 600",
        SEMI + "--batch-size 65",
        SEMI + "--supervise-only --mu 1",
        "--mu 0",
        SEMI + "--batch-size 4 --mu 0.2 --supervise-only",
        "--batch-size 65 --mixup 0 --cutmix 0",
        "--threshold 0",
        "--max-bad-images 0",
        "--max-bad-images 1",
        "--layer-decay 0.65 --sched-on-updates --pretrained",
        "--threshold 1",
        "--smoothing 0",
        "--device cuda:12",
        "--pseudo-type cnn --model resnet18",
        "--pseudo-type fuse --model Semiformer_small_patch16",
        "--eval --pseudo-type fuse --model resnet18 --aa rand-x",
        *[f"--aa={policy}" for policy in ["", *POLICIES]],
        f"--output_dir {Path(__file__).parent}/new/run",
        "--eval --batch-size 1",
        "--eval --mu 7 --batch-size 3 --data-set SEMI-IMNET",
    ],
)
def test_check_lets_pass(line):
    check(parse(line))


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_all_that_is_seeded_takes_the_outermost_seeds(seed):
    args = parse(f"--seed {seed} --epochs 3 --warmup-epochs 0 --lr-noise 0")
    check(args)
    seed_everything(seed, 2, 1)
    for repeated in (False, True):
        # Epoch 999 in its tenth pass over few images.
        order = training_order(5, 2, 1, seed, repeated)
        order.set_epoch(999 + 10 * Passes.BETWEEN_PASSES)
        assert set(order) <= set(range(5))
    assert len(learning_rates(args)) == 3


def cores(monkeypatch, number):
    """Let this process have so many cores, whatever the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize("number, workers", [(2, 2), (10, 10), (16, 10)])
def test_workers_that_were_not_asked_for_are_at_most_the_cores(number, workers, monkeypatch, capsys):
    cores(monkeypatch, number)
    got = []
    monkeypatch.setattr(semi_main, "train", lambda args, device: got.append(args))
    args = parse("--device cpu")
    for each in (args, recorded(args)):
        semi_main.main(each)
        assert (got[-1].num_workers, each.num_workers) == (workers, 10)
        line = f"--num_workers {number}, the cores of this process, instead of the default 10\n"
        assert capsys.readouterr().out == (line if number < 10 else "")
    semi_main.main(parse("--device cpu --num_workers 10"))
    assert got[-1].num_workers == 10 and capsys.readouterr().out == ""


def test_without_affinities_all_cores_of_the_machine_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for counted, workers in ((3, 3), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda counted=counted: counted)
        assert options.fit_workers(parse()).num_workers == workers


def test_the_machine_that_submits_does_not_decide_on_the_workers(monkeypatch):
    cores(monkeypatch, 2)
    args = run_with_submitit.get_args_parser().parse_args(["--local", "--device", "cpu"])
    run_with_submitit.check(args)
    assert run_with_submitit.job_flags(args).num_workers == 10


def test_a_policy_is_tried_without_drawing_from_the_generators_of_the_run():
    seed_everything(3)
    check(parse())
    drawn = random.random(), np.random.rand()
    seed_everything(3)
    assert drawn == (random.random(), np.random.rand())


NEVER_SEMI = "Note: --semi-start-epoch {} is not below --epochs {}, so no epoch of this run is semi-supervised.\n"
LATE = SEMI + "--epochs 5 --dual-consistency --consistency-start-epoch "


@pytest.mark.parametrize("line, note", [
    (SEMI + "--epochs 1 --semi-start-epoch 30", NEVER_SEMI.format(30, 1)),
    (SEMI + "--epochs 30 --semi-start-epoch 30 --dual-consistency", NEVER_SEMI.format(30, 30)),
    (SEMI + "--epochs 31 --semi-start-epoch 30 --dual-consistency", ""),
    (SEMI + "--epochs 1 --semi-start-epoch 30 --supervise-only", ""),
    (SEMI + "--epochs 1 --semi-start-epoch 30 --eval", ""),
    ("--epochs 1 --semi-start-epoch 30", ""),  # a data set without unlabelled images
    (LATE + "5", "Note: --consistency-start-epoch 5 is not below --epochs 5, so no epoch of this run has the "
     "consistency loss.\n"),
    (LATE + "4", ""),
    (LATE + "-1", ""),
    (SEMI + "--epochs 5 --consistency-start-epoch 5", ""),
])  # fmt: skip
def test_a_part_of_the_method_that_never_begins_is_said_at_the_start(line, note, monkeypatch, capsys):
    for action in ("train", "evaluate_checkpoint"):
        monkeypatch.setattr(semi_main, action, lambda args, device: print("begins"))
    semi_main.main(parse(line + " --device cpu --num_workers 0"))
    assert capsys.readouterr().out == note + "begins\n"


def test_eval_still_checks_what_evaluation_uses():
    with pytest.raises(ValueError, match="--input-size"):
        check(parse("--eval --input-size 0"))
