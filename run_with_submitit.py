"""Train or evaluate as a Slurm job, or with --local as one of this machine: semi_main.py's flags, its main.

    python run_with_submitit.py --nodes 2 --data-set SEMI-IMNET --data-path IMAGENET --data-split-file LIST ...

Shortly before its time is up, and when it is preempted, the job puts itself back into the queue and goes on from
its last checkpoint. The resources are those of the released Slurm runs.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

import semi_main

CPUS_PER_TASK, GB_PER_TASK = 10, 40
SIGNAL_AHEAD_S, REQUEUES = 120, 30
SHARED_FOLDER = Path("output", "jobs")
# A signal that comes while Python and torch still start, which takes most of a minute, would end the task: it waits.
HOLD_SIGNAL = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def get_args_parser():
    """semi_main.py's parser and the eleven flags of the released launcher."""
    parser = argparse.ArgumentParser("run_with_submitit.py", parents=[semi_main.get_args_parser()])
    # ours: the machine that submits often has no GPU, the one that trains has.
    parser.set_defaults(device="cuda")
    add = parser.add_argument_group("job").add_argument
    text = partial(add, default="", type=str)
    add("--ngpus", default=8, type=int, help="GPUs a node, and tasks: one a GPU (default: %(default)s)")
    add("--nodes", default=1, type=int, help="machines (default: %(default)s)")
    add("--timeout", default=2800, type=int, help="minutes until the job is requeued (default: %(default)s)")
    text("--job_dir", help="output folder, over --output_dir; %%j = job id (default: SHARED_FOLDER/%%j)")
    text("--partition", default="learnfair", help="Slurm's; empty: the cluster's default (default: %(default)s)")
    add("--use_volta32", action="store_true", help="ask Slurm for V100 GPUs of 32 GB (constraint volta32gb)")
    text("--comment", help="comment that Slurm keeps with the job (default: none)")
    add("--local", action="store_true", help="run on this machine, without Slurm, and wait for the end")
    text("--shared_folder", help=f"folder of job folders, seen by all nodes (default: {SHARED_FOLDER})")
    text("--resume_jobid", help="id of an earlier job whose checkpoint to go on from (default: none)")
    text("--resume_name", default="checkpoint.pth", help="file name of that checkpoint (default: %(default)s)")
    return parser


class Task:
    """What each task of the job calls: semi_main.main with these flags, its output in the job folder."""

    def __init__(self, args):
        self.args = args

    def __call__(self):
        """Train or evaluate; raises what semi_main.main does."""
        env = submitit.JobEnvironment()
        # Killed while it wrote one of these, an earlier attempt left half of it, and submitit writes none over that.
        for file in [env.paths.result_pickle, *([] if env.global_rank else [env.paths.submitted_pickle])]:
            Path(f"{file}.save_tmp").unlink(missing_ok=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        if env.cluster == "local":  # Slurm's own variables are read in utils.init_distributed.
            os.environ |= {
                "RANK": str(env.global_rank),
                "WORLD_SIZE": str(env.num_tasks),
                "LOCAL_RANK": str(env.local_rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20_000 + int(env.job_id) % 20_000),
            }
        # Slurm requeues by itself too (scontrol requeue, a node that failed), and then checkpoint() was not called.
        args = self._going_on() if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else self.args
        semi_main.main(_changed(args, output_dir=self._folder()))
        # All is done. Python, which takes seconds to end, drops its handlers first: the signal would fail the job then.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def checkpoint(self):
        """The task to requeue: the same one, going on from the checkpoint it wrote if there is one."""
        return submitit.helpers.DelayedSubmission(type(self)(self._going_on()))

    def _going_on(self):
        # Before it has a checkpoint of its own it begins where it was told to, perhaps from another run's.
        started = any(Path(self._folder()).glob("checkpoint*.pth"))
        return _changed(self.args, resume="auto") if started else self.args

    def _folder(self):
        return self.args.output_dir.replace("%j", submitit.JobEnvironment().job_id)


def _changed(args, **settings):
    return argparse.Namespace(**{**vars(args), **settings})


def check(args):
    """Refuse flags that cannot make a job: a ValueError with one sentence that names them."""
    for name in ("ngpus", "nodes", "timeout"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.local and args.nodes > 1:
        raise ValueError(f"--local runs on this machine alone, so --nodes {args.nodes} must be 1")
    if not args.local and shutil.which("srun") is None:
        raise ValueError("There is no Slurm (srun) on this machine: submit from one that has it, or pass --local")
    if args.resume and args.resume_jobid:
        raise ValueError("--resume and --resume_jobid both name a checkpoint: keep one of them")
    semi_main.options.check(args)


def job_flags(args):
    """The flags as the tasks get them, with the job folder (%j still in it) and the earlier job's checkpoint.

    Raises FileNotFoundError where --resume_jobid has no such checkpoint.
    """
    job_dir = args.job_dir or Path(args.shared_folder or SHARED_FOLDER, "%j")
    folder, resume = str(Path(job_dir).expanduser().absolute()), args.resume
    if args.resume_jobid:
        resume = str(Path(folder.replace("%j", args.resume_jobid), args.resume_name))
        if not Path(resume).is_file():
            raise FileNotFoundError(f"Job {args.resume_jobid} left no checkpoint {resume}.")
    changed = {"output_dir": folder, "resume": resume, "use_submitit": not args.local}
    return _changed(args, **changed)


def build_executor(args, folder):
    """submitit's executor for the flags: Slurm's, or with --local this machine's."""
    here = str(Path(__file__).resolve().parent)
    # The tasks find our modules from whatever folder the job was submitted in.
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    cluster = "local" if args.local else "slurm"
    start = [sys.executable, "-IS", "-c", HOLD_SIGNAL, "env", f"PYTHONPATH={path}", sys.executable]
    settings = {"max_num_timeout": REQUEUES, "python": shlex.join(start)}
    executor = submitit.AutoExecutor(folder, cluster, **{f"{cluster}_{key}": v for key, v in settings.items()})
    executor.update_parameters(
        name="semiformer",
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        gpus_per_node=args.ngpus if args.device.startswith("cuda") else None,
        cpus_per_task=CPUS_PER_TASK,
        mem_gb=GB_PER_TASK * args.ngpus,
        timeout_min=args.timeout,
        slurm_signal_delay_s=SIGNAL_AHEAD_S,  # the signal is submitit's default, USR2
        slurm_partition=args.partition or None,
        slurm_comment=args.comment or None,
        slurm_constraint="volta32gb" if args.use_volta32 else None,
        slurm_srun_args=["--kill-on-bad-exit=1"],  # or the other tasks wait for one that failed
        slurm_additional_parameters={"requeue": True},  # where the cluster's default is that jobs are not
    )
    return executor


def failure(job, lines=5):
    """Wait for the job; the last lines of the first failed task's error, None if none failed."""
    for task in map(job.task, range(job.num_tasks)):
        error = task.exception()
        if error is not None:
            # submitit puts the traceback between two lines of dashes.
            trace = re.split(r"^-{20,}$", str(error), flags=re.MULTILINE)[1:2] or [str(error)]
            return "\n".join(trace[0].strip().splitlines()[-lines:])
    return None


def main(args):
    """Submit the job and say where it is; with --local wait for its end, and exit with 1 if it failed.

    Raises ValueError, OSError, or submitit's FailedJobError or FailedSubmissionError where Slurm refuses the job.
    """
    check(args)
    flags = job_flags(args)
    job = build_executor(args, flags.output_dir).submit(Task(flags))
    semi_main.print_main(f"Job {job.job_id}, folder {job.paths.folder}")
    semi_main.print_main(f"Log files: {job.paths.stdout}, {job.paths.stderr}")
    if args.local:
        error = failure(job)
        if error is not None:
            sys.exit(f"Job {job.job_id} failed, and its log ends with:\n{error}")
        semi_main.print_main(f"Job {job.job_id} finished.")


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    try:
        main(arguments)
    except (ValueError, OSError, FailedJobError, FailedSubmissionError) as error:
        sys.exit(f"run_with_submitit.py: error: {error}")
