"""Attacks through split files, lists, CSV files and data sets in other formats."""

import gzip
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

from tests.proofs.attacks.sandbox import REFUSED, Executing, cases, fill, train
from tests.trees import make_cifar, make_fashion, make_inat, make_semi_inat


def split(content):
    """Prepare a split file: bytes, or a function of its path."""

    def prepare(box):
        fill(box / "data/labelled.txt", content)
        return train()

    return prepare


def table(content, **files):
    """Prepare data/train.csv, bytes or a function of its path, and val.csv, in place of the folders' classes."""

    def prepare(box):
        root = box / "data"
        (root / "train").rename(root / "kept"), (root / "val").rename(root / "other")
        fill(root / "train.csv", content)
        (root / "val.csv").write_text("path,label\nkept/class0/c0_1.png,a\nkept/class1/c1_1.png,b\n")
        for name, text in files.items():
            (root / f"{name}.csv").write_text(text)
        return train("--data-split-file", "None")

    return prepare


ROWS = b"kept/class0/c0_0.png,a\nkept/class1/c1_0.png,b\n"


def _unlabelled(content):
    def prepare(box):
        fill(box / "unlabelled.csv", content)
        return train("--unlabelled-path", "unlabelled.csv")

    return prepare


def other_set(make_it, name, *words):
    """Prepare a data set of another format, spoilt, and train on it."""

    def prepare(box):
        root = box / "set"
        root.mkdir()
        make_it(root)
        given = "--data-set", name, "--data-path", "set", "--data-split-file", "None"
        return train(*given, "--supervise-only", *words)

    return prepare


def _cifar(content):
    def make_it(root):
        make_cifar(root, "CIFAR10")
        (root / "cifar-10-batches-py/data_batch_3").write_bytes(content)

    return make_it


def _fashion(content, packed=False):
    """A function that writes a set whose training images are these bytes, with their right sum."""

    def make_it(root):
        make_fashion(root)
        path = root / "train-images-idx3-ubyte"
        fill(path, content)
        with open(root / "SHA256SUMS", "a") as sums:
            sums.write(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
        if packed:
            path.unlink(), Path(f"{path}.gz").write_bytes(gzip.compress(bytes(2**29), 1) * 6)

    return make_it


def _inat(change):
    def make_it(root):
        make_inat(root, 2018)
        path = root / "train2018.json"
        path.write_text(change(path.read_text()))

    return make_it


def _semi_inat(name, content):
    def make_it(root):
        make_semi_inat(root)
        fill(root / "semi_list" / name, content)

    return make_it


CASES = cases(
    "lists and tables",
    ("a split file of 100,000 blanks", split(b" " * 100_000), REFUSED, "lists no image"),
    ("100,000 blanks and a name", split(b"c0_0.png" + b" " * 100_000 + b"x\n"), REFUSED, "line 1: .*not among"),
    ("a line of 30 million letters", split(b"a" * 30_000_000), REFUSED, "line 1: .*not among"),
    ("a million commas", split(b"," * 1_000_000), REFUSED, "line 1: .*not among"),
    ("a million lines", split(b"c0_0.png\n" * 1_000_000), REFUSED, "was listed before, in line 1"),
    ("a null byte", split(b"c0_0.png\nc0_1\0.png\n"), REFUSED, "line 2 contains a null byte"),
    ("../ in a split file", split(b"../../labelled.txt\n"), REFUSED, "leaves the data folder"),
    ("an absolute path", split(b"/etc/passwd\n"), REFUSED, "leaves the data folder"),
    ("one image by ./ and //", split(b"./class0//c0_0.png\nc0_0.png\n"), REFUSED, "was listed before"),
    ("bytes that are no text", split(bytes(range(256))), REFUSED, "is not UTF-8 text"),
    ("UTF-16", split("c0_0.png\n".encode("utf-16")), REFUSED, "is not UTF-8 text"),
    ("escapes", split(b"\x1b[2J\x1b]0;x\x07\n"), REFUSED, "is not among"),
    ("an empty split file", split(b""), REFUSED, "lists no image"),
    ("a FIFO as split file", split(os.mkfifo), REFUSED, "is not a regular file"),
    ("a folder as split file", split(os.mkdir), REFUSED, "There is no split file"),
    ("/dev/zero as split file", split(lambda path: path.symlink_to("/dev/zero")), REFUSED, "not a regular"),
    ("a split file of 2 GiB", split(lambda path: (path.touch(), os.truncate(path, 2**31))), REFUSED, "larger"),
    ("train.csv: a header only", table(b"path,label\n"), REFUSED, "train.csv"),
    ("train.csv: an unknown header", table(b"Datei,Klasse\n" + ROWS), REFUSED, "looks like a header"),
    ("train.csv: one image by ./ and //", table(ROWS + b"./kept//class0/c0_0.png,a\n"), REFUSED, "before"),
    ("train.csv: ../", table(ROWS + b"../x.png,a\n"), REFUSED, "leaves the data folder"),
    ("train.csv: an open quote", table(ROWS + b'"kept'), REFUSED, "is not CSV"),
    ("train.csv: a field of a million letters", table(ROWS + b"a" * 10**6 + b",b\n"), REFUSED, "is not CSV"),
    ("train.csv: a FIFO", table(os.mkfifo), REFUSED),
    ("unlabelled.csv: ../", table(ROWS, unlabelled="../x.png\n"), REFUSED, "leaves the data folder"),
    ("--unlabelled-path is a FIFO", _unlabelled(os.mkfifo), REFUSED, "not a regular file"),
    ("--unlabelled-path is empty", _unlabelled(Path.touch), REFUSED, "There is no image in unlabelled.csv"),
    ("CIFAR: a pickle that executes", other_set(_cifar(pickle.dumps({"data": Executing()})), "CIFAR10"),
     REFUSED, "it asks for posix.system"),
    ("CIFAR: an array of objects", other_set(_cifar(pickle.dumps(
        {"data": np.array([None]), "labels": [[1]]}, 2)), "CIFAR10"), REFUSED, "is not CIFAR's"),
    ("CIFAR: cut off", other_set(_cifar(pickle.dumps({"data": b"x" * 99})[:-50]), "CIFAR10"), REFUSED,
     "is not CIFAR's"),
    ("FASHION: 10**28 bytes by its header", other_set(_fashion(b"\0\0\x08\x03" + b"\x7f" * 12), "FASHION"), REFUSED,
     "is no idx file"),
    ("FASHION: an empty file", other_set(_fashion(b""), "FASHION"), REFUSED, "is no idx file"),
    ("FASHION: 3 GB of zeros, compressed", other_set(_fashion(b"", packed=True), "FASHION"), REFUSED, "gz is not"),
    ("INAT: lists nested 100,000 deep", other_set(_inat(lambda text: "[" * 100_000), "INAT"), REFUSED,
     "train2018.json is not JSON"),
    ("INAT: another category", other_set(_inat(
        lambda text: text.replace('"category_id": 1', '"category_id": -1')), "INAT"), REFUSED, "are not iNaturalist's"),
    ("INAT: ../", other_set(_inat(lambda text: json.dumps(json.loads(text) | {"images": [
        {"id": 7, "file_name": "../../../../etc/passwd"}]})), "INAT"), REFUSED, "leaves the data folder"),
    ("SEMI-INAT: a list of 100,000 blanks", other_set(_semi_inat(
        "semi-train.txt", b"a" + b" " * 100_000 + b"b"), "SEMI-INAT"), REFUSED, "has no class"),
    ("SEMI-INAT: class 9,999,999", other_set(_semi_inat(
        "semi-train.txt", b"l_train/0.jpg,9999999\n"), "SEMI-INAT"), REFUSED, "has an image of class 9999999"),
    ("SEMI-INAT: a FIFO", other_set(_semi_inat("semi-val.txt", os.mkfifo), "SEMI-INAT"), REFUSED),
)  # fmt: skip
