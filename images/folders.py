"""Listing of the image files below a folder: which extensions count, and which links are followed."""

import os
from collections import Counter, deque
from functools import cache
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import printable_path

# Formats that Pillow knows but that are no pictures, are programs, or are not read by Pillow itself.
_NOT_READ = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Pictures that the user is told of where they are left out. Other files, such as texts, are left out silently.
_PICTURES = frozenset(
    ".3fr .ai .arw .avif .cr2 .cr3 .crw .dcm .dng .emf .eps .erf .exr .fits .gif .hdr .heic .heif .hif .iiq .j2k .jp2 "
    ".jxl .jxr .kdc .mrw .nef .nrw .orf .pef .psb .psd .raf .raw .rw2 .sr2 .srf .srw .svg .svgz .wdp .wmf .x3f "
    ".xcf".split()
)


@cache
def image_extensions():
    """The extensions of the image formats that Pillow reads on this machine, in lower case and with their dot."""
    Image.preinit()  # as Image.open does: it tries the formats in the order in which they were loaded
    Image.init()
    kinds = Image.OPEN.keys() - _NOT_READ | {"MPO"}  # which the reader of JPEG opens
    return frozenset(IMG_EXTENSIONS).union(ext for ext, kind in Image.registered_extensions().items() if kind in kinds)


def left_out_words(left_out):
    """The Counter that `images_below` returns in words, such as '2 .heic, 1 .svg, which ...'; '' for an empty one."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{number:,} {extension}" for extension, number in kinds)
    return words and f"{words}, whose format is not read here"


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _with_parents(folder):
    real = Path(os.path.realpath(folder))
    return {_identity(each) for each in (real, *real.parents)}


def contains(outer, inner):
    """Whether the folder `outer` is `inner` or lies above it, links resolved."""
    return _identity(outer) in _with_parents(inner)


def visible_entries(folder):
    """The entries of a folder that are not hidden, as os.scandir gives them; OSError naming the folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        name = printable_path(folder)
        raise OSError(f"Cannot list the folder {name} ({error.strerror}): give access to it.") from error


def is_folder(entry):
    """Whether an entry of os.scandir is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def images_below(root, name=""):
    """List the image files below `root/name`, which are those with one of `image_extensions`.

    Hidden files and folders are left out. Links to folders are followed after the folders themselves were listed. A
    link is not followed to a folder that was listed before, or that lies above `root/name`: so links in a circle end,
    and `class/up -> ..` does not bring in the other classes.

    Returns (paths relative to `root`, in any order, Counter {extension: pictures whose format is not read here}).
    Raises OSError naming a folder that cannot be listed.
    """
    extensions, paths, left_out = image_extensions(), [], Counter()
    listed = _with_parents(root) | _with_parents(os.path.join(root, name))
    folders, links, linked = deque([name]), deque(), False
    while folders or links:
        if not folders:
            linked = True
            folders.append(links.popleft())
        folder = folders.popleft()
        identity = _identity(os.path.join(root, folder))
        if linked and identity in listed:
            continue
        listed.add(identity)
        subfolders = []
        for entry in visible_entries(os.path.join(root, folder)):
            path = f"{folder}/{entry.name}" if folder else entry.name
            extension = os.path.splitext(entry.name)[1].lower()
            if is_folder(entry):
                subfolders.append((path, entry.is_symlink()))
            elif extension in extensions:
                paths.append(path)
            elif extension in _PICTURES:
                left_out[extension] += 1
        for path, is_link in sorted(subfolders):  # which of two links to a folder is followed must not depend on luck
            (links if is_link else folders).append(path)
    return paths, left_out
