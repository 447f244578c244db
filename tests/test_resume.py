"""A killed and resumed run ends as one that was never killed: --resume auto, the log, and which start wins."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import semi_main
import utils
from tests.equality import same
from tests.proofs import prove_resume
from tests.trees import FORKSERVER, ROOT, parse
from training import checkpoint, output_folder

FILES = ("checkpoint.pth", "best.pth", "epoch_0_checkpoint.pth")


def run(words, *more):
    """Train in this process; semi_main's Run."""
    args = parse(*words, *more)
    with utils.writing(args.output_dir):
        os.makedirs(args.output_dir or ".", exist_ok=True)
    return semi_main.train(args, torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The output folder of a run of three epochs that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(words, "--epochs", "3", "--output_dir", folder)
    return folder


def assert_same_checkpoint(path, expected):
    """Two files hold the same checkpoint to the bit, but for the flags of the run."""
    one, other = (checkpoint.read(each) for each in (path, expected))
    del one["args"], other["args"]
    assert same(one, other), path


class Killed(BaseException):
    """Stands for SIGKILL: the program does not catch it."""


class Disk:
    """Records the operations on the disk, and kills the run in the middle of the one with the number `last`."""

    def __init__(self, monkeypatch, last=None):
        self.done, self.last = [], last
        link, replace, save, append = os.link, os.replace, torch.save, utils.append_json_line

        def half_saved(content, file):
            file.write(b"half a file")
            file.flush()

        def half_appended(path, record):
            with open(path, "a") as file:
                file.write(json.dumps(record)[:40])

        for owner, name, real, half in (
            (os, "link", link, lambda *names: None),
            (os, "replace", replace, lambda *names: None),
            (torch, "save", save, half_saved),
            (utils, "append_json_line", append, half_appended),
        ):
            monkeypatch.setattr(owner, name, lambda *a, n=name, real=real, half=half: self(n, real, half, a))

    def __call__(self, name, real, half, arguments):
        killed = len(self.done) == self.last
        self.done.append(name)
        (half if killed else real)(*arguments)
        if killed:
            raise Killed


def operations():
    """run.json; of each epoch checkpoint.pth, the log line, best and checkpoint.pth again; of epoch 0 a fork too."""
    return range(28)


@pytest.mark.parametrize("last", operations())
def test_a_run_killed_in_any_operation_on_the_disk_ends_as_one_never_killed(words, whole, tmp_path, monkeypatch, last):
    given = [*words, "--epochs", "3", "--output_dir", tmp_path, "--resume", "auto"]
    with monkeypatch.context() as patch:
        disk = Disk(patch, last)
        try:
            run(given)
        except Killed:
            assert len(disk.done) == last + 1
        else:
            assert len(disk.done) <= last and disk.done.count("append_json_line") == 3  # every operation has been tried
    run(given)
    assert (tmp_path / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    for name in FILES:
        assert_same_checkpoint(tmp_path / name, whole / name)
    assert {n for n in os.listdir(tmp_path) if "dropped" not in n} == set(os.listdir(whole))


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_auto_names_the_damaged_file_and_takes_the_older_one(words, whole, tmp_path, capsys, damage):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    latest, previous = folder / "checkpoint.pth", folder / "checkpoint.prev.pth"
    os.remove(folder / "best.pth"), os.remove(folder / "epoch_0_checkpoint.pth")
    content = latest.read_bytes()
    middle = len(content) // 2
    latest.write_bytes(content[:middle] + {"cut": b"", "gone": b""}.get(damage, b"?" + content[middle + 1 :]))
    if damage == "gone":
        os.remove(latest)
    assert output_folder.newest(folder) == str(previous)
    printed = capsys.readouterr().out
    assert printed == "" if damage == "gone" else printed.startswith("Warning: Cannot read the checkpoint ")
    assert damage == "gone" or f"{latest}" in printed and f"going on from the older {previous}, of epoch 1." in printed
    # ... and the damaged one never becomes checkpoint.prev.pth.
    resumed = run(words, "--epochs", "3", "--output_dir", folder, "--resume", "auto")
    assert resumed.resumed == str(previous) and resumed.state.epoch == 2
    assert_same_checkpoint(latest, whole / "checkpoint.pth")
    assert_same_checkpoint(previous, whole / "checkpoint.prev.pth")
    assert (folder / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()


def test_auto_takes_the_latest_epoch_of_what_is_left(whole, tmp_path):
    epochs = {"checkpoint.prev.pth": 4, "best.pth": 5, "epoch_3_checkpoint.pth": 3}
    state = checkpoint.read(whole / "checkpoint.pth")
    for name, epoch in epochs.items():
        torch.save({**state, "epoch": epoch}, tmp_path / name)
    assert output_folder.newest(tmp_path) == str(tmp_path / "best.pth")
    torch.save({**state, "epoch": 5}, tmp_path / "checkpoint.prev.pth")
    assert output_folder.newest(tmp_path) == str(tmp_path / "checkpoint.prev.pth")
    torch.save({**state, "epoch": 2}, tmp_path / "checkpoint.pth")
    assert output_folder.newest(tmp_path) == str(tmp_path / "checkpoint.pth")  # it is the newest


def test_auto_without_any_complete_checkpoint(words, tmp_path, capsys):
    assert output_folder.resume_file("auto", tmp_path) == ""
    assert f"--resume auto: {tmp_path} holds no checkpoint yet." in capsys.readouterr().out
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"No checkpoint of .* is complete \(Cannot read .*checkpoint.pth.*move th"):
        output_folder.resume_file("auto", tmp_path)
    with pytest.raises(ValueError, match="--resume auto looks for a checkpoint in --output_dir: name that folder"):
        run(words, "--epochs", "1", "--resume", "auto")


def test_auto_wins_over_a_start_and_a_start_over_scratch(words, whole, tmp_path, capsys):
    start = tmp_path / "start.pth"
    shutil.copy(whole / "best.pth", start)
    words = [*words, "--epochs", "1", "--output_dir", tmp_path / "out", "--resume", "auto", "--finetune", start]
    assert run(words).resumed == ""
    assert "no checkpoint yet" in (printed := capsys.readouterr().out) and f"--finetune {start}: " in printed
    os.remove(start)  # not read again, because the checkpoint comes after it
    again = run(words)
    assert again.resumed == str(tmp_path / "out/checkpoint.pth")
    assert "Nothing left to train" in capsys.readouterr().out


def test_the_log_keeps_what_is_not_written_again_and_loses_nothing(words, whole, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    run(words, "--epochs", "3", "--output_dir", folder, "--resume", whole / "epoch_0_checkpoint.pth")
    assert (
        f"{folder / 'log.txt'}: 2 lines are not of epochs up to 0, now in log.dropped.txt." in capsys.readouterr().out
    )
    assert (folder / "log.txt").read_text().splitlines(keepends=True) == lines
    assert (folder / "log.dropped.txt").read_text().splitlines(keepends=True) == lines[1:]


@pytest.mark.parametrize("workers", [(1, 1), (2, 0), (0, 2)])
def test_workers_never_change_a_run_and_a_resume_may_change_them(words, whole, tmp_path, workers):
    """`whole` was trained without workers; here a run with other workers is stopped and resumed with others again."""
    for epochs, number in zip(("2", "3"), workers):
        given = [*words, "--epochs", "3", "--num_workers", number, "--output_dir", tmp_path]
        if epochs == "2":
            with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
                patch.setattr(semi_main.Run, "step_schedule", _stop_in_epoch(1))
                run(given)
        else:
            run([*given, "--resume", "auto"])
    for name in FILES:
        assert_same_checkpoint(tmp_path / name, whole / name)


def _stop_in_epoch(number):
    step_schedule = semi_main.Run.step_schedule

    def stop(self, epoch, test_meters):
        if epoch == number:
            raise Killed
        step_schedule(self, epoch, test_meters)

    return stop


def test_what_a_killed_run_left_half_written_is_removed(words, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint.pth.4711.tmp").write_bytes(b"half a checkpoint")
    run(words, "--epochs", "3", "--output_dir", tmp_path, "--resume", "auto")
    assert set(os.listdir(tmp_path)) == set(os.listdir(whole))


def test_evaluation_takes_the_newest_too(words, whole, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(whole, copy)
    args = parse(*words, "--eval", "--resume", "auto", "--output_dir", copy)
    meters = semi_main.evaluate_checkpoint(args, torch.device("cpu"))
    assert meters["checkpoint"] == str(copy / "checkpoint.pth") and meters["epoch"] == 2


def _kill(number, work):
    prove_resume.make_images(work / "data")
    row = prove_resume.one_kill(number, 0, work / "data", work, {})
    (work / "result").write_text(row[-1])


def test_a_run_killed_at_a_seeded_moment_ends_as_one_never_killed(tmp_path):
    """The second kill of the proof: of two ranks, in a semi-supervised epoch."""
    process = FORKSERVER.Process(target=_kill, args=(1, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and (tmp_path / "result").read_text() == "yes"


@pytest.mark.proof
def test_three_seeded_kills_of_whole_processes_end_identically():
    command = [sys.executable, "-m", "tests.proofs.prove_resume", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("\n3 kills, 3 identical\n")
