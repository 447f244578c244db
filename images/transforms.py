"""Views of an image: labelled, strong, weak and evaluation.

Each is a function PIL.Image (RGB) -> float tensor (3, size, size), normalised with the mean and standard deviation of
the data set's colours. `images.fast_transforms` has the same views on uint8 tensors.
"""

from functools import partial

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data import auto_augment as timm_augment
from torchvision import transforms
from torchvision.transforms.functional import get_image_size

from images.randaugment import rand_augment

BICUBIC = transforms.InterpolationMode.BICUBIC
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _posterize(image, bits_to_keep, **_):
    """timm's posterize. Pillow 13 refuses to keep 0 bits; older versions returned a black image, and so does this."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return timm_augment.posterize(image, bits_to_keep)


def repair_posterize(transform):
    """Let the AutoAugment or RandAugment policy in a timm transform use `_posterize`; returns the transform."""
    for step in transform.transforms:
        policy = getattr(step, "ops", None) or [op for sub in getattr(step, "policy", ()) for op in sub]
        for op in policy:
            if getattr(op, "aug_fn", None) is timm_augment.posterize:
                op.aug_fn = _posterize
    return transform


def resized_side(size):
    """The shorter side, in pixels, to which an image is resized before a crop of `size`: 256 for 224."""
    return int(256 / 224 * size)


def _to_tensor(colours=IMAGENET):
    return [transforms.ToTensor(), transforms.Normalize(*colours, inplace=True)]


def _resize_and_crop(size, padding_mode):
    return [
        transforms.Resize(resized_side(size), interpolation=BICUBIC),
        transforms.RandomCrop(size, padding=4, padding_mode=padding_mode),
    ]


def train_view(
    size,
    aa="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    interpolation="bicubic",
    reprob=0.25,
    remode="pixel",
    recount=1,
    hflip=0.5,
    scale=(0.08, 1.0),
):
    """The labelled and the strong view: timm's training transform (DeiT's settings).

    Args:
        size: output side in pixels.
        aa: timm's AutoAugment/RandAugment policy; '' or 'none' turns it off.
        color_jitter: strength of colour jitter, used only without `aa`.
        interpolation: 'bicubic', 'bilinear' or 'random', of RandomResizedCrop and of the policy's warps.
        reprob, remode, recount: random erasing: probability, 'const' | 'rand' | 'pixel', rectangles at most.
        hflip: probability of a horizontal flip.
        scale: smallest and largest share of the image's area that RandomResizedCrop takes.
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
            scale=tuple(scale),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=None if off else aa,
            interpolation=interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the --aa policy {aa!r} ({error!r}).") from error
    return repair_posterize(transform)


def weak_view(size, hflip=0.5):
    """The weak view: flip, resize of the shorter side, random crop with 4 pixels of reflected padding."""
    flip = transforms.RandomHorizontalFlip(hflip)
    return transforms.Compose([flip, *_resize_and_crop(size, "reflect"), *_to_tensor()])


def check_size(image, size):
    """The image itself; ValueError where it is not `size` x `size` pixels."""
    width, height = get_image_size(image)
    if (width, height) != (size, size):
        raise ValueError(
            f"At --input-size {size} (32 or less) images are evaluated as they are, "
            f"but one is {width}x{height}: resize the files or use a larger --input-size."
        )
    return image


def eval_view(size):
    """The evaluation view: resize of the shorter side and centre crop; sizes up to 32 take the images as they are."""
    if size <= 32:
        return transforms.Compose([partial(check_size, size=size), *_to_tensor()])
    return transforms.Compose(
        [transforms.Resize(resized_side(size), interpolation=BICUBIC), transforms.CenterCrop(size), *_to_tensor()]
    )


def cifar_weak_view(size, colours, hflip=0.5):
    """FixMatch's labelled and weak view of CIFAR: flip, resize, random crop with 4 pixels of zero padding.

    Args:
        colours: (mean, std), 0 to 1, a number per channel.
    """
    crop = _resize_and_crop(size, "constant")
    return transforms.Compose([transforms.RandomHorizontalFlip(hflip), *crop, *_to_tensor(colours)])


def cifar_strong_view(size, colours, hflip=0.5):
    """FixMatch's strong view of CIFAR: flip, RandAugment on the small image, resize and crop as in the weak view."""
    crop = _resize_and_crop(size, "constant")
    augment = transforms.Lambda(rand_augment)
    return transforms.Compose([transforms.RandomHorizontalFlip(hflip), augment, *crop, *_to_tensor(colours)])


def cifar_eval_view(size, colours):
    """The evaluation view of CIFAR: resize to the input size, no crop."""
    return transforms.Compose([transforms.Resize((size, size), interpolation=BICUBIC), *_to_tensor(colours)])
