"""One image file as RGB: what is read, how its colours become RGB, and which files count as unreadable."""

import errno
import io
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

# What the system says of this one file; anything else, as too many open files or a stale mount, is no broken image.
_OF_THE_FILE = {
    getattr(errno, name) for name in "ENOENT EACCES EPERM EISDIR ENOTDIR ELOOP ENAMETOOLONG ENXIO EIO".split()
}
# What Pillow raises on broken content, besides OSError. Not MemoryError.
_OF_THE_CONTENT = (
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(OSError):
    """A file that is no readable image, and will not be one when it is read again."""


def _bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise UnreadableImage(f"Cannot read the image {path}: {error.strerror}") from error


def _decoded(content):
    """(RGB image, the mode it had) of an image file's bytes."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "EPS":
            raise ValueError("it is PostScript, a program that Pillow would run")
        image.load()
        if image.mode != "I" and not image.mode.startswith("I;16"):
            # `convert` copies even where there is nothing to convert.
            return (image if image.mode == "RGB" else image.convert("RGB")), image.mode
        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), image.mode


def read_rgb(path):
    """(PIL image in mode RGB, the mode it had) of an image file, whatever its name ends with.

    Palettes are looked up, CMYK and grey become RGB as Pillow's `convert` does it, alpha is dropped, EXIF orientation
    is ignored, all as published. ours: 16 bits, also those that Pillow holds in 32 (mode I), become 8 by >> 8, where
    `convert` makes 255 of all above 255; of 16-bit colour Pillow keeps the same upper byte. Floats are cut to 0..255.
    Images of up to 2 * PIL.Image.MAX_IMAGE_PIXELS, 178,956,970, are read without a warning.

    Raises UnreadableImage naming a file that is missing, may not be read, is no image, is cut off, or has more
    pixels; OSError, as it comes, for what is not this file's fault.
    """
    return _read_rgb(_bytes(path), path)


def _read_rgb(content, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nor may a filter set elsewhere make an error of one
            return _decoded(content)
    except (OSError, *_OF_THE_CONTENT) as error:
        # Pillow's own words for these hold the address of the bytes in memory.
        unknown = "it is empty" if not content else "it is no image that Pillow knows"
        reason = unknown if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split()) or repr(error)
        raise UnreadableImage(f"Cannot read the image {path}: {reason}") from error


def _jpeg(content):
    """uint8 (3, H, W) of a JPEG's bytes by libjpeg-turbo; None: another format, CMYK, too large or broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, that another package is to decode some day
            with Image.open(io.BytesIO(content)) as header:  # reads no pixel
                if header.format != "JPEG" or header.mode not in ("RGB", "L"):
                    return None
            return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    except (OSError, *_OF_THE_CONTENT):
        return None


def read_pixels(path):
    """Pixels of an image file as `read_rgb` reads it, uint8 (3, H, W), a pixel's three bytes side by side.

    libjpeg-turbo decodes a JPEG in grey or colour straight to the tensor, to the same values. All else, CMYK and what
    it cannot decode as well, is read by `read_rgb`, which has the last word on what is broken: raises as it does.
    """
    content = _bytes(path)
    pixels = _jpeg(content)
    if pixels is None:
        pixels = torch.from_numpy(np.array(_read_rgb(content, path)[0])).permute(2, 0, 1)
    return pixels


def check_turbo():
    """Raise ValueError where torchvision was built without libjpeg-turbo, so that Pillow would decode every image."""
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG")
    if _jpeg(file.getvalue()) is None:
        raise ValueError("--data-backend fast needs libjpeg-turbo, which this torchvision lacks: use pil.")
