"""Which images there are and their classes: Samples (what is on disk), Views (what a loader reads), the readers."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from transforms import eval_view, train_view, weak_view


class FileSource:
    """Image files below a root, their relative paths in two arrays that worker processes share without copying."""

    def __init__(self, root, paths):
        self.root = Path(root)
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self):
        return len(self._ends)

    def path(self, i):
        """Path of image i relative to the root, '/' between its parts."""
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(self._bytes[start : self._ends[i]].tobytes())

    def load(self, i):
        """Image i as RGB. Raises OSError naming the file that cannot be read."""
        path = self.root / self.path(i)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise OSError(f"Cannot read the image {path}: {error}") from error


@dataclass(frozen=True)
class Samples:
    """Images and their classes.

    Attributes:
        source: answers `len` and `load(i) -> PIL.Image`.
        targets: (len,) int64, -1 = unknown.
        classes: names, in the order of the class indices.
    """

    source: FileSource
    targets: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.targets)


class Views:
    """A data set of the chosen images: `(view, ..., target, index)`, one view per transform, each image read once.

    Labelled and evaluation images have one view, unlabelled ones two, strong and weak, drawn independently.
    `index` is the image's place in `samples`.
    """

    def __init__(self, samples, indices, *transforms):
        self.samples, self.indices, self.transforms = samples, np.asarray(indices, dtype=np.int64), transforms

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = int(self.indices[i])
        image = self.samples.source.load(index)
        return *(view(image) for view in self.transforms), int(self.samples.targets[index]), index


def _images_below(root, name):
    paths = []
    for folder, folders, files in os.walk(root / name, followlinks=True):
        folders[:] = (each for each in folders if not each.startswith("."))
        shown = (file for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith("."))
        images = (os.path.join(folder, file) for file in shown)
        paths += (os.path.relpath(path, root).replace(os.sep, "/") for path in images)
    return paths


def image_folder(root):
    """Read a folder in ImageNet layout, `root/<class>/**/<image>`.

    The class index is the rank of the folder's name in natural order (class2 before class10, as timm sorts);
    images are sorted by path within their class, hidden files and folders are left out. Returns Samples.
    Raises FileNotFoundError or ValueError naming a missing folder, one without classes, an empty class.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}: --data-path must hold train/ and val/, a folder a class in each."
        )
    classes = sorted(
        (e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")),
        key=lambda name: (natural_key(name), name),
    )
    if not classes:
        raise ValueError(f"{root} holds no class folders: its images must lie in {root}/<class>/.")
    paths, targets = [], []
    for target, name in enumerate(classes):
        files = _images_below(root, name)
        if not files:
            raise ValueError(f"The class folder {root / name} holds no image: fill it or remove it.")
        paths += sorted(files)
        targets += [target] * len(files)
    return Samples(FileSource(root, paths), np.array(targets, dtype=np.int64), tuple(classes))


def _entries(path):
    """(line number, image) of each line `image[,shard,index in shard]` of a split file."""
    try:
        # Not splitlines, which cuts at characters that a file name may hold; -sig: a Windows editor's first bytes.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no split file {path} (--data-split-file).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The split file {path} is not UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            head, *columns = line.strip().rsplit(",", 2)
            # The columns are a shard and a place in it, not labels; a list of names only has none.
            plain = len(columns) == 2 and all(column.strip().isdigit() for column in columns)
            yield number, head.strip() if plain else line.strip()


def read_split(path, samples):
    """Indices into `samples` of the images a split file lists, in the file's order; (n,) int64.

    An entry is a file name, or a path relative to `train/` if it has a '/'. Raises FileNotFoundError or
    ValueError naming file, line and entry: not found, found in two classes, leaving the folder, listed twice.
    """
    by_path, by_name = {}, {}
    for i in range(len(samples)):
        relative = samples.source.path(i)
        by_path[relative] = i
        name = relative.rsplit("/", 1)[-1]
        by_name[name] = -1 if name in by_name else i
    found = {}
    for number, entry in _entries(path):
        where = f"{path}, line {number}: {entry!r}"
        if entry.startswith("/") or ".." in entry.split("/"):
            raise ValueError(f"{where} leaves the data folder: use a file name or a path relative to train/.")
        index = (by_path if "/" in entry else by_name).get(entry)
        if index is None:
            raise ValueError(f"{where} is not among the {len(samples)} images of {samples.source.root}.")
        if index < 0:
            raise ValueError(f"{where} is the name of several images: list them by their paths relative to train/.")
        if index in found:
            raise ValueError(f"{where} was listed before, in line {found[index]}: remove one of the two.")
        found[index] = number
    if not found:
        raise ValueError(f"The split file {path} lists no image.")
    return np.fromiter(found, dtype=np.int64)


def _views(args):
    strong = train_view(
        args.input_size, args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount
    )
    return strong, weak_view(args.input_size)


def build_training_sets(args, semi_supervised):
    """The labelled and, if `semi_supervised`, the unlabelled set of the flags: Views, and Views or None.

    The unlabelled set is the whole train folder, or what the split file leaves of it with
    `--unlabelDataset_exclude_labeledData`, in the folder's order on every rank.
    """
    samples = image_folder(Path(args.data_path, "train"))
    strong, weak = _views(args)
    labelled = everything = np.arange(len(samples))
    if args.data_set != "IMNET" and args.data_split_file != "None":
        labelled = read_split(args.data_split_file, samples)
    labelled_views = Views(samples, labelled, strong)
    if not semi_supervised:
        return labelled_views, None
    unlabelled = np.setdiff1d(everything, labelled) if args.unlabelDataset_exclude_labeledData else everything
    if not len(unlabelled):
        raise ValueError(
            "--unlabelDataset_exclude_labeledData leaves no unlabelled image: every image of "
            f"{samples.source.root} is labelled (--data-split-file {args.data_split_file})."
        )
    return labelled_views, Views(samples, unlabelled, strong, weak)


def build_validation_set(args, classes=None):
    """The evaluation set, `val/` of the data path. Raises ValueError listing the classes only one of the two has.

    Args:
        classes: names of the train classes, or None to take those of `val/` as they are (`--eval`).
    """
    samples = image_folder(Path(args.data_path, "val"))
    if classes is not None and samples.classes != tuple(classes):
        missing, extra = sorted(set(classes) - set(samples.classes)), sorted(set(samples.classes) - set(classes))
        raise ValueError(
            f"The class folders of train/ and val/ in {args.data_path} differ: "
            f"val/ lacks {missing[:10]}, train/ lacks {extra[:10]}."
        )
    return Views(samples, np.arange(len(samples)), eval_view(args.input_size))
