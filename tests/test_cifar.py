"""CIFAR: read from its own format, hostile files refused and not run, downloaded where it is missing."""

import codecs
import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from images import cifar as cifar_files
from images.cifar import cifar
from tests.trees import make_cifar, python2

FOLDER = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
TEST = {"CIFAR10": "test_batch", "CIFAR100": "test"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the network: a download fails as it does without one."""

    def download(url, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", download)


def pixels_of(samples):
    return np.stack([np.asarray(samples.source.load(i)) for i in range(len(samples))])


def test_the_files_of_these_tests_are_python_2s(tmp_path):
    make_cifar(tmp_path, "CIFAR10")
    content = (tmp_path / FOLDER["CIFAR10"] / "data_batch_1").read_bytes()
    opcodes = {op.name for op, _, _ in pickletools.genops(content)}
    assert content[:2] == b"\x80\x02" and "BINSTRING" in opcodes
    assert not {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"} & opcodes
    assert b"numpy.core.multiarray" in content and b"_codecs" not in content
    assert pickle.loads(content, encoding="bytes")[b"data"].shape == (4, 3072)  # the usual way to read them


@pytest.mark.parametrize("name", FOLDER)
def test_images_and_classes(tmp_path, name):
    classes = ("aeroplane", "boat", "cat")
    written = make_cifar(tmp_path, name, (3, 1, 4, 1, 5), 6, classes)
    train_rows = np.concatenate([each for file, each in written.items() if file != TEST[name]])
    train, val = cifar(tmp_path, name, "train"), cifar(tmp_path, name, "val")
    assert train.classes == val.classes == classes
    for samples, rows in ((train, train_rows), (val, written[TEST[name]])):
        assert len(samples) == len(samples.source) == len(rows)
        seen = pixels_of(samples)
        assert seen.shape == (len(rows), 32, 32, 3)
        for channel in range(3):  # a row is the red image, the green, the blue
            assert np.array_equal(seen[..., channel], rows[:, 1024 * channel :][:, :1024].reshape(-1, 32, 32))
        assert samples.targets.dtype == np.int64
    sizes = (3, 1, 4, 1, 5) if name == "CIFAR10" else (14,)
    assert train.targets.tolist() == [i % 3 for n in sizes for i in range(n)]
    assert val.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.source.load(2).mode == "RGB"


@pytest.mark.parametrize("protocol", [2, 4])
def test_python_3s_pickles_are_read_too(tmp_path, protocol):
    rows = make_cifar(tmp_path, "CIFAR10")["test_batch"]
    content = {"data": rows, "labels": [0, 1, 0, 1]}
    (tmp_path / FOLDER["CIFAR10"] / "test_batch").write_bytes(pickle.dumps(content, protocol))
    assert np.array_equal(pixels_of(cifar(tmp_path, "CIFAR10", "val"))[..., 0].reshape(4, -1), rows[:, :1024])


@pytest.mark.parametrize("name", FOLDER)
def test_evaluation_needs_the_test_batch_and_the_names(tmp_path, name):
    make_cifar(tmp_path, name)
    for path in (tmp_path / FOLDER[name]).iterdir():
        if "train" in path.name or "data_batch" in path.name:
            path.unlink()
    assert len(cifar(tmp_path, name, "val")) == 4
    with pytest.raises(FileNotFoundError, match="There is no .*(data_batch_1|train): take it from"):
        cifar(tmp_path, name, "train")


# -------------------------------------------------------------------------------- hostile and broken files


def test_a_file_that_cannot_be_read_is_named_and_does_not_block(tmp_path):
    make_cifar(tmp_path, "CIFAR10")
    file = tmp_path / FOLDER["CIFAR10"] / "test_batch"
    for make, words in ((os.mkfifo, "it is not a regular file"), (os.mkdir, "Is a directory")):
        file.unlink()
        make(file)
        with pytest.raises(OSError, match=f"^Cannot read {file} .{words}.: take it from CIFAR's archive for Python.$"):
            cifar(tmp_path, "CIFAR10", "val")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def crime(path):
    return {
        "os.system": Calls(os.system, f"touch {path}"),
        "builtins.open": Calls(open, str(path), "w"),
        "builtins.eval": Calls(eval, f"open({str(path)!r}, 'w')"),
        "pathlib.Path.touch": Calls(Path.touch, path),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {path}"))),
        "numpy.fromfile": Calls(np.fromfile, str(path)),
        "numpy.load": Calls(np.load, str(path), None, True),
        "codecs.decode": Calls(codecs.decode, b"eJwDAAAAAAE=", "zlib"),
    }


@pytest.mark.parametrize("what", crime("x"))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, what, protocol):
    rows = make_cifar(tmp_path, "CIFAR10")["test_batch"]
    victim, file = tmp_path / "victim", tmp_path / FOLDER["CIFAR10"] / "test_batch"
    try:
        hostile = pickle.dumps({"data": rows, "labels": [0, 1, 0, 1], "filenames": crime(victim)[what]}, protocol)
    except pickle.PicklingError:
        pytest.skip("this protocol cannot write it")
    file.write_bytes(hostile)
    with pytest.raises(ValueError, match=f"{file} is not CIFAR's: .*asks for"):
        cifar(tmp_path, "CIFAR10", "val")
    assert not victim.exists()


@pytest.mark.parametrize("content", [
    b"cbuiltins\nexec\n(S'1'\ntR.", b"cnumpy\nload\n.", b"cnumpy.core.multiarray\nscalar\n.", b"c_codecs\ndecode\n.",
    b"cnumpy\nndarray.tofile\n.", b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", b"c__main__\nx\n.",
    b"(S'x'\nios\nsystem\n.", b"\x80\x02\x82\x01.", b"Pother\n."])  # fmt: skip
def test_other_ways_to_a_name_are_closed(tmp_path, content):
    make_cifar(tmp_path, "CIFAR10")
    (tmp_path / FOLDER["CIFAR10"] / "batches.meta").write_bytes(content)
    with pytest.raises(ValueError, match="batches.meta is not CIFAR's"):
        cifar(tmp_path, "CIFAR10", "val")


def test_no_codec_but_latin1(tmp_path):
    for encoding, right in (("latin1", True), ("rot13", False), ("punycode", False), ("zlib_codec", False)):
        content = b"c_codecs\nencode\n(Vab\nS'" + encoding.encode() + b"'\ntR."
        reader = cifar_files._ArraysOnly(io.BytesIO(content), encoding="latin1")
        if right:
            assert reader.load() == b"ab"
        else:
            with pytest.raises(pickle.UnpicklingError, match=f"codec {encoding}"):
                reader.load()


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize("content", [
    {"data": ROWS[:, :3000], "labels": [0, 1]}, {"data": ROWS, "labels": [0]}, {"data": ROWS, "labels": [0, 2]},
    {"data": ROWS, "labels": [0, -1]}, {"data": ROWS.astype(np.int64), "labels": [0, 1]}, {"labels": [0, 1]},
    {"data": ROWS, "fine_labels": [0, 1]}, {"data": ROWS, "labels": [[0], [1]]}, {"data": ROWS, "labels": "ab"},
    {"data": [[1], [2, 3]], "labels": [0, 1]}, [1, 2], "text", 7])  # fmt: skip
def test_other_content_is_refused(tmp_path, content):
    make_cifar(tmp_path, "CIFAR10")
    file = tmp_path / FOLDER["CIFAR10"] / "test_batch"
    python2(file, content)
    with pytest.raises(ValueError, match=f"{file} is not CIFAR's"):
        cifar(tmp_path, "CIFAR10", "val")


@pytest.mark.parametrize("spoil", [
    lambda content: content[:1000], lambda content: content[:-1], lambda content: b"", lambda content: b"<html>404",
    lambda content: bytes(100)])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, spoil):
    make_cifar(tmp_path, "CIFAR10")
    file = tmp_path / FOLDER["CIFAR10"] / "data_batch_3"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file} is not CIFAR's"):
        cifar(tmp_path, "CIFAR10", "train")


# -------------------------------------------------------------------------------- download


@pytest.mark.parametrize("name", FOLDER)
def test_without_a_network_the_place_is_said(tmp_path, name):
    message = rf"no folder {tmp_path / FOLDER[name]} \(--data-path\).*no network.*unpack https://.*gz in {tmp_path}"
    with pytest.raises(FileNotFoundError, match=message):
        cifar(tmp_path, name, "train")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="--data-path"):
        cifar(tmp_path / "typo", name, "train")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("name", FOLDER)
def test_a_missing_folder_is_downloaded(tmp_path, name, monkeypatch):
    asked = []

    def download(url, folder, filename, md5):
        asked.append((url.rsplit("/", 1)[-1], filename, len(md5)))
        make_cifar(folder, name)
        Path(folder, filename).write_text("archive")

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", download)
    assert len(cifar(tmp_path, name, "train")) == 20 and len(cifar(tmp_path, name, "val")) == 4
    archive = "cifar-10-python.tar.gz" if name == "CIFAR10" else "cifar-100-python.tar.gz"
    assert asked == [(archive, archive, 32)]  # once, with a checksum
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER[name]]


def test_another_process_was_faster(tmp_path, monkeypatch):
    def download(url, folder, filename, md5):
        make_cifar(folder, "CIFAR10")
        make_cifar(tmp_path, "CIFAR10", test=7)

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", download)
    assert len(cifar(tmp_path, "CIFAR10", "val")) == 7
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER["CIFAR10"]]
