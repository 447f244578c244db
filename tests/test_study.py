"""study/study.py: its command lines, interrupted runs that resume, and tables checked by hand."""

import json

import numpy as np
import pytest
from PIL import Image

import options
from images import fashion
from models import build_model
from pseudo_labels import POLICIES
from study import make_clipart, study, study_report, suites
from tests.test_compare import cells, make_run, record
from tests.trees import draw, forked, make_fashion, parse

TINY = "--model Semiformer_micro_patch16 --input-size 32 --batch-size 4 --mu 0.5 --epochs 2 --steps-per-epoch 1"


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_named_run_is_a_command_line_of_semi_main(suite):
    for flags in suites.SUITES[suite].values():
        options.check(parse(*flags.split()))


def test_the_runs_that_are_compared_have_equal_steps_and_networks_of_a_size():
    args = {name: parse(*flags.split()) for name, flags in suites.METHODS.items()}
    assert {(a.epochs, a.steps_per_epoch, a.input_size) for a in args.values()} == {(20, 50, 64)}
    semi = [a for a in args.values() if options.semi_supervised(a)]
    assert {options.labelled_and_unlabelled(a) for a in semi} == {(8, 24)} and len(semi) == len(args) - 3
    assert {a.batch_size for a in args.values() if a.supervise_only} == {8}
    sizes = [sum(p.numel() for p in models_of(a).parameters()) for a in args.values()]
    assert all(abs(size / sizes[0] - 1) <= 0.2 for size in sizes)  # of Semiformer's


def models_of(args):
    return build_model(args.model, 10, args.input_size)


def test_smoke_covers_all_policies_and_every_ablation_is_in_both_suites():
    policies = {parse(*flags.split()).pseudo_type for flags in suites.SMOKE.values()}
    assert policies == set(POLICIES) and len(policies) == 15
    assert list(suites.SMOKE) == list(suites.ABLATION) == ["baseline", *suites.CHANGES]


def test_labelled_images_are_as_many_of_each_class_and_drawn_by_the_seed(tmp_path):
    make_fashion(tmp_path, train=200)
    targets = fashion.fashion(tmp_path, "train").targets
    lists = []
    for seed in (0, 1, 0):
        study.write_labelled(tmp_path / "list.txt", tmp_path, 40, seed)
        lists.append([int(line) for line in (tmp_path / "list.txt").read_text().splitlines()])
        assert np.bincount(targets[lists[-1]]).tolist() == [4] * 10
    assert lists[0] == lists[2] != lists[1]


def test_a_part_keeps_evaluation_images_out_of_training(tmp_path):
    make_fashion(tmp_path, train=50)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    study.write_part(tmp_path / "part", tmp_path, 30, 12)
    whole = fashion.fashion(tmp_path, "train")
    for part, places in (("train", range(30)), ("val", range(38, 50))):
        samples = fashion.fashion(tmp_path / "part", part)
        assert samples.targets.tolist() == whole.targets[places].tolist() and samples.classes == tuple("abcdefghij")
        assert np.array_equal(samples.source.images, whole.source.images[places])


def start(folder, *words):
    (done,) = forked("study.study", "--output", folder, "--data-path", folder, *words)
    return done


def test_runs_are_skipped_when_finished_and_go_on_when_not(tmp_path):
    make_fashion(tmp_path, train=40, test=5)
    words = ["--only", "published", "--labels", 20, "--", *TINY.split()]
    assert start(tmp_path, *words).returncode == 0
    suite = tmp_path / "methods-20"
    run, results = suite / "seed0/published", suite / "results.jsonl"
    first, log = results.read_text(), (run / "log.txt").read_text()
    line = json.loads(first)
    assert [record["epoch"] for record in line["log"]] == [0, 1] and len(log.splitlines()) == 2
    assert line["log"][-1]["test_acc1"] == json.loads(log.splitlines()[-1])["test_acc1"]
    assert (line["name"], line["seed"], line["labels"], line["args"]["epochs"]) == ("published", 0, 20, 2)
    assert str(tmp_path) not in first and (suite / "methods.png").is_file()
    before = (run / "out.txt").read_text()
    assert start(tmp_path, *words).returncode == 0 and (run / "out.txt").read_text() == before
    assert results.read_text() == first
    results.unlink()  # as if it had been killed after its last save
    assert start(tmp_path, *words).returncode == 0
    assert "Nothing left to train" in (run / "out.txt").read_text() and (run / "log.txt").read_text() == log
    again = json.loads(results.read_text())
    assert again["log"] == line["log"] and again["cpu_seconds"] > line["cpu_seconds"]
    other = start(tmp_path, *words, "--lr", "0.5")
    assert other.returncode == 1 and "study.py: error: " in other.stderr and "with other flags" in other.stderr
    wrong = start(tmp_path / "none")
    assert wrong.returncode == 1 and wrong.stderr.startswith("study.py: error: ") and wrong.stderr.count("\n") == 1


def line_of(name, seed, log, epochs=2, steps=250):
    """A line of results.jsonl."""
    args = {"epochs": epochs, "seed": seed, "steps_per_epoch": steps}
    spent = {"seconds": 60.0 + 60 * seed, "cpu_seconds": 30}
    return {"name": name, "seed": seed, "labels": 40, "flags": "", "args": args, "log": log} | spent


def test_the_report_of_methods_by_hand(tmp_path):
    """Semiformer with and without pseudo labels in two seeds, the recipe in one more, a CNN in two, a ViT in one."""
    figures = {
        "recipe": [(80, 81, 70), (90, 85, 75), (85, 80, 70)],
        "supervised": [(75, 76, 50), (88, 86, 45)],
        "published": [(79, 79, 79), (91, 90, 89)],
        "cnn-recipe": [(74, None, None), (72, None, None)],
        "vit-recipe": [(10, None, None)],
    }
    lines = [
        line_of(name, seed, [record(0, 10, 10, 10), record(1, *last) | {"n_parameters": 2_500_000}])
        for name, seeds in figures.items()
        for seed, last in reversed(list(enumerate(seeds)))  # in any order
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = study_report.write_report("methods", tmp_path, [0])
    rows, pairs = (cells(part) for part in text.split("\n\n"))
    assert rows[0][2:5] == ["top-1 %", "CNN stream %", "transformer stream %"] and "mask rate %" not in rows[0]
    assert [row[0] for row in rows[1:]] == ["supervised", "published", "recipe", "cnn-recipe", "vit-recipe"]
    assert rows[3] == [
        "recipe",
        "2.50 M",
        "85.00 ± 5.00",
        "82.00 ± 2.65",
        "71.67 ± 2.89",
        "3",
        "500",
        "2.0 min",
        "0.5 min",
    ]
    assert rows[4] == ["cnn-recipe", "2.50 M", "73.00 ± 1.41", "-", "-", "2", "500", "1.5 min", "0.5 min"]
    found = {(row[0], row[1]): row[2:] for row in pairs[1:]}
    # 5 and 2: mean 3.5, deviation 2.12, standard error 1.5
    assert found["recipe", "supervised"] == ["+5.0 / +2.0", "+3.50", "1.50", "2.3", "2 of 2"]
    stream = ("recipe, CNN stream", "supervised, CNN stream")
    assert found[stream] == ["+5.0 / -1.0", "+2.00", "3.00", "0.7", "1 of 2"]
    assert found["recipe", "published"] == ["+1.0 / -1.0", "+0.00", "1.00", "0.0", "1 of 2"]
    assert found["recipe, transformer stream", "vit-recipe"] == ["+60.0", "+60.00", "-", "-", "1 of 1"]
    assert ("recipe", "cnn-recipe") in found and (tmp_path / "table.md").read_text() == text + "\n"
    assert {path.name for path in tmp_path.glob("*.png")} == {"methods.png"}


def test_a_page_gets_the_tables_of_all_results_in_their_places(tmp_path, monkeypatch):
    shared = " ".join(suites.SHARED.split())
    monkeypatch.setitem(suites.SUITES, "trials", {"a": "", "b": ""})
    trials = [
        line_of("a", 0, [record(1, 50, 40, 30)]) | {"flags": f"{shared} --no-model-ema --threshold 0.9"},
        line_of("a", 1, [record(1, 60, 40, 30)]) | {"flags": f"{shared} --no-model-ema --threshold 0.9"},
        line_of("b", 1, [record(1, 70, 40, 30) | {"train_pseudo_acc": 0.5}]) | {"flags": f"{shared} --teacher ema"},
    ]
    versions = {"revision": "abc", "torch": "2.6.0", "timm": "1.0"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/trials-40.jsonl").write_text("".join(f"{json.dumps(x | versions)}\n" for x in trials))
    page = tmp_path / "study.md"
    page.write_text("before\n<!-- trials-40 -->\nearlier\n<!-- end -->\nafter\n")
    study_report.write_page(page, tmp_path / "results")
    text = page.read_text()
    table = cells(text[text.index("|") : text.rindex("|") + 1])
    assert table[0][:3] == ["trial", "flags", "top-1 %, seeds 0 / 1"]
    assert table[1][:4] == ["a", "`--threshold 0.9`", "50.0 / 60.0", "-"]
    assert table[2][:4] == ["b", "`--teacher ema`", "- / 70.0", "50.00"]
    assert "\n3 runs, 2 minutes of CPU time, torch 2.6.0, timm 1.0, revisions abc.\n" in text
    assert text.startswith("before\n<!-- trials-40 -->\n") and text.endswith("<!-- end -->\nafter\n")
    study_report.write_page(page, tmp_path / "results")
    assert page.read_text() == text and "earlier" not in text
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no line <!-- trials-40 -->"):
        study_report.write_page(page, tmp_path / "results")


def test_the_number_of_classes_is_that_of_equally_frequent_ones():
    records = [{"epoch": 0, "train_pseudo_entropy": np.log(4), "other": 1}, {"epoch": 1, "train_pseudo_entropy": None}]
    kept = study_report.kept_figures(records)
    assert kept[0]["train_classes"] == pytest.approx(4) and "other" not in kept[0] and "train_classes" not in kept[1]


def test_clip_art_is_divided_once_and_labelled_by_the_seed(tmp_path, monkeypatch):
    for name, value in (("TRAIN", 6), ("TEST", 3), ("TUNE", 2), ("CATEGORIES", ["a", "b"])):
        monkeypatch.setattr(make_clipart, name, value)
    for name in ("a/1.png", "a/x/1.png", *(f"{c}/{i}.png" for c in "ab" for i in range(2, 12))):
        draw(tmp_path / "source" / name, size=(20, 10))

    def write(out, seed, tune=False, labels=4):
        make_clipart.write_clipart(tmp_path / out, labels, seed, tune, tmp_path / "source")
        files = {part: {p.name for p in (tmp_path / out / part).rglob("*.png")} for part in ("train", "val")}
        return files, [line.split(",") for line in (tmp_path / out / "labelled.txt").read_text().splitlines()]

    (first, lines), (second, others), (tuned, _) = write("0", 0), write("1", 1), write("t", 0, tune=True)
    assert first == second and lines != others and [len(first[part]) for part in ("train", "val")] == [12, 6]
    assert [line[1:] for line in lines] == [["0", "0"], ["0", "1"], ["1", "2"], ["1", "3"]]
    assert {line[0] for line in lines} <= first["train"] and not first["train"] & first["val"]
    assert tuned["train"] | tuned["val"] == first["train"] and len(tuned["val"]) == 4
    picture = np.asarray(Image.open(next((tmp_path / "0/train/a").iterdir())))
    assert picture.shape == (72, 72, 3) and (picture[:17] == 255).all() and (picture[19:53] == (10, 20, 30)).all()
    with pytest.raises(ValueError, match="^--labels 3 must be a positive multiple of 2, and at most 12"):
        write("2", 0, labels=3)
    monkeypatch.setattr(make_clipart, "TEST", 30)
    with pytest.raises(FileNotFoundError, match="has 12 pictures, and 36 are needed: install"):
        write("3", 0)


def test_smoke_fails_where_a_flag_changes_nothing(tmp_path, monkeypatch):
    changes = {"lambda": ("--semi-lambda 4", ("train_loss",)), "mu": ("--mu 0.125", ("labelled",))}
    for name, loss, labelled in (("baseline", 1.0, 4), ("lambda", 1.5, 4), ("mu", 1.0, 4)):
        folder = make_run(tmp_path / "seed0" / name, [{"epoch": 0, "train_loss": loss}])
        extra = {"phases": {"semi-supervised": {"labelled": labelled}}, "images": {"unlabelled": 9}}
        (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | extra))
    monkeypatch.setattr(study_report, "CHANGES", changes)
    with pytest.raises(RuntimeError, match="^No quantity changed that should: mu; "):
        study_report.write_report("smoke", tmp_path, [0])
    rows = cells((tmp_path / "table.md").read_text())
    assert rows[1:] == [
        ["lambda", "`--semi-lambda 4`", "train_loss", "1", "1.5", "True"],
        ["mu", "`--mu 0.125`", "labelled", "4", "4", "False"],
    ]
