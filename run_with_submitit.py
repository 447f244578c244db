"""Train or evaluate in a Slurm job, or with --local in a job on this machine, with the flags of semi_main.py.

    python run_with_submitit.py --nodes 2 --data-set SEMI-IMNET --data-path IMAGENET --data-split-file LIST ...

Shortly before its time limit, and when it is preempted, the job requeues itself and resumes from its last checkpoint.
The requested resources are those of the released Slurm runs.
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
import utils
from training import output_folder

CPUS_PER_TASK, GB_PER_TASK = 10, 40
SIGNAL_AHEAD_S = 120  # from the signal to the time limit
REQUEUES = 30  # at most, after time limits
SHARED_FOLDER = Path("output", "jobs")
# Importing torch can take most of a minute, during which the signal has no handler yet and would end the task.
# It is therefore blocked when the task starts, and delivered when Task.__call__ unblocks it.
HOLD_SIGNAL = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def get_args_parser():
    """Return the parser of semi_main.py with the eleven flags of the released launcher added."""
    parser = semi_main.options.Parser("run_with_submitit.py", parents=[semi_main.get_args_parser()])
    # ours: the default is not detected here, because the machine that submits the job often has no GPU.
    parser.set_defaults(device="cuda")
    add = parser.add_argument_group("job").add_argument
    text = partial(add, default="", type=str)
    add("--ngpus", default=8, type=int, help="GPUs per node; each GPU has one task (default: %(default)s)")
    add("--nodes", default=1, type=int, help="number of nodes (default: %(default)s)")
    add("--timeout", default=2800, type=int, help="minutes until the job is requeued (default: %(default)s)")
    text("--job_dir", help="output folder, instead of --output_dir; %%j = job id (default: SHARED_FOLDER/%%j)")
    text("--partition", default="learnfair", help="partition; empty: the cluster's default (default: %(default)s)")
    add("--use_volta32", action="store_true", help="request V100 GPUs with 32 GB (constraint volta32gb)")
    text("--comment", help="comment of the Slurm job (default: none)")
    add("--local", action="store_true", help="run on this machine without Slurm, and wait until the job ends")
    text("--shared_folder", help=f"parent of the job folders, visible to all nodes (default: {SHARED_FOLDER})")
    text("--resume_jobid", help="id of an earlier job from whose checkpoint to resume (default: none)")
    text("--resume_name", default="checkpoint.pth", help="file name of that checkpoint (default: %(default)s)")
    return parser


class Task:
    """The function that every task of the job calls: semi_main.main, with its output in the job folder."""

    def __init__(self, args):
        self.args = args

    def __call__(self):
        """Train or evaluate; raises what semi_main.main raises."""
        env = submitit.JobEnvironment()
        # submitit refuses to write a pickle whose temporary file exists. An earlier attempt of this job may have been
        # killed while it wrote one.
        for file in [env.paths.result_pickle, *([] if env.global_rank else [env.paths.submitted_pickle])]:
            Path(f"{file}.save_tmp").unlink(missing_ok=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        if env.cluster == "local":  # utils.init_distributed reads Slurm's variables itself
            os.environ |= {
                "RANK": str(env.global_rank),
                "WORLD_SIZE": str(env.num_tasks),
                "LOCAL_RANK": str(env.local_rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(utils.master_port(env.job_id)),
            }
        # Slurm may also requeue the job itself (scontrol requeue, a failed node), without a call of checkpoint().
        args = self._resuming_args() if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else self.args
        semi_main.main(_replace(args, output_dir=self._job_folder()))
        # Python removes its signal handlers some seconds before it exits; the signal would then fail a finished job.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def checkpoint(self):
        """Return the task to requeue, for submitit: the same one, resuming from its own checkpoint if it has one."""
        return submitit.helpers.DelayedSubmission(type(self)(self._resuming_args()))

    def _resuming_args(self):
        # Without a checkpoint of its own the job starts again as before, perhaps from the checkpoint of another run.
        folder = self._job_folder()
        has_checkpoint = any(Path(folder).glob("checkpoint*.pth"))
        if self.args.overwrite:  # what lies there may be of the run to be overwritten
            has_checkpoint &= output_folder.begun_by_job(folder, submitit.JobEnvironment().job_id)
        return _replace(self.args, resume="auto", overwrite=False) if has_checkpoint else self.args

    def _job_folder(self):
        return self.args.output_dir.replace("%j", submitit.JobEnvironment().job_id)


def _replace(args, **settings):
    return argparse.Namespace(**{**vars(args), **settings})


def check(args):
    """Raise ValueError, with a sentence that names the flags, if they do not describe a job that can be submitted."""
    for name in ("ngpus", "nodes", "timeout"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.local and args.nodes > 1:
        raise ValueError(f"--local runs on this machine alone, so --nodes {args.nodes} must be 1")
    semi_main.options.check_folder("--job_dir" if args.job_dir else "--shared_folder", job_folder(args))
    if not args.local and shutil.which("srun") is None:
        raise ValueError("There is no Slurm (srun) on this machine: submit from one that has it, or pass --local")
    if args.resume and args.resume_jobid:
        raise ValueError("--resume and --resume_jobid both name a checkpoint: keep one of them")
    semi_main.options.check(args)


def job_folder(args):
    """Return the absolute path of the job folder, still containing %j."""
    return str(Path(args.job_dir or Path(args.shared_folder or SHARED_FOLDER, "%j")).expanduser().absolute())


def job_flags(args):
    """Return the flags of the tasks, with the job folder (still containing %j) and the earlier job's checkpoint.

    Raises FileNotFoundError if the job of --resume_jobid has no such checkpoint.
    """
    folder, resume = job_folder(args), args.resume
    if args.resume_jobid:
        resume = str(Path(folder.replace("%j", args.resume_jobid), args.resume_name))
        if not Path(resume).is_file():
            raise FileNotFoundError(f"Job {args.resume_jobid} left no checkpoint {resume}.")
    return _replace(args, output_dir=folder, resume=resume, use_submitit=not args.local)


def build_executor(args, folder):
    """Return submitit's executor for the flags: that of Slurm, or with --local that of this machine."""
    here = str(Path(__file__).resolve().parent)
    # The tasks must find this repository's modules, whatever folder the job is submitted from.
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
        # The other tasks would wait for a failed one; from Slurm 22.05 on, srun does not take the job's number of CPUs.
        slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={CPUS_PER_TASK}"],
        slurm_additional_parameters={"requeue": True},  # for clusters that do not allow it by default
    )
    return executor


def failure(job, lines=5):
    """Wait until the job ends and return the last lines of the first failed task's error, or None."""
    for task in map(job.task, range(job.num_tasks)):
        error = task.exception()
        if error is not None:
            # submitit prints the traceback between two lines of dashes.
            trace = re.split(r"^-{20,}$", str(error), flags=re.MULTILINE)[1:2] or [str(error)]
            return "\n".join(trace[0].strip().splitlines()[-lines:])
    return None


def main(args):
    """Submit the job and print where its files are. With --local, wait until it ends and exit with 1 if it failed.

    Raises ValueError or OSError for bad flags, and submitit's FailedJobError or FailedSubmissionError if Slurm refuses
    the job.
    """
    check(args)
    flags = job_flags(args)
    job = build_executor(args, flags.output_dir).submit(Task(flags))
    semi_main.print_main(f"Job {job.job_id}, folder {job.paths.folder}")
    semi_main.print_main(f"Log files: {job.paths.stdout}, {job.paths.stderr}")
    if args.local:
        error = failure(job)
        if error is not None:
            sys.exit(utils.printable(f"Job {job.job_id} failed, and its log ends with:\n{error}"))
        semi_main.print_main(f"Job {job.job_id} finished.")


if __name__ == "__main__":
    arguments = get_args_parser().parse_args()
    try:
        main(arguments)
    except (ValueError, OSError, FailedJobError, FailedSubmissionError) as error:
        sys.exit(utils.printable(f"run_with_submitit.py: error: {error}"))
