"""The strong augmentation of CIFAR: FixMatch's RandAugment and cut-out square, PIL.Image (RGB) -> PIL.Image.

Source: Sohn et al. (FixMatch, NeurIPS 2020) in its PyTorch ports (ildoonet/pytorch-randaugment, TorchSSL).
"""

import random

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

COLOUR = (125, 123, 114)  # of the cut-out square: CIFAR-10's mean


def _enhance(kind):
    return lambda image, factor: kind(image).enhance(factor)


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest neighbour, black outside


OPS = {  # name: (op(image, strength), lowest and highest strength)
    "AutoContrast": (lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "Brightness": (_enhance(ImageEnhance.Brightness), 0.05, 0.95),
    "Color": (_enhance(ImageEnhance.Color), 0.05, 0.95),
    "Contrast": (_enhance(ImageEnhance.Contrast), 0.05, 0.95),
    "Equalize": (lambda image, _: ImageOps.equalize(image), 0, 1),
    "Identity": (lambda image, _: image, 0, 1),
    # released code (the ports): the bits are cut to an integer, so 8 (no change) is the end that is not drawn.
    "Posterize": (lambda image, bits: ImageOps.posterize(image, int(bits)), 4, 8),
    "Rotate": (lambda image, degrees: image.rotate(degrees), -30, 30),
    "Sharpness": (_enhance(ImageEnhance.Sharpness), 0.05, 0.95),
    "ShearX": (lambda image, share: _affine(image, 1, share, 0, 0, 1, 0), -0.3, 0.3),
    "ShearY": (lambda image, share: _affine(image, 1, 0, 0, share, 1, 0), -0.3, 0.3),
    "Solarize": (lambda image, threshold: ImageOps.solarize(image, threshold), 0, 256),
    "TranslateX": (lambda image, share: _affine(image, 1, 0, share * image.width, 0, 1, 0), -0.3, 0.3),
    "TranslateY": (lambda image, share: _affine(image, 1, 0, 0, 0, 1, share * image.height), -0.3, 0.3),
}


def cut_out(image, share):
    """Paint a square of side `share` * width, its centre drawn anywhere in the image, in COLOUR."""
    side = share * image.width
    left, top = (int(max(0, random.uniform(0, length) - side / 2)) for length in image.size)
    # released code (the ports): PIL paints the last row and column too, so a square has int(side) + 1 of each.
    box = (left, top, min(image.width, left + side), min(image.height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(box, fill=COLOUR)
    return image


def rand_augment(image):
    """Three ops, drawn with replacement and always applied, each at a strength uniform in its range; a cut-out."""
    for op, lowest, highest in random.choices(tuple(OPS.values()), k=3):
        image = op(image, random.uniform(lowest, highest))
    return cut_out(image, random.uniform(0, 0.5))
