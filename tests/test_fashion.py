"""Fashion-MNIST's idx files: what is read, and the errors of files that are not right."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from images import fashion
from images.fashion import SUMS, write_idx
from tests.trees import make_fashion

FILES = tuple(SUMS)


def raw(folder, name):
    return (folder / name).read_bytes()


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_images_classes_and_order(tmp_path, place, packed):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    make_fashion(folder, train=23, test=4)
    # By hand: 16 bytes of header before the pixels, 8 before the labels.
    pixels = {name: raw(folder, name)[16 if "images" in name else 8 :] for name in FILES}
    assert raw(folder, FILES[0])[:16] == struct.pack(">BBBBiii", 0, 0, 8, 3, 23, 28, 28)
    if packed:
        for name in FILES:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw(folder, name)))
            (folder / name).unlink()
    for part, prefix, n in (("train", "train", 23), ("val", "t10k", 4)):
        samples = fashion.fashion(tmp_path, part)
        assert samples.targets.tolist() == list(pixels[f"{prefix}-labels-idx1-ubyte"]) == [i % 10 for i in range(n)]
        assert samples.classes[0] == "T-shirt/top" and samples.classes[9] == "Ankle boot" and len(samples) == n
        image = samples.source.load(n - 1)
        start = 784 * (n - 1)
        assert image.mode == "RGB" and image.size == (28, 28)
        for channel in np.asarray(image).reshape(-1, 3).T:
            assert channel.tobytes() == pixels[f"{prefix}-images-idx3-ubyte"][start : start + 784]
        assert (samples.source.path(n - 1), samples.source.identity(n - 1)) == (str(n - 1), n - 1)


def test_without_own_sums_the_published_ones_are_asked_for(tmp_path):
    make_fashion(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not Fashion-MNIST's, its sha256 differs"):
        fashion.fashion(tmp_path, "train")


def with_its_sum(folder, content):
    """The training images replaced by these bytes, whose sum SHA256SUMS has."""
    (folder / FILES[0]).write_bytes(content)
    with open(folder / "SHA256SUMS", "a") as file:
        file.write(f"{hashlib.sha256(content).hexdigest()}  {FILES[0]}\n")


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / FILES[1]).unlink(), "There is no .*train-labels-idx1-ubyte..gz.: put Fashion-MNIST's four"),
    (lambda f: (f / FILES[0]).write_bytes(raw(f, FILES[0])[:-1]), "train-images.* its sha256 differs"),
    (lambda f: (f / FILES[0]).rename(f / "x") and (f / f"{FILES[0]}.gz").write_bytes(b"no"), "ubyte.gz is damaged"),
    (lambda f: (f / "SHA256SUMS").write_text("abc\n"), "SHA256SUMS is not what sha256sum writes"),
    (lambda f: (f / "classes.txt").write_text("one\n" * 10), "classes.txt must hold 10 different class names"),
    (lambda f: (f / "classes.txt").write_text("one\ntwo\n"), "classes.txt must hold 10 different class names"),
    (lambda f: write_idx(f, FILES[1], np.zeros(3, np.uint8)), "do not fit: .40, 28, 28. images, .3,. labels"),
    (lambda f: write_idx(f, FILES[1], np.full(40, 10, np.uint8)), "do not fit"),
    (lambda f: write_idx(f, FILES[0], np.zeros((40, 9, 9), np.uint8)), "do not fit: .40, 9, 9. images"),
    (lambda f: with_its_sum(f, b""), "images-idx3-ubyte is no idx file of bytes"),
    (lambda f: with_its_sum(f, b"\0\0\x08\x03" + b"\xff" * 12), "images-idx3-ubyte is no idx file of bytes"),
    (lambda f: with_its_sum(f, b"\0\0\x08\x03" + b"\x7f" * 12), "images-idx3-ubyte is no idx file of bytes"),
    (lambda f: with_its_sum(f, b"\0\0\x08\xff" + bytes(8)), "images-idx3-ubyte is no idx file of bytes"),
    (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff"), "SHA256SUMS is not UTF-8 text"),
    (lambda f: (f / "classes.txt").write_bytes(b"\xff"), "classes.txt is not UTF-8 text"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, spoil, message):
    make_fashion(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        fashion.fashion(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_a_compressed_file_is_read_up_to_the_limit(tmp_path, monkeypatch):
    make_fashion(tmp_path)
    (tmp_path / FILES[0]).unlink(), (tmp_path / f"{FILES[0]}.gz").write_bytes(gzip.compress(bytes(10**6)))
    monkeypatch.setattr(fashion, "MAX_BYTES", 1000)
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(fashion.hashlib, "sha256", lambda content: hashed.append(len(content)) or sha256(content))
    with pytest.raises(ValueError, match="ubyte.gz is not Fashion-MNIST's, its sha256 differs"):
        fashion.fashion(tmp_path, "train")
    assert hashed == [1000]


def test_another_set_in_this_format_names_its_classes(tmp_path):
    make_fashion(tmp_path)
    (tmp_path / "classes.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    assert fashion.fashion(tmp_path, "val").classes == tuple(f"digit {i}" for i in range(10))


def test_what_cannot_be_downloaded_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(
        FileNotFoundError, match="no folder .*FashionMNIST .--data-path.*idx files into .*Debian's dataset-fashion"
    ) as caught:
        fashion.fashion(tmp_path, "train")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_download_lands_where_torchvision_keeps_it(tmp_path, monkeypatch):
    def download(root, download):
        folder = tmp_path / root / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        make_fashion(folder)

    monkeypatch.setattr(fashion, "FashionMNIST", download)
    assert len(fashion.fashion(tmp_path, "train")) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


def test_sums_are_those_sha256sum_checks(tmp_path):
    make_fashion(tmp_path)
    rows = dict(line.split()[::-1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert rows == {name: hashlib.sha256(raw(tmp_path, name)).hexdigest() for name in FILES}
