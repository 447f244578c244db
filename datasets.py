"""Which images a run sees: the table of data sets, and the training and evaluation sets that the flags ask for."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from images import fast_transforms, transforms
from images.bad_images import BadImages, tolerated
from images.cifar import cifar
from images.decoding import UnreadableImage, check_turbo
from images.fashion import fashion
from images.readers import image_csv, image_folder, image_list, inat, read_split, unlabelled_images
from utils import NOT_GIVEN, given


class MultiViewDataset:
    """The chosen images of a data set, each read once and shown in one view per transform.

    Item i is `(view, ..., target, index)`: labelled and evaluation images have one view, unlabelled ones two, strong
    and weak, drawn independently. `index` is the image's place in `samples`.

    Where an image is unreadable, the next readable one of `indices` stands in for it, after the last one the first.
    It is always the same one and brings its own target and index. Evaluation replaces no image.

    Args:
        samples: `images.readers.Samples`.
        indices: (n,) places of the chosen images in `samples`.
        transforms: functions of a PIL.Image or, with `finish`, of a uint8 tensor (3, H, W).
        targets: the target of every image in `samples`, (N,) int64; None: `samples.targets`.
        tolerated: how many different images may be unreadable; None in evaluation.
        finish: what the views leave to the device, (seed, device) -> function of a batch; None: nothing.
    """

    def __init__(self, samples, indices, *transforms, targets=None, tolerated=None, finish=None):
        self.samples, self.indices, self.transforms = samples, np.asarray(indices, dtype=np.int64), transforms
        self.targets = samples.targets if targets is None else targets
        self.finish, self.bad_images = finish, BadImages(samples.source, len(self.indices), tolerated)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """Raises UnreadableImage in evaluation, and where more images in a row are unreadable than are tolerated."""
        item, unreadable = self.load(i)
        if item is None:
            self.bad_images.refuse(unreadable)
        return item

    def load(self, i):
        """(item i, the unreadable images that it stands in for, [(index, reason)]); the item is None if none may."""
        unreadable = []
        for index in map(int, chain(self.indices[i:], self.indices[:i])):
            try:
                image = self.samples.source.pixels(index) if self.finish else self.samples.source.load(index)
            except UnreadableImage as error:
                unreadable.append((index, str(error)))
                if self.bad_images.too_many(len(unreadable)):
                    break
            else:
                views = [view(image) for view in self.transforms]
                return (*views, int(self.targets[index]), index), unreadable
        return None, unreadable


# -------------------------------------------------------------------------------- reading: (args, part) -> Samples


def _imagenet(args, part):
    """A folder in ImageNet layout or, where there is none, a CSV file."""
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
    if not given(args.split_folder):
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
    if not given(args.data_split_file):
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
    if not given(args.data_split_file):
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
        flags: the flags of `_UNSET` that apply to it.
        listed: whether the unlabelled images have a list of their own; else they are the train images.
        supervised_only: whether every image is labelled, so that there is nothing to pseudo-label.
        colours: (mean, std) of its colours, 0 to 1, where it has the views of FixMatch on CIFAR; None: those of
            ImageNet.
    """

    read: Callable
    label: Callable = _all_with_a_class
    flags: tuple = ()
    listed: bool = False
    supervised_only: bool = False
    colours: tuple | None = None


_UNSET = {  # flag: its value where it asks for nothing
    "--data-split-file": NOT_GIVEN,
    "--split-folder": NOT_GIVEN,
    "--select-ratio": 1.0,
    "--inat-category": "name",
    "--unlabelled-path": "",
    "--data-backend": "pil",
    "--scale": [0.08, 1.0],
}
_FILES = ("--data-backend", "--scale")  # apply where there are files to decode, which have ImageNet's views
_SPLIT = ("--data-split-file", "--select-ratio", "--unlabelled-path")
_PLACES = ("--split-folder", "--unlabelled-path", *_FILES)
_CIFAR = partial(DataSet, _cifar, _first_of_each_class, ("--select-ratio", "--unlabelled-path"))
# In the order of the released code's flag; FASHION is ours.
DATA_SETS = {
    "FASHION": DataSet(_fashion, _listed_or_first, _SPLIT, colours=((72.9 / 255,) * 3, (90.0 / 255,) * 3)),
    "CIFAR100": _CIFAR(colours=((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255))),
    "CIFAR10": _CIFAR(colours=((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))),
    # released code: IMNET does not read the split file, and its scripts pass one all the same.
    "IMNET": DataSet(_imagenet, flags=("--data-split-file", *_FILES), supervised_only=True),
    "SEMI-IMNET": DataSet(_imagenet, _listed_or_drawn, (*_SPLIT, *_FILES)),
    "INAT": DataSet(partial(_inat, 2018), flags=("--inat-category", *_FILES), supervised_only=True),
    "INAT19": DataSet(partial(_inat, 2019), flags=("--inat-category", *_FILES), supervised_only=True),
    "SEMI-INAT": DataSet(_semi_inat, flags=("--unlabelled-path", *_FILES), listed=True),
    "SEMI-PLACES205": DataSet(partial(_places, ""), flags=_PLACES, listed=True),
    "5PER-SEMI-PLACES205": DataSet(partial(_places, "5per_"), flags=_PLACES, listed=True),
    "1PER-SEMI-PLACES205": DataSet(partial(_places, "1per_"), flags=_PLACES, listed=True),
}


def _check_flags(args, data_set, flags=tuple(_UNSET)):
    for flag in flags:
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value != _UNSET[flag] and flag not in data_set.flags:
            raise ValueError(f"{flag} {value} means nothing to --data-set {args.data_set}: leave it out.")


def _views(args):
    """The labelled, the strong and the weak view of the flags; FixMatch's depend on --input-size and --hflip alone."""
    size, flip, colours = args.input_size, args.hflip, DATA_SETS[args.data_set].colours
    if colours:
        weak = transforms.cifar_weak_view(size, colours, flip)
        views = {"weak": weak, "strong": transforms.cifar_strong_view(size, colours, flip)}
    else:
        strong = transforms.train_view(
            size,
            args.aa,
            args.color_jitter,
            args.train_interpolation,
            args.reprob,
            args.remode,
            args.recount,
            hflip=flip,
            scale=args.scale,
        )
        views = {"weak": transforms.weak_view(size, flip), "strong": strong}
        if args.data_backend == "fast":
            views = {"weak": fast_transforms.weak_view(size, flip), "strong": fast_transforms.train_view(strong)}
    return views[args.labelled_view or ("weak" if colours else "strong")], views["strong"], views["weak"]


def fixmatch_colours(name):
    """(mean, std) of a data set with FixMatch's views; None for one with ImageNet's, and for an unknown name."""
    return DATA_SETS[name].colours if name in DATA_SETS else None


def evaluation_view(name, size):
    """The evaluation view of a data set, by name: PIL.Image (RGB) -> float tensor (3, size, size)."""
    colours = fixmatch_colours(name)
    return transforms.cifar_eval_view(size, colours) if colours else transforms.eval_view(size)


def validation_view(args):
    """The evaluation view of the flags; with `--data-backend fast` it takes and returns uint8 tensors."""
    if args.data_backend == "fast":
        return fast_transforms.eval_view(args.input_size)
    return evaluation_view(args.data_set, args.input_size)


def _finish(args, **erasing):
    """What the views leave to the device; None where they do everything."""
    if args.data_backend == "pil":
        return None
    check_turbo()
    return partial(fast_transforms.DeviceFinish, **erasing)


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


def _truth(samples, labelled, pool):
    """The classes (N,) of the unlabelled images `pool` by which their pseudo labels are measured; -1: unknown."""
    # ours: that of a labelled image counts as unknown, because the network has learned it. Nothing else reads these.
    truth = pool.targets.copy()
    if pool is samples:
        truth[labelled] = -1
    elif (classed := np.flatnonzero(truth >= 0)).size:
        known = {samples.source.identity(i) for i in labelled}
        truth[[i for i in classed if pool.source.identity(i) in known]] = -1
    return truth


def build_training_sets(args, semi_supervised):
    """The labelled MultiViewDataset of the flags and, if `semi_supervised`, the unlabelled one, else None.

    The unlabelled set is, in its order on disk and the same on every rank: the images of --unlabelled-path, or the
    data set's own list, or all train images, of which `--unlabelDataset_exclude_labeledData` leaves out the labelled
    ones. A labelled image in it has target -1. Raises FileNotFoundError or ValueError naming file and flag: something
    is missing or wrong on disk, a flag does not apply to the data set, no image is labelled or none is unlabelled.
    """
    data_set = DATA_SETS[args.data_set]
    _check_flags(args, data_set)
    samples = data_set.read(args, "train")
    indices = data_set.label(args, samples)
    if not len(indices):
        raise ValueError(f"--select-ratio {args.select_ratio} labels none of {len(samples)} train images: raise it.")
    labelled, *both = _views(args)
    finish = _finish(args, reprob=args.reprob, remode=args.remode, recount=args.recount)
    # On the device only the first view is erased, which of the labelled images may be the weak one.
    finish_labelled = _finish(args) if args.labelled_view == "weak" else finish
    allowed = partial(tolerated, args.max_bad_images)
    labelled_set = MultiViewDataset(samples, indices, labelled, tolerated=allowed(len(indices)), finish=finish_labelled)
    if not semi_supervised:
        return labelled_set, None
    pool, others = _unlabelled(args, data_set, samples, indices)
    truth = _truth(samples, indices, pool)
    return labelled_set, MultiViewDataset(
        pool, others, *both, targets=truth, tolerated=allowed(len(others)), finish=finish
    )


def build_validation_set(args, classes=None):
    """The evaluation set of the flags, `val/` of --data-path, as a MultiViewDataset.

    It needs nothing on disk but the validation part; INAT and INAT19 also need the train JSON, for the order of the
    classes.

    Args:
        classes: names of the train classes; None (`--eval`): those of the validation part.
    Raises ValueError listing the classes that only one of the two parts has.
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
