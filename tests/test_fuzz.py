"""Damaged split files, lists, CSV files, checkpoints and flags: the right result, or one error that names them."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proofs import fuzz

SETTINGS = {"derandomize": True, "deadline": None, "database": None, "max_examples": 300}


def test_a_short_run_has_no_failure():
    counts, failures = fuzz.run(370, seed=1)
    assert failures == []
    cells = {(kind, damage) for kind, damage, _ in counts}
    assert len(cells) == 37 and counts.total() == 370
    outcomes = Counter()
    for (kind, _, outcome), n in counts.items():
        outcomes[kind, outcome] += n
    kinds = ("split file", "list", "CSV file", "checkpoint", "training state", "flags")
    assert all(outcomes[kind, outcome] >= 2 for kind in kinds for outcome in ("accepted", "refused"))


def test_the_same_seed_gives_the_same_cases():
    assert [fuzz.run(40, seed)[0] for seed in (3, 3)] == [fuzz.run(40, 3)[0]] * 2
    assert fuzz.run(200, 3)[0] != fuzz.run(200, 4)[0]


def test_every_undamaged_file_is_accepted(tmp_path):
    for subject in fuzz.subjects(tmp_path).values():
        assert subject.expected(subject.valid) is not None
        assert fuzz.file_case(subject, subject.valid) == ("accepted", "")


# ------------------------------------------------------------------------------- any text, any flags

ROWS = st.lists(
    st.lists(st.sampled_from([*fuzz.NAMES, "1.jpg", "same.jpg", "é.jpg", "..", "/", "//", ",", "0", "12", "-1", "-0",
                              '"', " ", "\t", "\r", "\0", "\u2028", "²", "٣", "path", "label", "x", "\ufeff"]),
             max_size=6).map("".join), max_size=5).map("\n".join)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return fuzz.subjects(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", ["split file", "list", "CSV file"])
def test_any_rows_are_read_as_the_slow_reader_reads_them(files, kind):
    @settings(**SETTINGS)
    @given(ROWS | st.text(max_size=40))
    def check(text):
        outcome, why = fuzz.file_case(files[kind], text.encode("utf-8", "surrogatepass"))
        assert outcome in ("accepted", "refused"), why

    check()


def test_any_flags_are_answered_by_one_error():
    @settings(**SETTINGS)
    @given(st.randoms(use_true_random=False))
    def check(rng):
        outcome, why = fuzz.flags_case(*fuzz.command_line(rng))
        assert outcome in ("accepted", "refused"), why

    check()


# ------------------------------------------------------------------------------- the fuzz itself finds faults


def reading(subject, read):
    """The subject with another reader."""
    return fuzz.Subject(subject.path, subject.valid, read, subject.expected, subject.may_refuse)


def raising(error):
    def read(path):
        raise error(path) if callable(error) else error

    return read


@pytest.mark.parametrize("read, words", [
    (lambda path: [0], "read as"), (raising(IndexError("x")), "IndexError"), (raising(ValueError("x")), "ValueError"),
    (raising(lambda path: ValueError(f"{path}\nx")), "ValueError"), (raising(UserWarning("x")), "UserWarning"),
    (raising(lambda path: ValueError(str(path))), "refused a valid file"),
])  # fmt: skip
def test_faults_of_a_reader_are_found(files, read, words):
    subject = reading(files["split file"], read)
    outcome, why = fuzz.file_case(subject, subject.valid)
    assert outcome == "failed" and words in why


def test_a_checkpoint_read_wrongly_is_found(files):
    subject = reading(files["checkpoint"], lambda path: ("dict", []))
    assert fuzz.file_case(subject, subject.valid)[0] == "failed"


def test_faults_of_the_flags_are_found(monkeypatch):
    right, wrong = ["--lr", "1"], ["--lr", "-1"]
    assert fuzz.flags_case(right, {"--lr": "1"}) == ("accepted", "")
    assert fuzz.flags_case(right, {"--lr": "2"})[0] == "failed"
    assert fuzz.flags_case(wrong, {"--lr": "-1"}, {"--lr"}) == ("refused", "")
    assert fuzz.flags_case(wrong, {"--lr": "-1"})[0] == "failed"  # the slow check finds nothing wrong
    monkeypatch.setattr(fuzz.options, "check", lambda args: None)
    assert fuzz.flags_case(wrong, {"--lr": "-1"}, {"--lr"})[0] == "failed"
    monkeypatch.setattr(fuzz.options, "check", raising(ValueError("wrong")))
    assert fuzz.flags_case(wrong, {"--lr": "-1"}, {"--lr"})[0] == "failed"
    monkeypatch.setattr(fuzz.options, "check", raising(KeyError("--lr")))
    assert fuzz.flags_case(wrong, {"--lr": "-1"}, {"--lr"})[0] == "failed"


def test_the_table_and_the_status(capsys, monkeypatch):
    counts = Counter({("list", "cut off", "accepted"): 1200, ("list", "cut off", "failed"): 1,
                      ("flags", "combined", "refused"): 2})  # fmt: skip
    monkeypatch.setattr(fuzz, "run", lambda mutations, seed: (counts, ["Case 7 of --seed 0, list, cut off: x"]))
    assert fuzz.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "Case 7 of --seed 0, list, cut off: x",
        "| what | damage | cases | accepted | refused | failed |",
        "|---|---|--:|--:|--:|--:|",
        "| flags | combined | 2 | 0 | 2 | 0 |",
        "| list | cut off | 1,201 | 1,200 | 0 | 1 |",
        "| **all** | | 1,203 | 1,200 | 2 | 1 |",
    ]
    monkeypatch.setattr(fuzz, "run", lambda mutations, seed: (counts, []))
    assert fuzz.main([]) == 0


def test_damage_changes_what_it_says():

    text = b"one,1\ntwo,2\nthree,3\n"
    for name, damage in fuzz.DAMAGE.items():
        seen = {damage(random.Random(i), text) for i in range(50)}
        assert len(seen - {text}) >= 3, name
    lines = {name: {len(fuzz.DAMAGE[name](random.Random(i), text).splitlines()) for i in range(9)}
             for name in ("line dropped", "line doubled", "fields swapped")}  # fmt: skip
    assert lines["line dropped"] == {2} and lines["line doubled"] == {4}
    assert all(sorted(fuzz.swap_fields(random.Random(i), text)) == sorted(text) for i in range(9))
    assert all(text.startswith(fuzz.truncate(random.Random(i), text)) for i in range(9))
