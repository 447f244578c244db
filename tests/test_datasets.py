"""The sets of the flags: what is labelled and what is not, in each data set and in one's own folders and files."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import options
from datasets import DATA_SETS, MultiViewDataset, build_training_sets, build_validation_set
from images.readers import Samples
from tests.trees import draw, make_cifar, make_fashion, make_inat, make_places, make_semi_inat, paths, tree

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def flags(*words):
    return options.get_args_parser().parse_args(list(map(str, words)))


@pytest.fixture
def imagenet(tmp_path):
    """Three classes of four images, train and val."""
    names = {f"n0{c}": [f"n0{c}_{i}.JPEG" for i in range(4)] for c in range(3)}
    tree(tmp_path / "train", names)
    tree(tmp_path / "val", {name: [f"val_{name}.JPEG"] for name in names})
    return tmp_path


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
    labelled = MultiViewDataset(samples, [2, 0], lambda image: image + 1)
    unlabelled = MultiViewDataset(samples, [3, 1, 2], lambda image: image + 1, lambda image: image + 2)
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


# -------------------------------------------------------------------------------- --select-ratio, --unlabelled-path


@pytest.mark.parametrize("ratio, n", [(0.5, 6), (0.3, 3), (0.99, 11)])
def test_select_ratio_draws_with_its_own_seed(imagenet, ratio, n):
    path = write_split(imagenet, "n02_3.JPEG")
    expected = sorted(random.Random(2021).sample(range(12), n))
    for words in ([], ["--seed", 7], ["--data-split-file", path], ["--data-split-file", "not read"]):
        labelled, unlabelled = sets(imagenet, "--data-set", "SEMI-IMNET", "--select-ratio", ratio, *words)
        assert labelled.indices.tolist() == expected and len(unlabelled) == 12
    _, rest = sets(
        imagenet, "--data-set", "SEMI-IMNET", "--select-ratio", ratio, "--unlabelDataset_exclude_labeledData"
    )
    assert rest.indices.tolist() == sorted(set(range(12)) - set(expected))


def test_a_select_ratio_that_labels_nothing_is_refused(imagenet):
    with pytest.raises(ValueError, match="--select-ratio 0.05 labels none of 12 train images: raise it"):
        sets(imagenet, "--data-set", "SEMI-IMNET", "--select-ratio", 0.05)


OFF = {"--select-ratio": 0.5, "--split-folder": "lists", "--inat-category": "genus", "--unlabelled-path": "more",
       "--data-split-file": "list.txt", "--data-backend": "fast"}  # fmt: skip


@pytest.mark.parametrize("flag", OFF)
@pytest.mark.parametrize("name", DATA_SETS)
def test_flags_without_meaning_are_refused(tmp_path, name, flag):
    meant = {
        "--select-ratio": {"SEMI-IMNET", "CIFAR10", "CIFAR100", "FASHION"},
        "--split-folder": {"SEMI-PLACES205", "5PER-SEMI-PLACES205", "1PER-SEMI-PLACES205"},
        "--inat-category": {"INAT", "INAT19"},
        "--unlabelled-path": set(DATA_SETS) - {"IMNET", "INAT", "INAT19"},
        "--data-split-file": {"SEMI-IMNET", "IMNET", "FASHION"},
        "--data-backend": set(DATA_SETS) - {"CIFAR10", "CIFAR100", "FASHION"},
    }
    if name in meant[flag]:
        assert flag in DATA_SETS[name].flags
    else:
        with pytest.raises(ValueError, match=f"{flag} .* means nothing to --data-set {name}: leave it out"):
            sets(tmp_path, "--data-set", name, flag, OFF[flag])


def test_every_data_set_of_the_flags_is_in_the_table():
    action = next(a for a in options.get_args_parser()._actions if a.dest == "data_set")
    assert sorted(DATA_SETS) == sorted(action.choices)


def test_unlabelled_path(imagenet):
    for path in ("b.jpg", "a/deep/c.png"):
        draw(imagenet / "more" / path)
    words = ["--data-set", "SEMI-IMNET", "--data-split-file", write_split(imagenet, "n02_3.JPEG", "n00_1.JPEG")]
    labelled, unlabelled = sets(imagenet, *words, "--unlabelled-path", imagenet / "more")
    assert labelled.indices.tolist() == [11, 1] and paths(unlabelled.samples) == ["a/deep/c.png", "b.jpg"]
    strong, weak, target, index = unlabelled[1]
    assert strong.shape == weak.shape == (3, 32, 32) and (target, index) == (-1, 1)
    (imagenet / "some.csv").write_text("more/b.jpg\ntrain/n00/n00_1.JPEG\ntrain/n00/n00_2.JPEG\n")
    words += ["--unlabelled-path", imagenet / "some.csv"]
    assert len(sets(imagenet, *words)[1]) == 3
    assert sets(imagenet, *words, "--unlabelDataset_exclude_labeledData")[1].indices.tolist() == [0, 2]
    assert sets(imagenet, *words, "--supervise-only")[1] is None


# -------------------------------------------------------------------------------- by what pseudo labels are measured


def slow_truth(labelled, unlabelled):
    """The class of every unlabelled image, -1 for those that are labelled, compared one by one."""
    known = [labelled.samples.source.identity(i) for i in labelled.indices]
    source, targets = unlabelled.samples.source, unlabelled.samples.targets.tolist()
    return [-1 if source.identity(i) in known else target for i, target in enumerate(targets)]


def test_the_class_of_a_labelled_image_says_nothing_about_its_pseudo_label(imagenet):
    words = ["--data-set", "SEMI-IMNET", "--data-split-file", write_split(imagenet, "n02_3.JPEG", "n00_1.JPEG")]
    labelled, unlabelled = sets(imagenet, *words)
    assert [unlabelled[i][2] for i in range(12)] == [0, -1, 0, 0, 1, 1, 1, 1, 2, 2, 2, -1]
    assert [labelled[i][1] for i in range(2)] == [2, 0] and unlabelled.samples is labelled.samples
    assert unlabelled.targets.tolist() == slow_truth(labelled, unlabelled)
    _, rest = sets(imagenet, *words, "--unlabelDataset_exclude_labeledData")
    assert [rest[i][2] for i in range(10)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    _, others = sets(imagenet, *words, "--unlabelled-path", imagenet / "val")
    assert others.targets.tolist() == [-1] * 3
    assert set(sets(imagenet, "--data-set", "SEMI-IMNET")[1].targets.tolist()) == {-1}  # everything is labelled


@pytest.mark.parametrize("lines, truth", [
    (["u_train/0.jpg,1", "u_train/1.jpg", "l_train/0.jpg,0", "./l_train//1.jpg,2", "u_train/2.jpg 3"],
     [1, -1, -1, -1, 3]),
    (["u_train/0.jpg", "l_train/0.jpg"], [-1, -1]),
])  # fmt: skip
def test_labelled_images_in_a_list_of_its_own(tmp_path, lines, truth):
    make_semi_inat(tmp_path)
    (tmp_path / "semi_list" / "semi-unlabel.txt").write_text("\n".join(lines))
    labelled, unlabelled = sets(tmp_path, "--data-set", "SEMI-INAT")
    assert unlabelled.targets.tolist() == truth == slow_truth(labelled, unlabelled)


# -------------------------------------------------------------------------------- one's own CSV files


@pytest.fixture
def own(tmp_path):
    """train.csv with five labelled rows of three classes and one without; val.csv; unlabelled.csv of two more."""
    (tmp_path / "train.csv").write_text(
        "path,label\ni/0.jpg,dog10\ni/1.jpg,dog2\ni/2.jpg\ni/3.jpg,ant\ni/4.jpg,ant\ni/5.jpg,dog2\n"
    )
    (tmp_path / "val.csv").write_text("v/0.jpg,ant\nv/1.jpg,dog10\nv/2.jpg,dog2\n")
    (tmp_path / "unlabelled.csv").write_text("u/0.jpg\nu/1.jpg,cat\n")
    for path in [*(f"i/{i}.jpg" for i in range(6)), *(f"v/{i}.jpg" for i in range(3)), "u/0.jpg", "u/1.jpg"]:
        draw(tmp_path / path, size=(40, 40))
    return tmp_path


def test_own_csv_files(own):
    labelled, unlabelled = sets(own, "--data-set", "SEMI-IMNET")
    assert labelled.indices.tolist() == [0, 1, 3, 4, 5] and labelled.samples.classes == ("ant", "dog2", "dog10")
    assert [labelled[i][1] for i in range(5)] == [2, 1, 0, 0, 1]
    assert unlabelled.indices.tolist() == list(range(8)) and unlabelled[2][2:] == (-1, 2)
    assert unlabelled.targets.tolist() == [-1] * 8  # the others have no class, the labelled ones do not count
    assert paths(unlabelled.samples)[5:] == ["i/5.jpg", "u/0.jpg", "u/1.jpg"]
    _, rest = sets(own, "--data-set", "SEMI-IMNET", "--unlabelDataset_exclude_labeledData")
    assert rest.indices.tolist() == [2, 6, 7]
    views = build_validation_set(flags("--data-path", own, "--input-size", 32, "--data-set", "SEMI-IMNET"),
                                 labelled.samples.classes)  # fmt: skip
    assert views.samples.targets.tolist() == [0, 2, 1]


def test_own_csv_files_supervised(own):
    labelled, unlabelled = sets(own, "--data-set", "IMNET")
    assert labelled.indices.tolist() == [0, 1, 3, 4, 5] and unlabelled is None


def test_own_csv_files_are_split_and_drawn_among_the_labelled(own):
    words = ["--data-set", "SEMI-IMNET"]
    labelled, _ = sets(own, *words, "--data-split-file", write_split(own, "4.jpg", "i/0.jpg"))
    assert labelled.indices.tolist() == [4, 0]
    drawn, _ = sets(own, *words, "--select-ratio", 0.6)
    assert drawn.indices.tolist() == [[0, 1, 3, 4, 5][i] for i in sorted(random.Random(2021).sample(range(5), 3))]
    with pytest.raises(ValueError, match="split.txt lists 'i/2.jpg', which has no label in .*train.csv"):
        sets(own, *words, "--data-split-file", write_split(own, "4.jpg", "i/2.jpg"))


def test_folders_come_before_csv_files(own):
    draw(own / "train" / "cat" / "0.jpg")
    assert sets(own, "--data-set", "IMNET")[0].samples.classes == ("cat",)
    with pytest.raises(ValueError, match=r"val/ lacks \['cat'\], train/ lacks \['ant', 'dog10', 'dog2'\]"):
        build_validation_set(flags("--data-path", own), ("cat",))


def test_own_evaluation_needs_val_csv_only(own):
    (own / "train.csv").unlink()
    assert build_validation_set(flags("--data-path", own)).samples.classes == ("ant", "dog2", "dog10")
    with pytest.raises(FileNotFoundError, match="no folder .*train: .*or train.csv and val.csv"):
        sets(own, "--data-set", "IMNET")
    (own / "val.csv").write_text("v/0.jpg,ant\nv/1.jpg\n")
    with pytest.raises(ValueError, match="val.csv: 'v/1.jpg' has no label"):
        build_validation_set(flags("--data-path", own))


# -------------------------------------------------------------------------------- the published sets


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, name):
    make_cifar(tmp_path, name, (5, 5, 4, 3, 3), 6)
    labels = [i % 2 for n in ((5, 5, 4, 3, 3) if name == "CIFAR10" else (20,)) for i in range(n)]
    places = [[i for i, label in enumerate(labels) if label == c] for c in range(2)]
    for ratio in (0.25, 0.4, 1):
        labelled, unlabelled = sets(tmp_path, "--data-set", name, "--select-ratio", ratio)
        first = sorted(i for each in places for i in each[: int(ratio * len(each))])
        assert labelled.indices.tolist() == first
        assert unlabelled.indices.tolist() == list(range(20))
    strong, weak, target, index = unlabelled[3]
    assert strong.shape == weak.shape == (3, 32, 32) and (target, index) == (-1, 3)  # all are labelled
    assert labelled[3][1:] == (labels[3], 3) and labelled.transforms == unlabelled.transforms[1:]  # labelled = weak
    words = ["--data-set", name, "--select-ratio", 0.25, "--unlabelDataset_exclude_labeledData"]
    labelled, rest = sets(tmp_path, *words)
    assert rest.indices.tolist() == sorted(set(range(20)) - set(labelled.indices.tolist()))
    args = flags("--data-path", tmp_path, "--input-size", 48, "--data-set", name)
    views = build_validation_set(args, ("cat", "dog"))
    assert len(views) == 6 and views[0][0].shape == (3, 48, 48) and views[1][1:] == (1, 1)
    with pytest.raises(ValueError, match="--select-ratio 0.05 labels none of 20"):
        sets(tmp_path, "--data-set", name, "--select-ratio", 0.05)


def test_cifar_with_other_images(tmp_path):
    make_cifar(tmp_path, "CIFAR10")
    draw(tmp_path / "more" / "a.png", size=(50, 40))
    words = ["--data-set", "CIFAR10", "--unlabelled-path", tmp_path / "more", "--unlabelDataset_exclude_labeledData"]
    _, unlabelled = sets(tmp_path, *words)
    assert len(unlabelled) == 1 and unlabelled[0][0].shape == (3, 32, 32)


def test_fashion(tmp_path):
    labels = make_fashion(tmp_path, train=40, test=6)
    labelled, unlabelled = sets(tmp_path, "--data-set", "FASHION", "--select-ratio", 0.5)
    assert labelled.indices.tolist() == list(range(20)) and unlabelled.indices.tolist() == list(range(40))
    (tmp_path / "list.txt").write_text("31\n7\n")
    words = ["--data-set", "FASHION", "--data-split-file", tmp_path / "list.txt"]
    labelled, rest = sets(tmp_path, *words, "--unlabelDataset_exclude_labeledData")
    assert labelled.indices.tolist() == [31, 7]
    assert rest.indices.tolist() == [i for i in range(40) if i not in (7, 31)]
    assert labelled.transforms == rest.transforms[1:]  # labelled = weak
    strong, weak, target, index = unlabelled[23]
    assert strong.shape == weak.shape == (3, 32, 32) and (target, index) == (labels[23], 23) == (3, 23)
    views = build_validation_set(flags("--data-path", tmp_path, "--input-size", 48, "--data-set", "FASHION"))
    assert len(views) == 6 and views[5][0].shape == (3, 48, 48) and views[5][1:] == (5, 5)
    (tmp_path / "list.txt").write_text("40\n")
    with pytest.raises(ValueError, match="list.txt, line 1: '40' is not among the 40 images of .*train-images"):
        sets(tmp_path, *words)
    with pytest.raises(ValueError, match="--data-split-file and --select-ratio 0.5 both choose labels: keep one"):
        sets(tmp_path, *words, "--select-ratio", 0.5)


@pytest.mark.parametrize("name, year", [("INAT", 2018), ("INAT19", 2019)])
def test_inat_sets(tmp_path, name, year):
    make_inat(tmp_path, year)
    labelled, unlabelled = sets(tmp_path, "--data-set", name, "--inat-category", "genus")
    assert len(labelled) == 4 and labelled.samples.classes == ("Acer", "Bufo") and unlabelled is None
    args = flags("--data-path", tmp_path, "--data-set", name, "--inat-category", "genus")
    assert build_validation_set(args, ("Acer", "Bufo")).samples.targets.tolist() == [1, 1, 0]


def test_semi_inat(tmp_path):
    make_semi_inat(tmp_path)
    labelled, unlabelled = sets(tmp_path, "--data-set", "SEMI-INAT")
    assert labelled.samples.targets.tolist() == [0, 2] and labelled.samples.classes == ("0", "1", "2", "3")
    assert unlabelled.samples.targets.tolist() == [-1, -1, 0]
    assert unlabelled.samples.source.root == tmp_path / "data"
    _, rest = sets(tmp_path, "--data-set", "SEMI-INAT", "--unlabelDataset_exclude_labeledData")
    assert rest.indices.tolist() == [0, 1]
    args = flags("--data-path", tmp_path, "--input-size", 48, "--data-set", "SEMI-INAT")
    assert build_validation_set(args, labelled.samples.classes).samples.targets.tolist() == [0, 1, 3]
    assert unlabelled[0][0].shape == (3, 32, 32) and labelled[1][1:] == (2, 1)


@pytest.mark.parametrize("prefix", ["", "5per_", "1per_"])
def test_places(tmp_path, prefix):
    name = f"{prefix[:4].upper()}-SEMI-PLACES205".lstrip("-")
    make_places(tmp_path / "images", tmp_path / "lists", prefix, 4, 3, 2)
    words = ["--data-set", name, "--split-folder", tmp_path / "lists"]
    labelled, unlabelled = sets(tmp_path / "images", *words)
    assert paths(labelled.samples) == ["a/0.jpg", "b/1.jpg", "a/2.jpg", "b/3.jpg"]
    assert labelled.samples.targets.tolist() == [0, 1, 0, 1] and labelled.samples.classes == ("0", "1")
    assert paths(unlabelled.samples) == ["u/0.jpg", "u/1.jpg", "u/2.jpg"]
    args = flags("--data-path", tmp_path / "images", *words)
    assert len(build_validation_set(args, ("0", "1"))) == 2
    with pytest.raises(ValueError, match=f"--data-set {name} needs --split-folder.*{prefix}semi_ltrain.txt"):
        sets(tmp_path / "images", "--data-set", name)
    (tmp_path / "lists" / f"{prefix}semi_utrain.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"no list .*{prefix}semi_utrain.txt .--split-folder"):
        sets(tmp_path / "images", *words)
    assert sets(tmp_path / "images", *words, "--supervise-only")[1] is None


def test_evaluation_of_lists_needs_the_validation_part_only(tmp_path):
    make_places(tmp_path, tmp_path / "lists", val=3)
    make_semi_inat(tmp_path, train=(0, 8))
    args = [flags("--data-path", tmp_path, "--data-set", "SEMI-PLACES205", "--split-folder", tmp_path / "lists"),
            flags("--data-path", tmp_path, "--data-set", "SEMI-INAT")]  # fmt: skip
    for path in (tmp_path / "a" / "0.jpg", tmp_path / "data" / "l_train" / "0.jpg"):
        path.unlink()
    # The train list, where there is one, still tells how many classes the checkpoint was trained on.
    assert [len(build_validation_set(each).samples.classes) for each in args] == [2, 9]
    for path in [*(tmp_path / "lists").glob("semi_?train.txt"), tmp_path / "semi_list" / "semi-train.txt"]:
        path.unlink()
    views = [build_validation_set(each) for each in args]
    assert [len(each.samples.classes) for each in views] == [2, 4] and [len(each) for each in views] == [3, 3]
