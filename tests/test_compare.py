"""script/compare_runs.py and script/plot_log.py, on run folders written here and figures worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from script import compare_runs, plot_log
from tests.trees import ROOT


def make_run(folder, records, amp="off", **flags):
    """A run folder with these log records, by default one of two epochs, and these flags; returns it."""
    folder.mkdir(parents=True)
    flags = {"epochs": 2, "seed": 0, "lr": 0.001, "amp": None, "output_dir": str(folder), "num_workers": 1, **flags}
    (folder / "run.json").write_text(json.dumps({"args": flags, "world_size": 1, "amp": amp}, indent=2))
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def record(epoch, acc1, cnn=None, transformer=None, ema=None, pseudo=None, mask=None):
    """A log record of these figures; None is left out, but of the pseudo labels' accuracy, logged as null."""
    names = ("test_acc1", "test_acc1_head1", "test_acc1_head2", "test_ema_acc1", "train_mask_rate")
    known = {name: x for name, x in zip(names, (acc1, cnn, transformer, ema, mask)) if x is not None}
    return {"epoch": epoch, **known, **({"train_pseudo_acc": pseudo} if mask is not None else {})}


def table(*folders, metrics=()):
    return compare_runs.compare(compare_runs.read_runs(folders), metrics)


def cells(text):
    """The table's rows as lists of stripped cells, without the rule."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_the_mean_of_a_figure_that_is_not_finite_has_no_deviation(tmp_path, odd):
    runs = [make_run(tmp_path / str(i), [record(0, acc1)], seed=i) for i, acc1 in enumerate((odd, 50.0))]
    assert cells(table(*runs, metrics=["acc1"]))[1][-1] == str(odd)


@pytest.fixture
def six(tmp_path):
    """Two settings of three seeds, the data of a seed in a folder of its own; the larger mu first."""
    figures = {
        0.5: [(80, 81, 60, 79, 0.9, 0.6), (82, 81, 62, 79, None, 0.6), (84, 81, 64, 79, 0.8, 0.6)],
        0.2: [(70, 60, 10, 50, 0.9, 0.5), (71, 60, 20, 51, 0.8, 0.5), (75, 60, 30, 52, 0.7, 0.2)],
    }
    return [
        make_run(
            tmp_path / f"mu{mu}_{seed}",
            [record(0, 1.0), record(1, *last)],
            mu=mu,
            seed=seed,
            data_path=f"/data/seed{seed}",
            data_split_file=f"/data/seed{seed}/labelled_{seed}.txt",
            num_workers=seed,
            resume=f"warm{seed}.pth",
        )
        for mu, runs in figures.items()
        for seed, last in enumerate(runs)
    ]


SIX = """\
| run          | mu  |   n |   seeds | epochs run |      top-1 % |        CNN % | transformer % |        EMA % \
|   pseudo-label acc. % |   mask rate % |
| ------------ | --- | --: | ------: | ---------: | -----------: | -----------: | ------------: | -----------: \
| --------------------: | ------------: |
| mu0.2_{seed} | 0.2 |   3 | 0, 1, 2 |          2 | 72.00 ± 2.65 | 60.00 ± 0.00 | 20.00 ± 10.00 | 51.00 ± 1.00 \
|         80.00 ± 10.00 | 40.00 ± 17.32 |
| mu0.5_{seed} | 0.5 |   3 | 0, 1, 2 |          2 | 82.00 ± 2.00 | 81.00 ± 0.00 |  62.00 ± 2.00 | 79.00 ± 0.00 \
| 85.00 ± 7.07 (2 of 3) |  60.00 ± 0.00 |
"""


def test_two_settings_of_three_seeds(six, capsys):
    # 70, 71, 75: the squares of -2, -1, 3 over 2 are 7, its root 2.646; 50, 50, 20: (100 + 100 + 400) / 2, 17.32.
    compare_runs.main([str(folder) for folder in six])
    assert capsys.readouterr().out == SIX


def test_one_metric_with_or_without_its_prefix(six):
    for metric in ("acc1", "test_acc1"):
        header, *rows = cells(table(*six, metrics=[metric]))
        assert header == ["run", "mu", "n", "seeds", "epochs run", "top-1 %"]
        assert [row[-1] for row in rows] == ["72.00 ± 2.65", "82.00 ± 2.00"]
    assert cells(table(*six, metrics=["train_mask_rate", "epoch"]))[1][-2:] == ["40.00 ± 17.32", "1 ± 0"]


def test_single_stream_and_one_run_have_dashes(tmp_path):
    folder = make_run(tmp_path / "deit", [record(0, 50.0), record(1, 61.25, ema=60)])
    assert cells(table(folder))[1] == ["deit", "1", "0", "2", "61.25", "-", "-", "60.00", "-", "-"]


def test_a_row_has_the_names_of_its_runs(tmp_path):
    runs = {name: make_run(tmp_path / name, [record(0, 1)], epochs=1, lr=lr, seed=seed)
            for name, lr, seed in (("seed0/semi", 1, 0), ("seed1/semi", 1, 1), ("seed0/other", 2, 0),
                                   ("a", 3, 0), ("b", 3, 1), ("alone0", 4, 0))}  # fmt: skip
    below = str(tmp_path.name)
    names = [row[0] for row in cells(table(*runs.values()))[1:]]
    assert names == ["seed{seed}/semi", "seed0/other", f"{below}/a, {below}/b", f"{below}/alone0"]
    assert [row[0] for row in cells(table(runs["a"], runs["b"]))[1:]] == ["a, b"]
    assert [row[0] for row in cells(table(runs["alone0"]))[1:]] == ["alone0"]


def test_an_unfinished_run_is_marked_and_averaged_with_none_that_went_further(tmp_path):
    whole = [make_run(tmp_path / str(i), [record(0, 10), record(1, 20 + i)], seed=i) for i in range(2)]
    cut = make_run(tmp_path / "cut", [record(0, 12)], seed=2)
    rows = cells(table(*whole, cut))[1:]
    assert [row[:5] for row in rows] == [
        ["cut", "1", "2", "1 of 2, unfinished", "12.00"],
        ["{seed}", "2", "0, 1", "2", "20.50 ± 0.71"],
    ]


def test_flags_differ_by_what_came_out_and_sort_as_numbers(tmp_path):
    values = {"a": 10, "b": 9, "c": None, "d": "x|y"}
    runs = [make_run(tmp_path / name, [record(1, 1)], clip=value) for name, value in values.items()]
    runs.append(make_run(tmp_path / "e", [record(1, 1)], amp="bf16"))
    header, *rows = cells(table(*runs))
    assert header[1:3] == ["amp", "clip"]
    assert [row[1:3] for row in rows] == [
        ["bf16", "-"], ["off", "None"], ["off", "9"], ["off", "10"], ["off", "x\\|y"]]  # fmt: skip


@pytest.mark.parametrize("paths, differ", [
    (["d/seed0/x", "d/seed1/x"], False), (["d/0/x_0.txt", "d/1/x_1.txt"], False), (["d/seed00", "d/seed01"], False),
    (["d/x_0.txt", "d/x_0.txt"], False),  # one list for both seeds
    (["d/0percent.txt", "d/1percent.txt"], True), (["d/10", "d/11"], True), (["d/x", "d/y"], True),
    (["d/seed0/x", "d/seed1/y"], True), (["d/x0.0", "d/x0.1"], True)])  # fmt: skip
def test_a_path_that_differs_along_with_the_seed_is_no_setting(tmp_path, paths, differ):
    runs = [make_run(tmp_path / str(i), [record(1, 5)], seed=i, data_path=path) for i, path in enumerate(paths)]
    assert ("data_path" in cells(table(*runs))[0]) == differ


def test_the_later_attempt_at_an_epoch_counts(tmp_path):
    run = make_run(tmp_path / "a", [record(0, 1), record(1, 2), record(0, 3)])
    assert compare_runs.read_log(run / "log.txt") == [record(0, 3)]


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name, content, message", [
    ("run.json", None, "it has no run.json"), ("log.txt", None, "it has no log.txt"),
    ("log.txt", "", "its log.txt is empty"),
    ("log.txt", '{"epoch": 0}\n{"epoch": 1, "te', "/log.txt, line 2 is not JSON: correct or remove the line."),
    ("log.txt", '{"epoch": 0}\n\n', "/log.txt, line 2 is not JSON"),
    ("log.txt", "\xff\n", "/log.txt, line 1 is not JSON"),
    ("log.txt", '{"epoch": 0}\n[1]\n', "/log.txt, line 2 is not the record of an epoch"),
    ("log.txt", '{"acc1": 0}\n', "/log.txt, line 1 is not the record of an epoch"),
    ("log.txt", '{"epoch": -1}\n', "/log.txt, line 1 is not the record of an epoch"),
    ("log.txt", '{"epoch": true}\n', "/log.txt, line 1 is not the record of an epoch"),
    ("log.txt", f'{{"epoch": {10**300}}}\n', "/log.txt, line 1 is not the record of an epoch"),
    ("log.txt", '{"epoch": 1, "test_acc1": "x"}\n', "/log.txt, line 1 is not the record of an epoch"),
    ("log.txt", '{"epoch": 0}\n{"epoch": 1, "test_acc1": ' + "9" * 5000 + "}\n", "/log.txt, line 2 is not JSON"),
    ("log.txt", "[" * 100_000, "/log.txt, line 1 is not JSON"),
    ("run.json", "[" * 100_000, "/run.json, line 1 is not JSON: restore the file"),
    ("run.json", "9" * 5000, "/run.json, line 1 is not JSON: restore the file"),
    ("run.json", '{\n"args": {,\n', "/run.json, line 2 is not JSON: restore the file"),
    ("run.json", "[]", "/run.json has no flags with epochs and seed: give the --output_dir"),
    ("run.json", '{"args": {"epochs": 3}}', "/run.json has no flags with epochs and seed")])  # fmt: skip
@pytest.mark.parametrize("tool", [compare_runs, plot_log])
def test_a_folder_that_is_no_run(tmp_path, tool, name, content, message):
    folder = make_run(tmp_path / "a", [record(0, 1)])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode("latin-1"))
    if content == "" or content is None:
        message = f" is not the folder of a run that has evaluated an epoch, because {message}: give an --output_dir"
    with pytest.raises(SystemExit, match=f"^{name_of(tool)}: error: {tmp_path}/a{message}") as stopped:
        tool.main([str(folder)])
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize("name, content, message", [
    ("run.json", None, "run.json does not exist: give the --output_dir"),
    ("log.txt", None, "log.txt does not exist: give the --output_dir of a run that has evaluated an epoch."),
    ("log.txt", "", "log.txt is empty: wait until"),
])  # fmt: skip
def test_where_all_must_be_runs_the_first_that_is_none_is_named(tmp_path, name, content, message):
    folder = make_run(tmp_path / "a", [record(0, 1)])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=f"^{tmp_path}/a/{message}"):
        compare_runs.read_runs([make_run(tmp_path / "b", [record(0, 1)]), folder])


@pytest.mark.parametrize("tool", [compare_runs, plot_log])
def test_what_is_no_run_is_named_and_left_out(tmp_path, tool, capsys):
    one, two = (make_run(tmp_path / name, [record(0, 50.0)], epochs=1) for name in ("one", "two"))
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "waiting", [], epochs=1)
    make_run(tmp_path / "nothing", [], epochs=1)
    (tmp_path / "nothing/log.txt").unlink()
    (tmp_path / "notes.txt").write_text("{}")
    others = {"empty": "it has no run.json", "waiting": "its log.txt is empty", "nothing": "it has no log.txt",
              "notes.txt": "it is no folder"}  # fmt: skip
    words = [str(path) for path in (tmp_path / "empty", one, *(tmp_path / name for name in list(others)[1:]), two)]
    picture = ["--output", str(tmp_path / "log.png")] if tool is plot_log else []
    assert tool.main([*words, *picture]) is None
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"Left out {tmp_path}/{name}, because {why}." for name, why in others.items()]
    if tool is compare_runs:
        assert printed.out == table(one, two) + "\n" and [row[0] for row in cells(printed.out)] == ["run", "one, two"]
    else:
        assert printed.out == f"Plotted 2 run(s) in {tmp_path}/log.png\n"
    none_left = (
        f"^{name_of(tool)}: error: None of these 3 paths, such as {tmp_path}/empty, is the folder of a run that "
    )
    with pytest.raises(SystemExit, match=none_left + "has .* because it has no run.json: give an --output_dir of sem"):
        tool.main([str(tmp_path / name) for name in ("empty", "waiting", "notes.txt")])
    with pytest.raises(SystemExit, match=f"^{name_of(tool)}: error: {tmp_path}/typo does not exist: give an --output"):
        tool.main([str(one), str(tmp_path / "typo")])


def test_control_characters_of_names_and_flags_are_printed_as_escapes(tmp_path, capsys):
    folder = make_run(tmp_path / "a\x1b[2J\nb", [record(0, 1.0)], epochs=1, data_path="\x1b]0;title\x07")
    other = make_run(tmp_path / "c\u202e", [record(0, 1.0)], epochs=1, data_path="d")
    (tmp_path / "e\x9b").mkdir()
    compare_runs.main([str(path) for path in (folder, other, tmp_path / "e\x9b")])
    printed = capsys.readouterr()
    assert [row[:2] for row in cells(printed.out)[1:]] == [
        [r"a\x1b[2J\nb", r"\x1b]0;title\x07"], [r"c\u202e", "d"]]  # fmt: skip
    assert len({len(line) for line in printed.out.splitlines()}) == 1
    assert printed.err == f"Left out {tmp_path}/e\\x9b, because it has no run.json.\n"
    named = [[text.get_text() for text in legend.get_texts()]
             for legend in plot_log.draw(compare_runs.read_runs([folder, other])).legends]  # fmt: skip
    assert named[1] == [r"a\x1b[2J\nb", r"c\u202e"]
    with pytest.raises(SystemExit) as stopped:
        compare_runs.main([str(tmp_path / "e\x9b")])
    assert "\x9b" not in stopped.value.code


@pytest.mark.parametrize("tool", [compare_runs, plot_log])
def test_a_run_given_twice(tmp_path, tool):
    folder = make_run(tmp_path / "a", [record(0, 1)])
    with pytest.raises(SystemExit, match="is given twice: name each run once."):
        tool.main([str(folder), f"{folder}/../a"])


def name_of(tool):
    return Path(tool.__file__).name


def test_an_unknown_metric(six):
    with pytest.raises(SystemExit, match=r"error: --metric acc7 is not in .* choose from \['epoch', 'test_acc1', "):
        compare_runs.main([str(six[0]), "--metric", "acc7"])


@pytest.mark.parametrize("tool", ["compare_runs", "plot_log"])
def test_an_error_is_a_sentence_and_a_status(tmp_path, tool):
    done = subprocess.run([sys.executable, "-m", f"script.{tool}", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith(f"{tool}.py: error: {tmp_path} is not the folder of a run")
        and done.stderr.count("\n") == 1
    )


def test_plot_log_without_matplotlib_writes_one_sentence(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from script import plot_log; plot_log.main(['x'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "plot_log.py: error: matplotlib is not installed: pip install -r requirements-dev.txt.\n"


@pytest.mark.parametrize("output, message", [
    ("log.pdf", "log.pdf is not the name of a PNG file: end it in .png."),
    ("none/log.png", "none/log.png: No such file or directory; choose a place that can be written.")])  # fmt: skip
def test_plot_log_refuses_an_output(tmp_path, output, message):
    folder = make_run(tmp_path / "a", [record(0, 1)])
    with pytest.raises(SystemExit, match=message):
        plot_log.main([str(folder), "--output", str(tmp_path / output)])


def test_plot_log_refuses_more_runs_than_colours(tmp_path):
    runs = [str(make_run(tmp_path / str(i), [record(0, 1)])) for i in range(8)]
    with pytest.raises(SystemExit, match="error: There are 8 runs for 7 colours: plot fewer at a time."):
        plot_log.main([*runs, "--output", str(tmp_path / "log.png")])


# -------------------------------------------------------------------------------- the picture

TOTAL, LABELLED, UNLABELLED, CNN, TRANSFORMER, SUM, MASK, ACCURACY, RECALL, LARGEST, LEVEL, RATE = range(12)
LATER = {RECALL, LARGEST, LEVEL}
BLUE, ORANGE = "#0072B2", "#D55E00"


def drawn(figure):
    """For each panel its lines as (colour, style, epochs, values)."""

    def line(x):
        return x.get_color(), x.get_linestyle(), list(x.get_xdata()), pytest.approx(list(x.get_ydata()))

    return [[line(x) for x in axis.lines] for axis in figure.axes]


def texts(figure):
    """For each panel what is written inside it."""
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


@pytest.fixture
def supervised_and_semi(tmp_path):
    base = [{"train_lr": 1e-3, "train_loss": 2.5, "train_loss_0": 1.2, "train_loss_1": 1.3,
             **record(0, 20, 22, 18, 10)},
            {"train_lr": 5e-4, "train_loss": 1.5, "train_loss_0": 0.7, "train_loss_1": 0.8,
             **record(2, 40, 42, 38, 30)}]  # fmt: skip
    names = ("train_loss_0_u", "train_loss_1_u", "train_mask_rate", "train_pseudo_acc", "train_pseudo_recall")
    names += ("train_threshold",)
    more = [dict(zip(names, values)) for values in ((0.0, 0.1, 0.0, None, 0.05, 0.1), (0.3, 0.4, 0.25, 0.9, 0.2, 0.5))]
    semi = [old | new for old, new in zip(base, more)]
    runs = [make_run(tmp_path / "seed0" / name, log, epochs=3) for name, log in (("supervised", base), ("semi", semi))]
    return [str(run) for run in runs]


def test_supervised_and_semi_overlaid(supervised_and_semi):
    figure = plot_log.draw(compare_runs.read_runs(supervised_and_semi))
    panels = drawn(figure)
    for panel, style, values in [(TOTAL, "-", [2.5, 1.5]), (CNN, "--", [22, 42]), (TRANSFORMER, ":", [18, 38]),
                                 (SUM, "-", [20, 40]), (RATE, "-", [1e-3, 5e-4])]:  # fmt: skip
        assert panels[panel] == [(colour, style, [0, 2], values) for colour in (BLUE, ORANGE)]
    assert panels[LABELLED] == [
        (BLUE, "--", [0, 2], [1.2, 0.7]), (BLUE, ":", [0, 2], [1.3, 0.8]),
        (ORANGE, "--", [0, 2], [1.2, 0.7]), (ORANGE, ":", [0, 2], [1.3, 0.8])]  # fmt: skip
    assert panels[UNLABELLED] == [(ORANGE, "--", [0, 2], [0.0, 0.3]), (ORANGE, ":", [0, 2], [0.1, 0.4])]
    assert panels[MASK] == [(ORANGE, "-", [0, 2], [0, 25])]
    assert panels[ACCURACY] == [(ORANGE, "-", [2], [90])]  # null in epoch 0: no point, not zero
    assert panels[RECALL] == [(ORANGE, "-", [0, 2], [5, 20])] and panels[LEVEL] == [(ORANGE, "-", [0, 2], [0.1, 0.5])]
    assert texts(figure) == [["not in these logs"] if i in {LARGEST} else [] for i in range(12)]
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() and axis.get_title() for axis in figure.axes)
    named = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert named == [list(plot_log.STYLES), ["supervised", "semi"]]
    assert [line.get_color() for line in figure.legends[1].get_lines()] == [BLUE, ORANGE]
    assert not any(axis.get_legend() for axis in figure.axes)


def test_supervised_alone_says_what_is_not_there(supervised_and_semi):
    figure = plot_log.draw(compare_runs.read_runs(supervised_and_semi[:1]))
    empty = {UNLABELLED, MASK, ACCURACY} | LATER
    assert texts(figure) == [["not in these logs"] if i in empty else [] for i in range(12)]


def test_single_stream_draws_what_it_has(tmp_path):
    log = [{"epoch": e, "train_lr": 0.1, "train_loss": 3 - e, "train_loss_u": e, "test_acc1": 10 * e} for e in (0, 1)]
    figure = plot_log.draw(compare_runs.read_runs([make_run(tmp_path / "deit", log)]))
    panels = drawn(figure)
    for panel, values in {TOTAL: [3, 2], UNLABELLED: [0, 1], SUM: [0, 10], RATE: [0.1, 0.1]}.items():
        assert panels[panel] == [(BLUE, "-", [0, 1], values)]
    empty = {LABELLED, CNN, TRANSFORMER, MASK, ACCURACY} | LATER
    assert texts(figure) == [["not in these logs"] if i in empty else [] for i in range(12)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["whole network"]


def test_the_file_is_a_png_of_twice_a_readme_s_width(supervised_and_semi, tmp_path, capsys):
    plot_log.main([*supervised_and_semi, "--output", str(tmp_path / "log.png")])
    assert capsys.readouterr().out == f"Plotted 2 run(s) in {tmp_path}/log.png\n"
    with Image.open(tmp_path / "log.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1660)


@pytest.mark.parametrize("folders, names", [
    (["/a/semi"], ["semi"]), (["/a/x", "/a/y"], ["x", "y"]),
    (["/a/seed0/semi", "/a/seed1/semi", "/b/z"], ["seed0/semi", "seed1/semi", "b/z"]),
    (["/a", "/b/a"], ["/a", "b/a"])])  # fmt: skip
def test_names_are_as_short_as_they_can_be(folders, names):
    assert compare_runs.short_names(folders) == names
