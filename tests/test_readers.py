"""Readers: class order, any file name, split files, lists, CSV and JSON files, and what is wrong with them."""

import json
import os
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.folders import image_extensions, images_below
from images.readers import (
    ArraySource,
    FileSource,
    _in_natural_order,
    image_csv,
    image_folder,
    image_list,
    inat,
    read_split,
    unlabelled_images,
)
from images.tables import _path_and_target, list_rows
from tests.trees import draw, make_inat, make_list, paths, special_files, tree

torch.set_num_threads(1)


# -------------------------------------------------------------------------------- folders


def test_classes_are_in_natural_order(tmp_path):
    tree(tmp_path, {name: ["a.jpg"] for name in ("class10", "class2", "Class1", "class02", "other", "3")})
    samples = image_folder(tmp_path)
    assert samples.classes == ("3", "Class1", "class02", "class2", "class10", "other")
    assert paths(samples) == [f"{name}/a.jpg" for name in samples.classes]
    assert samples.targets.tolist() == [0, 1, 2, 3, 4, 5] and samples.targets.dtype == np.int64


def test_the_order_is_timms():
    rng = random.Random(0)
    names = sorted({"".join(rng.choices("aB01290_-. é", k=rng.randrange(1, 9))) for _ in range(500)})
    assert _in_natural_order(names) == sorted(names, key=lambda name: (natural_key(name), name))
    assert _in_natural_order(["²", "a" + 5000 * "1", "a2"]) == ["a2", "a" + 5000 * "1", "²"]


def test_synsets_are_in_plain_order(tmp_path):
    names = ["n01440764", "n15075141", "n02123045", "n01443537", "n09193705"]
    tree(tmp_path, {name: [f"{name}_1.JPEG", f"{name}_10.JPEG", f"{name}_2.JPEG"] for name in names})
    samples = image_folder(tmp_path)
    assert samples.classes == tuple(sorted(names))
    assert paths(samples) == sorted(paths(samples))
    assert samples.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert len(samples) == 15


def test_any_file_name(tmp_path):
    names = ["with space.jpg", "comma,1,2.jpg", "日本語 🐈.PNG", "UPPER.JPG", "dots.in.name.jpeg",
             "n01440764_1.JPEG", "-dash.png", "a\u2028b.jpg", "quo'te\".png", "percent%20.png"]  # fmt: skip
    for i, name in enumerate(sorted(names)):
        draw(tmp_path / "a class, with ünïcode" / name, (20 * i, 0, 0))
    samples = image_folder(tmp_path)
    assert paths(samples) == sorted(f"a class, with ünïcode/{name}" for name in names)
    for i in range(len(names)):
        assert abs(samples.source.load(i).getpixel((3, 3))[0] - 20 * i) <= 3  # JPEG rounds


def test_nested_folders_and_what_is_left_out(tmp_path):
    for path in ("dog/b.jpg", "dog/2011/a.jpg", "dog/2011/deep/er/c.png", "cat/z.jpg", ".hidden/x.jpg",
                 "dog/.cache/x.jpg", "dog/2011/.ipynb_checkpoints/a.jpg", "in_no_class.jpg"):  # fmt: skip
        draw(tmp_path / path)
    for path in ("dog/readme.txt", "dog/jpg", "cat/z.jpg.md5", "cat/movie.gif.bak", "labels.csv"):
        (tmp_path / path).write_text("no image")
    samples = image_folder(tmp_path)
    assert samples.classes == ("cat", "dog")
    assert paths(samples) == ["cat/z.jpg", "dog/2011/a.jpg", "dog/2011/deep/er/c.png", "dog/b.jpg"]
    assert samples.targets.tolist() == [0, 1, 1, 1]


def test_a_link_to_a_folder_is_followed(tmp_path):
    draw(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert paths(image_folder(tmp_path / "train")) == ["dog/a.jpg"]


def listed(root, name=""):
    return sorted(images_below(root, name)[0])


def test_a_circle_of_links_ends_and_brings_in_no_other_class(tmp_path):
    train = tree(tmp_path / "train", {"a": ["1.jpg", "x/2.jpg"], "b": ["3.jpg"]})
    draw(tmp_path / "val" / "a" / "4.jpg")
    whole = listed(train)
    assert whole == ["a/1.jpg", "a/x/2.jpg", "b/3.jpg"]
    links = {"up": "..", "self": ".", "root": tmp_path, "x/up": "..", "x/down": "../x", "loop": "loop"}
    for name, to in links.items():
        (train / "a" / name).symlink_to(to, target_is_directory=True)
    samples = image_folder(train)
    assert paths(samples) == whole == listed(train) and samples.targets.tolist() == [0, 0, 1]
    (train / "linked").symlink_to("b", target_is_directory=True)  # two classes with the same images
    (train / "a" / "too").symlink_to("../b", target_is_directory=True)
    samples = image_folder(train)
    assert paths(samples) == ["a/1.jpg", "a/too/3.jpg", "a/x/2.jpg", "b/3.jpg", "linked/3.jpg"]
    assert samples.targets.tolist() == [0, 0, 0, 1, 2]


def test_each_folder_is_listed_once_and_by_its_own_name_if_it_has_one_there(tmp_path):
    for path in ("root/real/1.jpg", "root/real/deep/2.jpg", "pool/3.jpg", "pool/sub/4.jpg"):
        draw(tmp_path / path)
    for name, to in (("a", "real/deep"), ("c", "../pool/sub"), ("b", "../pool"), ("d", "../pool")):
        (tmp_path / "root" / name).symlink_to(to, target_is_directory=True)
    (tmp_path / "pool" / "back").symlink_to(tmp_path / "root" / "real", target_is_directory=True)
    once = ["b/3.jpg", "b/sub/4.jpg", "real/1.jpg", "real/deep/2.jpg"]
    assert listed(tmp_path / "root") == once
    (tmp_path / "link").symlink_to("root", target_is_directory=True)
    assert listed(tmp_path / "link") == once


def test_a_class_that_contains_all_is_refused(tmp_path):
    train = tree(tmp_path / "train", {"a": ["1.jpg"]})
    for to in (".", "..", tmp_path.parent):
        (train / "up").symlink_to(to, target_is_directory=True)
        with pytest.raises(ValueError, match="class folder .*up is a link to a folder that contains .*train: remove"):
            image_folder(train)
        (train / "up").unlink()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    draw(tmp_path / "a" / "1.jpg")
    monkeypatch.setattr("images.folders.os.scandir", refuse)
    with pytest.raises(OSError, match=f"^Cannot list the folder {tmp_path}/a .Permission denied.: give access to it.$"):
        images_below(tmp_path, "a")


def old_images_below(root, name=""):
    """As it was, for torchvision's extensions, without its links in circles."""
    found = []
    for folder, subfolders, files in os.walk(os.path.join(root, name), followlinks=True):
        subfolders[:] = (each for each in subfolders if not each.startswith("."))
        names = [file for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, file), root) for file in names]
    return found


def test_files_with_torchvisions_extensions_are_those_that_they_were(tmp_path):
    rng, parts = random.Random(0), ["a", "B", ".", "é", "K", " ", "jpg", ".jpg", ".PNG", ".tiff", ".Webp", ".txt", "/"]
    for i in range(400):
        name = "".join(rng.choices(parts, k=rng.randrange(1, 6))) + rng.choice(["", ".bmp", ".jpeg", "."])
        path = tmp_path / "root" / f"{i % 7}" / name.strip("/.").replace("/.", "/x.")
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (tmp_path / "root" / "link").symlink_to("0", target_is_directory=True)
    (tmp_path / "linked").symlink_to("root/0", target_is_directory=True)
    (tmp_path / "root" / "0" / "dangling.jpg").symlink_to("nowhere")
    for root, name in ((tmp_path / "root", "0"), (tmp_path / "root", "link"), (tmp_path / "linked", "")):
        assert len(listed(root, name)) > 20 and listed(root, name) == sorted(old_images_below(root, name))


def test_whatever_pillow_reads_is_an_image(tmp_path, capsys):
    assert image_extensions() >= {*IMG_EXTENSIONS, ".gif", ".jfif", ".mpo", ".tga", ".apng"}
    assert not image_extensions() & {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".h5", ".txt", ".csv", ".json", ".svg"}
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    colours = {".gif": blue, ".jfif": green, ".tga": red, ".avif": blue, ".jp2": green}
    known = sorted(image_extensions() & set(colours))
    for extension in known:
        draw(tmp_path / "train" / "a" / f"x{extension}", colours[extension])
    samples = image_folder(tmp_path / "train")
    assert paths(samples) == [f"a/x{extension}" for extension in known] and capsys.readouterr().out == ""
    for i, extension in enumerate(known):
        assert np.abs(np.subtract(samples.source.load(i).getpixel((3, 3)), colours[extension])).max() <= 4


def test_pictures_that_are_not_read_are_counted(tmp_path, capsys, monkeypatch):
    train = tree(tmp_path / "train", {"a": ["1.jpg"], "b": ["2.jpg"]})
    for name in "a/1.heic a/x/2.HEIC b/3.heic b/logo.svg b/raw.CR2 a/notes.txt a/.hidden.heic labels.csv".split():
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text("")
    words = f"Pictures below {train} are left out: 3 .heic, 1 .cr2, 1 .svg, whose format is not read here.\n"
    assert len(image_folder(train)) == 2 and capsys.readouterr().out == words
    assert len(unlabelled_images(train)) == 2 and capsys.readouterr().out == words
    monkeypatch.setattr("utils.world_and_rank", lambda: (2, 1))
    assert len(image_folder(train)) == 2 and capsys.readouterr().out == ""  # the main process tells it once
    (train / "a" / "1.jpg").unlink()
    with pytest.raises(ValueError, match="train/a holds no images but 2 .heic, whose format is not read here: add"):
        image_folder(train)
    with pytest.raises(ValueError, match="no image in .*a but 2 .heic, whose format is not read here .--unl"):
        unlabelled_images(train / "a")


def test_a_class_whose_name_no_log_could_hold_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xff")
    try:
        draw(tmp_path / "ok" / "1.jpg"), draw(tmp_path / name / "1.jpg")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system wants UTF-8")
    with pytest.raises(ValueError, match=r"^The class folder .*/caf\\xff has a name that is not UTF-8: rename it.$"):
        image_folder(tmp_path)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/train.*--data-path"):
        image_folder(tmp_path / "train")
    (tmp_path / "train" / ".git").mkdir(parents=True)
    draw(tmp_path / "train" / "lonely.jpg")
    with pytest.raises(ValueError, match="train holds no class folders"):
        image_folder(tmp_path / "train")
    draw(tmp_path / "train" / "dog" / "a.jpg")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="class folder .*train/cat holds no image"):
        image_folder(tmp_path / "train")


# -------------------------------------------------------------------------------- files


def test_file_source_gives_back_its_paths(tmp_path):
    names = ["b/one.jpg", "a/with space.png", "ü/日本.png", "x", "c/" + "long" * 60 + ".jpg"]
    source = FileSource(tmp_path, names)
    assert len(source) == 5
    assert [source.path(i) for i in range(5)] == names
    assert [source.path(np.int64(i)) for i in range(5)] == names
    assert len(FileSource(tmp_path, [])) == 0


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        draw(tmp_path / "drinks" / "tea.png").rename(tmp_path / "drinks" / name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system wants UTF-8")
    draw(tmp_path / "drinks" / "water.png", (0, 0, 99))
    samples = image_folder(tmp_path)
    encoded = sorted(os.fsencode(path) for path in paths(samples))
    assert encoded == [b"drinks/caf\xe9.png", b"drinks/water.png"]
    where = paths(samples).index(f"drinks/{name}")
    assert samples.source.load(where).getpixel((0, 0)) == (10, 20, 30)
    (tmp_path / "drinks" / name).write_bytes(b"broken")
    with pytest.raises(OSError, match="Cannot read the image"):
        samples.source.load(where)


@pytest.mark.parametrize("mode, file, colour", [
    ("L", "x.png", (18, 18, 18)), ("P", "x.png", (10, 20, 30)), ("RGBA", "x.png", (10, 20, 30)),
    ("CMYK", "x.jpg", (10, 20, 30)), ("CMYK", "x.tif", (10, 20, 30)), ("L", "x.jpg", (18, 18, 18)),
    ("1", "x.png", None), ("LA", "x.png", (18, 18, 18)), ("RGB", "x.webp", (10, 20, 30))])  # fmt: skip
def test_every_kind_of_image_is_rgb(tmp_path, mode, file, colour):
    path = draw(tmp_path / file, mode=mode)
    assert file.endswith("webp") or Image.open(path).mode == mode
    image = FileSource(tmp_path, [file]).load(0)
    assert image.mode == "RGB" and image.size == (12, 10)
    if colour:
        assert np.abs(np.subtract(image.getpixel((3, 3)), colour)).max() <= (0 if file.endswith("png") else 4)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-60])


def _without_crc(path):
    content = bytearray(path.read_bytes())
    content[30] ^= 255
    path.write_bytes(content)


def _huge(path):
    """A bitmap whose header claims 60,000 x 60,000 pixels."""
    content = bytearray(path.read_bytes())
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    path.write_bytes(content)


@pytest.mark.parametrize("file, spoil", [
    ("cut.jpg", _truncated), ("cut.png", _truncated), ("crc.png", _without_crc),
    ("empty.jpg", lambda path: path.write_bytes(b"")),
    ("text.jpg", lambda path: path.write_text("404 Not Found")),
    ("gone.jpg", lambda path: path.unlink()),
    ("header.ppm", lambda path: path.write_bytes(b"P6\n1N 2\n255\n" + bytes(9))),
    ("bomb.bmp", _huge)])  # fmt: skip
def test_a_broken_file_is_named(tmp_path, file, spoil):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / file)
    assert FileSource(tmp_path, [file]).load(0).size == (40, 40)
    spoil(tmp_path / file)
    with pytest.raises(OSError, match=f"Cannot read the image {tmp_path / file}: "):
        FileSource(tmp_path, [file]).load(0)


# -------------------------------------------------------------------------------- split files


@pytest.fixture
def samples(tmp_path):
    """Seven images; the paths are in the order of the indices, 0 to 6."""
    for path in ("cat/1.jpg", "cat/same.jpg", "cat/sub/2.jpg", "dog/a b.jpg", "dog/c,3,4.jpg", "dog/same.jpg",
                 "dog/é\u2028.jpg"):  # fmt: skip
        draw(tmp_path / "train" / path)
    return image_folder(tmp_path / "train")


def split(samples, content):
    path = samples.source.root.parent / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content, expected", [
    ("2.jpg,101,77\n1.jpg,0,1256\n", [2, 0]),  # the published format: shard, index in shard
    ("2.jpg\n1.jpg", [2, 0]),
    ("a b.jpg,3,4\n1.jpg\n", [3, 0]),
    ("dog/same.jpg,1,1\ncat/sub/2.jpg\ncat/same.jpg\n", [5, 2, 1]),
    ("dog/same.jpg\n1.jpg,5,5\ncat/same.jpg,5,6\n2.jpg\n", [5, 0, 1, 2]),
    ("\n2.jpg,1,1\n\n   \n1.jpg,1,2\n\n", [2, 0]),
    ("2.jpg,1,1\r\n\r\n1.jpg\r\n", [2, 0]),
    ("c,3,4.jpg\n", [4]),
    ("c,3,4.jpg,5,6\ndog/same.jpg , 1 , 2\n", [4, 5]),
    ("dog/c,3,4.jpg,5,6\n", [4]),
    ("é\u2028.jpg\n1.jpg", [6, 0]),
    ("\ufeff2.jpg,1,1\r\n", [2]),  # a Windows editor's first bytes
    ("  1.jpg,1,2  \n\t2.jpg\n", [0, 2]),
    ("./cat//1.jpg\n./2.jpg,1,2\ndog/./same.jpg\n", [0, 2, 5]),
])  # fmt: skip
def test_split_files(samples, content, expected):
    indices = read_split(split(samples, content), samples)
    assert indices.tolist() == expected  # in the file's order
    assert indices.dtype == np.int64


@pytest.mark.parametrize("content, message", [
    ("1.jpg\n\nmissing.jpg,1,2\n", r"list.txt, line 3: 'missing.jpg' is not among the 7 images of .*train"),
    ("dog/1.jpg\n", r"line 1: 'dog/1.jpg' is not among"),
    ("sub/2.jpg\n", r"line 1: 'sub/2.jpg' is not among"),
    ("1.jpg,4\n", r"line 1: '1.jpg,4' is not among"),
    ("1.jpg,label,4\n", r"line 1: '1.jpg,label,4' is not among"),
    ("1.jpg\nsame.jpg,1,2\n", r"line 2: 'same.jpg' is the name of several images.*paths in .*train"),
    ("../val/1.jpg\n", r"line 1: '../val/1.jpg' leaves the data folder"),
    ("1.jpg\ncat/../dog/same.jpg\n", r"line 2: 'cat/../dog/same.jpg' leaves the data folder"),
    ("/etc/passwd\n", r"line 1: '/etc/passwd' leaves the data folder"),
    ("1.jpg,1,1\n2.jpg,1,2\n1.jpg,9,9\n", r"line 3: '1.jpg' was listed before, in line 1"),
    ("1.jpg\ncat/1.jpg\n", r"line 2: 'cat/1.jpg' was listed before, in line 1"),
    ("1.jpg\n./cat/1.jpg\n", r"line 2: './cat/1.jpg' was listed before, in line 1"),
    ("", "list.txt lists no image"),
    ("\n \r\n", "list.txt lists no image"),
    (b"1.jpg\ncaf\xe9.jpg\n", "list.txt is not UTF-8"),
    ("1.jpg\n\n2.jpg\0,1,1\n", "list.txt is not a text file: line 3 contains a null byte"),
    ("1.jpg,\u00b2,3\n", "line 1: '1.jpg,\u00b2,3' is not among"),
])  # fmt: skip
def test_wrong_split_files_are_explained(samples, content, message):
    with pytest.raises(ValueError, match=message):
        read_split(split(samples, content), samples)


def test_a_missing_split_file_is_named(samples, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no split file {tmp_path}/none.txt .--data-split-file"):
        read_split(tmp_path / "none.txt", samples)


def test_the_class_is_the_folder_not_the_file_name(tmp_path):
    tree(tmp_path, {"cat": ["dog_1.jpg"], "dog": ["cat_1.jpg", "n01440764_9.JPEG"]})
    samples = image_folder(tmp_path)
    (tmp_path / "list.txt").write_text("cat_1.jpg,0,0\nn01440764_9.JPEG,0,1\ndog_1.jpg,7,7\n")
    assert samples.targets[read_split(tmp_path / "list.txt", samples)].tolist() == [1, 1, 0]


def test_a_folder_is_no_split_file(samples, tmp_path):
    with pytest.raises(FileNotFoundError, match="no split file"):
        read_split(tmp_path, samples)


# -------------------------------------------------------------------------------- in memory


def test_array_source():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    source = ArraySource(images)
    assert len(source) == 3 and source.load(1).mode == "RGB" and source.load(1).size == (6, 8)
    assert np.array_equal(np.asarray(source.load(2)), images[2])


def test_identities(tmp_path, monkeypatch):
    draw(tmp_path / "data" / "a" / "x.png")
    (tmp_path / "link").symlink_to(tmp_path / "data", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    known = FileSource(tmp_path / "data", ["a/x.png", "a/y.png"])
    assert known.identity(0) == FileSource("link", ["a/x.png"]).identity(0)
    assert known.identity(0) == FileSource("data/a", ["x.png"]).identity(0)
    assert known.identity(0) != known.identity(1)
    arrays = ArraySource(np.zeros((2, 1, 1, 3), np.uint8))
    assert len({arrays.identity(np.int64(1)), arrays.identity(1), arrays.identity(0), known.identity(0)}) == 3


# -------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("labelled", [True, False])
def test_lists_in_both_notations(tmp_path, labelled):
    lines = ["a/abbey/1.jpg 4", "a/b.jpg,0", "c.jpg, 2", "  d.jpg\t1  ", "a/with space.jpg 3", "a/comma,5.jpg,4",
             "a/f.jpg   1", "é.jpg,10"]  # fmt: skip
    (tmp_path / "list.txt").write_bytes("\ufeff".encode() + "\r\n\n".join(lines).encode())
    draw(tmp_path / "root" / "a" / "abbey" / "1.jpg", (77, 77, 77))
    samples = image_list(tmp_path / "list.txt", tmp_path / "root", "--split-folder", labelled=labelled)
    assert paths(samples) == ["a/abbey/1.jpg", "a/b.jpg", "c.jpg", "d.jpg", "a/with space.jpg", "a/comma,5.jpg",
                              "a/f.jpg", "é.jpg"]  # fmt: skip
    assert samples.targets.tolist() == [4, 0, 2, 1, 3, 4, 1, 10] and samples.targets.dtype == np.int64
    assert samples.classes == tuple("0 1 2 3 4 5 6 7 8 9 10".split())
    assert samples.source.load(0).getpixel((0, 0)) == (77, 77, 77)


def test_unlabelled_lists(tmp_path):
    draw(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg,-1\nc.jpg 3\nd 5.jpg\n")
    samples = image_list(tmp_path / "list.txt", tmp_path, "--data-path", labelled=False)
    assert paths(samples) == ["a.jpg", "b.jpg", "c.jpg", "d 5.jpg"]
    assert samples.targets.tolist() == [-1, -1, 3, -1] and len(samples) == 4


def test_classes_are_counted_in_several_lists(tmp_path):
    make_list(tmp_path / "train.txt", tmp_path, ["a.jpg 0", "b.jpg 2"])
    (tmp_path / "val.txt").write_text("of_no_image.jpg 4\n")  # its images need not be there
    for others, n in (([], 3), ([tmp_path / "val.txt"], 5)):
        samples = image_list(tmp_path / "train.txt", tmp_path, "--data-path", *others)
        assert samples.classes == tuple(map(str, range(n)))
    (tmp_path / "val.txt").write_text("of_no_image.jpg 100000\n")
    with pytest.raises(ValueError, match="train.txt or .*val.txt has an image of class 100000"):
        image_list(tmp_path / "train.txt", tmp_path, "--data-path", tmp_path / "val.txt")


@pytest.mark.parametrize("content, message", [
    ("a.jpg 1\n\nb.jpg\n", "line 3: 'b.jpg' has no class"),
    ("a.jpg 1\nb.jpg,-1", "line 2: 'b.jpg,-1' has no class"),
    ("a.jpg 1\nb.jpg,cat", "line 2: 'b.jpg,cat' has no class"),
    ("a.jpg 1.5", "line 1: 'a.jpg 1.5' has no class"),
    ("a.jpg 12345678", "line 1: 'a.jpg 12345678' has no class"),
    ("5", "line 1: '5' has no class"),
    ("a.jpg 1\n../b.jpg 0", "line 2: '../b.jpg' leaves the data folder"),
    ("a.jpg 1\nx/../../b.jpg 0", "line 2: 'x/../../b.jpg' leaves the data folder"),
    ("a.jpg 1\n/etc/passwd,0", "line 2: '/etc/passwd' leaves the data folder"),
    ("", r"list.txt names no image \(--split-folder\)"), ("\n \n", "list.txt names no image"),
    (b"caf\xe9.jpg 1", "list.txt is not UTF-8"), ("a.jpg 1\nb\0.jpg 1", "list.txt is not a text file: line 2"),
    ("a.jpg \u0663", "line 1: 'a.jpg \u0663' has no class"),
    ("a.jpg 100000", "list.txt has an image of class 100000, but 99999 is the last possible one"),
])  # fmt: skip
def test_wrong_lists_are_explained(tmp_path, content, message):
    draw(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        image_list(tmp_path / "list.txt", tmp_path, "--split-folder")


def test_a_link_inside_the_folder_may_lead_out_of_it(tmp_path):
    draw(tmp_path / "elsewhere" / "a.jpg", (77, 77, 77))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "list.txt").write_text("link/a.jpg 0\n")
    (tmp_path / "root" / "list.csv").write_text("link/a.jpg,cat\n")
    for samples in (image_list(tmp_path / "list.txt", tmp_path / "root", "--split-folder"),
                    image_csv(tmp_path / "root" / "list.csv")):  # fmt: skip
        assert samples.source.load(0).getpixel((0, 0)) == (77, 77, 77)


def test_names_with_dots_stay_inside(tmp_path):
    draw(tmp_path / "..a" / "b...jpg")
    (tmp_path / "list.txt").write_text("..a/b...jpg 0\n./..a//b...jpg 0\n")
    samples = image_list(tmp_path / "list.txt", tmp_path, "--split-folder")
    assert [samples.source.load(i).size for i in range(2)] == [(12, 10)] * 2


def test_one_missing_image_is_no_wrong_folder(tmp_path):
    draw(tmp_path / "b.jpg")
    (tmp_path / "list.txt").write_text("gone.jpg 0\n" + "x" * 300 + " 0\nb.jpg 0\n")
    assert len(image_list(tmp_path / "list.txt", tmp_path, "--split-folder")) == 3


def test_a_list_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("images.tables.read_regular", refuse)
    with pytest.raises(OSError, match="^Cannot read the list x.txt .--split-folder.: Permission denied.$"):
        image_list("x.txt", tmp_path, "--split-folder")


@pytest.mark.parametrize("name", ["fifo", "dev_zero", "huge"])
def test_a_list_that_is_no_regular_file_is_refused_and_does_not_block(samples, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words = special_files(tmp_path, ".csv")[f"{name}.csv"]
    file = tmp_path / f"{name}.csv"
    readers = {"split file": lambda file: read_split(file, samples), "CSV file": image_csv}
    readers |= {"list": lambda file: image_list(file, tmp_path, "--x"), "folder or CSV file": unlabelled_images}
    for what, read in readers.items():
        with pytest.raises(OSError, match=rf"^Cannot read the {what} {file} \(--.*\): {words}[^\n]*\.$"):
            read(file)
    (tmp_path / "categories.json").symlink_to(f"{name}.csv")
    with pytest.raises(OSError, match=f"^Cannot read the file .*categories.json .--data-path.: {words}"):
        inat(tmp_path, "train", 2018, "name")


OLD_PATTERN = re.compile(r"(.+?)(?:\s*,\s*|\s+)(-?[0-9]{1,7})")


@settings(derandomize=True, deadline=None, database=None, max_examples=2000)
@given(st.text(alphabet="a.,- \t\xa0\x1c\u2028²٣0123456789", max_size=14))
def test_lines_of_lists_are_taken_apart_as_by_the_pattern_of_old(line):
    match = OLD_PATTERN.fullmatch(line.strip())
    assert _path_and_target(line.strip()) == ((match[1], int(match[2])) if match else (line.strip(), -1))


@pytest.mark.parametrize("line", ["a.jpg" + 100_000 * " " + "x", "a" + 100_000 * " ," + "x", 100_000 * "1" + "x,1,x"])
def test_long_lines_end(samples, tmp_path, line):
    file = split(samples, line + "\n")
    for read in (lambda: image_list(file, tmp_path, "--x"), lambda: read_split(file, samples)):
        with pytest.raises(ValueError, match="list.txt, line 1: '") as refusal:
            read()
        assert len(str(refusal.value)) < 1000
    assert list_rows(file, tmp_path, "--x", labelled=False) == ([line], [-1])


def test_leaving_entries_of_unlabelled_lists(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n../b.jpg\n")
    with pytest.raises(ValueError, match="list.txt, line 2: '../b.jpg' leaves the data folder"):
        image_list(tmp_path / "list.txt", tmp_path, "--split-folder", labelled=False)


def test_missing_lists_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no list {tmp_path}/list.txt .--split-folder"):
        image_list(tmp_path / "list.txt", tmp_path, "--split-folder")
    (tmp_path / "list.txt").write_text("a/b.jpg 3\n")
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}/a/b.jpg: paths in .*list.txt are relative to"):
        image_list(tmp_path / "list.txt", tmp_path, "--split-folder")


# -------------------------------------------------------------------------------- CSV


def table(tmp_path, content, name="train.csv"):
    draw(tmp_path / "a.jpg"), draw(tmp_path / "x" / "b c.jpg")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


@pytest.mark.parametrize("content", [
    "path,label\na.jpg,dog10\nx/b c.jpg,dog2\n",
    "a.jpg,dog10\nx/b c.jpg,dog2",
    "Path, Label\n".lower() + "a.jpg, dog10 \n\n x/b c.jpg ,dog2\n,\n",
    "\ufeffpath,label\r\na.jpg,dog10\r\n\"x/b c.jpg\",\"dog2\"\r\n",
    "./a.jpg,dog10\nx//./b c.jpg,dog2",
    *(f"{header}\na.jpg,dog10\nx/b c.jpg,dog2\n" for header in (
        "Path,Label", "image,class", "filename, category", "File Name,CLASS", "image_path,target", "img,class_name",
        "Image")),
])  # fmt: skip
def test_csv_rows(tmp_path, content):
    samples = image_csv(table(tmp_path, content))
    assert paths(samples) == ["a.jpg", "x/b c.jpg"]
    assert samples.classes == ("dog2", "dog10") and samples.targets.tolist() == [1, 0]  # natural order
    assert samples.targets.dtype == np.int64 and samples.source.load(1).size == (12, 10)


def test_a_missing_first_image_is_no_header(tmp_path):
    assert len(image_csv(table(tmp_path, "gone.jpg,cat\na.jpg,cat\n"))) == 2  # training replaces it
    assert len(image_csv(table(tmp_path, "path,label\ngone,cat\na.jpg,cat\n"))) == 2
    with pytest.raises(ValueError, match="train.csv: the first row, 'Datei', looks like a header"):
        unlabelled_images(table(tmp_path, "Datei\na.jpg\n"))


def test_any_label(tmp_path):
    names = ["10", "9", "été", "with space", "a,b", 'quo"te', "-1", "日本"]
    rows = "".join(f'{i}.jpg,"{name.replace(chr(34), chr(34) * 2)}"\n' for i, name in enumerate(names))
    draw(tmp_path / "0.jpg")
    samples = image_csv(table(tmp_path, rows))
    assert [samples.classes[target] for target in samples.targets] == names
    assert samples.classes.index("9") < samples.classes.index("10")


def test_rows_without_a_label(tmp_path):
    train = table(tmp_path, "a.jpg,cat\nb.jpg\nc.jpg,\nd.jpg,ant\n")
    samples = image_csv(train)
    assert samples.targets.tolist() == [1, -1, -1, 0] and samples.classes == ("ant", "cat")
    more = table(tmp_path, "path\ne.jpg\nb.jpg\nd.jpg,bee\nf.jpg,bee\n", "unlabelled.csv")
    samples = image_csv(train, more)
    assert paths(samples) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert samples.targets.tolist() == [1, -1, -1, 0, -1, -1]
    assert samples.classes == ("ant", "cat")  # labels of unlabelled.csv are not read
    with pytest.raises(ValueError, match="train.csv: 'b.jpg' has no label: every row needs one"):
        image_csv(train, complete=True)


@pytest.mark.parametrize("content, message", [
    ("a.jpg,cat,1\n", "line 1: 'a.jpg': write `path,label`, with quotes"),
    ("a.jpg,cat\n,dog\n", "line 2: '': write `path,label`"),
    ("path,label\na.jpg,cat\n\n../b.jpg,cat\n", "line 4: '../b.jpg' leaves the data folder"),
    ("a.jpg,cat\nx/../../b.jpg\n", "line 2: 'x/../../b.jpg' leaves"),
    ("/a.jpg,cat\n", "line 1: '/a.jpg' leaves"),
    ("a.jpg,cat\nb.jpg,cat\na.jpg,dog\n", "line 3: 'a.jpg' was listed before"),
    ("a.jpg,cat\nb.jpg,cat\n./a.jpg,dog\n", "line 3: './a.jpg' was listed before"),
    ("Datei,Klasse\na.jpg,cat\n", "train.csv: the first row, 'Datei', looks like a header: name the columns"),
    ("image,class,split\na.jpg,cat\n", "line 1: 'image': write `path,label`"),
    ('a.jpg,"cat\n', "train.csv, line 1 is not CSV"), ('a.jpg,"cat"s\n', "train.csv, line 1 is not CSV"),
    ("", "train.csv has no row `path,label`"), ("path,label\n", "has no row"), ("a.jpg\nb.jpg,\n", "has no row"),
    (b"a.jpg,caf\xe9\n", "train.csv is not UTF-8"), ("a.jpg,cat\nb\0.jpg,cat", "train.csv is not a text file: line 2"),
    ('"a\nb.jpg",cat\n"..",cat', r"line 3: '\.\.' leaves"),
])  # fmt: skip
def test_wrong_csv_files_are_explained(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        image_csv(table(tmp_path, content))


def test_missing_csv_files_and_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CSV file .*none.csv .--data-path"):
        image_csv(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}/none.jpg: paths in .*train.csv are relative to"):
        image_csv(table(tmp_path, "none.jpg,cat\n"))


# -------------------------------------------------------------------------------- images without classes


def test_unlabelled_folder(tmp_path):
    for path in ("b.jpg", "a/z.png", "a/deep/er/c.JPEG", ".hidden/x.jpg", "a/.x.jpg"):
        draw(tmp_path / path)
    (tmp_path / "notes.txt").write_text("no image")
    samples = unlabelled_images(tmp_path)
    assert paths(samples) == ["a/deep/er/c.JPEG", "a/z.png", "b.jpg"]
    assert samples.targets.tolist() == [-1] * 3 and samples.targets.dtype == np.int64 and samples.classes == ()
    assert samples.source.load(1).size == (12, 10)


def test_unlabelled_csv(tmp_path):
    samples = unlabelled_images(str(table(tmp_path, "path\nx/b c.jpg\na.jpg,cat\n")))
    assert paths(samples) == ["x/b c.jpg", "a.jpg"] and samples.targets.tolist() == [-1, -1]


def test_wrong_unlabelled_paths_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or CSV file .*none \(--unlabelled-path\)"):
        unlabelled_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("path\n")
    for name in ("empty", "empty.csv"):
        with pytest.raises(ValueError, match=rf"no image in .*{name} \(--unlabelled-path\)"):
            unlabelled_images(tmp_path / name)
    draw(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png is not UTF-8"):
        unlabelled_images(tmp_path / "image.png")


# -------------------------------------------------------------------------------- iNaturalist


@pytest.mark.parametrize("year", [2018, 2019])
def test_inat_classes_by_first_appearance(tmp_path, year):
    make_inat(tmp_path, year)
    train = inat(tmp_path, "train", year, "name")
    assert train.classes == ("Acer rubrum", "Bufo bufo", "Bufo viridis")  # neither by name nor by category
    assert train.targets.tolist() == [0, 1, 0, 2] and train.targets.dtype == np.int64
    # Acer/2/7.jpg in the JSON; the folder of the group is not on disk.
    assert paths(train) == [f"train_val{year}/{path}" for path in ("2/7.jpg", "0/8.jpg", "2/9.jpg", "1/10.jpg")]
    assert abs(train.source.load(3).getpixel((0, 0))[0] - 10) <= 3
    val = inat(tmp_path, "val", year, "name")
    assert val.classes == train.classes and val.targets.tolist() == [1, 2, 0]


@pytest.mark.parametrize("category, classes, targets", [
    ("genus", ("Acer", "Bufo"), [0, 1, 0, 1]), ("kingdom", ("Plantae", "Animalia"), [0, 1, 0, 1])])  # fmt: skip
def test_inat_categories(tmp_path, category, classes, targets):
    make_inat(tmp_path, 2018)
    samples = inat(tmp_path, "train", 2018, category)
    assert samples.classes == classes and samples.targets.tolist() == targets
    assert inat(tmp_path, "val", 2018, category).targets.tolist() == [1, 1, 0]


def test_inat_evaluation_needs_the_train_json_but_no_train_image(tmp_path):
    make_inat(tmp_path, 2018)
    for i in (7, 8, 9, 10):
        next(tmp_path.rglob(f"{i}.jpg")).unlink()
    assert len(inat(tmp_path, "val", 2018, "name")) == 3
    with pytest.raises(FileNotFoundError, match="no .*train_val2018/2/7.jpg: paths in .*train2018.json"):
        inat(tmp_path, "train", 2018, "name")
    (tmp_path / "train2018.json").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*train2018.json .--data-path"):
        inat(tmp_path, "val", 2018, "name")


def test_inat_classes_only_val_has(tmp_path):
    make_inat(tmp_path, 2018, train=((0, 1), (1, 2)), val=((2, 3),))
    with pytest.raises(ValueError, match=r"val2018.json has classes that train2018.json lacks: \['Acer rubrum'\]"):
        inat(tmp_path, "val", 2018, "name")


def test_inat_without_the_category(tmp_path):
    make_inat(tmp_path, 2018)
    with pytest.raises(ValueError, match=r"not iNaturalist's \(--inat-category phylum\): KeyError"):
        inat(tmp_path, "train", 2018, "phylum")


@pytest.mark.parametrize("key, value, message", [
    ("file_name", "/etc/x/passwd", "train2018.json, image 1 from 0: '/etc/x/passwd' leaves the data folder"),
    ("file_name", "train_val2018/a/../../b.jpg", "leaves the data folder"),
    ("file_name", "a/b.jpg", "'a/b.jpg' is not `folder/group/.../file`"),
    ("file_name", "../x/b.jpg", "train2018.json, image 1 from 0: '../x/b.jpg' leaves the data folder"),
    ("file_name", "a/../b/c.jpg", "leaves the data folder"),  # also where the part left out would be the '..'
    ("file_name", "a/b/c\0.jpg", "is not a file name"), ("file_name", "a/b/\ud800.jpg", "is not a file name"),
    ("file_name", 5, "image 1 from 0: 5 is not `folder/group/.../file`"),
    ("id", 555, "not iNaturalist's"), ("id", [], "not iNaturalist's"),
])  # fmt: skip
def test_wrong_inat_entries_are_explained(tmp_path, key, value, message):
    make_inat(tmp_path, 2018)
    content = json.loads((tmp_path / "train2018.json").read_text())
    content["images"][1][key] = value
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        inat(tmp_path, "train", 2018, "name")


@pytest.mark.parametrize("content, message", [
    ("{", "train2018.json is not JSON"), ("[]", "not iNaturalist's"), ("{}", "not iNaturalist's"),
    ('{"annotations": [{"category_id": 3, "image_id": 1}], "images": []}', "not iNaturalist's.*KeyError"),
    ('{"annotations": [{"category_id": -1, "image_id": 1}], "images": []}', "not iNaturalist's.*KeyError"),
    ("9" * 5000, "train2018.json is not JSON"), ("[" * 100_000, "train2018.json is not JSON"),
    ('{"annotations": [], "images": []}', "train2018.json lists no image"),
])  # fmt: skip
def test_wrong_inat_files_are_explained(tmp_path, content, message):
    make_inat(tmp_path, 2018)
    (tmp_path / "train2018.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        inat(tmp_path, "train", 2018, "name")


def test_leaving_entries_of_unlabelled_csv_files(tmp_path):
    for entry, words in (("../a.jpg", "leaves"), ("/a.jpg", "leaves"), ("a\0.jpg", "null byte")):
        with pytest.raises(ValueError, match=words):
            unlabelled_images(table(tmp_path, f"x/b c.jpg\n{entry}\n"))
