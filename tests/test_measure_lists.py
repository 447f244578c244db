"""The memory that lists of images take: bytes per entry, and benchmarks/measure_lists.py on a short list."""

import re

import numpy as np
import pytest

from benchmarks import measure_lists
from datasets import MultiViewDataset
from images.loading import TrainingLoader
from samplers import training_order
from tests.trees import forked


def test_an_entry_takes_its_path_and_four_numbers(tmp_path):
    n = 10_000
    samples = measure_lists.synthetic(tmp_path, n)
    views = MultiViewDataset(samples, np.arange(n), np.asarray)
    loader = TrainingLoader(views, training_order(n), seed=0, rank=0, stream=0)
    loader.start(0, 10, n // 10)
    held = {type(value) for thing in (samples.source, views) for value in vars(thing).values() if np.size(value) > 8}
    assert held == {np.ndarray}
    assert samples.source._bytes.nbytes == n * len(samples.source.path(0)) == n * 31
    assert samples.source._ends.nbytes == samples.targets.nbytes == views.indices.nbytes == n * 8
    order = loader._plans.current.order
    assert (len(order), order.itemsize) == (n, 8)
    assert sorted(order) == list(range(n)) and type(order[0]) is int
    assert samples.source.load(n - 1).size == (40, 36)


def test_a_short_list_costs_next_to_nothing(monkeypatch, capsys):
    def run(command, **_):
        (done,) = forked(*command[command.index("-m") + 1 :])
        return done

    words = ["--images", "5000", "--workers", "2", "--batches", "20"]
    monkeypatch.setattr("sys.argv", ["measure_lists.py", *words])
    monkeypatch.setattr(measure_lists.subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        measure_lists.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (training process|worker \d) \| ([\d.]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["training process", "worker 1", "worker 2"], printed
    assert all(float(pss) > 30 for _, *columns in rows for pss in columns)  # Python and PyTorch alone
    assert not ended.value.code and "limit 200" in printed
