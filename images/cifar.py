"""CIFAR-10 and CIFAR-100 in their format for Python, read without executing anything pickled in them."""

import io
import pickle
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_and_extract_archive

from images.downloads import fetch_folder
from images.files import read_regular
from images.readers import ArraySource, Samples

_CIFAR = {"CIFAR10": (CIFAR10, "labels"), "CIFAR100": (CIFAR100, "fine_labels")}


def _encode(text, encoding):
    """codecs.encode for the one codec in which Python 3 pickles a byte string."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


_PICKLED = {  # the only globals that a pickled array needs; numpy's function is taken from numpy under both its names
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and plain containers; anything else a pickle asks for is neither imported nor called."""

    def find_class(self, module, name):
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _PICKLED[module, name]


def _unpickled(path, *keys):
    """The values of these keys in a pickled dictionary, as arrays."""
    try:
        file = io.BytesIO(read_regular(path))
        content = _ArraysOnly(file, encoding="latin1").load()  # latin1: written by Python 2, bytes kept
        return [np.asarray(content[key]) for key in keys]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {path}: take it from CIFAR's archive for Python.") from error
    except OSError as error:
        raise OSError(f"Cannot read {path} ({error.strerror}): take it from CIFAR's archive for Python.") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is not CIFAR's: {error!r}; take it from CIFAR's archive for Python.") from error


def _fetch(kind, root):
    """Download a CIFAR archive, checked by its MD5 sum, and unpack its folder into `root`."""

    def download(folder):
        download_and_extract_archive(kind.url, folder, filename=kind.filename, md5=kind.tgz_md5)

    fetch_folder(root, kind.base_folder, download, f"unpack {kind.url} in {root}.")


def cifar(root, name, part):
    """Read CIFAR-10 or CIFAR-100 for Python, from `root/cifar-10-batches-py` or `root/cifar-100-python`.

    A missing folder is downloaded where the network allows it; nothing pickled in the files is executed.

    Args:
        name: 'CIFAR10' or 'CIFAR100' (its fine labels).
        part: 'train', or 'val': the test batch; then no other file than that and the names of the classes is read.
    Returns Samples of 32x32 images in file order. Raises FileNotFoundError or ValueError naming the file.
    """
    kind, key = _CIFAR[name]
    folder, images, targets = Path(root, kind.base_folder), [], []
    if not folder.is_dir():
        _fetch(kind, root)
    (classes,) = _unpickled(folder / kind.meta["filename"], kind.meta["key"])
    for file, _ in kind.train_list if part == "train" else kind.test_list:
        pixels, labels = _unpickled(folder / file, "data", key)
        right = pixels.dtype == np.uint8 and labels.ndim == 1 and pixels.shape == (labels.size, 3 * 32 * 32)
        if not (right and np.isin(labels, range(classes.size)).all()):
            raise ValueError(f"{folder / file} is not CIFAR's: take it from CIFAR's archive for Python.")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        targets.append(labels.astype(np.int64))
    return Samples(ArraySource(np.concatenate(images)), np.concatenate(targets), tuple(map(str, classes.ravel())))
