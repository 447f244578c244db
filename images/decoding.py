"""Decoding of image files to RGB, by Pillow or libjpeg-turbo, and which files count as unreadable."""

import errno
import io
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from images.files import read_regular
from utils import printable_path

# Errors of the operating system that concern this one file. Any other, such as too many open files or a stale mount,
# does not mean that the image is broken.
_FILE_ERRNOS = {
    getattr(errno, name)
    for name in "ENOENT EACCES EPERM EISDIR ENOTDIR ELOOP ENAMETOOLONG EIO "  # of any path
    "EAGAIN EBUSY EFBIG EINVAL ENODEV ENXIO".split()  # of what is not a regular file
}
# What Pillow raises on broken content, besides OSError. MemoryError is left out: the file may be fine.
_DECODING_ERRORS = (
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

# Views crop and resize what was decoded, and Pillow warns of a large image there as well; see `read_rgb`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_RATIO = 1000  # of the sides of an image; a view resizes the shorter side, and the other one grows with it


class UnreadableImage(OSError):
    """A file that is not a readable image, and will not be one when it is read again."""


def _read_bytes(path):
    try:
        return read_regular(path)
    except OSError as error:
        if error.errno not in _FILE_ERRNOS:
            raise
        raise UnreadableImage(f"Cannot read the image {printable_path(path)}: {error.strerror}") from error


def _is_too_narrow(image):
    return max(image.size) > MAX_RATIO * min(image.size)


def _decode(content):
    """Return (image in RGB, its original mode) from the content of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "EPS":
            raise ValueError("it is PostScript, a program that Pillow would run")
        if _is_too_narrow(image):
            raise ValueError(f"it has {image.width} x {image.height} pixels, too long and narrow for a view")
        image.load()
        if image.mode != "I" and not image.mode.startswith("I;16"):
            # `convert` would copy an image that is RGB already.
            return (image if image.mode == "RGB" else image.convert("RGB")), image.mode
        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), image.mode


def read_rgb(path):
    """Read an image file, whatever its extension, and return (PIL image in RGB, its original mode).

    As published, palettes are looked up, CMYK and grey are converted by Pillow, alpha is dropped, and the orientation
    stored in EXIF is ignored. Float pixels are clamped to 0..255. Images of up to 2 * PIL.Image.MAX_IMAGE_PIXELS,
    that is 178,956,970 pixels, are read, without Pillow's warnings.

    ours: 16-bit grey, which Pillow may load as 32-bit integers (mode I), is reduced to 8 bits by >> 8. Pillow's
    `convert` would clamp all values above 255, although it reduces 16-bit colour to the upper byte as well.

    Raises UnreadableImage, which names the file, if it is missing, may not be read, is not a regular file or not an
    image, is truncated, is longer than MAX_RATIO times its width or the reverse, or has too many pixels or more than
    images.files.MAX_BYTES. Errors of the operating system that do not concern this one file are not caught.
    """
    return _decode_or_raise(_read_bytes(path), path)


def _decode_or_raise(content, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a filter set elsewhere might turn a warning into an error
            return _decode(content)
    except (OSError, *_DECODING_ERRORS) as error:
        # The text of UnidentifiedImageError is the memory address of the buffer, which helps nobody.
        unidentified = "it is empty" if not content else "it is not an image that Pillow knows"
        text = printable_path(" ".join(str(error).split())) or repr(error)
        reason = unidentified if isinstance(error, UnidentifiedImageError) else text
        raise UnreadableImage(f"Cannot read the image {printable_path(path)}: {reason}") from error


def _jpeg(content):
    """Decode a JPEG by libjpeg-turbo to uint8 (3, H, W); None where `_decode` must read or refuse it."""
    try:
        with warnings.catch_warnings():
            # torch warns of a read-only buffer, and torchvision 0.29 deprecates its decoders.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:  # reads the header only
                if image.format != "JPEG" or image.mode not in ("RGB", "L") or _is_too_narrow(image):
                    return None
            return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    except (OSError, *_DECODING_ERRORS):
        return None


def read_pixels(path):
    """Read an image file to a uint8 tensor (3, H, W) in channels-last memory, with the pixels of `read_rgb`.

    JPEGs in grey or RGB are decoded by libjpeg-turbo, straight into a tensor. Everything else, including JPEGs in CMYK
    or that libjpeg-turbo cannot decode, is read by `read_rgb`, and raises the same errors.
    """
    content = _read_bytes(path)
    pixels = _jpeg(content)
    if pixels is None:
        pixels = torch.from_numpy(np.array(_decode_or_raise(content, path)[0])).permute(2, 0, 1)
    return pixels


def check_turbo():
    """Raise ValueError if torchvision was built without libjpeg-turbo, because Pillow would then decode every image."""
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG")
    if _jpeg(file.getvalue()) is None:
        raise ValueError(
            "--data-backend fast needs libjpeg-turbo, which this torchvision lacks: use --data-backend pil."
        )
