"""Download a published list of labelled ImageNet images and verify it.

    python -m data_splits.fetch_split {fixmatch10,fixmatch5,simclr1,simclr10} OUT_FOLDER [--url BASE]

Writes OUT_FOLDER/<list>.txt, for --data-split-file. fixmatch10 is the paper's 10 % list, and fixmatch5 consists of its
first 64,058 lines; both are verified by their sha256. The sha256 of SimCLR's balanced lists is not known here, so that
only the number of lines, the form of the names and the absence of duplicates are verified. A correct file that exists
already is not downloaded again.
"""

import argparse
import hashlib
import http.client
import re
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

from utils import atomic

FIXMATCH = "https://github.com/google-research/fixmatch/raw/d4985a1/imagenet/prep_imagenet_data/data_splits"
SIMCLR = "https://github.com/google-research/simclr/raw/master/imagenet_subsets"
NAME = re.compile(r"n[0-9]{8}_[0-9]+\.JPEG")
TIMEOUT = 30  # seconds without an answer


class Published(NamedTuple):
    """A published list.

    Attributes:
        lines: its number of lines.
        sha256: its checksum, None if not known.
        base, file: address of its folder, and its name there.
        head_of: instead of an address, the list of whose first lines it consists.
    """

    lines: int
    sha256: str | None = None
    base: str = ""
    file: str = ""
    head_of: str | None = None


LISTS = {
    "fixmatch10": Published(
        128_116,
        "d897658efd96e71ebf79042287a0975e6215f5b9e772a275e25aad050f554666",
        FIXMATCH,
        "files2shards_train_size128116_split1.txt",
    ),
    "fixmatch5": Published(
        64_058,
        "1838f8959bd588ba282807fff6df43be61d49b159640f1dd7e6e754abecc1aaa",
        head_of="fixmatch10",
    ),
    "simclr1": Published(12_811, base=SIMCLR, file="1percent.txt"),
    "simclr10": Published(128_116, base=SIMCLR, file="10percent.txt"),
}


def mismatch(content, wanted):
    """How the bytes `content` differ from the wanted Published list, in words; None if they are that list."""
    if wanted.sha256:
        found = hashlib.sha256(content).hexdigest()
        return None if found == wanted.sha256 else f"its sha256 is {found}, not {wanted.sha256}"
    names = content.decode("ascii", "replace").splitlines()
    strange = [name for name in names if not NAME.fullmatch(name)]
    if strange:
        return f"its line {strange[0][:60]!r} is not an image name like n01440764_10026.JPEG"
    if len(names) != wanted.lines:
        return f"it has {len(names)} lines, not {wanted.lines}"
    return None if len(set(names)) == len(names) else "it lists an image twice"


def _download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"Cannot download {url} ({error}): get the file another way and put it at {path}.") from error


def _write(path, content):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(f"Cannot write {path} ({error.strerror}): choose an OUT_FOLDER that can be written.") from error


def fetch(name, folder, url=None):
    """Download the list `name` of LISTS into a folder unless it is there, and return its path.

    Args:
        url: address of the folder that contains the file, instead of the published one.

    Raises OSError if the file cannot be downloaded or written, ValueError if it is not the published list.
    """
    wanted, path = LISTS[name], Path(folder, f"{name}.txt")
    if path.exists():
        wrong = mismatch(path.read_bytes(), wanted)
        if wrong:
            raise ValueError(f"{path} is not the published list ({wrong}): remove it and download it again.")
        return path
    if wanted.head_of:
        source = fetch(wanted.head_of, folder, url)
        content = b"".join(source.read_bytes().splitlines(keepends=True)[: wanted.lines])
    else:
        source = f"{(url or wanted.base).rstrip('/')}/{wanted.file}"
        content = _download(source, path)
    wrong = mismatch(content, wanted)
    if wrong:
        raise ValueError(f"{source} is not the published list ({wrong}): put the right file at {path} by hand.")
    _write(path, content)
    return path


def main():
    """Download the list that the command line names, and print what was verified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LISTS, help="name of the list")
    parser.add_argument("folder", metavar="OUT_FOLDER", help="folder to write it to")
    parser.add_argument("--url", metavar="BASE", help="address of another folder that contains the published file")
    arguments = parser.parse_args()
    try:
        path = fetch(**vars(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"fetch_split.py: error: {error}")
    wanted = LISTS[arguments.name]
    verified = f"sha256 {wanted.sha256}" if wanted.sha256 else "names and number correct, sha256 not known here"
    print(f"{path}: {wanted.lines} lines, {verified}")


if __name__ == "__main__":
    main()
