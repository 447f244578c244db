"""FixMatch's RandAugment: each op at its ends against arithmetic by hand, its ranges, its cut-out."""

import random

import numpy as np
import pytest
from PIL import Image

from images import randaugment
from images.randaugment import COLOUR, OPS, cut_out, rand_augment

RANGES = {"AutoContrast": (0, 1), "Equalize": (0, 1), "Identity": (0, 1), "Posterize": (4, 8), "Rotate": (-30, 30),
          "Solarize": (0, 256), **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.05, 0.95)),
          **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY"), (-0.3, 0.3))}  # fmt: skip


def noise(width=32, height=32, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def apply(name, image, strength):
    result = OPS[name][0](image, strength)
    assert result.mode == "RGB" and result.size == image.size
    return np.asarray(result)


def luma(pixels):
    """ITU-R 601-2, in Pillow's integers."""
    return (pixels.astype(int) @ [19595, 38470, 7471] + 0x8000) >> 16


def blend(degenerate, pixels, factor):
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def stretch(pixels):
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    return np.clip((pixels - low) * (255.0 / (high - low)), 0, 255).astype(np.uint8)


def equalised(pixels):
    """Pillow's: step = (sum - last count) // 255, each level to (step // 2 + all counts below) // step."""
    result = np.empty_like(pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        result[..., channel] = np.clip((step // 2 + below) // step, 0, 255)[pixels[..., channel]]
    return result


def smoothed(pixels):
    """3x3 mean with a centre of 5 of 13; the border stays."""
    result, p = pixels.astype(float), pixels.astype(float)
    box = sum(p[1 + dy : 31 + dy, 1 + dx : 31 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    result[1:31, 1:31] = np.floor((box + 4 * p[1:31, 1:31]) / 13 + 0.5)
    return result


def sampled(pixels, source):
    """Nearest neighbour: pixel (x, y) comes from source(x + 0.5, y + 0.5), black from outside."""
    result = np.zeros_like(pixels)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            u, v = source(x + 0.5, y + 0.5)
            if 0 <= u < pixels.shape[1] and 0 <= v < pixels.shape[0]:
                result[y, x] = pixels[int(v), int(u)]
    return result


def test_the_ops_and_their_ranges():
    assert {name: (low, high) for name, (_, low, high) in OPS.items()} == RANGES


@pytest.mark.parametrize("strength", [0, 1])
def test_ops_without_a_strength(strength):
    image = noise(40, 24)
    dull = Image.fromarray((np.asarray(image) // 3 + 50).astype(np.uint8))
    assert OPS["Identity"][0](image, strength) is image
    assert np.abs(apply("AutoContrast", dull, strength).astype(int) - stretch(np.asarray(dull))).max() <= 1
    assert np.array_equal(apply("Equalize", dull, strength), equalised(np.asarray(dull)))


@pytest.mark.parametrize("factor", [0.05, 0.5, 0.95])
def test_enhancements(factor):
    image = noise()
    pixels = np.asarray(image)
    grey = luma(pixels)
    mean = int(grey.mean() + 0.5)
    expected = {
        "Brightness": blend(0, pixels, factor),
        "Color": blend(grey[..., None].repeat(3, 2), pixels, factor),
        "Contrast": blend(mean, pixels, factor),
        "Sharpness": blend(smoothed(pixels), pixels, factor),
    }
    for name, by_hand in expected.items():
        assert np.abs(apply(name, image, factor) - by_hand).max() <= 1.01, name


@pytest.mark.parametrize("strength, bits", [(4, 4), (4.99, 4), (5, 5), (6.5, 6), (7.999, 7), (8, 8)])
def test_posterize(strength, bits):
    image = noise()
    assert np.array_equal(apply("Posterize", image, strength), np.asarray(image) >> (8 - bits) << (8 - bits))


@pytest.mark.parametrize("threshold", [0, 0.5, 77.7, 128, 255, 256])
def test_solarize(threshold):
    pixels = np.asarray(noise())
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    assert np.array_equal(apply("Solarize", noise(), threshold), expected)


@pytest.mark.parametrize("share", [-0.3, -0.11, 0, 0.25, 0.3])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_shears_and_translations(share, size):
    image = noise(*size)
    pixels, (width, height) = np.asarray(image), size
    sources = {
        "ShearX": lambda x, y: (x + share * y, y),
        "ShearY": lambda x, y: (x, y + share * x),
        "TranslateX": lambda x, y: (x + share * width, y),
        "TranslateY": lambda x, y: (x, y + share * height),
    }
    for name, source in sources.items():
        differing = (apply(name, image, share) != sampled(pixels, source)).any(2).mean()
        assert differing < 0.01, name  # a pixel whose source is on an edge may round to the other side


@pytest.mark.parametrize("degrees", [-30, -7.5, 0, 30])
def test_rotate(degrees):
    image, angle = noise(), np.deg2rad(degrees)

    def source(x, y):  # counter-clockwise about the centre
        x, y = x - 16, y - 16
        return np.cos(angle) * x - np.sin(angle) * y + 16, np.sin(angle) * x + np.cos(angle) * y + 16

    differing = (apply("Rotate", image, degrees) != sampled(np.asarray(image), source)).any(2).mean()
    assert differing < 0.02


# -------------------------------------------------------------------------------- the draw


def recorded(monkeypatch, n):
    """Per image, the (op, strength) drawn and the share of the cut-out, of n images."""
    drawn, shares, image = [], [], noise()

    def recorder(name):
        return lambda image, strength: drawn.append((name, strength)) or image

    monkeypatch.setattr(randaugment, "OPS", {name: (recorder(name), *RANGES[name]) for name in RANGES})
    monkeypatch.setattr(randaugment, "cut_out", lambda image, share: shares.append(share) or image)
    random.seed(0)
    for _ in range(n):
        rand_augment(image)
    return [drawn[3 * i : 3 * i + 3] for i in range(n)], drawn, shares


def test_three_ops_with_replacement_always(monkeypatch):
    triples, drawn, shares = recorded(monkeypatch, 2000)
    assert len(drawn) == 6000 and len(shares) == 2000
    repeats = np.mean([len({name for name, _ in triple}) < 3 for triple in triples])
    assert abs(repeats - (1 - 13 * 12 / 14**2)) < 0.04
    counts = [sum(name == each for name, _ in drawn) for each in RANGES]
    assert min(counts) > 340 and max(counts) < 520  # 6000 / 14 = 429, sd 20


def test_strengths_are_uniform_in_their_ranges(monkeypatch):
    _, drawn, shares = recorded(monkeypatch, 2000)
    seen = {name: ([s for each, s in drawn if each == name], *RANGES[name]) for name in RANGES}
    for name, (strengths, low, high) in {**seen, "cut-out": (shares, 0, 0.5)}.items():
        places = (np.array(strengths) - low) / (high - low)
        assert 0 <= places.min() < 0.02 and 0.98 < places.max() <= 1, name
        assert abs(places.mean() - 0.5) < 0.06 and abs(places.std() - 12**-0.5) < 0.04, name


def test_every_image_ends_with_a_cut_out():
    image = Image.new("RGB", (32, 32), (9, 9, 9))
    random.seed(1)
    for _ in range(200):
        pixels = np.asarray(rand_augment(image))
        assert pixels.shape == (32, 32, 3) and (pixels == COLOUR).all(2).any()
    assert np.asarray(image).max() == 9  # the other view reads the same image


# -------------------------------------------------------------------------------- the cut-out


def squares(n, width=32, height=32, share=None):
    """(top, bottom, left, right) of n cut-outs, ends included."""
    image, boxes = Image.new("RGB", (width, height), (1, 2, 3)), []
    for _ in range(n):
        painted = np.asarray(cut_out(image, random.uniform(0, 0.5) if share is None else share))
        where = (painted == COLOUR).all(2)
        assert ((painted == (1, 2, 3)).all(2) == ~where).all()  # COLOUR or untouched
        rows, columns = where.any(1).nonzero()[0], where.any(0).nonzero()[0]
        boxes.append((rows[0], rows[-1], columns[0], columns[-1]))
        assert where.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return np.array(boxes)


@pytest.mark.parametrize("share, side", [(0.5, 17), (0.25, 9), (0.26, 9), (0.01, 1), (0, 1)])
def test_side_of_the_square(share, side):
    random.seed(0)
    boxes = squares(300, share=share)
    heights, widths = boxes[:, 1] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 2] + 1
    for lengths, ends in ((heights, boxes[:, 1]), (widths, boxes[:, 3])):
        assert set(lengths[ends < 31]) == {side} and lengths.max() == side  # less only at the far border


def test_squares_lie_everywhere():
    random.seed(0)
    boxes, hits = squares(2000), np.zeros((32, 32), int)
    for top, bottom, left, right in boxes:
        hits[top : bottom + 1, left : right + 1] += 1
    assert hits.min() > 20
    assert (boxes[:, 0] == 0).any() and (boxes[:, 1] == 31).any() and (boxes[:, 3] == 31).any()


def test_the_side_is_a_share_of_the_width():
    random.seed(0)
    boxes = squares(200, width=64, height=20, share=0.25)
    assert (boxes[:, 3] - boxes[:, 2] + 1).max() == 17 and COLOUR == (125, 123, 114)


def test_the_cut_out_leaves_its_image_alone():
    image = noise()
    before = np.asarray(image).copy()
    cut_out(image, 0.5)
    assert np.array_equal(np.asarray(image), before)
