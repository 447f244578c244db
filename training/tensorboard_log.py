"""The curves of a training run for TensorBoard, an optional package: one event file a start of the run.

They are the main process's and come with the printed lines. That there are curves changes neither the weights nor
log.txt.
"""

import importlib.util
import resource
import sys
import time
from functools import partial
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


def memory():
    """The most memory this process has held so far, in GiB: of the GPU where it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


class Curves:
    """The event file of this start of a run. All ranks make it together, the main one writes.

    Each point is on the disk, as far as the system is concerned, when `add` returns: no thread holds any back, so a
    failure to write is met here and not in a thread's traceback.

    Args:
        folder: OUTPUT/tensorboard; made where missing.
        step: of the first point to come. TensorBoard takes out an earlier start's points from there on.
    Raises OSError naming the file that cannot be written.
    """

    def __init__(self, folder, step):
        self.path = Path(folder, f"events.out.tfevents.{time.time_ns()}")  # read in the order of their names
        utils.on_main(self._begin, step)

    def _begin(self, step):
        from tensorboard.compat.proto.event_pb2 import SessionLog

        with utils.writing(self.path):
            self.path.parent.mkdir(exist_ok=True)
        self._write(file_version="brain.Event:2")
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with utils.writing(self.path), open(self.path, "ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())

    def add(self, group, step, scalars):
        """Add a point to the curve `<group>/<name>` of each scalar but None; nothing on the other ranks.

        A failure to write costs the rest of this start's curves, and not the run: it is said, and no more is written.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self.path or not utils.is_main():
            return
        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in scalars.items()
            if value is not None
        ]
        try:
            self._write(step=step, summary=Summary(value=values))
        except OSError as error:
            self.path = None
            print_main(f"Warning: {error} The run goes on without --tensorboard's curves until it is started again.")

    def reporter(self, first):
        """The `report` of `engine.train_one_epoch` for an epoch whose first step is `first`; None on other ranks."""
        return partial(self._report, first) if utils.is_main() else None

    def _report(self, first, step, scalars):
        self.add("train", first + step, scalars | {"memory_gib": memory()})
