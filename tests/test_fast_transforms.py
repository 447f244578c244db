"""--data-backend fast: the pixels of the pil views but for a few levels, the erasing of timm's but on the device."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as vision

from datasets import DATA_SETS, build_training_sets, build_validation_set
from images import decoding, fast_transforms
from images.decoding import UnreadableImage, check_turbo, read_pixels, read_rgb
from images.fast_transforms import DeviceFinish, draw_rectangles
from images.loading import to_device
from images.transforms import IMAGENET, eval_view, train_view, weak_view
from options import get_args_parser
from samplers import training_order
from tests.trees import broken_images, draw, training_batches, tree
from utils import seed_everything

torch.set_num_threads(1)
CPU = torch.device("cpu")
COLOURS = {name: row.colours for name, row in DATA_SETS.items() if row.colours}
SIZES = [(500, 375), (375, 500), (300, 290), (90, 61), (61, 300)]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    y, x = np.mgrid[0:height, 0:width]
    waves = (127 + 127 * np.sin(x / 17 + y / 31), 255 * x / width, 127 + 127 * np.cos(y / 23))
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def pixels(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def without_floats(view):
    """A pil view up to where its image becomes a normalised tensor."""
    end = next(i for i, step in enumerate(view.transforms) if isinstance(step, vision.Normalize))
    return vision.Compose(view.transforms[: end - 1])


def levels(view, fast, image, seeds):
    """How many levels the fast view is off the pil one at most; a crop or flip of its own would be far off."""
    worst = 0
    for seed in range(seeds):
        seed_everything(seed)
        expected = pixels(without_floats(view)(image))
        seed_everything(seed)
        seen = fast(pixels(image))
        assert seen.dtype == torch.uint8 and seen.shape == expected.shape
        worst = max(worst, (seen.int() - expected.int()).abs().max().item())
    return worst


# -------------------------------------------------------------------------------- views


@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize("width, height", SIZES)
def test_fast_views_crop_and_flip_as_the_pil_ones_and_are_a_few_levels_off(width, height, size, make):
    image = make(width, height)
    assert levels(weak_view(size), fast_transforms.weak_view(size), image, 6) <= 2
    assert levels(eval_view(size), fast_transforms.eval_view(size), image, 1) <= 2
    for interpolation in ("bicubic", "random"):
        strong = train_view(size, "none", 0.0, interpolation, reprob=0.0)
        assert levels(strong, fast_transforms.train_view(strong), image, 10) <= 6


def test_levels_would_tell_another_crop():
    strong = train_view(48, "none", 0.0, reprob=0.0)
    other = vision.Compose([lambda image: (random.random(), image)[1], *fast_transforms.train_view(strong).transforms])
    assert levels(strong, other, smooth(90, 61), 3) > 20


@pytest.mark.parametrize("flags", [{}, {"aa": "augmix-m5-w4-d2"}, {"aa": "none", "color_jitter": 0.4}])
def test_the_policy_is_pillows(flags):
    view = train_view(48, **flags)
    crop, flip, *_ = fast_transforms.train_view(view).transforms
    policy = view.transforms[2]
    assert type(policy).__name__ in ("RandAugment", "AugMixAugment", "ColorJitter")
    for seed in range(8):
        seed_everything(seed)
        seen = fast_transforms.train_view(view)(pixels(noise(90, 61)))
        seed_everything(seed)
        small = flip(crop(pixels(noise(90, 61))))
        expected = pixels(policy(Image.fromarray(small.permute(1, 2, 0).numpy())))
        assert seen.dtype == torch.uint8 and torch.equal(seen, expected)


def test_small_images_are_evaluated_as_they_are():
    image = pixels(noise(32, 32))
    assert torch.equal(fast_transforms.eval_view(32)(image), image)
    with pytest.raises(ValueError, match="--input-size 32 .*40x32"):
        fast_transforms.eval_view(32)(pixels(noise(40, 32)))


# -------------------------------------------------------------------------------- decoding


JPEGS = [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"keep_rgb": True}, {"exif": b"Exif\0\0"}]


@pytest.mark.parametrize("settings", JPEGS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_pixels_of_pillow(tmp_path, settings, mode):
    noise(61, 45).convert(mode).save(path := tmp_path / "x.jpg", **settings)
    assert decoding._jpeg(path.read_bytes()) is not None
    assert torch.equal(read_pixels(path), pixels(read_rgb(path)[0]))


@pytest.mark.parametrize("mode, name", [("CMYK", "x.jpg"), ("RGB", "x.png"), ("P", "x.png"), ("I;16", "x.png")])
def test_what_is_not_libjpegs_is_read_by_pillow(tmp_path, mode, name):
    picture = Image.new("I;16", (9, 7), 40_000) if mode == "I;16" else noise(9, 7).convert(mode)
    picture.save(path := tmp_path / name)
    assert decoding._jpeg(path.read_bytes()) is None
    assert torch.equal(read_pixels(path), pixels(read_rgb(path)[0]))


def test_what_is_broken_is_refused_in_the_same_words(tmp_path):
    for name in broken_images(tmp_path):
        with pytest.raises(UnreadableImage) as expected:
            read_rgb(tmp_path / name)
        with pytest.raises(UnreadableImage) as refusal:
            read_pixels(tmp_path / name)
        assert str(refusal.value) == str(expected.value)


def test_a_jpeg_cut_anywhere_is_read_or_refused_as_by_pillow(tmp_path):
    noise(40, 30).save(file := io.BytesIO(), "JPEG")
    path, refused = tmp_path / "cut.jpg", 0
    for end in range(0, len(file.getvalue()), 61):
        path.write_bytes(file.getvalue()[:end])
        seen = []
        for read in (lambda path: pixels(read_rgb(path)[0]), read_pixels):
            try:
                seen.append(read(path).tolist())
            except UnreadableImage as error:
                seen.append(str(error))
        assert seen[0] == seen[1]
        refused += isinstance(seen[0], str)
    assert refused > 20


def test_a_torchvision_without_libjpeg_is_refused(monkeypatch):
    check_turbo()

    def without(*_):
        raise RuntimeError("torchvision not compiled with libjpeg support")

    monkeypatch.setattr(decoding, "decode_jpeg", without)
    with pytest.raises(ValueError, match="--data-backend fast needs libjpeg-turbo"):
        check_turbo()


# -------------------------------------------------------------------------------- rectangles


def theirs(probability, side, n):
    """(erased share, top, height, left, width of each rectangle) as timm's RandomErasing draws them."""
    erase, rows = RandomErasing(probability, mode="const", max_count=1, device="cpu"), []
    random.seed(0)
    for _ in range(n):
        where = (erase(torch.ones(1, side, side)) == 0)[0]
        if where.any():
            lines = [where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]]
            rows.append([float(x) for line in lines for x in (line[0], len(line))])
    return len(rows) / n, np.array(rows)


def test_rectangles_are_distributed_as_timms():
    share, expected = theirs(0.5, 64, 4000)
    boxes = draw_rectangles(torch.Generator().manual_seed(0), 20_000, 64, 0.5, 1)[:, 0].double()
    there = boxes.any(1)
    top, bottom, left, right = boxes[there].T
    seen = torch.stack([top, bottom - top, left, right - left], 1).numpy()
    assert abs(there.double().mean().item() - share) < 0.03
    for i in range(4):
        assert abs(seen[:, i].mean() - expected[:, i].mean()) < 0.07 * expected[:, i].std() + 0.2
        quantiles = [np.quantile(x[:, i], [0.1, 0.25, 0.5, 0.75, 0.9]) for x in (seen, expected)]
        np.testing.assert_allclose(*quantiles, atol=2)
    areas = [x[:, 1] * x[:, 3] for x in (seen, expected)]
    np.testing.assert_allclose(*[np.quantile(a / 64**2, [0, 0.25, 0.5, 0.75, 1]) for a in areas], atol=0.015)
    assert np.corrcoef(seen[:, 1], seen[:, 3])[0, 1] == pytest.approx(np.corrcoef(*expected.T[[1, 3]])[0, 1], abs=0.07)
    assert seen[:, :2].sum(1).max() <= 64 and seen[:, 2:].sum(1).max() <= 64


def test_up_to_so_many_rectangles_share_the_area():
    boxes = draw_rectangles(torch.Generator().manual_seed(0), 6000, 64, 1.0, 3)
    counts = boxes.any(2).sum(1)
    assert [round((counts == n).double().mean().item(), 1) for n in (1, 2, 3)] == [0.3, 0.3, 0.3]
    areas = ((boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])).sum(1) / 64**2
    assert areas.min() > 0.01 and areas.max() < 0.36  # that of one rectangle, whatever their number


@pytest.mark.parametrize("probability, share", [(0.0, 0.0), (1.0, 1.0)])
def test_probability_of_rectangles(probability, share):
    boxes = draw_rectangles(torch.Generator().manual_seed(0), 500, 64, probability, 1)
    assert boxes.any(2).any(1).double().mean().item() == share


# -------------------------------------------------------------------------------- on the device


def batch(n=12, side=24, views=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shown = [torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator) for _ in range(views)]
    return *shown, torch.arange(n), torch.arange(n) + 100


@pytest.mark.parametrize("colours", [IMAGENET, COLOURS["CIFAR10"]])
def test_normalised_to_the_bit_as_the_pil_views(colours):
    given = batch()
    finished = DeviceFinish(0, CPU, colours)(given)
    normalise = vision.Compose([vision.ToPILImage(), vision.ToTensor(), vision.Normalize(*colours)])
    for seen, view in zip(finished[:2], given[:2]):
        assert seen.dtype == torch.float32
        assert torch.equal(seen, torch.stack([normalise(image) for image in view]))
    assert all(torch.equal(seen, one) for seen, one in zip(finished[2:], given[2:]))


def by_loop(images, boxes):
    """Which pixels a rectangle covers, and the number of the last one that does; (N, S, S), 0: none."""
    covered = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
    for i, rectangles in enumerate(boxes.tolist()):
        for number, (top, bottom, left, right) in enumerate(rectangles, 1):
            covered[i, top:bottom, left:right] = number
    return covered


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("recount", [1, 3])
def test_erased_as_by_a_loop_over_images_and_rectangles(remode, recount):
    given = batch(n=40)
    plain = DeviceFinish(5, CPU)(given)
    seen = DeviceFinish(5, CPU, reprob=0.6, remode=remode, recount=recount)(given)
    boxes = draw_rectangles(torch.Generator().manual_seed(5), 40, 24, 0.6, recount)
    covered = by_loop(given[0], boxes)
    changed = (seen[0] != plain[0]).any(1)
    assert torch.equal(changed, covered > 0) and 10 < changed.flatten(1).any(1).sum() < 35
    assert torch.equal(seen[1], plain[1])  # the weak view is not erased
    filled = []
    for i in range(40):
        for number in range(1, recount + 1):
            filled += [seen[0][i][:, covered[i] == number]] if (covered[i] == number).any() else []
    if remode == "const":
        assert all(patch.abs().max() == 0 for patch in filled)
    elif remode == "rand":
        assert all((patch == patch[:, :1]).all() and len(set(patch[:, 0].tolist())) == 3 for patch in filled)
        assert len({patch[0, 0].item() for patch in filled}) == len(filled)  # a colour a rectangle
    else:
        values = torch.cat([patch.flatten() for patch in filled])
        assert len(values.unique()) > 0.99 * len(values)
        assert abs(values.mean().item()) < 0.05 and abs(values.std().item() - 1) < 0.05


def test_the_seed_decides_and_batches_differ():
    def two(seed):
        finish = DeviceFinish(seed, CPU, reprob=0.5)
        return torch.stack([finish(batch())[0] for _ in range(2)])

    assert torch.equal(two(1), two(1))
    assert not torch.equal(two(1), two(2))
    assert not torch.equal(*two(1))


# -------------------------------------------------------------------------------- from the flags to a batch


def sets(root, *words):
    """Arguments of three JPEG classes of noise below root."""
    if not (root / "train").exists():
        for part, n in (("train", 6), ("val", 2)):
            tree(root / part, {f"class{c}": [f"{c}_{i}.jpg" for i in range(n)] for c in range(3)})
            for i, path in enumerate(sorted(root.glob(f"{part}/*/*.jpg"))):
                noise(50, 40, i).save(path)
    given = ["--data-set", "SEMI-IMNET", "--data-path", str(root), "--input-size", "48", "--data-backend", "fast"]
    return get_args_parser().parse_args([*given, *words])


def seen(args, views, workers=0, epoch=0):
    order = training_order(len(views), repeated_aug=False)
    numbers = {"seed": args.seed, "epoch": epoch, "rank": 0, "stream": 1}
    loaded = training_batches(views, order, 4, 2, **numbers, workers=workers)
    return list(to_device(loaded, CPU, views.finish, tuple(numbers.values())))


def test_batches_of_the_fast_backend(tmp_path):
    args = sets(tmp_path, "--reprob", "1", "--remode", "const")
    _, unlabelled = build_training_sets(args, True)
    strong, weak, targets, index = unlabelled[3]
    assert strong.dtype == weak.dtype == torch.uint8 and strong.shape == weak.shape == (3, 48, 48)
    first, second = seen(args, unlabelled, workers=2)
    assert [tuple(x.shape) for x in first] == [(4, 3, 48, 48), (4, 3, 48, 48), (4,), (4,)]
    assert first[0].dtype == first[1].dtype == torch.float32
    assert all((image == 0).all(0).any() for image in first[0])  # erased
    again = seen(args, unlabelled, workers=2)
    assert all(torch.equal(a, b) for a, b in zip((*first, *second), (*again[0], *again[1])))
    assert not torch.equal(first[0], seen(args, unlabelled, workers=2, epoch=1)[0][0])


def test_evaluation_of_the_fast_backend_is_that_of_pil_but_for_levels(tmp_path):
    fast = build_validation_set(sets(tmp_path, "--reprob", "1"))
    pil = build_validation_set(sets(tmp_path, "--data-backend", "pil"))
    assert pil.finish is None
    image, target, index = fast[4]
    (finished, *_) = fast.finish(0, CPU)((image[None], torch.tensor([target]), torch.tensor([index])))
    assert (finished[0] - pil[4][0]).abs().max() <= 2 / 255 / 0.224 + 1e-6
    assert (target, index) == pil[4][1:]


def test_an_unreadable_jpeg_is_replaced(tmp_path):
    args = sets(tmp_path, "--max-bad-images", "1")
    broken = sorted(tmp_path.glob("train/*/*.jpg"))[2]
    broken.write_bytes(broken.read_bytes()[:-300])
    labelled, _ = build_training_sets(args, False)
    assert [labelled[i][-1] for i in range(4)] == [0, 1, 3, 3]


def test_arrays_have_nothing_to_decode(tmp_path):
    draw(tmp_path / "x.png")
    for name in COLOURS:
        for build in (lambda args: build_training_sets(args, True), build_validation_set):
            with pytest.raises(ValueError, match=f"--data-backend fast means nothing to --data-set {name}"):
                build(sets(tmp_path, "--data-set", name))
