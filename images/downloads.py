"""Data sets that are downloaded where they are missing and the network allows it."""

import os
import tempfile
from pathlib import Path


def fetch_folder(root, name, download, otherwise):
    """Download a folder into `root`, complete or not at all.

    Processes that start together each download into a temporary folder; the first complete one stays.

    Args:
        name: the folder to appear in `root`.
        download: called with a temporary folder, in which it leaves a folder of that name.
        otherwise: what to do where the download fails, the end of the error message.
    Raises FileNotFoundError where the folder is not there in the end.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as fresh:
            download(fresh)
            os.rename(Path(fresh, name), Path(root, name))
    except (OSError, RuntimeError) as error:
        if not Path(root, name).is_dir():
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"There is no folder {Path(root, name)} (--data-path) and downloading it failed ({reason}): {otherwise}"
            ) from error
