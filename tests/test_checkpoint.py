"""Saving and loading: whole files, nothing foreign executed, every mismatch named."""

import argparse
import errno
import io
import os
import pathlib
import pickle
import random
import resource
import shutil
import subprocess
from collections import OrderedDict
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import utils
from tests.equality import same
from tests.trees import parse
from training import checkpoint, optimization
from training.checkpoint import TrainState


def state_of(classes=3, seed=0, ema=True):
    torch.manual_seed(seed)
    layers = {"body": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "fc": nn.Linear(5, classes)}
    model = nn.Sequential(OrderedDict(layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = optimization.build_scheduler(
        parse("--sched", "step", "--decay-epochs", 2, "--warmup-epochs", 0), optimizer
    )
    average = ModelEmaV3(model, decay=0.5) if ema else None
    return TrainState(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), average)


def advance(state, steps=3):
    for k in range(steps):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
        state.optimizer.zero_grad()
        state.model(x).square().mean().backward()
        state.optimizer.step()
        state.ema and state.ema.update(state.model)
        state.epoch += 1
        state.scheduler.step(state.epoch, metric=10.0)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_a_loaded_state_goes_on_to_the_bit(tmp_path):
    whole, first = state_of(), state_of()
    advance(whole, 3), advance(first, 3)
    first.best = {"acc1": 61.5, "epoch": 1}
    checkpoint.save(first.to_dict(argparse.Namespace(lr=1)), tmp_path / "checkpoint.pth")
    second = state_of(seed=9)
    second.from_dict(checkpoint.read(tmp_path / "checkpoint.pth"), "checkpoint.pth")
    assert second.epoch == 2 and second.best == first.best
    assert equal(second.ema.module, first.ema.module) and not equal(second.ema.module, second.model)
    advance(whole, 2), advance(second, 2)
    assert equal(whole.model, second.model) and equal(whole.ema.module, second.ema.module)
    assert whole.scheduler.state_dict() == second.scheduler.state_dict()


def test_the_file_has_the_published_keys_and_replaces_the_old_one_whole(tmp_path, monkeypatch):
    path, state = tmp_path / "checkpoint.pth", state_of()
    checkpoint.save(state.to_dict(argparse.Namespace()), path)
    published = {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "args"}
    assert set(checkpoint.read(path)) == published | {"scaler", "best", "classes", "bad_images"}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match=r"Cannot write .*checkpoint\.pth \(No space left on device\): make room there"):
        checkpoint.save(state.to_dict(argparse.Namespace(lr=2)), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_file_stays_and_neither_name_is_ever_missing(tmp_path, monkeypatch, links):
    path, previous, seen = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.prev.pth", []
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    replace = os.replace

    def watched(source, target):
        replace(source, target)
        seen.append((path.exists(), previous.exists()))

    monkeypatch.setattr(os, "replace", watched)
    for k in range(3):
        (tmp_path / "checkpoint.prev.pth.tmp").write_bytes(b"left by a kill")
        checkpoint.save({"epoch": k}, path, previous)
        assert checkpoint.read(path)["epoch"] == k
        assert k == 0 or checkpoint.read(previous)["epoch"] == k - 1
    assert seen == [(True, False), *[(links, True), (True, True)] * 2]
    # Killed between its two renames, a run has one file under both names, and saves again.
    os.remove(previous), shutil.copyfile(path, tmp_path / "x"), replace(tmp_path / "x", previous)
    os.remove(path), (os.link if links else shutil.copyfile)(previous, path)
    checkpoint.save({"epoch": 3}, path, previous)
    assert (checkpoint.read(path)["epoch"], checkpoint.read(previous)["epoch"]) == (3, 2)
    left = set() if links else {"checkpoint.prev.pth.tmp"}
    assert set(os.listdir(tmp_path)) - left == {"checkpoint.pth", "checkpoint.prev.pth"}


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_a_link_to_the_same_file_where_there_are_links(tmp_path, monkeypatch, links):
    best, path, previous = (tmp_path / name for name in ("best.pth", "checkpoint.pth", "checkpoint.prev.pth"))
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for k in range(3):
        content = {"epoch": k}
        checkpoint.save(content, best)
        checkpoint.save_again(content, best, path, previous)
        assert [checkpoint.read(each)["epoch"] for each in (best, path)] == [k, k]
        assert os.path.samefile(best, path) == links
        assert k == 0 or checkpoint.read(previous)["epoch"] == k - 1
    checkpoint.save({"epoch": 3}, path, previous)  # an epoch that is not the best
    assert [checkpoint.read(each)["epoch"] for each in (best, path, previous)] == [2, 3, 2]
    assert not list(tmp_path.glob("*.tmp")) or not links


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def assert_refused(path, previous, reason):
    message = rf"Cannot write .*{path.name} \({reason}\): make room there, or choose "
    with pytest.raises(OSError, match=message) as caught:
        checkpoint.save({"epoch": 9, "tensor": torch.randn(200_000)}, path, previous)
    assert "\n" not in str(caught.value)
    assert (checkpoint.read(path)["epoch"], checkpoint.read(previous)["epoch"]) == (1, 0)


def test_a_full_disk_leaves_both_checkpoints_and_a_sentence(small_disk):
    path, previous = small_disk / "checkpoint.pth", small_disk / "checkpoint.prev.pth"
    for k in range(2):
        checkpoint.save({"epoch": k, "tensor": torch.randn(10_000)}, path, previous)
    assert_refused(path, previous, "No space left on device")
    assert set(os.listdir(small_disk)) == {path.name, previous.name}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_refused(path, previous, "Read-only file system")


def test_a_file_that_may_not_grow_leaves_both_checkpoints_and_a_sentence(tmp_path):
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.prev.pth"
    for k in range(2):
        checkpoint.save({"epoch": k}, path, previous)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert_refused(path, previous, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(os.listdir(tmp_path)) == {path.name, previous.name}


class Interrupted(io.BufferedWriter):
    """A file in whose third write Ctrl-C comes."""

    def __init__(self, file):
        super().__init__(file.raw)
        self.writes = 0

    def write(self, content):
        self.writes += 1
        if self.writes == 3:
            raise KeyboardInterrupt
        return super().write(content)


def test_ctrl_c_while_a_checkpoint_is_written_stays_what_it_is(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({"epoch": 0}, path)

    @contextmanager
    def interrupted(path, before_rename=None):
        with utils.atomic(path, before_rename) as file:
            yield Interrupted(file)

    monkeypatch.setattr(checkpoint, "atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 1, "tensor": torch.randn(9)}, path)
    assert os.listdir(tmp_path) == [path.name] and checkpoint.read(path) == {"epoch": 0}


def test_a_published_file_loads_with_its_namespace_and_paths(tmp_path):
    state = state_of()
    content = {**state.to_dict(None), "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("out"), gpu=0)}
    del content["scaler"], content["best"], content["classes"]
    torch.save(content, tmp_path / "semiformer.pth")
    loaded = checkpoint.read(tmp_path / "semiformer.pth")
    assert loaded["args"].lr == 1e-3 and str(loaded["args"].output_dir) == "out"
    other = state_of(seed=4)
    other.from_dict(loaded, "semiformer.pth")
    assert equal(other.model, state.model) and other.epoch == -1 and other.best == {"acc1": 0.0, "epoch": -1}


def test_a_bare_state_dict_gives_weights_alone_and_says_so(tmp_path, capsys):
    state, other = state_of(), state_of(seed=4)
    torch.save(state.model.state_dict(), tmp_path / "bare.pth")
    other.from_dict(checkpoint.read(tmp_path / "bare.pth"), "bare.pth")
    assert equal(other.model, state.model) and equal(other.ema.module, state.model) and other.epoch == -1
    printed = capsys.readouterr().out
    assert "bare.pth holds no model_ema" in printed and "bare.pth lacks optimizer, lr_scheduler, epoch" in printed


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save({"model": state_of().model.state_dict(), "args": Hostile(mark)}, path)
    with pytest.raises(ValueError, match=r"Refused to load .*evil\.pth: it holds \S*system, more than weights.*$"):
        checkpoint.read(path)
    assert not mark.exists()
    path.write_bytes(b"\x80\x02zzzz")
    with pytest.raises(ValueError, match=r"Cannot read .*evil\.pth, it is damaged or no PyTorch file\.$"):
        checkpoint.read(path)
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # the same object does run code where pickle is trusted


@pytest.mark.parametrize("damage", ["truncated", "cut by a byte", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "checkpoint.pth"
    torch.save(state_of().to_dict(None), path)
    whole = path.read_bytes()
    kinds = {"truncated": whole[:1000], "cut by a byte": whole[:-1], "empty": b"", "text": b"not a checkpoint\n"}
    path.write_bytes(kinds[damage])
    with pytest.raises((ValueError, OSError), match=r"checkpoint\.pth") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint .*none.pth"):
        checkpoint.read(tmp_path / "none.pth")


def test_a_flipped_bit_of_a_weight_is_found_though_pytorch_does_not_look(tmp_path):
    path, content = tmp_path / "checkpoint.pth", state_of().to_dict(None)
    checkpoint.save(content, path)
    whole = path.read_bytes()
    place = whole.index(content["model"]["body.weight"].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert not same(torch.load(path, weights_only=True), content)
    with pytest.raises(ValueError, match=r"Cannot read the checkpoint .*checkpoint\.pth, it is damaged .*checksum"):
        checkpoint.read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_any_flipped_bit_or_cut_gives_the_same_content_or_one_sentence(tmp_path, legacy):
    path, content = tmp_path / "checkpoint.pth", state_of().to_dict(argparse.Namespace(lr=1))
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole, draw, refused = path.read_bytes(), random.Random(5), 0
    for k in range(300):
        place = draw.randrange(len(whole))
        cut = whole[:place] if k % 3 == 0 else whole[:place] + bytes([whole[place] ^ 1 << k % 8]) + whole[place + 1 :]
        path.write_bytes(cut)
        try:
            read = checkpoint.read(path)
            # A file of the old kind has no checksums: it may be read as another one.
            assert legacy or same(read, content)
        except (ValueError, OSError) as error:
            assert "checkpoint.pth" in str(error) and "\n" not in str(error)
            refused += 1
    assert legacy or refused > 100


def test_a_safetensors_file_holds_weights_names_and_flags_or_is_named(tmp_path):
    weights, path = state_of().model.state_dict(), tmp_path / "model.safetensors"
    checkpoint.save_safetensors(weights, {"classes": ["cat"], "epoch": 3, "args": {"lr": 0.1}}, path)
    content = checkpoint.read(path)
    assert same(dict(sorted(content["model"].items())), dict(sorted(weights.items())))
    assert (content["classes"], content["epoch"], content["args"]) == (["cat"], 3, argparse.Namespace(lr=0.1))
    for damaged in (path.read_bytes()[:-1], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Cannot read .*model\.safetensors, it is damaged or no saf") as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value)


def test_other_networks_and_class_counts_are_named():
    model, weights = state_of(3).model, state_of(7).model.state_dict()
    with pytest.raises(ValueError, match="The head in a.pth has 7 classes, but the data has 3 class folders"):
        checkpoint.load_weights(model, weights, "a.pth")
    with pytest.raises(ValueError, match=r"a.pth is of another network: it lacks 1 tensors of this one \['fc.bias'\]"):
        checkpoint.load_weights(model, {k: v for k, v in model.state_dict().items() if k != "fc.bias"}, "a.pth")
    with pytest.raises(ValueError, match=r"and has 1 others \['x'\]"):
        checkpoint.load_weights(model, {**model.state_dict(), "x": torch.zeros(1)}, "a.pth")
    wide = {**model.state_dict(), "body.weight": torch.zeros(5, 9)}
    with pytest.raises(ValueError, match=r"body.weight is \(5, 9\) there, \(5, 4\) here"):
        checkpoint.load_weights(model, wide, "a.pth")
    with pytest.raises(ValueError, match="a.pth holds no state dict"):
        checkpoint.weights_in({"epoch": 3}, "a.pth")


def test_a_checkpoint_keeps_the_class_names_and_goes_on_with_these_only(tmp_path):
    first, second, third = state_of(), state_of(seed=4), state_of(seed=5)
    first.classes, second.classes = ("cat", "dog", "maître"), ("cat", "cow", "maître")
    checkpoint.save(first.to_dict(None), tmp_path / "a.pth")
    content = checkpoint.read(tmp_path / "a.pth")
    assert checkpoint.classes_in(content) == ["cat", "dog", "maître"]
    before = deepcopy(second.model)
    with pytest.raises(ValueError, match="a.pth is of other classes than the data, whose class 1 is 'dog' there and"):
        second.from_dict(content, "a.pth")
    assert equal(second.model, before)
    third.from_dict(content, "a.pth")  # of data without names, as before
    second.from_dict({key: value for key, value in content.items() if key != "classes"}, "a.pth")
    assert equal(second.model, first.model) and equal(third.model, first.model)


@pytest.mark.parametrize("content", [{}, [1], {"classes": []}, {"classes": [1, 2]}, {"classes": "cat"}])
def test_what_is_no_list_of_names_is_no_class_names(content):
    assert checkpoint.classes_in(content) is None


def test_control_characters_of_class_names_are_shown_as_escapes():
    difference = checkpoint.class_mismatch(["cat\x1b[2J\n"], ["dog\u202e"])
    assert difference == r"whose class 0 is 'cat\x1b[2J\n' there and 'dog\u202e' here"


def test_an_optimizer_of_another_kind_is_named():
    state = state_of()
    content = state.to_dict(None)
    content["optimizer"] = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1).state_dict()
    with pytest.raises(ValueError, match="The optimizer state in a.pth is not of this network and --opt"):
        state.from_dict(content, "a.pth")


def test_plateau_goes_on_with_its_counters_and_as_plateau_only():
    def plateau(sched="plateau"):
        words = ["--sched", sched, "--warmup-epochs", "0", "--patience-epochs", "2", "--cooldown-epochs", "0"]
        args = parse(*words)
        state = state_of()
        state.scheduler = optimization.build_scheduler(args, state.optimizer)
        return state

    def step(state, epochs):
        return [
            (state.scheduler.step(epoch, metric=50.0), state.optimizer.param_groups[0]["lr"])[1] for epoch in epochs
        ]

    whole, first, second = plateau(), plateau(), plateau()
    rates = step(whole, range(9))
    assert len(set(rates)) > 2
    before, first.epoch = step(first, range(3)), 2
    second.from_dict(first.to_dict(None), "a.pth")
    assert before + step(second, range(3, 9)) == rates
    # Of another schedule, the flags win: here the rates are those of the cosine.
    cosine, alone = plateau("cosine"), plateau("cosine")
    cosine.from_dict(first.to_dict(None), "a.pth")
    assert step(cosine, [3]) == step(alone, [3])
