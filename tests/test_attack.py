"""tests/proofs/attack.py: a case or two of each area, and every kind of fault is found."""

from collections import Counter

import pytest

from tests.proofs import attack
from tests.proofs.attacks import sandbox
from tests.proofs.attacks.sandbox import DONE, EITHER, REFUSED, REPORTED, Case, command

SHORT = {
    "training state": ["a moment of another shape", "a pickle that executes"],
    "resume": ["another --opt"],
    "output folder": ["run.lock: a link to a file elsewhere", "log.txt: a FIFO"],
    "images": ["fifo, to evaluate", "narrow, to train with"],
    "lists and tables": ["100,000 blanks and a name"],
    "flags": ["--lr nan"],
    "scripts": ["compare_runs: a log nested 100,000 deep"],
    "signals": ["SIGKILL to a worker"],
    "resources": ["files of at most 1 MB"],
}


def test_a_case_or_two_of_each_area_survive():
    chosen = [case for case in attack.CASES if case.name in SHORT[case.area]]
    assert len(chosen) == 12
    assert [(case.name, why) for case, end, why in attack.run(chosen) if end != "survived"] == []


def test_there_are_enough_cases_with_names_of_their_own():
    assert list(SHORT) == attack.AREAS and len(attack.CASES) >= 400
    assert max(Counter((case.area, case.name) for case in attack.CASES).values()) == 1


# ------------------------------------------------------------------------------- the proof itself finds faults


@pytest.fixture(scope="module", autouse=True)
def originals():
    yield
    sandbox.remove_originals()


@pytest.fixture
def fault(tmp_path):
    """A function: what is wrong with a program of these lines, where it must end so."""

    def found(lines, ends=REFUSED, words="", limit_s=10, **settings):
        program = tmp_path / "x.py"
        program.write_text(f"import os, signal, subprocess, sys, time\n{lines}\n")
        case = Case("area", "name", lambda box: command(str(program), **settings), ends, words)
        return sandbox.attack(case, limit_s).partition("\n")[0]

    return found


GOOD = "sys.exit('x.py: error: the list is wrong.')"


@pytest.mark.parametrize("lines, ends, words", [
    (GOOD, REFUSED, "list is wrong"), (GOOD, EITHER, "list is wrong"), ("print('Trained')", DONE, "Trained"),
    ("print('Trained')", EITHER, ""), ("print('one is bad'); sys.exit(1)", REPORTED, "one is bad"),
    ("os.mkdir('out'); open('out/a', 'w')", DONE, ""), ("os.kill(os.getpid(), signal.SIGTERM)", 15, ""),
    ("sys.exit('x.py: error: no flag --x\\nsee x.py --help')", REFUSED, "no flag"),
])  # fmt: skip
def test_a_program_that_ends_as_it_must_survives(fault, lines, ends, words):
    assert fault(lines, ends, words) == ""


@pytest.mark.parametrize("lines, found", [
    ("os.kill(os.getpid(), signal.SIGSEGV)", "it ended with status -11, not refused"),
    ("os.abort()", "it ended with status -6, not refused"),
    ("raise RuntimeError('x.py: error: x')", "it printed 'Traceback (most'"),
    ("class C:\n    def __del__(self):\n        1 / 0\nC()\n" + GOOD, "it printed 'Exception ignored'"),
    ("print('Trained')", "it ended with status 0, not refused"),
    ("sys.exit('the list is wrong.')", "its last message is not one of ours: 'the list is wrong.'"),
    ("sys.exit('x.py: error: the list\\nis wrong.')", "its last message is not one of ours: 'is wrong.'"),
    ("sys.exit('x.py: error: \\x1b[2J')", r"its last message is not one of ours: 'x.py: error: \x1b[2J'"),
    ("sys.exit(1)", "its last message is not one of ours: ''"),
    ("sys.exit('x.py: error: the list.')", "its last message has no 'wrong'"),
    ("open('a', 'w')", "it changed ['a']"), ("os.mkdir('a')", "it changed ['a']"),
    ("os.remove('data/labelled.txt')", "it changed ['data/labelled.txt']"),
    ("open('data/labelled.txt', 'a').write('x')", "it changed ['data/labelled.txt']"),
    ("os.chmod('data/labelled.txt', 0)", "it changed ['data/labelled.txt']"),
    ("os.rename('data/labelled.txt', 'b'); os.symlink('../b', 'data/labelled.txt')", "it changed ['b', 'data/"),
    ("open('tmp/x', 'w')", "it changed ['tmp/x']"),
])  # fmt: skip
def test_every_fault_is_found(fault, lines, found):
    assert fault(lines, words="wrong").startswith(found)


def test_what_does_not_end_in_time_is_a_fault(fault):
    assert fault("time.sleep(60)", limit_s=0.5) == "it was still running after 0.5 s"
    assert fault("subprocess.Popen(['sleep', '60'])\n" + GOOD, limit_s=2) == "it left 1 processes behind"


def test_ends_that_are_not_those_of_the_case_are_faults(fault):
    assert fault(GOOD, DONE) == "it ended with status 1, not done"
    assert fault(GOOD, REPORTED) == "it ended with status 1, not reported"
    assert fault("sys.exit(2)", REPORTED) == "it ended with status 2, not reported"
    assert fault("pass", 15) == "it ended with status 0, not 15"
    assert fault("os.kill(os.getpid(), 9)", EITHER) == "it ended with status -9, not either"
    assert fault("print('Trained')", DONE, "Resumed") == "its output has no 'Resumed'"


def test_only_what_it_may_write_is_written(fault):
    lines = "os.mkdir('out'); open('out/a', 'w'); open('out/b', 'w')"
    assert fault(lines, DONE, may_write=("out",)) == ""
    assert fault(lines, DONE, may_write=("out/a",)) == "it changed ['out', 'out/b']"


def test_the_table_and_the_status(capsys, monkeypatch):
    cases = [Case(area, str(i), None) for area in ("images", "flags") for i in range(2)]
    results = [(case, end, "why") for case, end in zip(cases, ("survived", "failed", "skipped", "survived"))]
    monkeypatch.setattr(attack, "run", lambda cases: results)
    assert attack.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "images, 1: failed: why", "", "flags, 0: skipped: why", "",
        "| area | tried | survived |", "|---|--:|--:|", "| images | 2 | 1 |", "| flags | 1 | 1 |",
        "| **all** | 3 | 2 |",
    ]  # fmt: skip
    monkeypatch.setattr(attack, "run", lambda cases: results[2:])
    assert attack.main(["--only", "flags"]) == 0
