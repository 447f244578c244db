"""The strong augmentation of CIFAR: FixMatch's RandAugment followed by Cutout, on PIL images in RGB.

Source: Sohn et al. (FixMatch, NeurIPS 2020), as in its PyTorch ports (ildoonet/pytorch-randaugment, TorchSSL).
"""

import random

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

COLOUR = (125, 123, 114)  # of the square that Cutout paints: the mean of CIFAR-10


def _enhance(kind):
    return lambda image, factor: kind(image).enhance(factor)


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest neighbour, filled with black


OPS = {  # name: (function of image and strength, lowest strength, highest strength)
    "AutoContrast": (lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "Brightness": (_enhance(ImageEnhance.Brightness), 0.05, 0.95),
    "Color": (_enhance(ImageEnhance.Color), 0.05, 0.95),
    "Contrast": (_enhance(ImageEnhance.Contrast), 0.05, 0.95),
    "Equalize": (lambda image, _: ImageOps.equalize(image), 0, 1),
    "Identity": (lambda image, _: image, 0, 1),
    # released code (the ports): the number of bits is rounded down, so that 8, no change, is never drawn.
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
    """Return a copy of the image with a square in COLOUR, of side `share` * width around a random centre."""
    side = share * image.width
    left, top = (int(max(0, random.uniform(0, length) - side / 2)) for length in image.size)
    # released code (the ports): PIL includes the last row and column, so the square has int(side) + 1 of each.
    box = (left, top, min(image.width, left + side), min(image.height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(box, fill=COLOUR)
    return image


def rand_augment(image):
    """Apply three operations, drawn with replacement, each at a strength uniform in its range, then Cutout."""
    for op, lowest, highest in random.choices(tuple(OPS.values()), k=3):
        image = op(image, random.uniform(lowest, highest))
    return cut_out(image, random.uniform(0, 0.5))
