"""Unreadable training images: which were met, how many are tolerated, and what the user is shown."""

from images.decoding import UnreadableImage
from utils import gather, print_rank, printable_path

LEAST = 5  # unreadable images that a share allows in the shortest list, because small folders have broken files too


def tolerated(limit, total):
    """How many of `total` images may be unreadable by `--max-bad-images`, from 0.

    A limit below 1 is a share of the list, but of LEAST images at least; from 1 on it is a number of images; 0: none.
    """
    if limit >= 1 or limit == 0:
        return int(limit)
    return max(LEAST, int(limit * total + 1e-9))


class BadImages:
    """The unreadable images of one data set, in the process that trains.

    Args:
        source: the images, with `root` and `path(index)` for the messages.
        total: the number of images in the list.
        tolerated: how many different images may be unreadable; None in evaluation, which replaces none, because the
            accuracy would be that of other images.

    Attributes:
        known: indices of the images that any process found unreadable before this epoch; part of the checkpoint.
        met: those that this process met in this epoch.
    """

    def __init__(self, source, total, tolerated):
        self.source, self.total, self.tolerated = source, total, tolerated
        self.known, self.met = set(), set()

    def too_many(self, count):
        """Whether so many unreadable images end the run."""
        return count > (self.tolerated or 0)

    def add(self, found):
        """Record the unreadable images behind a batch, [(index, reason)], and print each the first time it is met.

        Raises UnreadableImage where more have been met than are tolerated.
        """
        for index, reason in found:
            if index not in self.met | self.known:
                print_rank(f"{reason}; the next readable image stands in for it.")
            self.met.add(index)
        self._check(self.met | self.known)

    def refuse(self, found):
        """Raise the UnreadableImage of an item for which no image stands in; `found` as in `add`."""
        if self.tolerated is None:
            raise UnreadableImage(f"{found[0][1]}; evaluation replaces no image: mend or remove this one.")
        self._check({index for index, _ in found})
        raise UnreadableImage(f"None of the {self.total} images in {self.source.root} can be read.")

    def end_epoch(self):
        """The number of different unreadable images of the epoch that ends, over all ranks, which must all call this.

        Raises UnreadableImage on all ranks together where more are known by now than are tolerated.
        """
        met = set().union(*gather(self.met))
        self.known, self.met = self.known | met, set()
        self._check(self.known)
        return len(met)

    def restore(self, indices):
        """Take over the known unreadable images of a checkpoint; those that this list does not have are ignored."""
        self.known = {index for index in indices if index < self.total}

    def _check(self, indices):
        if self.too_many(len(indices)):
            names = [printable_path(self.source.path(index)) for index in sorted(indices)]
            raise UnreadableImage(
                f"At least {len(names)} of {self.total} images in {self.source.root} cannot be read and "
                f"--max-bad-images allows {self.tolerated} (a share allows {LEAST} at least): "
                f"{', '.join(names[:3])}{', ...' if names[3:] else ''}; python -m script.check_images finds all."
            )
