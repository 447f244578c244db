"""Which images a run sees: MultiViewDataset, what a loader reads, and the sets that the flags ask for."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path

import numpy as np

from images.cifar import cifar
from images.decoding import UnreadableImage, check_turbo
from images.fashion import fashion
from images.readers import image_csv, image_folder, image_list, inat, read_split, unlabelled_images
from images.transforms import (
    FIXMATCH,
    DeviceFinish,
    cifar_strong_view,
    cifar_weak_view,
    evaluation_view,
    fast_eval_view,
    fast_train_view,
    fast_weak_view,
    train_view,
    weak_view,
)


class MultiViewDataset:
    """A data set of the chosen images: `(view, ..., target, index)`, one view per transform, each image read once.

    Labelled and evaluation images have one view, unlabelled ones two, strong and weak, drawn independently.
    `index` is the image's place in `samples`.

    Where an image is unreadable the next one of `indices` that can be read stands in for it, after the last one the
    first: always the same, and target and index are its own. Evaluation replaces nothing, because the accuracy would
    be that of other images.

    Args:
        tolerated: how many different images may be unreadable, None for evaluation: none, and none is replaced.
        finish: what a batch lacks, (seed, device) -> function of the batch on the device; images are then read as
            uint8 tensors. None: nothing, images are read as PIL.Image.

    Attributes:
        met: indices of the unreadable images this process met in this epoch; kept by `loading.watched`.
        unreadable: those of all processes in the epochs before, since this process started.
    """

    def __init__(self, samples, indices, *transforms, tolerated=None, finish=None):
        self.samples, self.indices, self.transforms = samples, np.asarray(indices, dtype=np.int64), transforms
        self.tolerated, self.finish, self.met, self.unreadable = tolerated, finish, set(), set()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """Raises UnreadableImage in evaluation, and where more images in a row are unreadable than are tolerated."""
        unreadable = []
        for index in self._from(i):
            try:
                image = self.samples.source.pixels(index) if self.finish else self.samples.source.load(index)
            except UnreadableImage as error:
                if self.tolerated is None:
                    raise UnreadableImage(f"{error}; evaluation replaces no image: mend or remove this one.") from error
                unreadable.append(index)
                self.check(unreadable)
            else:
                return *(view(image) for view in self.transforms), int(self.samples.targets[index]), index
        raise UnreadableImage(f"None of the {len(self)} images in {self.samples.source.root} can be read.")

    def _from(self, i):
        """The indices from place i on, once round."""
        return map(int, chain(self.indices[i:], self.indices[:i]))

    def replaced(self, places, given):
        """Of images asked for by their `places`, (B,), those that are not in the batch: their indices, a list.

        `given`, (B,), has the indices in the batch. What lies between the two is unreadable as well.
        """
        found, given = [], np.asarray(given)
        for k in np.flatnonzero(self.indices[places] != given):
            found += takewhile(given[k].__ne__, self._from(places[k]))
        return list(dict.fromkeys(found))

    def why(self, index):
        """Why the image of this index is unreadable, its path in it."""
        try:
            self.samples.source.load(index)
        except UnreadableImage as error:
            return str(error)
        return f"{self.samples.source.path(index)} could not be read, and now it can: look after its disk"

    def check(self, unreadable):
        """Raise UnreadableImage, naming some of them, if these indices are more than are tolerated."""
        if len(unreadable) > self.tolerated:
            names = [self.samples.source.path(index) for index in sorted(unreadable)]
            raise UnreadableImage(
                f"At least {len(names)} of {len(self)} images in {self.samples.source.root} cannot be read and "
                f"--max-bad-images allows {self.tolerated}: {', '.join(names[:3])}{', ...' if names[3:] else ''}; "
                "script/check_images.py finds all."
            )


# -------------------------------------------------------------------------------- reading: (args, part) -> Samples


def _own(args, part):
    """A folder in ImageNet layout, or where there is none a CSV file."""
    folder, table = Path(args.data_path, part), Path(args.data_path, f"{part}.csv")
    if folder.is_dir() or not table.is_file():
        return image_folder(folder)
    more = [path for path in [Path(args.data_path, "unlabelled.csv")] if part == "train" and path.is_file()]
    return image_csv(table, *more, complete=part == "val")


def _cifar(args, part):
    return cifar(args.data_path, args.data_set, part)


def _fashion(args, part):
    return fashion(args.data_path, part)


def _inat(year, args, part):
    return inat(args.data_path, part, year, args.inat_category)


def _of_lists(paths, root, flag, part):
    """The images of a list. Classes are counted in train and val; evaluation may have val alone, and counts that."""
    counted = {"train": "val", "val": "train"}.get(part)
    others = [paths[counted]] if counted and paths[counted].is_file() else []
    return image_list(paths[part], root, flag, *others, labelled=part != "unlabelled")


def _semi_inat(args, part):
    lists = Path(args.data_path, "semi_list")
    paths = {"train": "semi-train.txt", "unlabelled": "semi-unlabel.txt", "val": "semi-val.txt"}
    root = Path(args.data_path, "data")
    return _of_lists({part: lists / name for part, name in paths.items()}, root, "--data-path", part)


def _places(prefix, args, part):
    if args.split_folder == "None":
        raise ValueError(f"--data-set {args.data_set} needs --split-folder, the folder of {prefix}semi_ltrain.txt.")
    lists = Path(args.split_folder)
    paths = {"train": f"{prefix}semi_ltrain.txt", "unlabelled": f"{prefix}semi_utrain.txt", "val": "semi_val.txt"}
    return _of_lists({part: lists / name for part, name in paths.items()}, args.data_path, "--split-folder", part)


# -------------------------------------------------------------------------------- labelling: (args, samples) -> indices


def _all_with_a_class(args, samples):
    return np.flatnonzero(samples.targets >= 0)


def _listed_or_drawn(args, samples):
    """The images of the split file, or with --select-ratio below 1 a sample; with neither, all that have a class."""
    candidates = _all_with_a_class(args, samples)
    if args.select_ratio < 1:
        # released code: this seed, whatever --seed is, and the split file is not read.
        drawn = random.Random(2021).sample(range(len(candidates)), int(args.select_ratio * len(candidates)))
        return candidates[sorted(drawn)]
    if args.data_split_file == "None":
        return candidates
    listed = read_split(args.data_split_file, samples)
    if (without := listed[samples.targets[listed] < 0]).size:
        path = samples.source.path(without[0])
        raise ValueError(f"{args.data_split_file} lists {path!r}, which has no label in {args.data_path}/train.csv.")
    return listed


def _first_of_each_class(args, samples):
    """The first int(--select-ratio * size) images of each class, in file order."""
    counts = np.bincount(samples.targets, minlength=len(samples.classes))
    places = (np.flatnonzero(samples.targets == i)[: int(args.select_ratio * n)] for i, n in enumerate(counts))
    return np.sort(np.concatenate(list(places)))


def _listed_or_first(args, samples):
    """The images of the split file, or the first of each class."""
    if args.data_split_file == "None":
        return _first_of_each_class(args, samples)
    if args.select_ratio < 1:
        raise ValueError(f"--data-split-file and --select-ratio {args.select_ratio} both choose labels: keep one.")
    return read_split(args.data_split_file, samples)


# -------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class DataSet:
    """One value of --data-set.

    Attributes:
        read: (args, part) -> Samples; part is 'train', 'val' or, with `listed`, 'unlabelled'.
        label: (args, train Samples) -> indices of the labelled images, (n,) int64.
        flags: the flags of `_UNSET` that mean something here.
        listed: whether the unlabelled images have a list of their own; else they are the train images.
    """

    read: Callable
    label: Callable = _all_with_a_class
    flags: tuple = ()
    listed: bool = False


_UNSET = {  # flag: the value that asks for nothing
    "--data-split-file": "None",
    "--split-folder": "None",
    "--select-ratio": 1.0,
    "--inat-category": "name",
    "--unlabelled-path": "",
    "--data-backend": "pil",
}
_FILES = ("--data-backend",)  # only files are decoded
_CIFAR_ROW = DataSet(_cifar, _first_of_each_class, ("--select-ratio", "--unlabelled-path"))
_PLACES_FLAGS = ("--split-folder", "--unlabelled-path", *_FILES)
DATA_SETS = {
    # released code: IMNET does not read the split file, and scripts pass it all the same.
    "IMNET": DataSet(_own, flags=("--data-split-file", *_FILES)),
    "SEMI-IMNET": DataSet(
        _own, _listed_or_drawn, ("--data-split-file", "--select-ratio", "--unlabelled-path", *_FILES)
    ),
    "CIFAR10": _CIFAR_ROW,
    "CIFAR100": _CIFAR_ROW,
    "FASHION": DataSet(_fashion, _listed_or_first, ("--data-split-file", "--select-ratio", "--unlabelled-path")),
    "INAT": DataSet(partial(_inat, 2018), flags=("--inat-category", *_FILES)),
    "INAT19": DataSet(partial(_inat, 2019), flags=("--inat-category", *_FILES)),
    "SEMI-INAT": DataSet(_semi_inat, flags=("--unlabelled-path", *_FILES), listed=True),
    "SEMI-PLACES205": DataSet(partial(_places, ""), flags=_PLACES_FLAGS, listed=True),
    "5PER-SEMI-PLACES205": DataSet(partial(_places, "5per_"), flags=_PLACES_FLAGS, listed=True),
    "1PER-SEMI-PLACES205": DataSet(partial(_places, "1per_"), flags=_PLACES_FLAGS, listed=True),
}


def _check_flags(args, data_set, flags=tuple(_UNSET)):
    for flag in flags:
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value != _UNSET[flag] and flag not in data_set.flags:
            raise ValueError(f"{flag} {value} means nothing to --data-set {args.data_set}: leave it out.")


def _views(args):
    """The labelled, the strong and the weak view of the flags; CIFAR's and FASHION's have no flag but --input-size."""
    if args.data_set in FIXMATCH:
        weak = cifar_weak_view(args.input_size, FIXMATCH[args.data_set])
        return weak, cifar_strong_view(args.input_size, FIXMATCH[args.data_set]), weak
    strong = train_view(
        args.input_size, args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount
    )
    if args.data_backend == "fast":
        return *[fast_train_view(strong)] * 2, fast_weak_view(args.input_size)
    return strong, strong, weak_view(args.input_size)


def _finish(args, **erasing):
    """What is left to the device; None where the views do all."""
    if args.data_backend == "pil":
        return None
    check_turbo()
    return partial(DeviceFinish, **erasing)


def _unlabelled(args, data_set, samples, labelled):
    """The unlabelled Samples and the indices of those to use."""
    if args.unlabelled_path:
        pool = unlabelled_images(args.unlabelled_path)
    else:
        pool = data_set.read(args, "unlabelled") if data_set.listed else samples
    if not args.unlabelDataset_exclude_labeledData:
        return pool, np.arange(len(pool))
    known = {samples.source.identity(i) for i in labelled}
    others = [i for i in range(len(pool)) if pool.source.identity(i) not in known]
    if not others:
        raise ValueError(
            f"--unlabelDataset_exclude_labeledData leaves no unlabelled image: all {len(pool)} are labelled; "
            "leave it out, label fewer, or pass --supervise-only."
        )
    return pool, np.array(others)


def _tolerated(args, indices):
    """How many unreadable images --max-bad-images allows in a set: a share of it below 1, else a number."""
    limit = args.max_bad_images
    return int(limit if limit >= 1 else limit * len(indices) + 1e-9)


def build_training_sets(args, semi_supervised):
    """The labelled and, if `semi_supervised`, the unlabelled set of the flags: MultiViewDataset, and Views or None.

    The unlabelled set is, in its order on disk on every rank: the images of --unlabelled-path, or the data set's own
    list, or all train images, labelled ones included but for `--unlabelDataset_exclude_labeledData`. Raises
    FileNotFoundError or ValueError naming file and flag: what is missing or wrong on disk, a flag without meaning
    for the data set, no labelled or no unlabelled image.
    """
    data_set = DATA_SETS[args.data_set]
    _check_flags(args, data_set)
    samples = data_set.read(args, "train")
    indices = data_set.label(args, samples)
    if not len(indices):
        raise ValueError(f"--select-ratio {args.select_ratio} labels none of {len(samples)} train images: raise it.")
    labelled, *both = _views(args)
    finish = _finish(args, reprob=args.reprob, remode=args.remode, recount=args.recount)
    labelled_views = MultiViewDataset(samples, indices, labelled, tolerated=_tolerated(args, indices), finish=finish)
    if not semi_supervised:
        return labelled_views, None
    pool, others = _unlabelled(args, data_set, samples, indices)
    return labelled_views, MultiViewDataset(pool, others, *both, tolerated=_tolerated(args, others), finish=finish)


def validation_view(args):
    """The view of evaluation that the flags ask for; with `--data-backend fast` of uint8 tensors."""
    fast = args.data_backend == "fast"
    return fast_eval_view(args.input_size) if fast else evaluation_view(args.data_set, args.input_size)


def build_validation_set(args, classes=None):
    """The evaluation set, as `val/` of the data path. Raises ValueError listing the classes only one of the two has.

    It needs the validation part on disk and nothing else, but for INAT and INAT19, whose train JSON has the order
    of the classes.

    Args:
        classes: names of the train classes, or None to take those of the validation part as they are (`--eval`).
    """
    data_set = DATA_SETS[args.data_set]
    _check_flags(args, data_set, _FILES)
    samples = data_set.read(args, "val")
    if classes is not None and samples.classes != tuple(classes):
        missing, extra = sorted(set(classes) - set(samples.classes)), sorted(set(samples.classes) - set(classes))
        raise ValueError(
            f"The classes of train/ and val/ in {args.data_path} differ: "
            f"val/ lacks {missing[:10]}, train/ lacks {extra[:10]}."
        )
    return MultiViewDataset(samples, np.arange(len(samples)), validation_view(args), finish=_finish(args))
