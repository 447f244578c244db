"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017) in its idx format: 28x28 grey photos of clothes, 10 classes."""

import gzip
import hashlib
import io
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from images.downloads import fetch_folder
from images.files import MAX_BYTES, read_regular
from images.readers import ArraySource, Samples
from images.tables import read_text

CLASSES = tuple(FashionMNIST.classes)
SIDE = 28
SUMS = {  # sha256 of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
OWN_SUMS = "SHA256SUMS"  # as sha256sum writes it
OWN_CLASSES = "classes.txt"  # a name a line


class GreySource(ArraySource):
    """Grey images in memory, uint8 (N, H, W). A split file names an image by its number in the file."""

    def __init__(self, images, root):
        super().__init__(images)
        self.root = root

    def path(self, i):
        """The name of image i, its number in the file."""
        return str(int(i))

    def load(self, i):
        """Image i as RGB, its grey in all three channels."""
        return super().load(i).convert("RGB")


def _folder(root):
    """The folder of the idx files: `root` itself, or torchvision's place below it; downloaded where there is none."""
    places = [Path(root), Path(root, "FashionMNIST", "raw")]
    if not any(any(place.glob("*-idx?-ubyte*")) for place in places):
        advice = f"put Fashion-MNIST's four idx files into {root}, as of Debian's dataset-fashion-mnist."
        fetch_folder(root, "FashionMNIST", partial(FashionMNIST, download=True), advice)
    return places[0] if any(places[0].glob("*-idx?-ubyte*")) else places[1]


def _sums(folder):
    """{file: sha256}, from the folder's SHA256SUMS, which another data set in this format brings, else SUMS."""
    path = folder / OWN_SUMS
    if not path.is_file():
        return SUMS
    rows = [line.split() for line in read_text(path, "file of sums", "--data-path").splitlines()]
    if any(len(row) != 2 or len(row[0]) != 64 for row in rows):
        raise ValueError(f"{path} is not what sha256sum writes: make it anew, or remove it for Fashion-MNIST itself.")
    return {name.lstrip("*"): digest for digest, name in rows}


def _array(folder, name):
    """The uint8 array of an idx file, plain or gzip-compressed, checked by its sha256."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"There is no {folder / name}[.gz]: put Fashion-MNIST's four idx files there.")
    try:
        content = read_regular(path)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES)  # a compressed file can be that of terabytes
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again.") from error
    if hashlib.sha256(content).hexdigest() != _sums(folder).get(name):
        raise ValueError(f"{path} is not Fashion-MNIST's, its sha256 differs: fetch it again.")
    try:
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (IndexError, ValueError) as error:  # of a file with a sum of its own
        raise ValueError(f"{path} is no idx file of bytes ({error}): make it anew.") from error


def _classes(folder):
    """The ten class names, from the folder's classes.txt, which another data set may bring, else CLASSES."""
    path = folder / OWN_CLASSES
    if not path.is_file():
        return CLASSES
    names = tuple(line.strip() for line in read_text(path, "file of class names", "--data-path").splitlines())
    if len(names) != len(CLASSES) or len({*names} - {""}) != len(CLASSES):
        raise ValueError(f"{path} must hold {len(CLASSES)} different class names, one a line: mend or remove it.")
    return names


def write_idx(folder, name, array):
    """Write a uint8 array as an idx file, and its sha256 into SHA256SUMS beside it, for `fashion` to read."""
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    Path(folder, name).write_bytes(content)
    with open(Path(folder, OWN_SUMS), "a", encoding="utf-8") as file:
        file.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n")


def fashion(root, part):
    """Read Fashion-MNIST from its four idx files, plain or with gzip, in `root` or `root/FashionMNIST/raw`.

    Missing files are downloaded where the network allows it. Their content is checked by sha256. Another data set in
    this format, such as MNIST, brings a file SHA256SUMS of its own and, optionally, classes.txt.

    Args:
        part: 'train' (60,000 images), or 'val': the 10,000 test images.
    Returns Samples in file order; a split file names an image by its number there, from 0. Raises FileNotFoundError
    or ValueError naming the file.
    """
    folder, prefix = _folder(root), "train" if part == "train" else "t10k"
    images = _array(folder, name := f"{prefix}-images-idx3-ubyte")
    targets = _array(folder, f"{prefix}-labels-idx1-ubyte").astype(np.int64)
    right = images.ndim == 3 and images.shape[1:] == (SIDE, SIDE) and targets.shape == images.shape[:1]
    if not right or targets.max(initial=0) >= len(CLASSES):
        raise ValueError(f"{folder / name} and its labels do not fit: {images.shape} images, {targets.shape} labels.")
    return Samples(GreySource(images, folder / name), targets, _classes(folder))
