"""Data sets: class order, any file name, split files and what is wrong with them, the sets of the flags."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import options
from datasets import (
    FileSource,
    Samples,
    Views,
    build_training_sets,
    build_validation_set,
    image_folder,
    read_split,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def draw(path, colour=(10, 20, 30), mode="RGB", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "TIFF" if mode == "CMYK" and path.suffix.lower() == ".tif" else None
    image = Image.new("RGB", size, colour)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path, kind)
    return path


def tree(root, classes):
    """{class: file names} as one-colour JPEG files; the red value counts the files."""
    count = 0
    for name, files in classes.items():
        for file in files:
            draw(root / name / file, (count, 0, 0))
            count += 1
    return root


def paths(samples):
    return [samples.source.path(i) for i in range(len(samples))]


def flags(*words):
    return options.get_args_parser().parse_args(list(map(str, words)))


@pytest.fixture
def imagenet(tmp_path):
    """Three classes of four images, train and val."""
    names = {f"n0{c}": [f"n0{c}_{i}.JPEG" for i in range(4)] for c in range(3)}
    tree(tmp_path / "train", names)
    tree(tmp_path / "val", {name: [f"val_{name}.JPEG"] for name in names})
    return tmp_path


# -------------------------------------------------------------------------------- folders


def test_classes_are_in_natural_order(tmp_path):
    tree(tmp_path, {name: ["a.jpg"] for name in ("class10", "class2", "Class1", "class02", "other", "3")})
    samples = image_folder(tmp_path)
    assert samples.classes == ("3", "Class1", "class02", "class2", "class10", "other")
    assert paths(samples) == [f"{name}/a.jpg" for name in samples.classes]
    assert samples.targets.tolist() == [0, 1, 2, 3, 4, 5] and samples.targets.dtype == np.int64


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
    ("1.jpg\nsame.jpg,1,2\n", r"line 2: 'same.jpg' is the name of several images.*relative to train/"),
    ("../val/1.jpg\n", r"line 1: '../val/1.jpg' leaves the data folder"),
    ("1.jpg\ncat/../dog/same.jpg\n", r"line 2: 'cat/../dog/same.jpg' leaves the data folder"),
    ("/etc/passwd\n", r"line 1: '/etc/passwd' leaves the data folder"),
    ("1.jpg,1,1\n2.jpg,1,2\n1.jpg,9,9\n", r"line 3: '1.jpg' was listed before, in line 1"),
    ("1.jpg\ncat/1.jpg\n", r"line 2: 'cat/1.jpg' was listed before, in line 1"),
    ("", "list.txt lists no image"),
    ("\n \r\n", "list.txt lists no image"),
    (b"1.jpg\ncaf\xe9.jpg\n", "list.txt is not UTF-8"),
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


# -------------------------------------------------------------------------------- views


class CountingSource:
    """Numbers for images; counts how often each is loaded."""

    def __init__(self, n):
        self.loads = [0] * n

    def __len__(self):
        return len(self.loads)

    def load(self, i):
        self.loads[i] += 1
        return 100 * (i + 1)


def test_views_load_an_image_once():
    source = CountingSource(4)
    samples = Samples(source, np.array([5, 6, 7, -1]), ("a",) * 8)
    labelled = Views(samples, [2, 0], lambda image: image + 1)
    unlabelled = Views(samples, [3, 1, 2], lambda image: image + 1, lambda image: image + 2)
    assert (len(samples), len(labelled), len(unlabelled)) == (4, 2, 3)
    assert [labelled[i] for i in range(2)] == [(301, 7, 2), (101, 5, 0)]
    assert [unlabelled[i] for i in range(3)] == [(401, 402, -1, 3), (201, 202, 6, 1), (301, 302, 7, 2)]
    assert source.loads == [1, 1, 2, 1]
    assert all(type(number) is int for number in unlabelled[0][2:])


# -------------------------------------------------------------------------------- the flags' sets


def sets(imagenet, *words):
    args = flags("--data-path", imagenet, "--input-size", 32, *words)
    return build_training_sets(args, options.semi_supervised(args))


def write_split(imagenet, *names):
    path = imagenet / "split.txt"
    path.write_text("".join(f"{name},0,{i}\n" for i, name in enumerate(names)))
    return path


def test_without_a_split_everything_is_labelled(imagenet):
    labelled, unlabelled = sets(imagenet, "--data-set", "SEMI-IMNET")
    assert labelled.indices.tolist() == unlabelled.indices.tolist() == list(range(12))


def test_the_split_chooses_the_labelled_images(imagenet):
    path = write_split(imagenet, "n02_3.JPEG", "n00_1.JPEG")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8))
    noise.save(imagenet / "train" / "n01" / "n01_0.JPEG")
    labelled, unlabelled = sets(imagenet, "--data-set", "SEMI-IMNET", "--data-split-file", path)
    assert labelled.indices.tolist() == [11, 1]
    assert unlabelled.indices.tolist() == list(range(12))  # published: the labelled ones are in it
    image, target, index = labelled[0]
    assert image.shape == (3, 32, 32) and (target, index) == (2, 11)
    strong, weak, target, index = unlabelled[4]
    assert strong.shape == weak.shape == (3, 32, 32) and (target, index) == (1, 4)
    assert (strong - weak).abs().max() > 0.1
    assert labelled.transforms == unlabelled.transforms[:1]  # labelled = strong, and a weak one


def test_supervised_only(imagenet):
    path = write_split(imagenet, "n02_3.JPEG", "n00_1.JPEG")
    words = ["--data-set", "SEMI-IMNET", "--data-split-file", path, "--supervise-only"]
    labelled, unlabelled = sets(imagenet, *words)
    assert labelled.indices.tolist() == [11, 1] and unlabelled is None


def test_imnet_is_labelled_throughout(imagenet):
    path = write_split(imagenet, "n02_3.JPEG")
    for words in ([], ["--data-set", "IMNET"], ["--data-set", "IMNET", "--data-split-file", path]):
        labelled, unlabelled = sets(imagenet, *words)
        assert labelled.indices.tolist() == list(range(12)) and unlabelled is None


EXCLUDE = """
import sys, options
from datasets import build_training_sets
args = options.get_args_parser().parse_args(sys.argv[1:])
print(build_training_sets(args, True)[1].indices.tolist())
"""


def test_excluding_labelled_images_is_the_same_everywhere(imagenet):
    path = write_split(imagenet, "n02_3.JPEG", "n00_1.JPEG", "n01_0.JPEG")
    words = ["--data-set", "SEMI-IMNET", "--data-split-file", str(path),
             "--unlabelDataset_exclude_labeledData"]  # fmt: skip
    for _ in range(2):
        labelled, unlabelled = sets(imagenet, *words)
        assert labelled.indices.tolist() == [11, 1, 4]
        assert unlabelled.indices.tolist() == [0, 2, 3, 5, 6, 7, 8, 9, 10]  # in the folder's order
    command = [sys.executable, "-c", EXCLUDE, "--data-path", str(imagenet), *words]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    elsewhere = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert elsewhere.stdout.strip() == str(unlabelled.indices.tolist())


def test_excluding_everything_is_refused(imagenet):
    with pytest.raises(ValueError, match="--unlabelDataset_exclude_labeledData leaves no unlabelled image"):
        sets(imagenet, "--data-set", "SEMI-IMNET", "--unlabelDataset_exclude_labeledData")


def test_validation_set(imagenet):
    args = flags("--data-path", imagenet, "--input-size", 48)
    views = build_validation_set(args, ("n00", "n01", "n02"))
    assert views.indices.tolist() == [0, 1, 2]
    seen = [views[i] for i in range(3)]
    assert [item[1:] for item in seen] == [(0, 0), (1, 1), (2, 2)]
    assert all(item[0].shape == (3, 48, 48) for item in seen)
    assert torch.equal(views[1][0], seen[1][0])


def test_validation_needs_the_train_classes(imagenet):
    args = flags("--data-path", imagenet)
    message = r"train/ and val/ in .* differ: val/ lacks \['n03'\], train/ lacks \['n02'\]"
    with pytest.raises(ValueError, match=message):
        build_validation_set(args, ("n00", "n01", "n03"))


def test_evaluation_alone_needs_no_train_folder(imagenet):
    (imagenet / "train").rename(imagenet / "gone")
    views = build_validation_set(flags("--data-path", imagenet))
    assert views.samples.classes == ("n00", "n01", "n02") and len(views) == 3
