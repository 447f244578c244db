"""Scalars of a training run for TensorBoard (an optional package), written by the main process.

A run with --tensorboard has the same weights and the same log.txt as one without.
"""

import importlib.util
import resource
import sys
from pathlib import Path

import torch

import utils
from utils import print_main


def check(folder):
    """Raise ValueError where --tensorboard lacks the output folder or the package."""
    if not folder:
        raise ValueError("--tensorboard writes below --output_dir: name that folder, or leave --tensorboard out.")
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out.")


def peak_memory():
    """The most memory that this process has used so far, in GiB: on the GPU where it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


class TensorBoardLog:
    """The event file of one start of a run. All ranks create it together; only the main one writes.

    Args:
        folder: OUTPUT_DIR/tensorboard; created where missing.
        step: the first step to be written. TensorBoard discards what an earlier start wrote from there on.
    Raises OSError naming the folder that cannot be written.
    """

    def __init__(self, folder, step):
        self.folder, self._writer = Path(folder), None
        utils.on_main(self._open, step)

    def _open(self, step):
        from torch.utils.tensorboard import SummaryWriter

        with utils.writing(self.folder):
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
            self._writer.flush()

    def add(self, group, step, scalars):
        """Write {name: value or None} as the scalars `<group>/<name>` of a step; does nothing on the other ranks.

        A failure to write ends the log of this start, with a warning, and not the run.
        """
        if self._writer is None or not utils.is_main():
            return
        try:
            with utils.writing(self.folder):
                for name, value in scalars.items():
                    if value is not None:
                        self._writer.add_scalar(f"{group}/{name}", value, step)
                self._writer.flush()
        except OSError as error:
            self._writer = None
            print_main(f"Warning: {error} The run continues without --tensorboard until it is started again.")

    def writer(self, first_step):
        """The `write` of utils.EpochLog for an epoch that begins at this step; None on the other ranks."""

        def write(step, scalars):
            self.add("train", first_step + step, {**scalars, "memory_gib": peak_memory()})

        return write if utils.is_main() else None
