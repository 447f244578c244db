"""What is on disk: Samples, and the readers that make them of folders, lists, CSV files and iNaturalist's JSON."""

import csv
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.decoding import read_pixels, read_rgb


class FileSource:
    """Image files below a root, their relative paths in two arrays that worker processes share without copying."""

    def __init__(self, root, paths):
        self.root = Path(root)
        self._folder = os.path.realpath(root)
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self):
        return len(self._ends)

    def path(self, i):
        """Path of image i relative to the root, '/' between its parts."""
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(self._bytes[start : self._ends[i]].tobytes())

    def identity(self, i):
        """What image i has in common with the same image of another source: its absolute path."""
        return os.path.normpath(os.path.join(self._folder, self.path(i)))

    def load(self, i):
        """Image i as RGB, as `images.read_rgb` makes it. Raises UnreadableImage naming the file."""
        return read_rgb(self.root / self.path(i))[0]

    def pixels(self, i):
        """Image i as uint8 (3, H, W), as `images.read_pixels` makes it. Raises UnreadableImage naming the file."""
        return read_pixels(self.root / self.path(i))


class ArraySource:
    """Images in memory: uint8 (N, H, W, 3)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def identity(self, i):
        """What image i has in common with the same image of another source: its place in the array."""
        return int(i)

    def load(self, i):
        """Image i as RGB."""
        return Image.fromarray(self.images[i])


@dataclass(frozen=True)
class Samples:
    """Images and their classes.

    Attributes:
        source: answers `len`, `load(i) -> PIL.Image` and `identity(i)`, the same for the same image only.
        targets: (len,) int64, -1 = unknown.
        classes: names, in the order of the class indices.
    """

    source: FileSource | ArraySource
    targets: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.targets)


# -------------------------------------------------------------------------------- folders


def images_below(root, name=""):
    """Paths, relative to `root`, of all images below `root/name`; hidden files and folders are left out."""
    paths = []
    for folder, folders, files in os.walk(os.path.join(root, name), followlinks=True):
        folders[:] = (each for each in folders if not each.startswith("."))
        shown = (file for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith("."))
        images = (os.path.join(folder, file) for file in shown)
        paths += (os.path.relpath(path, root).replace(os.sep, "/") for path in images)
    return paths


def _in_natural_order(names):
    """Sorted as timm sorts: small letters, runs of digits by their number. timm's own key fails on a name like '²'."""

    def key(name):
        parts = re.split("([0-9]+)", name.lower())
        parts[1::2] = ((len(number), number) for number in (digits.lstrip("0") for digits in parts[1::2]))
        return parts, name

    return sorted(names, key=key)


def image_folder(root):
    """Read a folder in ImageNet layout, `root/<class>/**/<image>`.

    The class index is the rank of the folder's name in natural order (class2 before class10, as timm sorts);
    images are sorted by path within their class, hidden files and folders are left out. Returns Samples.
    Raises FileNotFoundError or ValueError naming a missing folder, one without classes, an empty class.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}: --data-path must hold train/ and val/, a folder a class in each, "
            "or train.csv and val.csv."
        )
    classes = _in_natural_order(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} holds no class folders: its images must lie in {root}/<class>/.")
    paths, targets = [], []
    for target, name in enumerate(classes):
        files = images_below(root, name)
        if not files:
            raise ValueError(f"The class folder {root / name} holds no image: fill it or remove it.")
        paths += sorted(files)
        targets += [target] * len(files)
    return Samples(FileSource(root, paths), np.array(targets, dtype=np.int64), tuple(classes))


def unlabelled_images(path):
    """Images without classes: all below the folder `path`, or those of a CSV file, relative to the file's folder.

    Returns Samples without classes, all targets -1, sorted by path (folder) or in the file's order, which may
    have labels: they are not read. Raises FileNotFoundError or ValueError naming `path`.
    """
    path = Path(path)
    if not path.is_dir():
        root, paths = path.parent, list(_csv_rows(path, "--unlabelled-path", "folder or CSV file"))
    else:
        root, paths = path, sorted(images_below(path))
    if not paths:
        raise ValueError(f"There is no image in {path} (--unlabelled-path).")
    return Samples(_files(root, paths, path), np.full(len(paths), -1), ())


# -------------------------------------------------------------------------------- text files


def _text(path, what, flag):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig: a Windows editor's first bytes
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"There is no {what} {path} ({flag}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {path} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise OSError(f"Cannot read the {what} {path} ({flag}): {error.strerror}.") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"The {what} {path} is no text: line {line} holds a zero byte.")
    return text


def _lines(path, what, flag):
    """(number, text without blanks around) of each line of a file that is not blank."""
    # Not splitlines, which cuts at characters that a file name may hold.
    for number, line in enumerate(_text(path, what, flag).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _check_inside(entry, where, root):
    # Links inside the folder are the user's own and may lead anywhere.
    if entry.startswith("/") or ".." in entry.split("/"):
        raise ValueError(f"{where} leaves the data folder: write names or paths relative to {root}.")
    if "\0" in entry or any("\ud800" <= letter <= "\udfff" for letter in entry):  # JSON can write both
        raise ValueError(f"{where} is no name of a file: it holds a zero byte or half a character.")


def _files(root, paths, listed_in):
    """FileSource; FileNotFoundError where none of the first hundred is there, as with a wrong --data-path."""
    source = FileSource(root, paths)
    if not any(os.path.isfile(os.path.join(root, path)) for path in paths[:100]):
        raise FileNotFoundError(f"There is no {Path(root, paths[0])}: paths in {listed_in} are relative to {root}.")
    return source


def _entries(path):
    """(line number, image) of each line `image[,shard,index in shard]` of a split file."""
    for number, line in _lines(path, "split file", "--data-split-file"):
        head, *columns = line.rsplit(",", 2)
        # The columns are a shard and a place in it, not labels; a list of names only has none.
        plain = len(columns) == 2 and all(re.fullmatch(r"\s*[0-9]+\s*", column) for column in columns)
        yield number, head.strip() if plain else line


def read_split(path, samples):
    """Indices into `samples` of the images a split file lists, in the file's order; (n,) int64.

    An entry is an image's path below the samples' root (`train/`) or, where only one has it, its file name. Raises
    FileNotFoundError or ValueError naming file, line and entry: not found, the name of two, leaving the folder,
    listed twice.
    """
    root, by_path, by_name = samples.source.root, {}, {}
    for i in range(len(samples)):
        relative = samples.source.path(i)
        by_path[relative] = i
        name = relative.rsplit("/", 1)[-1]
        by_name[name] = -1 if name in by_name else i
    found = {}
    for number, entry in _entries(path):
        where = f"{path}, line {number}: {entry!r}"
        _check_inside(entry, where, root)
        index = by_path.get(entry, by_name.get(entry))
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


# A number of more digits is no class: nobody has ten million.
_LISTED = re.compile(r"(.+?)(?:\s*,\s*|\s+)(-?[0-9]{1,7})")


def _listed(path, root, flag, labelled):
    """(paths, targets) of a list's lines, both lists; target -1: none."""
    paths, targets = [], []
    for number, line in _lines(path, "list", flag):
        match = _LISTED.fullmatch(line)
        entry, target = (match[1], int(match[2])) if match else (line, -1)
        if labelled and target < 0:
            raise ValueError(f"{path}, line {number}: {line!r} has no class: write `path,target`, target 0 or more.")
        _check_inside(entry, f"{path}, line {number}: {entry!r}", root)
        paths.append(entry)
        targets.append(max(target, -1))
    if not paths:
        raise ValueError(f"The list {path} names no image ({flag}).")
    return paths, targets


def image_list(path, root, flag, *others, labelled=True):
    """Read a list of images: a line `path target` or `path,target` each, paths relative to the folder `root`.

    With `labelled` False lines may end after the path: their target is -1. A line that comes twice is an image twice.
    Returns Samples; the classes are the numbers from 0 to the largest target in it and in the labelled lists `others`,
    of whose images none need exist. Raises FileNotFoundError or ValueError naming the file, and `flag`, or the line: a
    list that is missing, images none of which is there, a line without a target, a path that leaves the folder.
    """
    paths, targets = _listed(path, root, flag, labelled)
    largest = max(map(max, [targets, *(_listed(other, root, flag, True)[1] for other in others)]))
    return Samples(_files(root, paths, path), np.array(targets), tuple(map(str, range(largest + 1))))


def _csv_rows(path, flag, what="CSV file"):
    """{image: label, '' where the row has none} of the rows `image,label` or `image` of a CSV file, in its order."""
    rows, reader = {}, csv.reader(io.StringIO(_text(path, what, flag)), skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            entry, *label = (cell.strip() for cell in cells or [""])
            header = not rows and [entry, *label] in (["path"], ["path", "label"])
            if header or not any([entry, *label]):
                continue
            where = f"{path}, line {reader.line_num}: {entry!r}"
            if len(label) > 1 or not entry:
                raise ValueError(f"{where}: write `path,label`, in quotes what holds a comma.")
            _check_inside(entry, where, Path(path).parent)
            if entry in rows:
                raise ValueError(f"{where} was listed before: remove one of the two.")
            rows[entry] = label[0] if label else ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}.") from error
    return rows


def image_csv(path, *unlabelled, complete=False):
    """Read a CSV file of rows `path,label`, the images' paths relative to its folder; a header is optional.

    A row without a label has target -1, as have the images of the CSV files `unlabelled`, beside it, which follow
    and whose labels are not read. Returns Samples; the classes are the labels, in natural order. Raises
    FileNotFoundError or ValueError naming file and line: a missing file, an image listed twice or leaving the
    folder, no image or no label, with `complete` a row without one.
    """
    rows = _csv_rows(path, "--data-path")
    missing = [entry for entry, label in rows.items() if not label]
    if len(missing) == len(rows):
        raise ValueError(f"{path} has no row `path,label`: without labels there are no classes.")
    if missing and complete:
        raise ValueError(f"{path}: {missing[0]!r} has no label: every row needs one here.")
    for file in unlabelled:
        rows |= {entry: "" for entry in _csv_rows(file, "--data-path") if entry not in rows}
    classes = _in_natural_order(set(rows.values()) - {""})
    number = {"": -1} | {name: i for i, name in enumerate(classes)}
    targets = np.array([number[label] for label in rows.values()])
    return Samples(_files(Path(path).parent, list(rows), path), targets, tuple(classes))


# -------------------------------------------------------------------------------- iNaturalist


def _json(path):
    text = _text(path, "file", "--data-path")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def inat(root, part, year, category):
    """Read iNaturalist 2018 or 2019: `{train,val}<year>.json` and `categories.json` in `root`.

    Args:
        part: 'train' or 'val'; val needs train's JSON too, for the order of the classes.
        category: the key of `categories.json` whose values are the classes, in the order of their first appearance
            in the train annotations.
    Returns Samples; an image's path is its `file_name` without the second component (`train_val2018/Aves/2761/x.jpg`
    lies in `train_val2018/2761/`). Raises FileNotFoundError or ValueError naming the file and what is wrong in it.
    """
    root, paths, targets = Path(root), [], []
    file, categories = root / f"{part}{year}.json", _json(root / "categories.json")
    train = _json(root / f"train{year}.json")
    content = train if part == "train" else _json(file)
    try:
        name = {i: str(each[category]) for i, each in enumerate(categories)}  # not a list: -1 is no category
        order = dict.fromkeys(name[each["category_id"]] for each in train["annotations"])
        target = {name: i for i, name in enumerate(order)}
        class_of = {each["image_id"]: name[each["category_id"]] for each in content["annotations"]}
        entries = [(each["file_name"], class_of[each["id"]]) for each in content["images"]]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{file} and categories.json beside it are not iNaturalist's (--inat-category {category}): {error!r}."
        ) from error
    if unknown := {label for _, label in entries} - set(target):
        raise ValueError(f"{file} has classes that train{year}.json lacks: {sorted(unknown)[:10]}.")
    for number, (entry, label) in enumerate(entries):
        where = f"{file}, image {number} from 0: {entry!r}"
        parts = entry.split("/") if isinstance(entry, str) else []
        if len(parts) < 3:
            raise ValueError(f"{where} is not `folder/group/.../file`, of which the group is dropped.")
        _check_inside(entry, where, root)
        paths.append("/".join(parts[:1] + parts[2:]))
        targets.append(target[label])
    if not paths:
        raise ValueError(f"{file} lists no image.")
    return Samples(_files(root, paths, file), np.array(targets), tuple(order))
