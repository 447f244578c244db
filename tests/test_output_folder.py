"""One run a folder: the lock, what it says of its holder, and runs that are in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_with_submitit
import semi_main
from tests.trees import FORKSERVER, ROOT, parse
from tests.trees import semi_main as run_semi_main
from training import output_folder


def _hold(folder, seconds, job):
    os.environ.pop("SLURM_JOB_ID", None)
    if job:
        os.environ["SLURM_JOB_ID"] = job
    with output_folder.claimed(folder, "auto", False):
        Path(folder, "held").touch()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds the lock of tmp_path; it is killed after the test."""
    started = []

    def start(seconds=60, job=None):
        process = FORKSERVER.Process(target=_hold, args=(tmp_path, seconds, job))
        process.start()
        started.append(process)
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_run_is_refused_by_name_and_touches_nothing(holder, tmp_path):
    process = holder()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError) as caught, output_folder.claimed(tmp_path, "auto", False):
        pass
    host = os.uname().nodename
    assert str(caught.value).startswith(f"{tmp_path} is in use by process {process.pid} on {host}, started 20")
    assert "choose another --output_dir" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_run_leaves_no_lock(holder, tmp_path):
    process = holder()
    process.kill()
    process.join()
    with output_folder.claimed(tmp_path, "auto", False):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_run_that_has_ended_leaves_no_lock(holder, tmp_path):
    for _ in range(2):
        with output_folder.claimed(tmp_path, "auto", False):
            pass
    holder()


def test_a_requeued_job_waits_for_the_attempt_before_it_and_no_other(holder, tmp_path, monkeypatch, capsys):
    holder(seconds=2, job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(ValueError, match="is in use by process"), output_folder.claimed(tmp_path, "auto", False):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with output_folder.claimed(tmp_path, "auto", False):
        assert "Waiting up to 300 s for the end of process" in capsys.readouterr().out
    assert output_folder.begun_by_job(tmp_path, "77") and not output_folder.begun_by_job(tmp_path, "78")


def test_its_wait_is_bounded(holder, tmp_path, monkeypatch):
    holder(job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(output_folder, "WAIT_S", 0.1)
    with pytest.raises(ValueError, match="is in use by process"), output_folder.claimed(tmp_path, "auto", False):
        pass


@pytest.mark.parametrize("name", ["run.lock", "log.txt", "log.dropped.txt", "run.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("../outside")])
def test_a_text_file_of_a_run_that_is_something_else_is_refused_unopened(tmp_path, name, make):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir(), outside.write_text("precious"), make(folder / name)
    with pytest.raises(ValueError, match=f"{folder / name} is no regular file, but a link, a folder or a device: rem"):
        with output_folder.claimed(folder, "auto", False):
            pass
    assert outside.read_text() == "precious" and os.listdir(folder) == [name]


def test_a_checkpoint_that_is_a_link_to_itself_is_one_of_its_folder(tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to("checkpoint.pth")
    assert output_folder.is_inside(str(tmp_path / "checkpoint.pth"), tmp_path)
    assert not output_folder.is_inside(str(tmp_path / "checkpoint.pth"), tmp_path.parent)


def test_a_folder_that_is_called_like_a_leftover_stays_and_a_leftover_goes(tmp_path):
    (tmp_path / "checkpoint.pth.17.tmp").mkdir(), (tmp_path / "best.pth.17.tmp").touch()
    output_folder.Output(tmp_path).tidy(0)
    assert os.listdir(tmp_path) == ["checkpoint.pth.17.tmp"]


def test_a_lock_file_of_nonsense_hinders_nobody(tmp_path):
    for nonsense in (b"\xff\xfe", b"[1]", b"{}", b"[" * 100_000):
        (tmp_path / "run.lock").write_bytes(nonsense)
        assert not output_folder.begun_by_job(tmp_path, "1")
        with output_folder.claimed(tmp_path, "auto", False):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(output_folder.fcntl, "lockf", no_locks)
    with output_folder.claimed(tmp_path, "auto", False):
        pass
    assert "run.lock cannot be locked (Function not implemented): see that no second" in capsys.readouterr().out


# ------------------------------------------------------------------------------- a folder that holds a run


def make_run(folder, extra=()):
    for name in ("checkpoint.pth", "best.pth", "epoch_3_checkpoint.pth", "log.txt", "run.json", "ema_per_class.csv"):
        (folder / name).write_text(f"old {name}\n")
    (folder / "tensorboard").mkdir()
    (folder / "12_0_log.out").write_text("of submitit")
    return {path.name for path in folder.iterdir()} - {"12_0_log.out"}


@pytest.mark.parametrize("resume", ["", "/elsewhere/checkpoint.pth", "https://example.org/checkpoint.pth"])
def test_a_new_run_is_refused_where_another_is(tmp_path, resume):
    make_run(tmp_path)
    with pytest.raises(
        ValueError, match="holds another run: choose a new --output_dir, .*--resume auto, .*--overwrite"
    ):
        with output_folder.claimed(tmp_path, resume, False):
            pass


@pytest.mark.parametrize("name", ["checkpoint.pth", "epoch_2_checkpoint.pth", "log.txt"])
def test_one_checkpoint_or_log_line_is_a_run_and_notes_of_a_start_are_none(tmp_path, name):
    for other in ("run.json", "run.lock", "checkpoint.pth.17.tmp"):
        (tmp_path / other).write_text("{}")
    (tmp_path / "log.txt").touch()
    assert not output_folder.holds_run(tmp_path)
    (tmp_path / name).write_text("x")
    assert output_folder.holds_run(tmp_path)


def test_a_run_goes_on_in_its_own_folder(tmp_path, monkeypatch):
    before = make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for resume in ("auto", tmp_path / "best.pth", "best.pth", "./checkpoint.pth"):
        with output_folder.claimed(tmp_path, str(resume), False):
            assert before <= set(os.listdir(tmp_path))


def test_a_run_json_nested_without_end_is_none_of_ours(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    output_folder.Output(tmp_path).write_run_json(lambda: {"resumed_from": None}, goes_on=True)
    assert json.loads((tmp_path / "run.json").read_text()) == {"resumed_from": None, "earlier": []}


def test_overwrite_moves_the_old_files_and_deletes_none(tmp_path, capsys):
    old = make_run(tmp_path)
    with output_folder.claimed(tmp_path, "", True):
        (aside,) = tmp_path.glob("replaced-*")
        assert {path.name for path in aside.iterdir()} == old
        assert (aside / "checkpoint.pth").read_text() == "old checkpoint.pth\n"
        assert set(os.listdir(tmp_path)) == {aside.name, "run.lock", "12_0_log.out"}
    assert f"--overwrite: the files of the run before are in {aside}." in capsys.readouterr().out
    with output_folder.claimed(tmp_path, "", True):  # nothing is left to move
        assert list(tmp_path.glob("replaced-*")) == [aside]


@pytest.mark.parametrize("resume", ["auto", "INSIDE"])
def test_overwrite_and_resume_from_the_same_folder_contradict_each_other(tmp_path, resume):
    resume = resume.replace("INSIDE", str(tmp_path / "checkpoint.pth"))
    old = make_run(tmp_path)
    with pytest.raises(ValueError, match="--overwrite and --resume .* contradict each other"):
        with output_folder.claimed(tmp_path, resume, True):
            pass
    assert old <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("begun", [True, False])
def test_a_requeued_job_that_overwrites_goes_on_with_its_own_checkpoint_alone(tmp_path, monkeypatch, begun):
    (tmp_path / "checkpoint.pth").write_text("x")
    (tmp_path / "run.lock").write_text(json.dumps({"job": "5" if begun else "4"}))
    monkeypatch.setattr(run_with_submitit.submitit, "JobEnvironment", lambda: type("Job", (), {"job_id": "5"}))
    args = run_with_submitit.get_args_parser().parse_args(["--overwrite", "--output_dir", str(tmp_path)])
    resuming = run_with_submitit.Task(args)._resuming_args()
    assert (resuming.resume, resuming.overwrite) == (("auto", False) if begun else ("", True))


# ------------------------------------------------------------------------------- whole programs


def test_two_ranks_are_refused_together_and_evaluation_takes_no_lock(words, holder, tmp_path):
    semi_main.main(parse(*words, "--epochs", 1, "--output_dir", tmp_path))
    process = holder()
    done = run_semi_main(*words, "--resume", "auto", "--output_dir", tmp_path, processes=2, check=False)
    assert done.returncode == 1 and done.stderr.count(f"is in use by process {process.pid} on") == 2
    assert "Traceback" not in done.stderr
    semi_main.main(parse(*words, "--eval", "--resume", "auto", "--output_dir", tmp_path))
    assert (tmp_path / "eval.json").exists()


def test_a_second_run_over_the_first_is_refused_unless_it_overwrites(words, tmp_path):
    first = [*words, "--epochs", 1, "--output_dir", tmp_path]
    semi_main.main(parse(*first))
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        semi_main.main(parse(*first, "--seed", 1))
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    semi_main.main(parse(*first, "--seed", 1, "--overwrite"))
    (aside,) = tmp_path.glob("replaced-*")
    assert (aside / "checkpoint.pth").read_bytes() == before != (tmp_path / "checkpoint.pth").read_bytes()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_ranks_whose_torchrun_was_killed_end_by_themselves(words, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "semi_main.py"]
    job = subprocess.Popen(
        [str(word) for word in [*command, *words, "--epochs", 9999, "--output_dir", tmp_path]],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < until:
            time.sleep(0.05)
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(ranks) == 2
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    with output_folder.claimed(tmp_path, "auto", False):  # and the folder is free
        pass


@pytest.mark.parametrize("processes", [0, 2])
def test_an_interrupt_says_where_it_stopped_and_how_to_go_on(words, tmp_path, processes):
    """SIGINT to the process group, as of Ctrl-C in a terminal, with data workers."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, "semi_main.py", *words, "--epochs", 9999, "--output_dir", tmp_path]
    job = subprocess.Popen(
        [str(word) for word in [*command, "--num_workers", 1]], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(job.pid, signal.SIGINT)
        printed = job.communicate(timeout=60)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    # A rank that waited for the other one reports that it is gone.
    ours = [line for line in printed.splitlines() if "semi_main.py: stopped in epoch " in line]
    assert len(ours) == 1 and ours[0].endswith("--resume auto goes on")
    assert 'semi_main.py", line' not in printed  # no traceback of ours; torchrun prints its own
    assert processes or "Traceback" not in printed
