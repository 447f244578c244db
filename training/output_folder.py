"""The output folder of a run: its files, the order in which they are written, and the checkpoint to resume from."""

from pathlib import Path

import utils
from training import checkpoint
from utils import print_main

LATEST, PREVIOUS, BEST, FORK = "checkpoint.pth", "checkpoint.prev.pth", "best.pth", "epoch_{}_checkpoint.pth"


def newest(folder):
    """The path of the newest complete checkpoint of an output folder, None where the folder has no checkpoint.

    That is checkpoint.pth. Where it is missing or damaged, the file of the latest epoch among the others that hold a
    complete training state takes its place, and a warning names the damaged ones. Raises ValueError where there are
    checkpoints but none is complete.
    """
    forks = sorted(Path(folder).glob(FORK.format("*")))
    found, epoch, damaged = None, None, []
    for path in [*(Path(folder, name) for name in (LATEST, PREVIOUS, BEST)), *forks]:
        if not path.exists():
            continue
        try:
            content = checkpoint.read(path)
            if not isinstance(content, dict) or any(key not in content for key in checkpoint.STATE_KEYS):
                raise ValueError(f"{path} holds no whole training state ({', '.join(checkpoint.STATE_KEYS)})")
        except (OSError, ValueError) as error:
            damaged.append(str(error))
            continue
        if found is None or content["epoch"] > epoch:
            found, epoch = path, content["epoch"]
        if path.name == LATEST:
            break
    if damaged and found is None:
        raise ValueError(
            f"No checkpoint of {folder} is complete ({damaged[0]}): move them away for a fresh start, "
            "or name another file with --resume."
        )
    for reason in damaged:
        print_main(f"Warning: {reason}; going on from the older {found}, of epoch {epoch}.")
    return found and str(found)


def resume_file(resume, folder):
    """The checkpoint to resume from, "" for none: the one that --resume names, or for `auto` the newest of the folder.

    Every rank must call this and gets the same answer. Raises ValueError for `auto` without a folder, and as `newest`.
    """
    if resume != "auto":
        return resume
    if not folder:
        raise ValueError("--resume auto looks for a checkpoint in --output_dir: name that folder, or a file.")
    found = utils.on_main(newest, folder)
    print_main(
        f"--resume auto: going on from {found}." if found else f"--resume auto: {folder} holds no checkpoint yet."
    )
    return found or ""


class Output:
    """The files of a run. All ranks call its methods together; the main one writes, and all raise its OSError.

    Args:
        folder: an existing folder; empty: nothing is written.
    """

    def __init__(self, folder):
        self.folder = Path(folder) if folder else None

    def write_run_json(self, content):
        """Write run.json. `content()` makes the object to write, on the main process alone."""
        if self.folder:
            utils.on_main(lambda: utils.write_json(self.folder / "run.json", content()))

    def tidy(self, epoch):
        """Prepare the folder for a run that resumes after this epoch.

        Temporary files of a killed run are removed; the lines of later epochs, which the run writes again, and
        incomplete lines are moved out of log.txt.
        """
        if self.folder is None:
            return
        log = self.folder / "log.txt"

        def tidy_up():
            for leftover in self.folder.glob("*.[0-9]*.tmp"):
                leftover.unlink()
            return utils.trim_json_lines(log, epoch)

        if dropped := utils.on_main(tidy_up):
            print_main(f"{log}: {dropped} lines are not of epochs up to {epoch}, now in log.dropped.txt.")

    def log(self, record):
        """Append an epoch's record to log.txt."""
        if self.folder:
            utils.on_main(utils.append_json_line, self.folder / "log.txt", record)

    def save(self, content, names, keep_previous=True):
        """Write an epoch's checkpoints in the order of `names`.

        checkpoint.pth should be the last name: a run that is killed before this file is in place repeats the epoch.
        `content()` makes the state to write, on the main process alone. The checkpoint.pth of the epoch before
        becomes checkpoint.prev.pth.
        """

        def write():
            state = content()
            for name in names:
                previous = self.folder / PREVIOUS if name == LATEST and keep_previous else None
                checkpoint.save(state, self.folder / name, previous)

        if self.folder:
            utils.on_main(write)
