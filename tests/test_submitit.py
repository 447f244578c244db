"""The Slurm launcher: its flags, what it asks Slurm for, the published scripts, and jobs that are interrupted."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import submitit
import torch
from submitit.core.utils import temporary_save_path
from torch.utils.data import DataLoader

import options
import run_with_submitit
from images import loading
from run_with_submitit import Task, get_args_parser, job_flags
from tests.equality import same
from tests.trees import ROOT, SMALL, forked, python_calls, semi_main
from training import checkpoint

PUBLISHED = json.loads((ROOT / "tests/data/flags.json").read_text())["run_with_submitit"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--mu", "0.5"]
RUN = [*SMALL, "--batch-size", "6", "--mu", "0.34", "--threshold", "0.3", "--warmup-epochs", "0",
       "--model-ema-decay", "0.5", "--semi-start-epoch", "1", "--steps-per-epoch", "2"]  # fmt: skip
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}
LIMIT_S = 110


def parse(*words):
    return get_args_parser().parse_args([str(word) for word in words])


def described(parser):
    """The flags of a parser in the form of flags.json."""
    return {
        action.option_strings[0]: {
            "flags": list(action.option_strings),
            "dest": action.dest,
            "default": action.default,
            "type": action.type and action.type.__name__,
            "nargs": action.nargs,
            "choices": action.choices and list(action.choices),
            "action": type(action).__name__.lstrip("_"),
        }
        for action in parser._actions
        if action.dest != "help"
    }


# ------------------------------------------------------------------------------------------- flags


def test_eleven_published_flags_join_those_of_semi_main():
    ours, theirs = described(get_args_parser()), described(options.get_args_parser())
    assert {flag: ours.pop(flag) for flag in set(ours) - set(theirs)} == {row["flags"][0]: row for row in PUBLISHED}
    # The default device does not depend on the submitting machine, which may have no GPU.
    assert (ours.pop("--device")["default"], len(PUBLISHED)) == ("cuda", 11)
    assert ours == {flag: row for flag, row in theirs.items() if flag != "--device"}


def test_every_flag_has_a_help_text():
    texts = {action.option_strings[0]: action.help for action in get_args_parser()._actions}
    assert all(texts[row["flags"][0]] for row in PUBLISHED)
    assert "%j = job id" in " ".join(get_args_parser().format_help().split())


@pytest.mark.parametrize("words, message", [
    (["--ngpus", "0", "--local"], "--ngpus 0 must be at least 1"),
    (["--nodes", "2", "--local"], "--local runs on this machine alone, so --nodes 2 must be 1"),
    (["--resume", "a", "--resume_jobid", "1", "--local"], "--resume and --resume_jobid both name a checkpoint"),
    (["--job_dir", f"{__file__}/%j", "--local"], "--job_dir .*/%j cannot be a folder, because .* is a file"),
    (["--shared_folder", __file__, "--local"], "--shared_folder .* cannot be a folder, because .* is a file"),
    (["--device", "tpu", "--local"], "--device tpu must be cpu, cuda or cuda:N"),
    (["--mu", "2", "--local"], "--mu 2.0 must be above 0 and below 1"),
    (["--resume_jobid", "17", "--local"], "Job 17 left no checkpoint .*/output/jobs/17/checkpoint.pth"),
    ([], r"There is no Slurm \(srun\) on this machine"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_submitted(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run_with_submitit.main(parse(*PLAIN, *words))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- what Slurm is asked for

SRUN = f"""#!{sys.executable}
import os, subprocess, sys
tasks = [subprocess.Popen(sys.argv[sys.argv.index("env"):],
                          env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
         for rank in range(int(os.environ["SLURM_STEP_NUM_TASKS"]))]
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with Slurm commands that accept job 4711, and with an srun that the test may call."""
    tools = {"sbatch": "#!/bin/sh\necho Submitted batch job 4711\n", "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}
    for name, text in {**tools, "srun": SRUN}.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(folder):
    """{option: value} of the #SBATCH lines of job 4711."""
    lines = (folder / "4711_submission.sh").read_text().splitlines()
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))


@pytest.mark.parametrize("words, changed", [
    ([], {}),
    (["--nodes", "2", "--use_volta32"], {"nodes": "2", "constraint": "volta32gb"}),
    (["--ngpus", "4", "--timeout", "60"],
     {"gpus-per-node": "4", "ntasks-per-node": "4", "mem": "160GB", "time": "60"}),
    (["--partition", "long", "--comment", "ECCV"], {"partition": "long", "comment": "ECCV"}),
    (["--partition", "", "--device", "cpu"], {"partition": None, "gpus-per-node": None}),
])  # fmt: skip
def test_what_slurm_is_asked_for(slurm, capsys, words, changed):
    run_with_submitit.main(parse(*PLAIN, *words))
    folder = slurm / "output/jobs/4711"
    log = folder / "4711_0_log"
    expected_output = f"Job 4711, folder {folder}\nLog files: {log}.out, {log}.err\n"
    expected = {
        "job-name": "semiformer",
        "nodes": "1",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "10",
        "mem": "320GB",
        "time": "2800",
        "signal": "USR2@120",
        "requeue": "",
        "partition": "learnfair",
    } | changed
    got = asked(folder)
    assert capsys.readouterr().out == expected_output
    assert {key: got.get(key) for key in expected} == expected
    assert ("constraint" in got, "comment" in got) == ("constraint" in changed, "comment" in changed)
    assert " --kill-on-bad-exit=1 --cpus-per-task=10 " in (folder / "4711_submission.sh").read_text()
    submitted = pickle.loads((folder / "4711_submitted.pkl").read_bytes())
    assert submitted._timeout_countdown == 30
    assert submitted.function.args.use_submitit is True and submitted.function.args.dist_url == "env://"


def test_a_refusal_by_slurm_is_one_sentence(slurm):
    (slurm / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2\nexit 1\n")
    (done,) = forked(ROOT / "run_with_submitit.py", *PLAIN)
    assert done.returncode == 1
    assert "run_with_submitit.py: error: sbatch: error: invalid partition specified" in done.stderr


# ------------------------------------------------------------------------------------------- job folder and requeue


@pytest.mark.parametrize("words, folder", [
    ([], "output/jobs/%j"),
    (["--shared_folder", "shared"], "shared/%j"),
    (["--job_dir", "runs/a_%j", "--shared_folder", "shared"], "runs/a_%j"),
])  # fmt: skip
def test_the_job_folder_replaces_output_dir(tmp_path, monkeypatch, words, folder):
    monkeypatch.chdir(tmp_path)
    assert job_flags(parse(*words, "--output_dir", "elsewhere")).output_dir == str(tmp_path / folder)


def test_an_earlier_jobs_checkpoint_is_found_in_its_folder(tmp_path):
    (tmp_path / "17").mkdir()
    (tmp_path / "17/best.pth").touch()
    flags = job_flags(parse("--shared_folder", tmp_path, "--resume_jobid", "17", "--resume_name", "best.pth"))
    assert (flags.resume, flags.output_dir) == (str(tmp_path / "17/best.pth"), str(tmp_path / "%j"))


@pytest.mark.parametrize("saved", [False, True])
def test_a_requeued_job_goes_on_from_what_it_saved_and_keeps_the_rest(tmp_path, monkeypatch, saved):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    # The job began from a checkpoint of an earlier one; as soon as it has one of its own, it resumes from that.
    start = tmp_path / "17/epoch_29_checkpoint.pth"
    (tmp_path / "4711").mkdir()
    start.parent.mkdir()
    start.touch()
    words = ["--shared_folder", tmp_path, "--resume_jobid", "17", "--resume_name", start.name, "--mu", "0.25"]
    task = Task(job_flags(parse(*words)))
    before = dict(vars(task.args))
    if saved:
        (tmp_path / "4711/checkpoint.pth").touch()
    requeued = task.checkpoint()
    resume = "auto" if saved else str(start)
    assert isinstance(requeued.function, Task) and not requeued.args and not requeued.kwargs
    assert vars(requeued.function.args) == before | {"resume": resume}
    assert vars(task.args) == before and before["output_dir"] == str(tmp_path / "%j")


@pytest.fixture
def in_a_task(tmp_path, monkeypatch):
    """The folder of job 4711, whose tasks the test calls in its own process; restores the signal handlers."""
    for name, value in {"EXECUTOR": "slurm", "FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("restarts, resume", [(None, False), ("0", False), ("1", True)])
def test_a_job_that_slurm_itself_requeued_goes_on_too(in_a_task, monkeypatch, restarts, resume):
    got = []
    monkeypatch.setattr(run_with_submitit.semi_main, "main", got.append)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    saved = in_a_task / "4711/checkpoint.pth"
    saved.parent.mkdir()
    saved.touch()
    Task(job_flags(parse("--shared_folder", in_a_task)))()
    assert (got[0].resume, got[0].output_dir) == ("auto" if resume else "", str(saved.parent))
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN  # which could make a finished job fail


@pytest.mark.parametrize(
    "rank, left", [("0", {"4711_1_result.pkl"}), ("1", {"4711_0_result.pkl", "4711_submitted.pkl"})]
)
def test_half_written_files_of_a_killed_attempt_are_removed(in_a_task, monkeypatch, rank, left):
    monkeypatch.setattr(run_with_submitit.semi_main, "main", lambda args: None)
    monkeypatch.setenv("SLURM_PROCID", rank)
    paths = [submitit.JobEnvironment().paths.submitted_pickle, *(in_a_task / f"4711_{n}_result.pkl" for n in range(2))]
    for path in paths:
        with pytest.raises(KeyboardInterrupt), temporary_save_path(path) as half:
            half.touch()
            raise KeyboardInterrupt
    Task(job_flags(parse("--shared_folder", in_a_task)))()
    assert {path.name for path in in_a_task.iterdir()} == {f"{name}.save_tmp" for name in left}


def dispositions():
    """Whether SIGUSR2, SIGTERM and SIGINT are blocked in this process."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return signal.SIGUSR2 in blocked, signal.SIGTERM in blocked, signal.SIGINT in blocked


class Asks(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.tensor(dispositions())


@pytest.fixture
def new_forkserver():
    """The test starts the fork server of this process, which hands on the signal mask that it was started with."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_data_worker_leaves_the_signals_to_its_task(in_a_task, monkeypatch, request, method):
    if method == "forkserver":
        request.getfixturevalue("new_forkserver")

    def loads_data(args):
        batches = loading._start(DataLoader(Asks(), num_workers=1, multiprocessing_context=method))
        got.extend([next(batches)[0].tolist(), dispositions()])

    got = []
    monkeypatch.setattr(run_with_submitit.semi_main, "main", loads_data)
    signal.signal(signal.SIGTERM, lambda *_: None)  # as submitit does
    Task(job_flags(parse()))()
    assert got == [[True, True, True], (False, False, False)]


def test_the_signal_waits_until_the_task_has_started():
    # The first words of the job's command, then a program that gets the signal before it has a handler.
    code = ("import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('alive', flush=True); "
            "signal.signal(signal.SIGUSR2, lambda *_: print('received', flush=True)); "
            "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])")  # fmt: skip
    done = subprocess.run([sys.executable, "-IS", "-c", run_with_submitit.HOLD_SIGNAL, sys.executable, "-c", code],
                          capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["alive", "received"], "")


# ------------------------------------------------------------------------------------------- published scripts

SHARED = {
    "model": "Semiformer_small_patch16",
    "data_set": "SEMI-IMNET",
    "batch_size": 108,
    "lr": 1e-3,
    "temperature": 1.0,
    "threshold": 0.7,
    "semi_lambda": 4.0,
    "semi_start_epoch": 30,
    "pseudo_type": "cnn",
    "smoothing": 0.1,
    "unlabel_smooth": False,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
    "repeated_aug": False,
    "evaluate_freq": 10,
    "use_volta32": False,  # ours: PyTorch's wheels for CUDA 13 have no code for V100
    "ngpus": 8,
    "timeout": 2800,
    "local": False,
    "partition": "learnfair",
    "opt": "adamw",
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": 5,
    "min_lr": 1e-5,
}
SCRIPTS = {
    "submitit_1to5_300ep_2nodes.sh": {"mu": 0.16667, "epochs": 300, "nodes": 2},
    "submitit_1to7_300ep_2nodes.sh": {"mu": 0.125, "epochs": 300, "nodes": 2},
    "submitit_1to7_600ep_1node.sh": {"mu": 0.125, "epochs": 600, "nodes": 1},
    "submitit_1to7_600ep_4nodes_lr4e-3.sh": {"mu": 0.125, "epochs": 600, "nodes": 4, "lr": 4e-3},
    "submitit_1to7_600ep_4nodes_smooth.sh": {"mu": 0.125, "epochs": 600, "nodes": 4, "unlabel_smooth": True},
}


def sent(script, tmp_path, *words, **settings):
    """The flags with which a script calls the launcher; the script runs in another folder."""
    settings = {"DATA_ROOT": "images", "SPLIT": "list.txt", **settings}
    ((program, *flags),) = python_calls(f"script/{script}", tmp_path, *words, **settings)
    assert Path(program).resolve() == ROOT / "run_with_submitit.py"
    return parse(*flags)


def test_every_slurm_script_is_known():
    assert {path.name for path in (ROOT / "script").glob("submitit_*.sh")} == {*SCRIPTS, "submitit_common.sh"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_hyper_parameters(script, tmp_path):
    args = sent(script, tmp_path)
    expected = SHARED | SCRIPTS[script] | {"data_path": "images", "data_split_file": "list.txt"}
    assert {key: getattr(args, key) for key in expected} == expected
    assert options.labelled_and_unlabelled(args) == ((18, 90) if "1to5" in script else (13, 95))
    options.check(args)


def test_script_settings_and_flags_reach_the_launcher(tmp_path):
    settings = {"PARTITION": "", "SHARED_FOLDER": "my jobs", "COMMENT": "two words"}
    args = sent("submitit_1to7_300ep_2nodes.sh", tmp_path, "--nodes", "1", "--local", **settings)
    assert (args.partition, args.shared_folder, args.comment) == ("", "my jobs", "two words")
    assert (args.nodes, args.local, args.epochs) == (1, True, 300)


@pytest.mark.parametrize("setting", ["DATA_ROOT", "SPLIT"])
def test_a_script_without_data_says_what_to_set(tmp_path, setting):
    with pytest.raises(subprocess.CalledProcessError):
        sent("submitit_1to7_600ep_1node.sh", tmp_path, **{setting: ""})
    assert (tmp_path / "python.calls").read_text() == ""


# ------------------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def data(tree):
    return {"DATA_ROOT": str(tree), "SPLIT": str(tree / "labelled.txt")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_scripts_end_and_resume(script, data, in_a_task, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    for job, epochs, resumed in (("4711", [0, 1], []), ("4712", [2], ["--resume_jobid", "4711"])):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        words = [*RUN, "--evaluate-freq", "1", "--epochs", str(epochs[-1] + 1), *resumed]
        Task(job_flags(sent(script, in_a_task, *words, SHARED_FOLDER=in_a_task, **data)))()
        assert [json.loads(line)["epoch"] for line in lines(in_a_task / job / "log.txt")] == epochs


def children(pid):
    """Process ids of the running children of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            ppid = status.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        found += [int(status.parent.name)] if int(ppid) == pid else []
    return found


def wait_for(condition, process, until):
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_an_interrupted_local_job_ends_as_one_never_interrupted(data, tmp_path):
    until = time.monotonic() + LIMIT_S
    script = "submitit_1to7_600ep_1node.sh"
    words = [*RUN, "--evaluate-freq", "1", "--epochs", "3"]
    (flags,) = python_calls(f"script/{script}", tmp_path, *words, **data)
    nodes = flags.index("--nodes")  # the launcher's own, as are those before --model
    flags = flags[flags.index("--model") : nodes] + flags[nodes + 2 :]
    semi_main(*flags, "--output_dir", tmp_path / "whole", processes=2, timeout=LIMIT_S)
    # From another folder, and in its own session, so that a failing test can end all its processes.
    launcher = subprocess.Popen(
        ["bash", ROOT / "script" / script, *words, "--local", "--ngpus", "2"],
        cwd=tmp_path, env=QUIET | data | {"PYTHON": sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        job = int(re.match(r"Job (\d+), folder", launcher.stdout.readline()).group(1))
        named = launcher.stdout.readline()  # now, because communicate() may miss what was buffered with the first line
        folder = tmp_path / "output/jobs" / str(job)
        wait_for((folder / "checkpoint.pth").exists, launcher, until)
        tasks = children(job)
        assert len(tasks) == 2
        for task in tasks:  # as Slurm does, shortly before the time is up
            os.kill(task, signal.SIGUSR2)
        out, err = launcher.communicate(timeout=until - time.monotonic())
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, out + err
    assert named.startswith(f"Log files: {folder}/{job}_0_log.out")
    assert out.splitlines() == [f"Job {job} finished."] and err == ""
    errors = (folder / f"{job}_0_log.err").read_text() + (folder / f"{job}_0_log.out").read_text()
    assert "this job is preempted" in errors and errors.count("learning rate:") == 2
    assert json.loads((folder / "run.json").read_text())["args"]["resume"] == "auto"
    assert lines(folder / "log.txt") == lines(tmp_path / "whole/log.txt") and len(lines(folder / "log.txt")) == 3
    whole, ours = (checkpoint.read(f / "checkpoint.pth") for f in (tmp_path / "whole", folder))
    assert list(ours) == list(whole) and ours["epoch"] == 2
    assert all(same(ours[key], whole[key]) for key in ours if key != "args")


def test_a_failed_local_job_ends_with_the_last_lines_of_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_with_submitit.main(parse(*RUN, "--data-path", "nowhere", "--local", "--ngpus", "1"))
    assert "finished" not in capsys.readouterr().out
    printed = ended.value.code.splitlines()
    assert re.match(r"Job \d+ failed, and its log ends with:", printed[0]) and len(printed) <= 6
    assert "There is no folder nowhere/train" in printed[-1]


def test_a_slurm_job_of_two_tasks_trains(slurm, data):
    words = [*RUN, "--data-path", data["DATA_ROOT"], "--data-split-file", data["SPLIT"], "--epochs", "1"]
    words += ["--semi-start-epoch", "0", "--ngpus", "2", "--output_dir", "unused"]
    run_with_submitit.main(parse(*words))
    step = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "here"}
    folder = slurm / "output/jobs/4711"
    done = subprocess.run(["bash", folder / "4711_submission.sh"], env=QUIET | step | {"PATH": os.environ["PATH"]},
                          capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 process(es); 2 steps an epoch" in done.stdout
    assert len(lines(folder / "log.txt")) == 1 and (folder / "checkpoint.pth").is_file()
    assert not (slurm / "unused").exists()
