"""tests/proofs/prove_memory.py: its slope by hand, and a short run that finds the process and its four workers."""

import re

import pytest

from tests.proofs import prove_memory
from tests.trees import forked


def test_slope_is_that_of_the_last_three_quarters():
    start = [(10 * i, 500.0 - 9 * i) for i in range(10)]  # start-up: not counted
    assert prove_memory.slope(start + [(100 + 10 * i, 300 + 0.02 * i) for i in range(30)]) == pytest.approx(2.0)


def test_a_short_run_measures_the_process_and_its_workers():
    (done,) = forked("tests.proofs.prove_memory", "--steps", "20")
    rows = re.findall(r"^\| (training process|worker \d) \| (\d+) \| ([\d.]+) \|", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["training process", *(f"worker {i}" for i in range(1, 5))], done.stderr
    # A printed line every ten steps, the last left out; no PyTorch process is smaller than 100 MB.
    assert all(int(samples) == 2 and float(memory) > 100 for _, samples, memory in rows)
