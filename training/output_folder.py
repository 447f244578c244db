"""The output folder of a run: its files, the order in which they are written, and where a killed run goes on."""

from pathlib import Path

import utils
from training import checkpoint
from utils import print_main

LATEST, PREVIOUS, BEST, FORK = "checkpoint.pth", "checkpoint.prev.pth", "best.pth", "epoch_{}_checkpoint.pth"


def newest(folder):
    """The newest complete checkpoint of an output folder, a path; None where there is none at all.

    That is checkpoint.pth. Where it is missing or damaged it is, of the other files that hold a whole training
    state, the one of the latest epoch; the damaged ones are named. Raises ValueError where there are files but
    none is complete.
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
    """The checkpoint that --resume names or, on every rank the same, that `auto` finds in a folder; "" for none.

    Raises ValueError for `auto` without a folder, and what `newest` does.
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
    """The files of a run. All ranks call its methods together, the main one writes, and its OSError is everyone's.

    Attributes:
        folder: an existing folder, or None: nothing is kept.
    """

    def __init__(self, folder):
        self.folder = Path(folder) if folder else None

    def describe(self, content):
        """Write run.json; `content` is called, on the main process alone, for what to write."""
        if self.folder:
            utils.on_main(lambda: utils.write_json(self.folder / "run.json", content()))

    def trim(self, epoch):
        """Take the lines of epochs after this one, which come again, and half-written ones out of log.txt."""
        dropped = utils.on_main(utils.trim_json_lines, self.folder / "log.txt", epoch) if self.folder else 0
        if dropped:
            print_main(
                f"{self.folder / 'log.txt'}: {dropped} lines are not of epochs up to {epoch}, now in log.dropped.txt."
            )

    def save(self, content, names, record=None, keep_previous=True):
        """Write an epoch's log line, if it has one, then its checkpoints, in the order of `names`.

        checkpoint.pth shall be the last name, for it stands for all: a run killed before it is in place repeats the
        epoch. `content` is called, on the main process alone, for what to write; the checkpoint.pth that was there
        becomes checkpoint.prev.pth.
        """

        def write():
            if record is not None:
                utils.append_json_line(self.folder / "log.txt", record)
            state = content()
            for name in names:
                previous = self.folder / PREVIOUS if name == LATEST and keep_previous else None
                checkpoint.save(state, self.folder / name, previous)

        if self.folder:
            utils.on_main(write)
