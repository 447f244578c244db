"""On a resume the flags win: what is printed and recorded is what is used; a fork counts its own best epoch."""

import json
import os
import shutil

import pytest
import torch

import semi_main
from tests.test_resume import assert_same_checkpoint, run
from tests.trees import SMALL, make_tree, parse
from training import checkpoint
from training.optimization import learning_rates


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """The output folder of a run of four epochs that was stopped after two."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2; --resume auto goes on"):
        with pytest.MonkeyPatch.context() as patch:
            train_epoch = semi_main.Run.train_epoch

            def stop(self, epoch):
                if epoch == 2:
                    raise KeyboardInterrupt
                return train_epoch(self, epoch)

            patch.setattr(semi_main.Run, "train_epoch", stop)
            run([*words, "--epochs", "4", "--evaluate-freq", "1", "--warmup-epochs", "1", "--output_dir", folder])
    return folder


def resumed(words, stopped, tmp_path, *more):
    """A Run that has resumed a copy of the stopped run, and its flags."""
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    given = parse(*words, "--warmup-epochs", 1, "--epochs", 4, *more, "--output_dir", folder, "--resume", "auto")
    made = semi_main.Run(given, torch.device("cpu"))
    made.print_plan()
    return made, given


CHANGES = [
    ("--lr 1e-6", {"--lr": [0.0005, 1e-06]}),
    ("--weight-decay 5", {"--weight-decay": [0.05, 5.0]}),
    ("--weight-decay 0", {"--weight-decay": [0.05, 0.0]}),
    ("--epochs 8", {"--epochs": [4, 8]}),
    ("--sched step --decay-epochs 1", {"--sched": ["cosine", "step"], "--decay-epochs": [30, 1.0]}),
    ("--min-lr 1e-4", {"--min-lr": [1e-05, 1e-4]}),
    ("--opt-betas 0.5 0.6", {"--opt-betas": [None, [0.5, 0.6]]}),
    ("--opt-eps 1e-3", {"--opt-eps": [1e-08, 1e-3]}),
    ("--steps-per-epoch 3", {"--steps-per-epoch": [1, 3]}),
    ("--threshold 0.9", {"--threshold": [0.7, 0.9]}),
]


@pytest.mark.parametrize("line, changed", CHANGES)
def test_what_is_printed_and_recorded_is_what_is_used(words, stopped, tmp_path, capsys, line, changed):
    made, args = resumed(words, stopped, tmp_path, *line.split())
    printed = capsys.readouterr().out
    for flag, (old, new) in changed.items():
        assert f"{flag} {old} -> {new}\n" in printed
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["changed"] == changed and record["resumed_from"] == str(tmp_path / "out/checkpoint.pth")
    plain, decayed = made.state.optimizer.param_groups
    assert plain["lr"] == decayed["lr"] == learning_rates(args)[2]
    assert (
        (plain["weight_decay"], decayed["weight_decay"])
        == (0, args.weight_decay)
        == (0, record["args"]["weight_decay"])
    )
    assert plain["betas"] == tuple(args.opt_betas or (0.9, 0.999)) and plain["eps"] == args.opt_eps
    assert made.phases[True][2] == args.steps_per_epoch and made.recipe.threshold == args.threshold
    # ... while the moments and counters are those of the file.
    saved = checkpoint.read(stopped / "checkpoint.pth")["optimizer"]["state"]
    here = made.state.optimizer.state_dict()["state"]
    assert all(torch.equal(saved[i][key], here[i][key]) for i in saved for key in saved[i]) and set(saved) == set(here)
    assert made.state.epoch == 1


def test_a_resume_without_changes_says_nothing(words, stopped, tmp_path, capsys):
    resumed(words, stopped, tmp_path)
    assert " -> " not in capsys.readouterr().out
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["changed"] == {} and record["earlier"] == []


def test_what_cannot_change_in_mid_run_is_one_sentence(words, stopped, tmp_path):
    for line, message in (
        ("--opt sgd", "The optimizer state in .* is not of this network and --opt .*: keep --opt and --model, or"),
        ("--model lcnet_050", "is of another network: .*; check --model and its flags"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed(words, stopped, tmp_path, *line.split())
        shutil.rmtree(tmp_path / "out")


def test_the_average_may_end_or_begin_in_mid_run(words, stopped, tmp_path, capsys):
    made, _ = resumed(words, stopped, tmp_path, "--no-model-ema")
    assert made.state.ema is None and "--model-ema True -> False" in capsys.readouterr().out
    made.save()
    args = parse(*words, "--warmup-epochs", 1, "--epochs", 4, "--output_dir", tmp_path / "out", "--resume", "auto")
    again = semi_main.Run(args, torch.device("cpu"))
    assert "holds no model_ema: the moving average starts from its weights" in capsys.readouterr().out
    assert all(map(torch.equal, again.state.ema.module.parameters(), again.state.model.parameters()))


def test_a_fork_has_its_own_best_and_its_changes_outlive_a_requeue(words, stopped, tmp_path, capsys):
    best = checkpoint.read(stopped / "checkpoint.pth")["best"]
    assert best["epoch"] >= 0
    fork = [*words, "--warmup-epochs", "1", "--epochs", "3", "--lr", "1e-5", "--output_dir", tmp_path]
    made = run(fork, "--resume", stopped / "epoch_0_checkpoint.pth")
    assert made.state.best["epoch"] >= 1 and (tmp_path / "best.pth").exists()
    assert f"best top-1 {made.state.best['acc1']:.3f} in epoch {made.state.best['epoch']}." in capsys.readouterr().out
    origin = {
        "resumed_from": str(stopped / "epoch_0_checkpoint.pth"),
        "changed": {"--epochs": [4, 3], "--lr": [5e-4, 1e-5]},
    }
    record = json.loads((tmp_path / "run.json").read_text())
    assert {key: record[key] for key in origin} == origin and record["earlier"] == []
    for _ in range(2):
        run(fork, "--resume", "auto")
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["changed"] == {} and record["earlier"] == [origin]


# ------------------------------------------------------------------------------- an evaluation costs no epoch


def test_an_epoch_is_saved_before_it_is_evaluated_and_trained_once(words, stopped, tmp_path, monkeypatch):
    """The first evaluation of epoch 2 fails; the resumed run begins with it and ends as one that never failed."""
    given = [*words, "--warmup-epochs", "1", "--epochs", "4", "--resume", "auto"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shutil.copytree(stopped, whole), shutil.copytree(stopped, broken)
    run(given, "--output_dir", whole)
    with monkeypatch.context() as patch:
        patch.setattr(semi_main, "_evaluate", lambda *_: (_ for _ in ()).throw(OSError("the disk of val/ is gone")))
        with pytest.raises(OSError, match="is gone"):
            run(given, "--output_dir", broken)
    held = checkpoint.read(broken / "checkpoint.pth")
    assert held["epoch"] == 2 and set(held["pending"]) >= {"loss", "lr", "bad_images"}
    assert checkpoint.read(broken / "checkpoint.prev.pth")["epoch"] == 1
    trained, train_epoch = [], semi_main.Run.train_epoch

    def counted(self, epoch):
        trained.append(epoch)
        return train_epoch(self, epoch)

    monkeypatch.setattr(semi_main.Run, "train_epoch", counted)
    run(given, "--output_dir", broken)
    assert trained == [3]
    assert (broken / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in ("checkpoint.pth", "checkpoint.prev.pth", "best.pth"):
        assert_same_checkpoint(broken / name, whole / name)
    assert "pending" not in checkpoint.read(broken / "checkpoint.pth")


def test_what_evaluation_needs_is_checked_before_the_first_epoch(tmp_path):
    tree = make_tree(tmp_path / "tree", train=4, val=2)
    (tree / "val/class0/c0_0.png").write_bytes(b"no image")
    words = [*SMALL, "--data-path", tree, "--supervise-only", "--model", "lcnet_035", "--batch-size", 4]
    with pytest.raises(OSError, match="c0_0.png.*evaluation replaces no image"):
        semi_main.Run(parse(*words, "--output_dir", ""), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"At --input-size 32 \(32 or less\) images are evaluated as they are"):
        other = make_tree(tmp_path / "other", train=4, val=2)
        semi_main.Run(parse(*words, "--data-path", other, "--input-size", 32), torch.device("cpu"))


# ------------------------------------------------------------------------------- ruined weights


def test_weights_that_are_not_finite_are_never_saved(words, stopped, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    before = (folder / "checkpoint.pth").read_bytes()
    for part in ("model", "model_ema", "optimizer"):
        made = semi_main.Run(
            parse(*words, "--epochs", 4, "--output_dir", folder, "--resume", "auto"), torch.device("cpu")
        )
        moments = next(iter(made.state.optimizer.state.values()))
        own = {"model": made.state.model, "model_ema": made.state.ema.module}
        with torch.no_grad():
            (moments["exp_avg_sq"] if part == "optimizer" else next(own[part].parameters())).fill_(torch.inf)
        with pytest.raises(FloatingPointError, match=rf"After epoch 1 \['{part}'\].* is not finite: .*not saved"):
            made.save()
        assert (folder / "checkpoint.pth").read_bytes() == before


def test_a_stop_for_nan_names_the_epoch_before(words, stopped, tmp_path):
    """lr 1e30 leaves finite but useless weights after one epoch, and no finite loss in the next."""
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    given = [*words, "--warmup-epochs", "0", "--epochs", "6", "--evaluate-freq", "10", "--lr", "1e30"]
    given += ["--opt", "adamw", "--output_dir", folder]
    previous = folder / "checkpoint.prev.pth"
    with pytest.raises(FloatingPointError, match=f"start from the same weights again; --resume {previous} is an epoch"):
        run(given, "--resume", "auto")
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.read(folder / name)["model"].values())


def test_auto_passes_over_a_checkpoint_with_nan(words, stopped, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    content = checkpoint.read(folder / "checkpoint.pth")
    next(iter(content["model"].values())).fill_(torch.nan)
    torch.save(content, folder / "checkpoint.pth")
    made = semi_main.Run(parse(*words, "--epochs", 4, "--output_dir", folder, "--resume", "auto"), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert made.resumed == str(folder / "checkpoint.prev.pth") and made.state.epoch == 0
    assert "checkpoint.pth is damaged or no checkpoint of ours" in printed and "is not finite; going on from" in printed


# ------------------------------------------------------------------------------- the log, and evaluation


def test_lost_log_lines_are_said(words, stopped, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    given = [*words, "--warmup-epochs", "1", "--epochs", "4", "--output_dir", folder, "--resume", "auto"]
    lines = (folder / "log.txt").read_text().splitlines(keepends=True)
    for kept, missing in ((lines[:1], "1"), ([], "1"), (lines, None)):
        (folder / "log.txt").write_text("".join(kept))
        made = semi_main.Run(parse(*given), torch.device("cpu"))
        made.tidy()
        printed = capsys.readouterr().out
        assert (f"log.txt lacks the lines of epochs {missing}, which" in printed) == (missing is not None), printed
    os.remove(folder / "log.txt")
    semi_main.Run(parse(*given), torch.device("cpu")).tidy()
    assert "log.txt lacks the lines of epochs 1, which were trained." in capsys.readouterr().out


def test_evaluation_takes_network_size_and_view_from_the_checkpoint(words, stopped, tmp_path, capsys):
    data = words[words.index("--data-path") : words.index("--data-path") + 2]
    bare = [*data, "--eval", "--resume", stopped / "checkpoint.pth", "--device", "cpu", "--num_workers", 0]

    def evaluated(*more):
        return semi_main.evaluate_checkpoint(parse(*bare, *more), torch.device("cpu"))

    expected = evaluated("--model", "lcnet_035", "--input-size", 48, "--data-set", "SEMI-IMNET")
    assert "checkpoint.pth was trained" not in capsys.readouterr().out
    taken = evaluated()
    printed = capsys.readouterr().out
    assert taken["acc1"] == expected["acc1"] and taken["loss"] == expected["loss"]
    for flag in ("--model lcnet_035", "--input-size 48", "--data-set SEMI-IMNET"):
        assert f"checkpoint.pth was trained with {flag}, which is taken.\n" in printed
    other = evaluated("--input-size", 64)
    assert "was trained with --input-size 48, not 64 as --input-size says now." in capsys.readouterr().out
    assert other["loss"] != expected["loss"]


@pytest.mark.parametrize("flag, value", [("model", 5), ("input_size", "48"), ("data_set", "MNIST"), ("input_size", 0)])
def test_evaluation_refuses_flags_of_a_checkpoint_that_are_none(words, stopped, tmp_path, flag, value):
    content = checkpoint.read(stopped / "checkpoint.pth")
    setattr(content["args"], flag, value)
    torch.save(content, tmp_path / "a.pth")
    data = words[words.index("--data-path") : words.index("--data-path") + 2]
    args = parse(*data, "--eval", "--resume", tmp_path / "a.pth", "--device", "cpu", "--num_workers", 0)
    with pytest.raises(
        ValueError, match=f"--{flag.replace('_', '-')} {value!r}|args.'{flag}'. is {value!r}, not a value"
    ):
        semi_main.evaluate_checkpoint(args, torch.device("cpu"))


def test_nan_weights_are_not_evaluated(words, stopped, tmp_path):
    content = checkpoint.read(stopped / "checkpoint.pth")
    next(iter(content["model_ema"].values())).fill_(torch.nan)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth \(model_ema\) cannot be used: model_ema.* is not finite"):
        semi_main.evaluate_checkpoint(parse(*words, "--eval", "--resume", tmp_path / "a.pth"), torch.device("cpu"))
