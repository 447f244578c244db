"""Seeds, meters, progress lines, the process group's environment, the log files."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from utils import (
    EpochLog,
    Meters,
    append_json_line,
    derived_seed,
    environment,
    init_distributed,
    seed_everything,
    write_json,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]

# -------------------------------------------------------------------------------- what is printed


@pytest.mark.parametrize("text, shown", [
    ("Äpfel, 猫 and ±", "Äpfel, 猫 and ±"), ("two\nlines\tof text", "two\nlines\tof text"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"), ("a\rb\x07\x7f", r"a\rb\x07\x7f"), ("\x9b2J", r"\x9b2J"),
    ("gpj.\u202eexe", r"gpj.\u202eexe"), ("not UTF-8 \udcff", r"not UTF-8 \udcff"), (3, "3"),
])  # fmt: skip
def test_what_could_steer_a_terminal_is_printed_as_an_escape(text, shown, capsys):
    assert utils.printable(text) == shown
    utils.print_main(text, "end")
    utils.print_rank(text)
    assert capsys.readouterr().out == f"{shown} end\n[rank 0] {shown}\n"
    with pytest.raises(ValueError) as caught:
        utils.check_device_name(f"no {text}")
    utils.excepthook("semi_main.py", ValueError, caught.value, caught.tb)
    shown = utils.printable(text, kept="")  # of a name, in which a newline would make two messages of one
    assert capsys.readouterr().err.startswith(f"semi_main.py: error: --device no {shown} must be cpu")


def test_lines_of_a_name_are_escaped_where_asked():
    assert utils.printable("a\tb\n\x1b", kept="") == r"a\tb\n\x1b"


# -------------------------------------------------------------------------------- seeds


def test_a_seed_is_the_same_in_every_process():
    code = "from utils import derived_seed; print(derived_seed(0), derived_seed(3, 14, 15))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "777"})  # fmt: skip
    assert done.stdout.split() == [str(derived_seed(0)), str(derived_seed(3, 14, 15))]
    # The recipe itself: another one would change every run that is resumed.
    digest = hashlib.sha256(b"(3, 14, 15)").digest()[:8]
    assert derived_seed(3, 14, 15) == int.from_bytes(digest, "little") // 2


def test_any_change_gives_another_seed():
    grid = [(s, e, r, k) for s in range(6) for e in range(6) for r in range(6) for k in range(2)]
    seeds = {derived_seed(*numbers) for numbers in grid}
    seeds |= {derived_seed(), derived_seed(0), derived_seed(0, 0), derived_seed(0, 0, 0), derived_seed(-1)}
    seeds |= {derived_seed(1, 23), derived_seed(12, 3), derived_seed(123)}
    assert len(seeds) == len(grid) + 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all of the range is used
    assert derived_seed(np.int64(5), torch.tensor(6)) == derived_seed(5, 6)


def test_seed_everything_seeds_all_three():
    def draws(*numbers):
        seed_everything(*numbers)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = draws(0, 1, 2), draws(0, 1, 2), draws(0, 1, 3)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


# -------------------------------------------------------------------------------- meters


def test_meters_are_weighted_means():
    values, counts = [0.5, 2.0, -1.25, 7.0], [3, 1, 4, 2]
    meters = Meters()
    for value, count in zip(values, counts, strict=True):
        meters.update(count, plain=value, tensor=torch.tensor(value, requires_grad=True))
        meters.update(torch.tensor(count), counted=torch.tensor(value).half())
        meters.update(unweighted=value)
    weighted = (3 * 0.5 + 1 * 2.0 - 4 * 1.25 + 2 * 7.0) / 10
    means = meters.means()
    assert list(means) == ["plain", "tensor", "counted", "unweighted"]
    assert all(type(mean) is float for mean in means.values())
    for name in ("plain", "tensor", "counted"):
        assert means[name] == pytest.approx(weighted, abs=1e-12)
    assert means["unweighted"] == pytest.approx(8.25 / 4, abs=1e-12)
    assert meters.totals()["plain"] == (pytest.approx(weighted * 10), 10.0)
    assert meters.means_over_ranks() == means  # alone: the same
    assert meters.count_over_ranks("plain") == 10 and meters.count_over_ranks("absent") == 0


def test_a_meter_that_counted_nothing_has_no_mean():
    meters = Meters()
    assert meters.means() == {} == meters.totals()
    meters.update(0, empty=0.0, tensor=torch.tensor(3.0))
    meters.update(torch.tensor(0), late=torch.tensor(1.0))
    assert meters.means() == {"empty": None, "tensor": None, "late": None}
    meters.update(torch.tensor(2), late=torch.tensor(5.0))
    assert meters.means()["late"] == 5.0


def test_sums_do_not_lose_small_steps():
    meters = Meters()
    for value in [1e8] + [1.0] * 100:
        meters.update(value=torch.tensor(value))
    assert meters.totals()["value"] == (100_000_100.0, 101.0)  # float32 would stay at 1e8


def test_ranks_are_merged_by_their_counts(monkeypatch):
    monkeypatch.setattr(utils, "gather", lambda totals: [totals, {"loss": (30.0, 10.0), "far": (4.0, 2.0)}])
    meters = Meters()
    meters.update(5, loss=1.0, near=3.0)
    assert meters.means_over_ranks() == {"loss": 35 / 15, "near": 3.0, "far": 2.0}
    assert meters.count_over_ranks("loss") == 15


# -------------------------------------------------------------------------------- the log of an epoch


def run_epoch(log, items):
    """Go through an epoch as the engine does; each step's loss is twice its number from 1."""
    for step, item in enumerate(log.timed(items)):
        log.add({"loss": (2.0 * (step + 1), 1), "nothing": (0.0, 0), "grad_norm": (5.0, 1)}, images=7)
        if log.is_due(step):
            log.print_line(step)
        yield item


@pytest.mark.parametrize(
    "total, every, printed",
    [(25, 10, [1, 11, 21, 25]), (21, 10, [1, 11, 21]), (1, 10, [1]), (4, 1, [1, 2, 3, 4]), (3, 50, [1, 3])],
)
def test_a_line_is_printed_after_the_first_each_every_and_the_last_step(capsys, total, every, printed, monkeypatch):
    log, asked = EpochLog(3, total, every), []
    means = log._whole.means
    monkeypatch.setattr(log._whole, "means", lambda: asked.append(int(log._whole._counts["loss"])) or means())
    assert list(run_epoch(log, range(100, 100 + total))) == list(range(100, 100 + total))
    assert asked == printed  # the device is waited for only where a line is printed
    width, lines = len(str(total)), capsys.readouterr().out.splitlines()
    for line, step in zip(lines, printed, strict=True):
        assert line.startswith(f"Epoch 3 [{step:{width}d}/{total}]  eta: ")
        assert f"  loss: {step + 1:.4g}  time: " in line and "nothing" not in line and "grad_norm" not in line
    assert "eta: 0:00:00" in lines[-1]
    assert log.means() == {"loss": total + 1, "nothing": None}


def test_eta_is_the_mean_step_times_what_is_left(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 60))  # every look at the clock is a minute after the one before
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(clock))
    seen = []
    log = EpochLog(0, 3, 1, write=lambda step, scalars: seen.append(scalars))
    list(run_epoch(log, "abc"))
    # Looks: start; then, for each item, after its wait, at its line, after the line, before the next wait.
    assert re.findall(r"eta: (\S+)", capsys.readouterr().out) == ["0:04:00", "0:03:00", "0:00:00"]
    assert [scalars["step_seconds"] for scalars in seen] == [120, 180, 180]
    assert [scalars["data_seconds"] for scalars in seen] == [60, 60, 60]


def test_the_writer_gets_the_means_since_the_line_before(capsys):
    seen = []
    log = EpochLog(0, 12, 5, write=lambda step, scalars: seen.append((step, scalars)))
    list(run_epoch(log, range(12)))
    assert [step for step, _ in seen] == [0, 5, 10, 11]
    assert [scalars["loss"] for _, scalars in seen] == [2.0, 8.0, 18.0, 24.0]
    for _, scalars in seen:
        assert scalars["grad_norm"] == 5.0 and scalars["nothing"] is None and "images" not in scalars
        assert scalars["images_per_second"] == pytest.approx(7 / scalars["step_seconds"])
        assert 0 <= scalars["data_seconds"] <= scalars["step_seconds"]


def test_an_epoch_passes_an_error_on():
    def broken():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(EpochLog(0, 5).timed(broken()))


# -------------------------------------------------------------------------------- process group

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
            "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST",
            "SLURM_NTASKS")  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """No launcher's environment, and none left behind."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def slurm(monkeypatch, **more):
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567",
            "SLURM_STEP_NODELIST": "node[07-08]"}  # fmt: skip
    for name, value in {**step, **more}.items():
        monkeypatch.setenv(name, value)


def test_slurm_step_of_four(alone):
    slurm(alone, MASTER_ADDR="node07")
    assert utils._slurm_environment() == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node07",
        "MASTER_PORT": "30567"}  # fmt: skip  # 20,000 + the job's number modulo 12,000
    alone.setenv("MASTER_PORT", "29500")
    assert utils._slurm_environment()["MASTER_PORT"] == "29500"


def test_slurm_ports_are_valid_and_differ_between_jobs(alone):
    ports = []
    for job in (1, 2, 11_999, 12_000, 987_654_321):
        slurm(alone, MASTER_ADDR="x", SLURM_JOB_ID=str(job))
        ports.append(int(utils._slurm_environment()["MASTER_PORT"]))
    assert ports == [20_001, 20_002, 31_999, 20_000, 26_321]  # Linux itself hands out 32,768 and above


def test_the_first_host_comes_from_scontrol(alone, tmp_path):
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    script.chmod(0o755)
    alone.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm(alone)
    assert utils._slurm_environment()["MASTER_ADDR"] == "node07"


@pytest.mark.parametrize("env", [
    {}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a batch step
    {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}])  # fmt: skip
def test_no_step_of_several_tasks(alone, env):
    for name, value in env.items():
        alone.setenv(name, value)
    assert utils._slurm_environment() == {}
    assert init_distributed("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized() and "RANK" not in os.environ
    assert utils.world_and_rank() == (1, 0) and utils.is_main() and utils.gather("x") == ["x"]


def test_submitit_outside_slurm_is_refused(alone):
    with pytest.raises(ValueError, match="--use_submitit true needs Slurm"):
        init_distributed("cpu", from_slurm=True)
    alone.setenv("SLURM_PROCID", "0")  # a job of one task
    assert init_distributed("cpu", from_slurm=True) == torch.device("cpu")


def test_more_processes_than_were_started_are_refused(alone):
    with pytest.raises(ValueError, match="--world_size 4, but the launcher started 1: use torchrun"):
        init_distributed("cpu", world_size=4)
    alone.setenv("RANK", "0")
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--world_size 4, but the launcher started 2"):
        init_distributed("cpu", world_size=4)


def test_cuda_without_a_gpu_is_refused(alone):
    alone.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"--device {device}, but PyTorch sees no CUDA GPU"):
            init_distributed(device)


@pytest.fixture
def gpus(alone):
    """A function that makes PyTorch see as many GPUs of a capability; its `chosen` lists the current devices."""
    chosen = []

    def see(count, capability=(9, 0)):
        alone.setattr(torch.cuda, "is_available", lambda: True)
        alone.setattr(torch.cuda, "device_count", lambda: count)
        alone.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        alone.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
        alone.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
        alone.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))

    see.chosen = chosen
    return see


def test_a_device_that_the_machine_does_not_have_is_refused(alone, gpus):
    gpus(2)
    assert [init_distributed(device).index for device in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    assert gpus.chosen == [0, 1]
    with pytest.raises(ValueError, match="^--device tpu must be cpu, cuda or cuda:N, the N-th GPU counted from 0$"):
        init_distributed("tpu")
    message = (
        r"^--device cuda:{}, but the last of the 2 GPU\(s\) that PyTorch sees here is cuda:1; each process needs one"
    )
    with pytest.raises(ValueError, match=message.format(9)):
        init_distributed("cuda:9")
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=message.format(2)):
        init_distributed("cuda")
    assert gpus.chosen == [0, 1]


@pytest.mark.parametrize("capability, fits", [
    ((7, 0), False), ((7, 5), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)])  # fmt: skip
def test_a_gpu_that_pytorch_has_no_code_for_is_refused(gpus, capability, fits):
    gpus(1, capability)
    if fits:
        utils.check_device("cuda")
    else:
        with pytest.raises(ValueError, match=r"^--device cuda is a Tesla V100 \(sm_\d+\), for which PyTorch .* has no "
                           r"code \(sm_75, sm_80, sm_90\): install a build"):  # fmt: skip
            utils.check_device("cuda")


def test_intermediate_code_runs_on_later_gpus_and_other_names_are_not_judged():
    assert utils._has_code((12, 0), ["sm_80", "compute_90"]) and not utils._has_code((8, 0), ["sm_86", "compute_90"])
    assert utils._has_code((9, 4), ["gfx90a"]) and utils._has_code((7, 0), [])


@pytest.mark.parametrize("count, launcher, index", [(4, {}, 2), (1, {}, 0), (4, {"TORCHELASTIC_RUN_ID": "x"}, 2)])
def test_a_rank_that_sees_one_gpu_uses_it(alone, gpus, count, launcher, index):
    gpus(count)
    alone.setattr(utils, "_end_with", lambda _: None)
    joined = []
    alone.setattr(torch.distributed, "init_process_group", lambda *args, **more: joined.append((args, more)))
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", **launcher}.items():
        alone.setenv(name, value)
    assert init_distributed("cuda") == torch.device("cuda", index) and gpus.chosen == [index]
    ((args, more),) = joined
    assert args == ("nccl",) and more["device_id"] == torch.device("cuda", index) and more["rank"] == 6


GROUP = """
import torch, utils
from utils import Meters
device = utils.init_distributed("cpu", world_size=2)
world, rank = utils.world_and_rank()
meters = Meters()
meters.update(1 + 2 * rank, loss=torch.tensor(4.0 * rank))
if rank == 0:
    meters.update(seen=5.0)
norm = torch.nn.BatchNorm1d(2)
norm.running_mean += 7.0 + rank
utils.broadcast_buffers(norm)
utils.print_main("rank", rank, "of", world, utils.gather(rank * 10), meters.means_over_ranks(),
          meters.count_over_ranks("loss"))
assert norm.running_mean.tolist() == [7.0, 7.0]
torch.distributed.destroy_process_group()
"""


def test_two_processes_join_count_and_print_once(alone, tmp_path):
    alone.setenv("OMP_NUM_THREADS", "1")
    # The meeting point is a file: no port to be taken by someone else.
    script = GROUP.replace("world_size=2", f"world_size=2, dist_url='file://{tmp_path}/meeting'")
    started = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said == ["rank 0 of 2 [0, 10] {'loss': 3.0, 'seen': 5.0} 4\n", ""]


# -------------------------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with utils.atomic(path, before_rename=lambda: done.append(path.read_text())) as file:
        done = []
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and done == ["old"]
    for error in (OSError("broken"), ValueError("wrong"), RuntimeError("torn")):
        with pytest.raises(type(error), match=str(error)):
            with utils.atomic(path, "--here") as file:
                file.write(b"half")
                raise error
    with pytest.raises(
        OSError, match="^Cannot write .*gone/file .No such file.*: make room there, or choose another --here"
    ):
        utils.write_atomic(tmp_path / "gone" / "file", "x", "--here")
    assert path.read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_generators_are_seeded_and_given_back():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_everything(1)
    expected = draws(), draws()
    seed_everything(1)
    first = draws()
    with utils.preserved_cpu_generators():
        utils.seed_cpu(2, 3)
        inside = draws()
    assert (first, draws()) == expected
    utils.seed_cpu(2, 3)
    assert draws() == inside
    seed_everything(2, 3)
    assert draws() == inside


def test_json_lines_round_trip(tmp_path):
    path = tmp_path / "log.txt"
    records = [{"epoch": 0, "acc1": 12.5, "none": None}, {"epoch": 1, "note": "ü\n"}]
    for record in records:
        append_json_line(path, record)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and [json.loads(line) for line in lines] == records


def test_json_round_trip(tmp_path):
    path, record = tmp_path / "run.json", {"args": {"lr": 1e-3, "betas": None}, "phases": [1, 2]}
    write_json(path, {"old": 1, **{str(i): i for i in range(100)}})
    write_json(path, record)
    assert json.loads(path.read_text(encoding="utf-8")) == record
    assert len(path.read_text().splitlines()) > 5  # indented, to be read by people
    write_json(path, {"path": Path("a/b")})
    assert json.loads(path.read_text()) == {"path": "a/b"}


def test_environment_has_versions_and_revision():
    seen = environment()
    assert set(seen) == {"command", "python", "torch", "torchvision", "timm", "numpy", "gpu", "revision"}
    assert seen["torch"] == torch.__version__ and seen["numpy"] == np.__version__
    assert seen["python"] == ".".join(map(str, sys.version_info[:3]))
    assert seen["command"] == sys.argv
    assert json.loads(json.dumps(seen)) == seen


def test_revision_is_what_git_says(monkeypatch, tmp_path):
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\n[ "$1 $2" = "-C {ROOT}" ] && echo abc1234-dirty\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment()["revision"] == "abc1234-dirty"
    git.write_text("#!/bin/sh\necho 'fatal: not a git repository' >&2\nexit 128\n")
    assert environment()["revision"] is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))  # no git at all
    assert environment()["revision"] is None
