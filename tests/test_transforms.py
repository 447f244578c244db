"""Views: what the flags switch, posterize with no bits left, hand-made versions of every view."""

import copy
import pickle
import random

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_augment
from timm.data import create_transform

import datasets
from datasets import DATA_SETS
from images import transforms
from images.randaugment import rand_augment
from images.transforms import (
    cifar_eval_view,
    cifar_strong_view,
    cifar_weak_view,
    eval_view,
    resized_side,
    train_view,
    weak_view,
)
from options import get_args_parser
from utils import seed_everything

torch.set_num_threads(1)
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
COLOURS = {name: row.colours for name, row in DATA_SETS.items() if row.colours}


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(pixels):
    """(H, W, 3) bytes -> (3, H, W), as the network sees them."""
    return torch.from_numpy(((pixels / 255.0 - MEAN) / STD).transpose(2, 0, 1)).float()


def resize_shorter_side(image, side):
    width, height = image.size
    if width < height:
        return image.resize((side, int(side * height / width)), Image.Resampling.BICUBIC)
    return image.resize((int(side * width / height), side), Image.Resampling.BICUBIC)


def steps(view):
    return {type(step).__name__: step for step in view.transforms}


def operations(thing, seen=None):
    """Every timm AugmentOp that can be reached from a thing, however it is held."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, timm_augment.AugmentOp):
        return [thing]
    if isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif isinstance(thing, dict):
        parts = list(thing.values())
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    return [op for part in parts for op in operations(part, seen)]


def plain(size=64, **flags):
    """The training view without policy, jitter or erasing: crop, flip, normalise."""
    return train_view(size, **{"aa": "none", "color_jitter": 0.0, "reprob": 0.0, **flags})


# -------------------------------------------------------------------------------- training view


def test_published_training_view():
    view = train_view(224)
    assert [type(step).__name__ for step in view.transforms] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor",
        "Normalize", "RandomErasing"]  # fmt: skip
    by_name = steps(view)
    crop, erasing = by_name["RandomResizedCropAndInterpolation"], by_name["RandomErasing"]
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation.value == "bicubic"
    assert by_name["RandomHorizontalFlip"].p == 0.5
    assert (erasing.probability, erasing.per_pixel) == (0.25, True)
    assert (erasing.min_count, erasing.max_count) == (1, 1)
    np.testing.assert_allclose(by_name["Normalize"].mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(by_name["Normalize"].std, STD, rtol=1e-6)


def test_the_policy_string_is_followed():
    policy = steps(train_view(224, aa="rand-m7-n3-mstd0.25-inc1"))["RandAugment"]
    assert policy.num_layers == 3 and len(policy.ops) == 15
    assert {op.magnitude for op in policy.ops} == {7} and {op.magnitude_std for op in policy.ops} == {0.25}
    assert "PosterizeIncreasing" in {op.name for op in policy.ops}
    assert {op.kwargs["fillcolor"] for op in policy.ops} == {(124, 116, 104)}  # the mean colour, in bytes


@pytest.mark.parametrize("aa", ["", "none", "None", None])
def test_colour_jitter_only_without_a_policy(aa):
    by_name = steps(train_view(64, aa=aa, color_jitter=0.3))
    assert "RandAugment" not in by_name
    jitter = by_name["ColorJitter"]
    assert tuple(jitter.brightness) == tuple(jitter.contrast) == tuple(jitter.saturation) == (0.7, 1.3)
    assert jitter.hue is None
    assert "ColorJitter" not in steps(train_view(64, aa="rand-m9-mstd0.5-inc1", color_jitter=0.3))


def test_colour_jitter_changes_colours_and_its_absence_does_not():
    image = Image.new("RGB", (80, 70), (200, 120, 40))
    kept = normalised(np.broadcast_to([200, 120, 40], (64, 64, 3)))
    seed_everything(3)
    torch.testing.assert_close(plain()(image), kept, atol=1e-5, rtol=0)
    assert (plain(color_jitter=0.4)(image) - kept).abs().max() > 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [64, 48])
def test_plain_training_view_equals_a_hand_made_one(interpolation, size):
    image, flips = noise(90, 61), set()
    view = plain(size, interpolation=interpolation)
    for seed in range(8):
        seed_everything(seed)
        seen = view(image)
        seed_everything(seed)
        top, left, height, width = steps(view)["RandomResizedCropAndInterpolation"].get_params(
            image, (0.08, 1.0), (3 / 4, 4 / 3))  # fmt: skip
        flip = torch.rand(1).item() < 0.5
        crop = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(crop.resize((size, size), getattr(Image.Resampling, interpolation.upper())))
        expected = normalised(pixels[:, ::-1] if flip else pixels)
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
        flips.add(flip)
    assert flips == {True, False}


def test_random_interpolation_draws_both():
    image, seen = noise(90, 61), set()
    for seed in range(20):
        results = []
        for interpolation in ("random", "bicubic", "bilinear"):
            random.seed(seed)
            torch.manual_seed(seed)
            results.append(plain(interpolation=interpolation)(image))
        seen.add((torch.equal(results[0], results[1]), torch.equal(results[0], results[2])))
    assert seen == {(True, False), (False, True)}


def erased(view, image, seed):
    """(what the view shows, where it is not the one colour of the image)."""
    seed_everything(seed)
    seen = view(image)
    colour = normalised(np.asarray(image)[:1, :1])
    return seen, (seen - colour).abs().amax(0) > 1e-4


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_random_erasing_fills_a_rectangle(remode):
    image = Image.new("RGB", (80, 70), (250, 120, 10))
    for seed in range(5):
        seen, where = erased(plain(reprob=1.0, remode=remode), image, seed)
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
        box = (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1)
        assert int(where.sum()) == box  # full: one rectangle
        assert 0.01 < box / 64**2 < 0.36
        filled = seen[:, where]
        if remode == "const":
            assert filled.abs().max() == 0
        elif remode == "rand":
            assert filled.std(1).max() < 1e-6 and len(set(filled[:, 0].tolist())) == 3
        else:
            assert len(set(filled[0].tolist())) == box


def test_probability_and_count_of_random_erasing():
    image = Image.new("RGB", (80, 70), (250, 120, 10))
    assert "RandomErasing" not in steps(plain(reprob=0.0))
    assert steps(plain(reprob=0.6))["RandomErasing"].probability == 0.6
    shares = [erased(plain(reprob=0.6), image, seed)[1].any().item() for seed in range(200)]
    assert 0.5 < np.mean(shares) < 0.7
    colours = set()
    for seed in range(30):
        seen, where = erased(plain(reprob=1.0, remode="rand", recount=3), image, seed)
        colours.add(len({tuple(pixel) for pixel in seen[:, where].T.tolist()}))
    assert colours == {1, 2, 3}  # one colour a rectangle


@pytest.mark.parametrize("flags, message", [
    ({"aa": "quatsch"}, "--aa policy 'quatsch'"),
    ({"aa": "rand-x9"}, "--aa policy 'rand-x9'"),
    ({"aa": "rand-m9.5"}, "--aa policy 'rand-m9.5'"),
    ({"aa": "random"}, "--aa policy 'random'"),
    ({"aa": "augmix-q3"}, "--aa policy 'augmix-q3'"),
    ({"aa": "v0-m3"}, "--aa policy 'v0-m3'"),
    ({"remode": "noise"}, "--remode 'noise'.*const, rand or pixel"),
    ({"remode": "noise", "reprob": 0.0}, "--remode 'noise'"),
    ({"interpolation": "lanczos"}, "--train-interpolation 'lanczos'.*bicubic, bilinear or random"),
])  # fmt: skip
def test_unknown_names_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train_view(64, **flags)


# -------------------------------------------------------------------------------- posterize


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 began to raise")
def test_pillow_refuses_no_bits():
    with pytest.raises(ValueError):
        timm_augment.posterize(noise(4, 4), 0)


@pytest.mark.parametrize("bits", [0, -1, -4])
def test_posterize_with_no_bits_left_is_black(bits):
    result = transforms._posterize(noise(7, 5), bits, fillcolor=(1, 2, 3), resample=3)
    assert result.mode == "RGB" and result.size == (7, 5)
    assert np.asarray(result).max() == 0


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_keeps_the_highest_bits(bits):
    image = noise(40, 30)
    result = np.asarray(transforms._posterize(image, bits))
    assert np.array_equal(result, np.asarray(ImageOps.posterize(image, bits)))
    assert np.array_equal(result, np.asarray(image) >> (8 - bits) << (8 - bits))


@pytest.mark.parametrize(
    "aa, number",
    [
        ("rand-m9-mstd0.5-inc1", 1),
        ("rand-m9", 1),
        ("rand-m9-t3aw", 1),
        ("augmix-m5-w4-d2", 1),
        ("v0", 2),
        ("original", 5),
        ("3a", 0),
    ],
)
def test_every_posterize_of_a_policy_is_repaired(aa, number):
    table, function = dict(timm_augment.NAME_TO_OP), timm_augment.posterize
    untouched = operations(create_transform(64, is_training=True, auto_augment=aa))
    theirs = [op for op in untouched if op.aug_fn is timm_augment.posterize]
    ours = operations(train_view(64, aa=aa))
    assert len(ours) == len(untouched) > 0
    assert [op.name for op in ours if op.aug_fn is transforms._posterize] == [op.name for op in theirs]
    assert len(theirs) == number
    assert not [op for op in ours if op.aug_fn is timm_augment.posterize]
    assert not [op for op in ours if "Posterize" in op.name and op.aug_fn is not transforms._posterize]
    assert timm_augment.NAME_TO_OP == table and timm_augment.posterize is function
    assert function.__module__ == "timm.data.auto_augment"


def test_the_strongest_policy_never_raises():
    view, image, without = train_view(32, aa="rand-m15-n4-mstd0.5-inc1"), noise(40, 36), []
    (posterize,) = [op for op in operations(view) if op.aug_fn is transforms._posterize]

    def counting(img, bits, **rest):
        without.append(bits)
        return transforms._posterize(img, bits, **rest)

    posterize.aug_fn = counting
    seed_everything(0)
    for _ in range(400):
        seen = view(image)
        assert seen.shape == (3, 32, 32) and torch.isfinite(seen).all()
    assert without.count(0) > 20  # so the images that used to raise were among them


# -------------------------------------------------------------------------------- weak view


@pytest.mark.parametrize("size, side", [(224, 256), (32, 36), (48, 54), (64, 73), (160, 182), (384, 438)])
def test_resized_side(size, side):
    assert resized_side(size) == side


@pytest.mark.parametrize("width, height", [(90, 61), (61, 90), (300, 290)])
@pytest.mark.parametrize("size, side", [(224, 256), (48, 54)])
def test_weak_view_equals_a_hand_made_one(size, side, width, height):
    image, view, flips = noise(width, height), weak_view(size), set()
    for seed in range(6):
        torch.manual_seed(seed)
        seen = view(image)
        torch.manual_seed(seed)
        flip = torch.rand(1).item() < 0.5
        step = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        pixels = np.pad(np.asarray(resize_shorter_side(step, side)), ((4, 4), (4, 4), (0, 0)), mode="reflect")
        top = torch.randint(0, pixels.shape[0] - size + 1, (1,)).item()
        left = torch.randint(0, pixels.shape[1] - size + 1, (1,)).item()
        expected = normalised(pixels[top : top + size, left : left + size])
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
        flips.add(flip)
    assert flips == {True, False}


# -------------------------------------------------------------------------------- evaluation view


@pytest.mark.parametrize("width, height", [(90, 61), (61, 90), (300, 300)])
@pytest.mark.parametrize("size, side", [(224, 256), (48, 54), (33, 37)])
def test_evaluation_view_equals_a_hand_made_one(size, side, width, height):
    image = noise(width, height)
    pixels = np.asarray(resize_shorter_side(image, side))
    top, left = (round((length - size) / 2) for length in pixels.shape[:2])
    expected = normalised(pixels[top : top + size, left : left + size])
    seen = eval_view(size)(image)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
    assert torch.equal(seen, eval_view(size)(image))  # nothing is drawn


@pytest.mark.parametrize("size", [32, 16])
def test_small_images_are_evaluated_as_they_are(size):
    image = noise(size, size)
    torch.testing.assert_close(eval_view(size)(image), normalised(np.asarray(image)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width, height", [(40, 32), (32, 40), (31, 31)])
def test_a_small_image_of_another_size_is_refused(width, height):
    with pytest.raises(ValueError, match=rf"--input-size 32 .*{width}x{height}"):
        eval_view(32)(noise(width, height))


# -------------------------------------------------------------------------------- CIFAR


CIFAR_COLOURS = {"CIFAR10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
                 "CIFAR100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
                 "FASHION": ((72.9,) * 3, (90.0,) * 3)}  # fmt: skip


def cifar_normalised(pixels, name):
    mean, std = map(np.array, CIFAR_COLOURS[name])
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("size, side", [(32, 36), (48, 54), (224, 256)])
@pytest.mark.parametrize("strong", [False, True])
def test_cifar_views_equal_hand_made_ones(name, size, side, strong):
    image, flips = noise(32, 32), set()
    view = (cifar_strong_view if strong else cifar_weak_view)(size, COLOURS[name])
    for seed in range(6):
        seed_everything(seed)
        seen = view(image)
        seed_everything(seed)
        flip = torch.rand(1).item() < 0.5
        step = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        step = rand_augment(step) if strong else step  # on 32 pixels
        pixels = np.asarray(step.resize((side, side), Image.Resampling.BICUBIC))
        pixels = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))  # zeros
        top = torch.randint(0, side + 8 - size + 1, (1,)).item()
        left = torch.randint(0, side + 8 - size + 1, (1,)).item()
        expected = cifar_normalised(pixels[top : top + size, left : left + size], name)
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
        flips.add(flip)
    assert flips == {True, False}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("size", [32, 16, 48, 224])
def test_cifar_evaluation_view_equals_a_hand_made_one(name, size):
    image = noise(32, 32)
    expected = cifar_normalised(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)), name)
    seen = cifar_eval_view(size, COLOURS[name])(image)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------- independence


def test_strong_and_weak_are_drawn_independently():
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (96, 96, 3))
    image, strong, weak = Image.fromarray(ramp.copy()), plain(), weak_view(64)
    seed_everything(0)
    flips = []
    for _ in range(80):
        views = [view(image)[0] for view in (strong, weak)]
        flips.append(tuple(bool(seen[:, 0].mean() > seen[:, -1].mean()) for seen in views))
    counts = {pair: flips.count(pair) for pair in set(flips)}
    assert len(counts) == 4 and min(counts.values()) >= 10  # all four combinations of flipped or not


def cifar_views(size):
    colours = COLOURS["CIFAR10"]
    return lambda image: cifar_strong_view(size, colours)(image) + cifar_weak_view(size, colours)(image)


@pytest.mark.parametrize("make", [train_view, weak_view, cifar_views])
def test_two_draws_differ(make):
    image, view = noise(100, 80), make(64)
    untouched = copy.deepcopy(np.asarray(image))
    seed_everything(0)
    seen = [view(image) for _ in range(4)] + [weak_view(64)(image), train_view(64)(image)]
    for i, first in enumerate(seen):
        for second in seen[i + 1 :]:
            assert (first - second).abs().max() > 0.1
    assert np.array_equal(untouched, np.asarray(image))  # the next view reads the same image


@pytest.mark.parametrize("size", [32, 48])
def test_views_can_be_sent_to_workers_that_are_not_forked(size):
    for view in (train_view(size), weak_view(size), eval_view(size)):
        image = Image.new("RGB", (size, size), (10, 200, 90))
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        here = view(image)
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        assert torch.equal(pickle.loads(pickle.dumps(view))(image), here)


# -------------------------------------------------------------------------------- --hflip and --scale


def views_of(data_set, backend, *words):
    """{name: view} of the flags, erasing and colours off, each PIL.Image -> (3, S, S)."""
    given = ["--data-set", data_set, "--data-backend", backend, "--input-size", "48", "--aa", "", "--reprob", "0"]
    labelled, strong, weak = datasets._views(get_args_parser().parse_args([*given, "--color-jitter", "0", *words]))
    named = {"labelled": labelled, "strong": strong, "weak": weak}
    if backend == "pil":
        return named
    return {n: lambda image, v=v: v(torch.from_numpy(np.array(image)).permute(2, 0, 1)) for n, v in named.items()}


@pytest.mark.parametrize("data_set, backend", [("SEMI-IMNET", "pil"), ("SEMI-IMNET", "fast"), ("CIFAR10", "pil")])
@pytest.mark.parametrize("hflip, flipped", [("0", 0), ("1", 1), ("0.5", 0.5)])
def test_hflip_is_the_share_of_flipped_images_in_every_training_view(data_set, backend, hflip, flipped, monkeypatch):
    monkeypatch.setattr(transforms, "rand_augment", lambda image: image)  # whose operations are drawn without flips
    scale = ["--scale", "0.9", "1"] if data_set == "SEMI-IMNET" else []
    bright_left = Image.fromarray(np.repeat(np.linspace(255, 0, 60, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2))
    seed_everything(0)
    for name, view in views_of(data_set, backend, "--hflip", hflip, *scale).items():
        seen = [view(bright_left).float() for _ in range(60)]
        share = np.mean([(image[..., 24:].mean() > image[..., :24].mean()).item() for image in seen])
        assert share == pytest.approx(flipped, abs=0.2 if flipped == 0.5 else 0), name


@pytest.mark.parametrize("backend", ["pil", "fast"])
@pytest.mark.parametrize("low, high", [(0.08, 0.2), (0.7, 1.0), (0.5, 0.5)])
def test_scale_is_the_share_of_the_area_that_the_labelled_and_strong_crop_takes(backend, low, high):
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)  # a pixel's colour is its place
    image = Image.fromarray(np.stack([x, y, x], -1))
    views = views_of("SEMI-IMNET", backend, "--scale", str(low), str(high), "--hflip", "0")
    std = np.array(STD).reshape(3, 1, 1) * 255 if backend == "pil" else 1
    seed_everything(0)
    for name in ("labelled", "strong"):
        for _ in range(30):
            seen = views[name](image).float().numpy() * std
            # The centres of the first and last of 48 pixels are 47/48 of the crop's side apart.
            width, height = ((seen[c].max() - seen[c].min()) * 48 / 47 / 200 for c in (0, 1))
            assert low - 0.04 <= width * height <= high + 0.04, name
    weak = views["weak"](image).float().numpy() * std
    assert (weak[0].max() - weak[0].min()) / 200 > 0.7  # the weak crop is a few pixels smaller than the image


@pytest.mark.parametrize("name", COLOURS)
def test_scale_means_nothing_where_no_view_has_such_a_crop(name, tmp_path):
    args = get_args_parser().parse_args(["--data-set", name, "--data-path", str(tmp_path), "--scale", "0.5", "1"])
    with pytest.raises(ValueError, match=rf"--scale \[0.5, 1.0\] means nothing to --data-set {name}: leave it out"):
        datasets.build_training_sets(args, True)
