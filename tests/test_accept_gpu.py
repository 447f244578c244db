"""benchmarks/accept_gpu.py: runs to its end without a GPU; a part that fails, hangs or dies has a row that says so."""

import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import accept_gpu
from tests.test_compare import cells
from tests.trees import forked


def test_every_part_passes_or_is_skipped_on_a_cpu(tmp_path):
    (done,) = forked("benchmarks.accept_gpu", "--device", "cpu", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = cells((tmp_path / "table.md").read_text())
    assert [row[1] for row in rows] == list(accept_gpu.PARTS) and {row[0] for row in rows} == {"PASS"}
    skipped = {row[1] for row in rows if row[2] == "skipped: no CUDA"}
    assert skipped == {"card", "waits", "memory"}
    assert "identical end after a kill: yes" in dict(row[1:] for row in rows)["resume"]


def dies(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(_):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)


def breaks(_):
    raise LookupError("the reason\nand more")


@pytest.mark.parametrize("part, figure", [
    (dies, "ended with status -9; see part.txt"), (hangs, "ended at its limit of 3 s; see part.txt"),
    (breaks, "LookupError: the reason; see part.txt"), (lambda _: (False, "too slow"), "too slow")])  # fmt: skip
def test_a_part_that_does_not_pass_fails(tmp_path, monkeypatch, part, figure):
    monkeypatch.setitem(accept_gpu.PARTS, "part", (part, 3, False))
    (tmp_path / "part.json").write_text(json.dumps([True, "of an earlier run"]))
    assert accept_gpu.outcome("part", Namespace(device="cpu", output=tmp_path)) == ("FAIL", figure)
    if part is hangs:
        child, until = (tmp_path / "part.txt").read_text().strip(), time.monotonic() + 10
        while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < until
    if part is breaks:
        assert "Traceback" in (tmp_path / "part.txt").read_text()


def test_without_a_gpu_the_default_says_what_to_do(tmp_path):
    (done,) = forked("benchmarks.accept_gpu", "--output", tmp_path, environments=[{"CUDA_VISIBLE_DEVICES": ""}])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "accept_gpu.py: error: PyTorch sees no CUDA GPU here: pass --device cpu --quick to try the program.\n"
    )
