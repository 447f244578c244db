"""The views of `images.transforms` on uint8 tensors, for `--data-backend fast`.

A view is a function (3, H, W) -> (3, size, size). `DeviceFinish` normalises and erases whole batches on the device.
With the same draws both kinds crop and flip alike; resized pixels differ by a few levels of 255.
"""

import math
import random
from functools import partial

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import get_image_size

from images.transforms import IMAGENET, check_size, resized_side

ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # Pillow resizes rows first where that is cheaper


def _resized(image, height, width, mode="bicubic"):
    """uint8 (3, H, W) -> (3, height, width), antialiased as by Pillow, up to rounding."""
    rows, columns = image.shape[1] - height, image.shape[2] - width  # how many are lost
    if ROWS_FIRST and columns and rows > max(0, 2 * columns):
        # torch resizes columns first. The order matters, because values are clamped to 0..255 after the first pass.
        image = _resized(image, height, image.shape[2], mode)
    # The strides of this batch are those of channels_last, for which torch has a faster kernel.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode=mode, antialias=True)[0]


def _with_shorter_side(image, side):
    width, height = get_image_size(image)
    short, long = min(width, height), max(width, height)
    long = int(side * long / short)
    return _resized(image, *((long, side) if width <= height else (side, long)))


def _reflected(image, padding):
    # By NumPy, because torch converts bytes to floats in order to pad them.
    around = ((0, 0), (padding, padding), (padding, padding))
    return torch.from_numpy(np.pad(image.numpy(), around, mode="reflect"))


def _random_resized_crop(image, crop):
    """timm's RandomResizedCropAndInterpolation, `crop`, applied to a tensor."""
    top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
    several = isinstance(crop.interpolation, tuple | list)
    mode = random.choice(crop.interpolation) if several else crop.interpolation
    return _resized(image[:, top : top + height, left : left + width], *crop.size, mode.value)


def _by_pillow(image, steps):
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    for step in steps:
        image = step(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def train_view(view):
    """The crop, flip and augmentation policy of a `transforms.train_view` on uint8 tensors.

    The operations of the policy are Pillow's, as in `view`.
    """
    crop, *rest = view.transforms
    normalise = next(i for i, step in enumerate(rest) if isinstance(step, transforms.Normalize))
    rest = rest[: normalise - 1]  # the step before Normalize converts to a tensor
    flip = [step for step in rest if isinstance(step, transforms.RandomHorizontalFlip)]  # timm adds none for hflip 0
    policy = rest[len(flip) :]
    steps = [partial(_random_resized_crop, crop=crop), *flip]
    return transforms.Compose(steps + ([partial(_by_pillow, steps=policy)] if policy else []))


def weak_view(size, hflip=0.5):
    """`transforms.weak_view` on uint8 tensors."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(hflip),
            partial(_with_shorter_side, side=resized_side(size)),
            partial(_reflected, padding=4),
            transforms.RandomCrop(size),
        ]
    )


def eval_view(size):
    """`transforms.eval_view` on uint8 tensors."""
    if size <= 32:
        return partial(check_size, size=size)
    return transforms.Compose([partial(_with_shorter_side, side=resized_side(size)), transforms.CenterCrop(size)])


# -------------------------------------------------------------------------------- on the device


def draw_rectangles(generator, images, side, probability, count):
    """Draw the rectangles of random erasing, distributed as by timm's RandomErasing: int64 (images, count, 4).

    A rectangle is (top, bottom, left, right) in pixels, bottom and right exclusive; four zeros mean none. An image
    of `side` x `side` pixels has, with `probability`, from 1 to `count` of them, which cover 2 to 33 % of its area.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(images, *shape, generator=generator, dtype=torch.float64)

    number = uniform(1, count + 1).long()
    area = uniform(0.02, 1 / 3, count, 10) * side**2 / number[:, None, None]  # ten attempts: the first that fits
    aspect = uniform(math.log(0.3), -math.log(0.3), count, 10).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1).round()
    first = (uniform(0, 1, count, 10, 2) * (side - sides + 1)).floor()
    fits = (sides < side).all(-1)
    boxes = torch.stack([first, first + sides], -1).flatten(-2)  # top, bottom, left, right
    boxes = boxes.take_along_dim(fits.int().argmax(-1)[..., None, None], 2).squeeze(2)
    there = fits.any(-1) & (torch.arange(count) < number[:, None]) & (uniform(0, 1, 1) <= probability)
    return (boxes * there[..., None]).long()


def _inside(boxes, side):
    """Masks (N, 1, side, side) of boxes (N, 4)."""
    line = torch.arange(side, device=boxes.device)
    top, bottom, left, right = boxes.T[..., None]
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


class DeviceFinish:
    """What the fast views leave to the device: normalising all views of a batch and random erasing in the first.

    It maps a batch (images, ..., targets, indices) with uint8 images (B, 3, S, S) to one with float32 images. The
    rectangles are drawn on the host, which never waits for the device.

    Args:
        seed, device: of the two generators that it owns, for rectangles and for noise.
        colours: mean and std, 0 to 1.
        reprob, remode, recount: as in `transforms.train_view`; without them nothing is erased, as in evaluation.
    """

    def __init__(self, seed, device, colours=IMAGENET, reprob=0.0, remode="pixel", recount=1):
        self.mean, self.std = (torch.tensor(each, device=device).view(3, 1, 1) for each in colours)
        self.reprob, self.remode, self.recount = reprob, remode, recount
        self.rectangles = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed ^ 1)

    def __call__(self, batch):
        """The finished batch, a tuple."""
        *views, targets, indices = batch
        views = [view.float().div_(255).sub_(self.mean).div_(self.std) for view in views]
        if self.reprob:
            self._erase(views[0])
        return *views, targets, indices

    def _erase(self, images):
        boxes = draw_rectangles(self.rectangles, len(images), images.shape[-1], self.reprob, self.recount)
        chosen = boxes.any(2).any(1).nonzero()[:, 0]
        boxes, chosen = (x.to(images.device, non_blocking=True) for x in (boxes[chosen], chosen))
        erased = images[chosen]
        for box in boxes.unbind(1):  # where two overlap, the later one wins
            erased = torch.where(_inside(box, images.shape[-1]), self._filling(erased), erased)
        images.index_copy_(0, chosen, erased)

    def _filling(self, images):
        if self.remode == "const":
            return images.new_zeros(())
        shape = images.shape if self.remode == "pixel" else (*images.shape[:2], 1, 1)
        return torch.randn(shape, generator=self.noise, device=images.device)
