"""Readers of data sets: folders, lists, CSV files and iNaturalist's JSON files become `Samples`."""

import json
import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from images.decoding import read_pixels, read_rgb
from images.folders import contains, images_below, is_folder, left_out_words, visible_entries
from images.tables import LOOKED_AT, check_entry, csv_rows, list_rows, quoted, read_text, split_entries
from utils import print_main, printable_path


class FileSource:
    """Image files below a root folder.

    The relative paths are kept in two arrays, which worker processes share. A list of strings would be copied by every
    worker, because reading a string writes its reference count.
    """

    def __init__(self, root, paths):
        self.root = Path(root)
        self._real_root = os.path.realpath(root)
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self):
        return len(self._ends)

    def path(self, i):
        """Path of image i relative to the root, with '/' as its separator."""
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(self._bytes[start : self._ends[i]].tobytes())

    def identity(self, i):
        """Absolute path of image i, which identifies the same image in other sources."""
        return os.path.normpath(os.path.join(self._real_root, self.path(i)))

    def load(self, i):
        """Image i as a PIL image in RGB, read by `images.decoding.read_rgb`, whose errors it raises."""
        return read_rgb(self.root / self.path(i))[0]

    def pixels(self, i):
        """Image i as uint8 (3, H, W), read by `images.decoding.read_pixels`, whose errors it raises."""
        return read_pixels(self.root / self.path(i))


class ArraySource:
    """Images in memory: an array (N, H, W, 3) of uint8."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def identity(self, i):
        """Index of image i in the array, which identifies the same image in other sources of the array."""
        return int(i)

    def load(self, i):
        """Image i as a PIL image in RGB."""
        return Image.fromarray(self.images[i])


MOST_CLASSES = 100_000  # of a list; a larger target is taken for a mistake, because the heads would fill the memory


@dataclass(frozen=True)
class Samples:
    """Images and their classes.

    Attributes:
        source: the images, with `len(source)`, `load(i)` (a PIL image) and `identity(i)` (equal for equal images only).
        targets: class indices (N,) int64, -1 where the class is unknown.
        classes: the classes' names, in the order of their indices.
    """

    source: FileSource | ArraySource
    targets: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.targets)


# -------------------------------------------------------------------------------- folders


def _in_natural_order(names):
    """Sort as timm does: case is ignored, and digits compare as numbers. timm's own key fails on names such as '²'."""

    def key(name):
        parts = re.split("([0-9]+)", name.lower())
        parts[1::2] = ((len(number), number) for number in (digits.lstrip("0") for digits in parts[1::2]))
        return parts, name

    return sorted(names, key=key)


def image_folder(root):
    """Read a folder in the layout of ImageNet, `root/<class>/**/<image>`, into Samples.

    Classes are in the natural order of their folders' names (class2 before class10, as timm sorts them), images in the
    order of their paths within the class. Which files are images, `images.folders.images_below` decides; pictures in a
    format that is not read are counted in a printed line.

    Raises FileNotFoundError if the folder is missing, ValueError if it has no classes, or a class has no images, a name
    that is not UTF-8, or is a link to a folder above it, and OSError if a folder cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}: --data-path must hold train/ and val/ with one folder per class, "
            "or train.csv and val.csv."
        )
    classes = _in_natural_order(entry.name for entry in visible_entries(root) if is_folder(entry))
    if not classes:
        raise ValueError(f"{root} holds no class folders: its images must lie in {root}/<class>/.")
    paths, targets, left_out = [], [], Counter()
    for target, name in enumerate(classes):
        files, others = _class_images(root, name)
        paths += sorted(files)
        targets += [target] * len(files)
        left_out += others
    _tell_left_out(root, left_out)
    return Samples(FileSource(root, paths), np.array(targets, dtype=np.int64), tuple(classes))


def _class_images(root, name):
    """`images_below` of a class folder, which must hold images and have a name that can be written to a log."""
    folder = f"The class folder {printable_path(root / name)}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"{folder} has a name that is not UTF-8: rename it.")
    if contains(root / name, root):
        raise ValueError(f"{folder} is a link to a folder that contains {root}: remove it.")
    files, left_out = images_below(root, name)
    if not files:
        words = left_out_words(left_out)
        raise ValueError(f"{folder} holds no images{words and f' but {words}'}: add some or remove it.")
    return files, left_out


def _tell_left_out(folder, left_out):
    if left_out:
        print_main(f"Pictures below {printable_path(folder)} are left out: {left_out_words(left_out)}.")


def unlabelled_images(path):
    """Read images without labels (`--unlabelled-path`) into Samples without classes, whose targets are all -1.

    `path` is a folder, whose images at any depth are sorted by path, or a CSV file as in `image_csv`, whose order is
    kept and whose labels are ignored.

    Raises FileNotFoundError if `path` or each of the first 100 images is missing, and ValueError if there are no images
    or the file is not such a CSV file.
    """
    path, left_out = Path(path), Counter()
    if not path.is_dir():
        root, paths = path.parent, list(csv_rows(path, "--unlabelled-path", "folder or CSV file"))
    else:
        root, (paths, left_out) = path, images_below(path)
        paths.sort()
    if not paths:
        words = left_out_words(left_out)
        raise ValueError(f"There is no image in {path}{words and f' but {words}'} (--unlabelled-path).")
    _tell_left_out(path, left_out)
    return Samples(_file_source(root, paths, path), np.full(len(paths), -1), ())


# -------------------------------------------------------------------------------- split files, lists, CSV files


def _file_source(root, paths, listed_in):
    """Return a FileSource; FileNotFoundError if none of the first 100 files exists, as with a wrong --data-path."""
    source = FileSource(root, paths)
    if not any(os.path.isfile(os.path.join(root, path)) for path in paths[:LOOKED_AT]):
        raise FileNotFoundError(f"There is no {Path(root, paths[0])}: paths in {listed_in} are relative to {root}.")
    return source


def read_split(path, samples):
    """Return the indices, (n,) int64, of the images in `samples` that a split file lists, in the file's order.

    An entry is an image's path relative to the root of the samples, or its file name if no other image has it.

    Raises FileNotFoundError if the file is missing, and ValueError, which names file and line, if an entry is not
    found, is the name of several images, leaves the root folder or is listed twice.
    """
    root, by_path, by_name = samples.source.root, {}, {}
    for i in range(len(samples)):
        relative = samples.source.path(i)
        by_path[relative] = i
        name = relative.rsplit("/", 1)[-1]
        by_name[name] = -1 if name in by_name else i
    found = {}
    for number, entry in split_entries(path):
        where = f"{path}, line {number}: {quoted(entry)}"
        check_entry(entry, where, root)
        plain = posixpath.normpath(entry)  # ./a//b.jpg is a/b.jpg
        index = by_path.get(plain, by_name.get(plain))
        if index is None:
            raise ValueError(f"{where} is not among the {len(samples)} images of {root}.")
        if index < 0:
            raise ValueError(f"{where} is the name of several images: list them by their paths in {root}.")
        if index in found:
            raise ValueError(f"{where} was listed before, in line {found[index]}: remove one of the two.")
        found[index] = number
    if not found:
        raise ValueError(f"The split file {path} lists no image.")
    return np.fromiter(found, dtype=np.int64)


def image_list(path, root, flag, *others, labelled=True):
    """Read a list with a line `path target` or `path,target` for every image into Samples.

    Args:
        path: the list. A line that occurs twice is two images.
        root: the folder that the paths are relative to.
        flag: the command-line flag that error messages name.
        others: further labelled lists, which only contribute classes; their images need not exist.
        labelled: whether every line must have a target; if not, a missing target is -1.

    Returns:
        Samples; the classes are the numbers from 0 to the largest target of all lists.

    Raises FileNotFoundError if a list or each of the first 100 images is missing, and ValueError, which names the line,
    if a target is missing or a path leaves the folder, and the list, if there are more than MOST_CLASSES.
    """
    paths, targets = list_rows(path, root, flag, labelled)
    largest = max(map(max, [targets, *(list_rows(other, root, flag, True)[1] for other in others)]))
    if largest >= MOST_CLASSES:
        lists = " or ".join(map(str, (path, *others)))
        raise ValueError(f"{lists} has an image of class {largest}, but {MOST_CLASSES - 1} is the last possible one.")
    return Samples(_file_source(root, paths, path), np.array(targets), tuple(map(str, range(largest + 1))))


def image_csv(path, *unlabelled, complete=False):
    """Read a CSV file with a row `path,label` for every image into Samples.

    Args:
        path: the CSV file; its paths are relative to its folder, a header such as `path,label` or `image,class` is
            optional, and a missing label is target -1.
        unlabelled: further CSV files in the same folder, whose images are appended with target -1; their labels are
            ignored.
        complete: refuse rows without a label.

    Returns:
        Samples; the classes are the labels in natural order.

    Raises FileNotFoundError if a file or each of the first 100 images is missing, and ValueError, which names the file,
    if an image is listed twice or leaves the folder, the first row looks like an unknown header, no row has a label, or
    with `complete` a row has none.
    """
    rows = csv_rows(path, "--data-path")
    missing = [entry for entry, label in rows.items() if not label]
    if len(missing) == len(rows):
        raise ValueError(f"{path} has no row `path,label`: without labels there are no classes.")
    if missing and complete:
        raise ValueError(f"{path}: {quoted(missing[0])} has no label: every row needs one here.")
    for file in unlabelled:
        rows |= {entry: "" for entry in csv_rows(file, "--data-path") if entry not in rows}
    classes = _in_natural_order(set(rows.values()) - {""})
    index = {"": -1} | {name: i for i, name in enumerate(classes)}
    targets = np.array([index[label] for label in rows.values()])
    return Samples(_file_source(Path(path).parent, list(rows), path), targets, tuple(classes))


# -------------------------------------------------------------------------------- iNaturalist


def _read_json(path):
    text = read_text(path, "file", "--data-path")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def inat(root, part, year, category):
    """Read iNaturalist 2018 or 2019, `{train,val}<year>.json` and `categories.json` in `root`, into Samples.

    An image's path is its `file_name` without the second component: `train_val2018/Aves/2761/x.jpg` is read from
    `train_val2018/2761/x.jpg`.

    Args:
        part: "train" or "val"; "val" needs the JSON file of "train" too, for the order of the classes.
        year: 2018 or 2019.
        category: the key of `categories.json` whose values are the classes, in the order of their first appearance
            in the annotations of "train".

    Raises FileNotFoundError or ValueError, which name the file and what is wrong with it.
    """
    root, paths, targets = Path(root), [], []
    file, categories = root / f"{part}{year}.json", _read_json(root / "categories.json")
    train = _read_json(root / f"train{year}.json")
    content = train if part == "train" else _read_json(file)
    try:
        # A dict, because a list would accept the index -1.
        name_of = {i: str(each[category]) for i, each in enumerate(categories)}
        classes = dict.fromkeys(name_of[each["category_id"]] for each in train["annotations"])
        target_of = {name: i for i, name in enumerate(classes)}
        class_of = {each["image_id"]: name_of[each["category_id"]] for each in content["annotations"]}
        entries = [(each["file_name"], class_of[each["id"]]) for each in content["images"]]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} and categories.json beside it are not iNaturalist's (--inat-category {category}): {error!r}."
        ) from error
    if unknown := {label for _, label in entries} - set(target_of):
        raise ValueError(f"{file} has classes that train{year}.json lacks: {sorted(unknown)[:10]}.")
    for number, (entry, label) in enumerate(entries):
        where = f"{file}, image {number} from 0: {quoted(entry)}"
        parts = entry.split("/") if isinstance(entry, str) else []
        if len(parts) < 3:
            raise ValueError(f"{where} is not `folder/group/.../file`, whose second component is left out.")
        check_entry(entry, where, root)
        paths.append("/".join(parts[:1] + parts[2:]))
        targets.append(target_of[label])
    if not paths:
        raise ValueError(f"{file} lists no image.")
    return Samples(_file_source(root, paths, file), np.array(targets), tuple(classes))
