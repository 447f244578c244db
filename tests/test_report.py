"""The report of an evaluation against slow loops over images; its files, its pictures, and what is missing."""

import builtins
import csv
import json
from contextlib import nullcontext
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from engine import evaluate
from training import report
from training.report import BINS, Tally

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures of few pixels, for they are slow to draw."""
    monkeypatch.setattr(report, "DPI", 40)


class Streams(nn.Module):
    """Two streams that are slices of their input."""

    def forward(self, x):
        return [x[:, :, 0], x[:, :, 1]]


def data(classes=7, sizes=(40, 40, 11), seed=0):
    """Batches of logits (N, C, 2) and targets, among which the last class has no image."""
    g = torch.Generator().manual_seed(seed)
    for n in sizes:
        target = torch.randint(classes - 1, (n,), generator=g)
        logits = torch.randn(n, classes, 2, generator=g) * 2
        logits[range(n), target] += 2
        yield logits, target


def tallied(batches, classes=7):
    tally = Tally(classes, CPU)
    meters = evaluate(Streams(), tally.clocked(batches), autocast=nullcontext, observe=tally.add)
    return tally, meters, tally.over_ranks()


def test_counts_equal_a_slow_loop_over_images():
    tally, meters, figures = tallied(data())
    hits, confusion = np.zeros((3, 7), int), np.zeros((7, 7), int)
    bins = [[] for _ in range(BINS)]  # (hit, confidence)
    for logits, targets in data():
        for x, target in zip(logits.double(), targets.tolist()):
            predicted = [score.argmax().item() for score in (x.sum(1), x[:, 0], x[:, 1])]
            hits[:, target] += np.array(predicted) == target
            confusion[target, predicted[0]] += 1
            confidence = (x[:, 0].float() + x[:, 1].float()).double().softmax(0).max().item()
            bins[ceil(confidence * BINS) - 1].append((predicted[0] == target, confidence))
    assert tally.confusion.tolist() == confusion.tolist() and tally.hits.tolist() == hits.tolist()
    assert [int(n) for n in tally.bins[0]] == [len(each) for each in bins]
    gaps = [len(each) * abs(np.mean([h for h, _ in each]) - np.mean([c for _, c in each])) for each in bins if each]
    assert figures["ece"] == pytest.approx(sum(gaps) / 91, rel=1e-9) and 0.01 < figures["ece"] < 0.5
    for row, name in zip(hits, ("acc1", "acc1_head1", "acc1_head2")):
        assert 100 * row.sum() / 91 == pytest.approx(meters[name], rel=1e-12)


def test_the_meters_are_those_of_an_evaluation_without_a_report():
    assert tallied(data())[1] == evaluate(Streams(), data(), autocast=nullcontext)


def test_confidence_at_a_bins_edge_belongs_to_the_bin_below_and_a_perfect_network_has_no_error():
    tally, best = Tally(3, CPU), torch.zeros(3, 1, dtype=torch.int64)
    even = torch.zeros(3, 3)  # confidence 1/3: the fifth of 15 bins
    confident = torch.tensor([[100.0, 0.0, 0.0]] * 3)  # 1: the last
    for scores, target in ((even, [0, 1, 2]), (confident, [0, 0, 0])):
        tally.add({"": scores}, {"": best}, torch.tensor(target))
    assert {i: n for i, n in enumerate(tally.bins[0].tolist()) if n} == {4: 3, 14: 3}
    assert tally.over_ranks()["ece"] == pytest.approx(0, abs=1e-12)
    assert tally.hits.tolist() == [[4, 0, 0], [0] * 3, [0] * 3]  # no second stream
    thirds = torch.tensor([[3.0, 3, 3], [1, 1, 1], [0, 3, 2]], dtype=torch.float64)
    assert report.calibration_error(thirds) == pytest.approx((1 + 2 + 1) / 9)


def test_ranks_are_summed(monkeypatch):
    whole, *_ = tallied(data())
    batches = list(data())
    monkeypatch.setattr(utils, "gather", lambda own: [own])
    shares = [tallied(share)[0] for share in (batches[:2], batches[2:])]
    monkeypatch.setattr(utils, "sum_over_ranks", lambda own: own.add_(other.pop(0)))
    monkeypatch.setattr(utils, "gather", lambda own: [own, (30, 1.0, 4.0)])
    other = [shares[1].confusion, shares[1].hits, shares[1].bins]
    shares[0].images, shares[0].waited, shares[0].start = 10, 0.0, None
    figures = shares[0].over_ranks()
    assert (figures["images_per_second"], figures["data_wait"]) == (40 / 4, 1 / 4)
    for name in ("confusion", "hits", "bins"):
        assert torch.allclose(getattr(shares[0], name).double(), getattr(whole, name).double(), rtol=1e-12)


def test_the_clock_starts_after_the_first_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def batches():
        for n, waiting in ((5, 100.0), (8, 1.0), (4, 2.0)):
            now[0] += waiting
            yield (torch.zeros(n),)

    tally = Tally(2, CPU)
    for (images,) in tally.clocked(batches()):
        now[0] += 50.0 if len(images) == 5 else 3.0
    figures = tally.over_ranks()
    assert figures["images_per_second"] == pytest.approx(12 / 9) and figures["data_wait"] == pytest.approx(3 / 9)
    alone = Tally(2, CPU)
    list(alone.clocked([(torch.zeros(5),)]))
    figures = alone.over_ranks()
    assert figures["images_per_second"] is figures["data_wait"] is None
    assert report.summary(figures | {"ece": 0.5}).endswith("error 0.5000; one batch is too few to time")


NAMES = ["T-shirt/top", 'a "b", c', "$x^2", "d", "e", "f", "never seen"]


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_files(tmp_path):
    tally, meters, _ = tallied(data())
    report.write(tmp_path, tally, NAMES, 2, "ema_")
    head, *table = rows(tmp_path / "ema_per_class.csv")
    assert head == ["class", "name", "images", "top1", "top1_cnn", "top1_transformer"]
    assert [row[:2] for row in table] == [[str(i), name] for i, name in enumerate(NAMES)]
    assert table[-1][2:] == ["0", "", "", ""]
    images = [int(row[2]) for row in table]
    assert sum(images) == 91
    for column, name in ((3, "acc1"), (4, "acc1_head1"), (5, "acc1_head2")):
        mean = sum(float(row[column] or 0) * n for row, n in zip(table, images)) / 91
        assert mean == pytest.approx(meters[name], abs=1e-3)
    head, *table = rows(tmp_path / "ema_confusion.csv")
    assert head[1:] == [row[0] for row in table] == NAMES
    assert [[int(x) for x in row[1:]] for row in table] == tally.confusion.tolist()
    for name in ("ema_confusion.png", "ema_reliability.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] == 332 and len(image.convert("RGB").getcolors(2**24)) > 20
    assert len(list(tmp_path.iterdir())) == 4


def test_one_stream_has_one_column_and_more_than_100_classes_have_no_confusion_picture(tmp_path):
    tally = Tally(101, CPU)
    tally.add({"": torch.eye(101)}, {"": torch.arange(101)[:, None]}, torch.arange(101))
    report.write(tmp_path, tally, [str(i) for i in range(101)], 1)
    assert rows(tmp_path / "per_class.csv")[1] == ["0", "0", "1", "100.000"]
    assert {path.name for path in tmp_path.iterdir()} == {"per_class.csv", "confusion.csv", "reliability.png"}


def test_without_matplotlib_the_csv_files_are_there_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    report.write(tmp_path, tallied(data())[0], NAMES, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"per_class.csv", "confusion.csv"}
    assert capsys.readouterr().out == (
        "Cannot draw reliability.png and confusion.png without matplotlib: pip install matplotlib.\n"
    )


@pytest.mark.parametrize("name", ["per_class.csv", "reliability.png"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"^Cannot write {tmp_path / name} .*choose another --output_dir"):
        report.write(tmp_path, tallied(data())[0], NAMES, 2)


def test_figures_are_json():
    assert set(json.loads(json.dumps(tallied(data())[2]))) == {"ece", "images_per_second", "data_wait"}
