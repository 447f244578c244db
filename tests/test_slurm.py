"""Jobs on a real Slurm, two nodes of two tasks: whole, requeued, out of time, failed. bash script/test.sh --slurm"""

import os
import subprocess

import pytest

import run_with_submitit
from tests.proofs import prove_slurm as slurm
from tests.trees import make_tree

# script/test.sh --slurm sets it: "ready", or why there is no Slurm.
STATE = os.environ.get("SLURM_SANDBOX_STATE", "bash script/test.sh --slurm runs it on a Slurm of its own")
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(STATE != "ready", reason=STATE)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), train=24, val=100, labelled=8)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The job that nobody interrupted."""
    return slurm.Job(tmp_path_factory.mktemp("whole"), tree).end()


def test_four_ranks_on_two_nodes_train_to_the_end(whole):
    assert whole.epochs() == [[*range(8)]] and len(whole.lines()) == 5
    assert "24 in all on 4 process(es); 20 steps an epoch" in whole.log(0, "out")
    shown = whole.facts()
    assert (shown["NumNodes"], shown["NumTasks"], shown["Restarts"]) == ("2", "4", "0")


def test_a_job_requeued_again_and_again_ends_as_one_left_alone(whole, tree, tmp_path):
    job = slurm.Job(tmp_path, tree)
    for _, command, moment in slurm.INTERRUPTIONS:
        job.interrupt(command, moment)
    job.end()
    # Checkpoints come every epoch although --evaluate-freq is 2: what is repeated is the epoch that was cut off.
    assert len(job.epochs()) == 5 and max(slurm.repeated(job)) == 1
    assert slurm.differences(job, whole) == []
    assert job.log(0, "out").count("- Requeued job") == 3  # once a SIGUSR2: no data worker answered it too


def test_a_job_at_its_time_limit_requeues_itself_and_ends_as_one_left_alone(whole, tree, tmp_path):
    job = slurm.out_of_time(whole, tmp_path, tree).end()
    log = job.log(0, "out")
    assert "Caught signal SIGUSR2" in log and "this job is timed-out" in log
    assert len(job.epochs()) > 1 and max(slurm.repeated(job)) <= 1
    assert slurm.differences(job, whole) == []


def submitted(task, tmp_path):
    """A job with the launcher's settings that calls the task."""
    words = ["--partition", "", "--nodes", "2", "--ngpus", "2", "--device", "cpu", "--timeout", "5"]
    folder = str(tmp_path / "%j")
    args = run_with_submitit.get_args_parser().parse_args(words)
    return run_with_submitit.build_executor(args, folder).submit(task).job_id


def state_at_the_end(job, seconds=120):
    """Slurm's last word on a job; TimeoutExpired if it is still there after so many seconds."""
    subprocess.run(["bash", "-c", f'while [ -n "$(squeue -h -j {job})" ]; do sleep 0.5; done'], timeout=seconds)
    return slurm.facts(job)


def test_a_task_that_fails_ends_the_job(tmp_path):
    def fails():
        import os
        import time

        if os.environ["SLURM_PROCID"] == "2":
            raise ValueError("rank 2 is broken")
        time.sleep(1000)

    job = submitted(fails, tmp_path)
    end = state_at_the_end(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "ValueError: rank 2 is broken" in (tmp_path / job / f"{job}_2_log.err").read_text()


def test_a_cancelled_job_does_not_come_back(tmp_path):
    def waits():
        import time

        print("waits", flush=True)
        time.sleep(1000)

    job = submitted(waits, tmp_path)
    log = tmp_path / job / f"{job}_0_log.out"
    subprocess.run(["bash", "-c", f"until grep -sq waits {log}; do sleep 0.2; done"], timeout=120, check=True)
    subprocess.run(["scancel", job], check=True)
    end = state_at_the_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
