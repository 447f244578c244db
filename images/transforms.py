"""What is done to an image before the network sees it: labelled, strong, weak and evaluation views.

Each is a function PIL.Image (RGB) -> float tensor (3, size, size), normalised with ImageNet's mean and std, those
of CIFAR and Fashion-MNIST with their own. The fast ones are functions of uint8 tensors, (3, H, W) -> (3, size, size),
which DeviceFinish normalises and erases on the device. At one seed both kinds crop and flip alike.
"""

import math
import random
from functools import partial

import numpy as np
import PIL
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data import auto_augment as timm_augment
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import get_image_size

from images.randaugment import rand_augment

ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # resizing, where that is cheaper
BICUBIC = transforms.InterpolationMode.BICUBIC
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
FIXMATCH = {  # data sets with the views of FixMatch on CIFAR: mean and std of their colours, 0 to 1
    "CIFAR10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "CIFAR100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "FASHION": ((72.9 / 255,) * 3, (90.0 / 255,) * 3),
}


def _posterize(image, bits_to_keep, **_):
    """timm's posterize; 0 bits give a black image, as Pillow did before version 13 began to raise."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return timm_augment.posterize(image, bits_to_keep)


def _repair_posterize(transform):
    for step in transform.transforms:
        policy = getattr(step, "ops", None) or [op for sub in getattr(step, "policy", ()) for op in sub]
        for op in policy:
            if getattr(op, "aug_fn", None) is timm_augment.posterize:
                op.aug_fn = _posterize
    return transform


def resized_side(size):
    """Shorter side, in pixels, an image is resized to before a crop of `size`: 256 for 224."""
    return int(256 / 224 * size)


def _to_tensor(colours=IMAGENET):
    return [transforms.ToTensor(), transforms.Normalize(*colours, inplace=True)]


def _resize_and_crop(size, padding_mode):
    return [
        transforms.Resize(resized_side(size), interpolation=BICUBIC),
        transforms.RandomCrop(size, padding=4, padding_mode=padding_mode),
    ]


def train_view(
    size, aa="rand-m9-mstd0.5-inc1", color_jitter=0.4, interpolation="bicubic", reprob=0.25, remode="pixel", recount=1
):
    """The labelled and the strong view: timm's training transform.

    Args:
        size: output side in pixels.
        aa: timm's AutoAugment/RandAugment policy; '' or 'none' turns it off.
        color_jitter: strength of colour jitter, used only without `aa`.
        interpolation: 'bicubic', 'bilinear' or 'random', of RandomResizedCrop and of the policy's warps.
        reprob, remode, recount: random erasing: probability, 'const' | 'rand' | 'pixel', rectangles at most.
    Raises ValueError for a policy, mode or interpolation timm does not know.
    """
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise ValueError(f"Unknown --train-interpolation {interpolation!r}: use bicubic, bilinear or random.")
    if remode not in ("const", "rand", "pixel"):
        raise ValueError(f"Unknown --remode {remode!r}: use const, rand or pixel.")
    off = aa is None or aa.lower() in ("", "none")
    try:
        transform = create_transform(
            size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=None if off else aa,
            interpolation=interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the --aa policy {aa!r} ({error!r}).") from error
    return _repair_posterize(transform)


def weak_view(size):
    """The weak view: flip, resize of the shorter side, random crop with 4 pixels of reflection padding."""
    return transforms.Compose([transforms.RandomHorizontalFlip(), *_resize_and_crop(size, "reflect"), *_to_tensor()])


def _check_size(image, size):
    width, height = get_image_size(image)
    if (width, height) != (size, size):
        raise ValueError(
            f"At --input-size {size} (32 or less) images are evaluated as they are, "
            f"but one is {width}x{height}: resize the files or use a larger --input-size."
        )
    return image


def eval_view(size):
    """The evaluation view: resize of the shorter side, centre crop; neither at sizes up to 32."""
    if size <= 32:
        return transforms.Compose([partial(_check_size, size=size), *_to_tensor()])
    return transforms.Compose(
        [transforms.Resize(resized_side(size), interpolation=BICUBIC), transforms.CenterCrop(size), *_to_tensor()]
    )


def cifar_weak_view(size, colours):
    """CIFAR's labelled and weak view: flip, resize, random crop with 4 pixels of zeros around; colours: of FIXMATCH."""
    crop = _resize_and_crop(size, "constant")
    return transforms.Compose([transforms.RandomHorizontalFlip(), *crop, *_to_tensor(colours)])


def cifar_strong_view(size, colours):
    """CIFAR's strong view: flip, FixMatch's RandAugment on the small image, then resize and crop as the weak one."""
    crop = _resize_and_crop(size, "constant")
    augment = transforms.Lambda(rand_augment)
    return transforms.Compose([transforms.RandomHorizontalFlip(), augment, *crop, *_to_tensor(colours)])


def cifar_eval_view(size, colours):
    """CIFAR's evaluation view: resize to the input size, no crop."""
    return transforms.Compose([transforms.Resize((size, size), interpolation=BICUBIC), *_to_tensor(colours)])


def evaluation_view(data_set, size):
    """The evaluation view of a --data-set: `cifar_eval_view` for those of FIXMATCH, else `eval_view`."""
    return cifar_eval_view(size, FIXMATCH[data_set]) if data_set in FIXMATCH else eval_view(size)


# -------------------------------------------------------------------------------- fast: uint8 tensors


def _resized(image, height, width, mode="bicubic"):
    """uint8 (3, H, W) -> (3, height, width), antialiased as Pillow does it, up to rounding."""
    rows, columns = image.shape[1] - height, image.shape[2] - width  # fewer than before
    if ROWS_FIRST and columns and rows > max(0, 2 * columns):
        # torch begins with the columns, and what a byte cannot hold after the first pass is cut off.
        image = _resized(image, height, image.shape[2], mode)
    # Batched this way round the strides are those of channels_last, which has a kernel of its own.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode=mode, antialias=True)[0]


def _with_shorter_side(image, side):
    width, height = get_image_size(image)
    short, long = min(width, height), max(width, height)
    long = int(side * long / short)
    return _resized(image, *((long, side) if width <= height else (side, long)))


def _reflected(image, padding):
    # NumPy's, because torch pads bytes as floats.
    around = ((0, 0), (padding, padding), (padding, padding))
    return torch.from_numpy(np.pad(image.numpy(), around, mode="reflect"))


def _random_resized_crop(image, crop):
    """timm's `crop`, RandomResizedCropAndInterpolation, of a tensor."""
    top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
    several = isinstance(crop.interpolation, tuple | list)
    mode = random.choice(crop.interpolation) if several else crop.interpolation
    return _resized(image[:, top : top + height, left : left + width], *crop.size, mode.value)


def _by_pillow(image, steps):
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    for step in steps:
        image = step(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fast_train_view(view):
    """The crop, flip and policy of `view`, a `train_view`, on uint8 tensors; the policy's steps stay Pillow's."""
    crop, flip, *rest = view.transforms
    normalise = next(i for i, step in enumerate(rest) if isinstance(step, transforms.Normalize))
    policy = rest[: normalise - 1]  # before it the step that makes a tensor
    steps = [partial(_random_resized_crop, crop=crop), flip]
    return transforms.Compose(steps + ([partial(_by_pillow, steps=policy)] if policy else []))


def fast_weak_view(size):
    """`weak_view` on uint8 tensors."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            partial(_with_shorter_side, side=resized_side(size)),
            partial(_reflected, padding=4),
            transforms.RandomCrop(size),
        ]
    )


def fast_eval_view(size):
    """`eval_view` on uint8 tensors."""
    if size <= 32:
        return partial(_check_size, size=size)
    return transforms.Compose([partial(_with_shorter_side, side=resized_side(size)), transforms.CenterCrop(size)])


# -------------------------------------------------------------------------------- fast: the rest, on the device


def draw_rectangles(generator, images, side, probability, count):
    """What random erasing erases, as timm's RandomErasing draws it: int64 (images, count, 4).

    A rectangle is the first row, the row after the last, and so its columns, in images of `side` pixels; all zeros is
    none. An image has from 1 to `count` of them with `probability`; together they are some 2 to 33 % of its area.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(images, *shape, generator=generator, dtype=torch.float64)

    number = uniform(1, count + 1).long()
    area = uniform(0.02, 1 / 3, count, 10) * side**2 / number[:, None, None]  # of ten attempts, the first that fits
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
    """What the fast views leave to the device: normalising all views of a batch, random erasing of the first.

    finish((images, ..., targets, indices)), images uint8 (B, 3, S, S), has them as float32, and the rest as it is.
    The host draws the rectangles and never waits for the device.

    Args:
        seed, device: decide the draws; generators of their own.
        colours: mean and std, 0 to 1.
        reprob, remode, recount: those of `train_view`; 0.0: no erasing, as in evaluation.
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
        for box in boxes.unbind(1):  # where two overlap, the later one is seen
            erased = torch.where(_inside(box, images.shape[-1]), self._filling(erased), erased)
        images.index_copy_(0, chosen, erased)

    def _filling(self, images):
        if self.remode == "const":
            return images.new_zeros(())
        shape = images.shape if self.remode == "pixel" else (*images.shape[:2], 1, 1)
        return torch.randn(shape, generator=self.noise, device=images.device)
