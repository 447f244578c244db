"""Reading of whole regular files."""

import errno
import os
import stat

MAX_BYTES = 2**30  # more than any file that this project reads has; a larger one is taken for a mistake


def _without_waiting(path, flags):
    # A FIFO without a writer would block, and a terminal could become that of this process.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_regular(path):
    """Return the content of a regular file of at most MAX_BYTES, bytes.

    Raises OSError, whose `strerror` says why: the file cannot be opened or read, is a folder, a FIFO, a socket or a
    device, or is too large. It never waits for data, and never reads more than MAX_BYTES + 1, whatever size the system
    tells (files in /proc have size 0, and some have no end).
    """
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ENODEV, "it is not a regular file", str(path))
        left = MAX_BYTES + 1 if status.st_size <= MAX_BYTES else 0
        chunks, step = [], status.st_size + 1
        while left and (chunk := os.read(file.fileno(), min(left, step))):
            chunks.append(chunk)
            left, step = left - len(chunk), 2**16
        if not left:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_BYTES:,} bytes", str(path))
    return b"".join(chunks)
