"""The demo: pseudo labels help in a short form of it, its table is right by hand, and a failure is one sentence."""

import json
import sys

import numpy as np
import pytest

from options import recorded
from study import demo
from tests.trees import parse


def logs(*figures):
    """A log per seed, whose last record has these figures of both streams, the CNN and the transformer."""
    keys = list(demo.COLUMNS)
    return [[{"epoch": 0, **dict.fromkeys(keys, 10.0)}, {"epoch": 1, **dict(zip(keys, each))}] for each in figures]


def results(supervised, semi):
    return [{"supervised": a, "semi": b} for a, b in zip(logs(*supervised), logs(*semi))]


def test_the_table_has_means_and_standard_errors_of_the_last_epoch():
    text, gains = demo.table(results([(80, 81, 60), (84, 83, 70)], [(86, 84, 80), (86, 86, 84)]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["top-1, %", "both streams", "CNN stream", "transformer stream"]
    assert rows[2] == ["labelled images only", "82.0 ± 2.0", "82.0 ± 1.0", "65.0 ± 5.0"]
    assert rows[3] == ["with pseudo labels", "86.0 ± 0.0", "85.0 ± 1.0", "82.0 ± 2.0"]
    assert rows[4] == ["difference", "+4.0 ± 2.0", "+3.0 ± 0.0", "+17.0 ± 3.0"]
    assert [gain.tolist() for gain in gains] == [[6, 2], [3, 3], [20, 14]]
    one, _ = demo.table(results([(80, 81, 60)], [(70.5, 84, 80)]))
    assert "±" not in one and "| -9.5" in one.replace("         ", " ").replace("  ", " ")


def test_the_conclusion_is_what_the_figures_say():
    helped = demo.conclusion([np.array([4.0]), np.array([2.0]), np.array([7.0])])
    assert helped.startswith("The pseudo labels are worth 4.0 points of top-1.") and "transformer" in helped
    assert "transformer" not in demo.conclusion([np.array([4.0]), np.array([7.0]), np.array([2.0])])
    assert "did not help" in demo.conclusion([np.array([1.0, -2.0]), np.array([0.0]), np.array([9.0])])


def test_both_trainings_take_as_many_steps_on_the_same_images():
    common = [*demo.COMMON.split(), "--epochs", str(demo.EPOCHS), "--steps-per-epoch", str(demo.STEPS)]
    supervised, semi = (vars(recorded(parse(*common, *flags.split()))) for _, flags in demo.RUNS.values())
    different = {name for name in semi if semi[name] != supervised[name]}
    assert different == {"supervise_only", "batch_size", "mu", "semi_start_epoch", "threshold", "semi_lambda"}
    assert supervised["batch_size"] == semi["batch_size"] * semi["mu"] == 8  # labelled images of a step and process


def test_a_training_that_fails_and_an_old_folder_end_with_a_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="seed 3 failed: .*unrecognized flag --no-such-flag.*out.txt"):
        demo.train(tmp_path / "run", "seed 3", ["--no-such-flag"])
    (tmp_path / "seed0").mkdir()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="^demo.py: error: .*seed0 exists from an earlier run: remove it or choose"):
        demo.main()


def test_a_short_demo_shows_that_pseudo_labels_help(tmp_path, monkeypatch, capsys):
    """A tune seed, a fifth of the steps, one process: a change of kernels must not reverse the order unseen."""
    monkeypatch.setattr(demo, "STEPS", 20)
    monkeypatch.setattr(demo, "PROCESSES", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--tune", "--seeds", "14", "--output", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out.splitlines()
    lines = {name: (tmp_path / "seed14" / name / "log.txt").read_text().splitlines() for name in demo.RUNS}
    final = {name: json.loads(each[-1]) for name, each in lines.items()}
    assert final["semi"]["test_acc1"] >= final["supervised"]["test_acc1"]
    assert final["semi"]["test_acc1_head2"] > final["supervised"]["test_acc1_head2"]  # the transformer stream
    last = dict(word.split("=") for word in printed[-1].split())
    assert list(last) == ["supervised", "semi", "steps", "seconds", "picture"] and last["steps"] == "160"
    assert last["semi"] == f"{final['semi']['test_acc1']:.1f}"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
