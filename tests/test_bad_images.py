"""Broken images: what can be read is read, the rest is replaced, named and counted, and too many end the run."""

import argparse
import errno
import itertools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import semi_main as program
from datasets import MultiViewDataset
from images import decoding, files
from images.bad_images import tolerated
from images.decoding import UnreadableImage, read_pixels, read_rgb
from images.loading import evaluation_loader, read_batches, to_device
from images.readers import FileSource, Samples
from options import get_args_parser
from samplers import training_order
from tests.trees import (
    FORKSERVER,
    SMALL,
    broken_images,
    draw,
    make_tree,
    semi_main,
    special_files,
    training_batches,
)
from utils import printable_path

torch.set_num_threads(1)


# -------------------------------------------------------------------------------- one file


def saved(path, pixels, **how):
    """An image file of these pixels; returns its path."""
    Image.fromarray(np.asarray(pixels)).save(path, **how)
    return path


def first_row(path):
    """The first row of an image's pixels, one of the three equal channels."""
    pixels = np.asarray(read_rgb(path)[0])
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


SIXTEEN = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)


def test_sixteen_bits_become_eight_by_their_upper_byte(tmp_path):
    upper = [0, 0, 1, 3, 128, 255]
    for name in ("x.png", "x.tif"):
        assert read_rgb(saved(tmp_path / name, SIXTEEN))[1] == "I;16"
        assert first_row(tmp_path / name) == upper
    (tmp_path / "big_endian.tif").write_bytes(
        b"MM\0*\0\0\0\x08\0\x08"
        + b"".join(
            tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + value
            for tag, kind, value in [
                (256, 3, b"\0\6\0\0"), (257, 3, b"\0\1\0\0"), (258, 3, b"\0\x10\0\0"), (259, 3, b"\0\1\0\0"),
                (262, 3, b"\0\1\0\0"), (273, 4, (110).to_bytes(4, "big")), (278, 3, b"\0\1\0\0"),
                (279, 4, (12).to_bytes(4, "big"))]  # fmt: skip
        )
        + bytes(4) + SIXTEEN.astype(">u2").tobytes())  # fmt: skip
    assert read_rgb(tmp_path / "big_endian.tif")[1] == "I;16B"
    assert first_row(tmp_path / "big_endian.tif") == upper
    (tmp_path / "x.pgm").write_bytes(b"P5 6 1 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert read_rgb(tmp_path / "x.pgm")[1] == "I" and first_row(tmp_path / "x.pgm") == upper
    # Pillow itself takes the upper byte of 16-bit colour.
    (tmp_path / "x.ppm").write_bytes(b"P6 2 1 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert np.abs(np.asarray(read_rgb(tmp_path / "x.ppm")[0]).ravel().astype(int) - upper).max() <= 1


def test_numbers_beyond_sixteen_bits_and_floats_are_cut(tmp_path):
    saved(tmp_path / "i.tif", np.array([[-5, 0, 65535, 2**30]], np.int32))
    saved(tmp_path / "f.tif", np.array([[-5, 0, 99.9, 1e9]], np.float32))
    assert first_row(tmp_path / "i.tif") == [0, 0, 255, 255]
    assert first_row(tmp_path / "f.tif") == [0, 0, 99, 255]


def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path):
    saved(tmp_path / "rgba.png", np.array([[[9, 8, 7, 0], [1, 2, 3, 255]]], np.uint8))
    assert np.asarray(read_rgb(tmp_path / "rgba.png")[0]).tolist() == [[[9, 8, 7], [1, 2, 3]]]
    saved(tmp_path / "la.png", np.array([[[9, 0], [1, 255]]], np.uint8))
    assert read_rgb(tmp_path / "la.png")[1] == "LA" and first_row(tmp_path / "la.png") == [9, 1]
    saved(tmp_path / "bits.png", np.array([[True, False]]))
    assert read_rgb(tmp_path / "bits.png")[1] == "1" and first_row(tmp_path / "bits.png") == [255, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    for name, how in (("p.png", {}), ("one.png", {"transparency": 0}), ("many.png", {"transparency": b"\0\x80"})):
        palette.save(tmp_path / name, **how)
        image, mode = read_rgb(tmp_path / name)  # any warning, as Pillow's of the last, is an error below
        assert mode == "P" and np.asarray(image).tolist() == [[[9, 8, 7], [1, 2, 3]]]


@pytest.mark.filterwarnings("error")
def test_no_warning_passes(tmp_path, monkeypatch):
    test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path)
    draw(tmp_path / "large.png", size=(30, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    assert read_rgb(tmp_path / "large.png")[0].size == (30, 10)  # 300 pixels: a warning of Pillow's, no more
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149)
    with pytest.raises(UnreadableImage, match="large.png: .*300 pixels.* exceeds limit of 298 pixels"):
        read_rgb(tmp_path / "large.png")


def test_the_name_does_not_matter_and_orientation_is_ignored(tmp_path):
    draw(tmp_path / "x.png").rename(tmp_path / "x.JPEG")
    assert read_rgb(tmp_path / "x.JPEG")[0].getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (12, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg")[0].size == (12, 10)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_that_no_view_can_resize_is_unreadable(tmp_path, suffix):
    """At 224 pixels a view would make 256 x 15,360,000 of one that is 1 x 60,000, which are 12 GB."""
    for number, size in enumerate([(1, 1001), (1001, 1), (3, 60_000)]):
        draw(tmp_path / f"{number}{suffix}", size=size)
        for read in (read_rgb, read_pixels):
            with pytest.raises(UnreadableImage, match=rf"it has {size[0]} x {size[1]} pixels, too long and narrow for"):
                read(tmp_path / f"{number}{suffix}")
    draw(tmp_path / f"long{suffix}", size=(1, 1000))
    assert read_rgb(tmp_path / f"long{suffix}")[0].size == (1, 1000)
    assert read_pixels(tmp_path / f"long{suffix}").shape == (3, 1000, 1)


def warned_of(path, told):
    """Write down the warnings that an image gives when it is cropped as in a view, with the filters of a program."""
    with warnings.catch_warnings(record=True) as given:
        read_rgb(path)[0].crop((0, 0, 9999, 9999))
    Path(told).write_text("\n".join(str(each.message) for each in given))


def test_views_of_a_large_image_give_no_warning(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    process = FORKSERVER.Process(target=warned_of, args=(tmp_path / "large.png", tmp_path / "told"))
    process.start(), process.join()
    assert (tmp_path / "told").read_text() == ""


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.JPEG")
    with pytest.raises(UnreadableImage, match="x.JPEG: it is PostScript"):
        read_rgb(tmp_path / "x.JPEG")


def test_every_broken_kind_is_one_sentence_that_names_the_file(tmp_path):
    kinds = broken_images(tmp_path)
    assert len(kinds) == 9
    for name, words in kinds.items():
        with pytest.raises(UnreadableImage) as refusal:
            read_rgb(tmp_path / name)
        text = str(refusal.value)
        assert (
            text.startswith(f"Cannot read the image {tmp_path / name}: ") and "\n" not in text and " at 0x" not in text
        )
        assert words in text


@pytest.mark.parametrize("number, replaced", [
    (errno.EACCES, True), (errno.EIO, True), (errno.EMFILE, False), (errno.ENOMEM, False), (errno.ESTALE, False)
])  # fmt: skip
def test_only_what_is_wrong_with_the_file_makes_it_unreadable(tmp_path, monkeypatch, number, replaced):
    draw(tmp_path / "x.png")

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "open", fails)
    with pytest.raises(OSError, match=os.strerror(number)) as refusal:
        read_rgb(tmp_path / "x.png")
    assert isinstance(refusal.value, UnreadableImage) is replaced


REGULAR = [b"", b"x", b"\0" * 65_535, bytes(range(256)) * 700]


@pytest.mark.parametrize("content", REGULAR, ids=len)
def test_a_regular_file_is_read_whole(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert files.read_regular(tmp_path / "x") == content


def test_a_file_that_hides_its_size_is_read_up_to_the_limit(tmp_path, monkeypatch):
    told = os.stat("/proc/self/status")
    assert told.st_size == 0 and files.read_regular("/proc/self/status").startswith(b"Name:")
    (tmp_path / "x").write_bytes(bytes(300_000))
    asked, read = [], os.read
    monkeypatch.setattr(files.os, "fstat", lambda descriptor: told)  # the size 0 of a file that has no end
    monkeypatch.setattr(files.os, "read", lambda descriptor, n: asked.append(n) or read(descriptor, n))
    assert len(files.read_regular(tmp_path / "x")) == 300_000
    asked.clear()
    monkeypatch.setattr(files, "MAX_BYTES", 299_999)
    with pytest.raises(OSError, match="it is larger than 299,999 bytes"):
        files.read_regular(tmp_path / "x")
    assert sum(asked) == 300_000


def test_what_is_no_regular_file_is_unreadable_and_does_not_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in special_files(tmp_path).items():
        for read in (read_rgb, read_pixels):
            with pytest.raises(UnreadableImage, match=f"^Cannot read the image {tmp_path / name}: .*{words}"):
                read(tmp_path / name)


def test_names_are_printed_in_one_line_of_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \x1b[31m\n\xc3\xa9.png")
    with pytest.raises(UnreadableImage) as refusal:
        read_rgb(tmp_path / name)
    assert str(refusal.value) == rf"Cannot read the image {tmp_path}/caf\xe9 \x1b[31m\né.png: No such file or directory"
    assert [printable_path(text) for text in ("a\u2028b", "日本 🐈\\n", "\ud800")] == [
        r"a\u2028b", "日本 🐈\\n", r"\ud800"]  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_memory_and_interrupts_pass_through(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(decoding.Image, "open", fails)
    with pytest.raises(error):
        read_rgb(draw(tmp_path / "x.png"))


# -------------------------------------------------------------------------------- what stands in


class Numbers:
    """Images that are their own index; some cannot be read."""

    def __init__(self, n, broken=(), error=UnreadableImage):
        self.root, self.n, self.broken, self.error = "ROOT", n, set(broken), error

    def __len__(self):
        return self.n

    def path(self, i):
        return f"{i}.jpg"

    def load(self, i):
        if i in self.broken:
            raise self.error(f"Cannot read the image {self.path(i)}: it is broken")
        return torch.tensor(float(i))


def unchanged(image):
    return image


def numbers(n=10, broken=(), indices=None, *, tolerated=10, views=1, error=UnreadableImage):
    """Views of `Numbers` whose target is ten times the index."""
    samples = Samples(Numbers(n, broken, error), 10 * np.arange(n), ())
    indices = range(n) if indices is None else indices
    return MultiViewDataset(samples, indices, *[unchanged] * views, tolerated=tolerated)


@pytest.mark.parametrize("broken, given", [
    (set(), [7, 3, 5, 1]), ({3}, [7, 5, 5, 1]), ({3, 5}, [7, 1, 1, 1]), ({1}, [7, 3, 5, 7]), ({1, 7}, [3, 3, 5, 3]),
    ({0, 2, 4}, [7, 3, 5, 1]), ({7, 3, 5}, [1, 1, 1, 1]),
])  # fmt: skip
@pytest.mark.parametrize("views", [1, 2])
def test_the_next_readable_image_of_the_same_list_stands_in(broken, given, views):
    data = numbers(10, broken, [7, 3, 5, 1], views=views)
    for _ in range(2):
        seen = [data[i] for i in range(4)]
        assert seen == [(*[index] * views, 10 * index, index) for index in given]
    for i in range(4):
        item, found = data.load(i)
        between = itertools.takewhile(given[i].__ne__, [7, 3, 5, 1] * 2 if i == 0 else ([7, 3, 5, 1] * 2)[i:])
        assert item == seen[i] and found == [(k, f"Cannot read the image {k}.jpg: it is broken") for k in between]


def test_only_unreadable_images_end_in_words_not_in_a_circle():
    with pytest.raises(UnreadableImage, match="^None of the 5 images in ROOT can be read.$"):
        numbers(5, range(5))[3]
    with pytest.raises(UnreadableImage, match="^At least 3 of 1000 images in ROOT cannot be read and --max-bad-images "
                       r"allows 2 \(a share allows 5 at least\): 3.jpg, 4.jpg, 5.jpg; python -m script.check_images "
                       "finds all.$"):  # fmt: skip
        numbers(1000, range(1000), tolerated=2)[3]
    with pytest.raises(UnreadableImage, match=r"^At least 1 .* allows 0 \(.*\): 3.jpg; "):
        numbers(5, {3}, tolerated=0)[3]


def test_evaluation_replaces_nothing():
    data = numbers(5, {3}, tolerated=None)
    assert data[2][-1] == 2
    with pytest.raises(UnreadableImage, match="^Cannot read the image 3.jpg: it is broken; evaluation replaces no"):
        data[3]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, OSError, ValueError])
def test_other_errors_are_not_swallowed(error):
    with pytest.raises(error, match="it is broken"):
        numbers(5, {3}, error=error)[3]


# -------------------------------------------------------------------------------- through the loaders


def epoch(data, workers=0, batch=4, steps=3, epoch=0):
    """Indices of one epoch's batches, repeated augmentation off."""
    loaded = training_batches(data, training_order(len(data)), batch, steps, epoch=epoch, workers=workers)
    batches = list(to_device(loaded, torch.device("cpu")))
    assert len(batches) == steps
    for *views, targets, indices in batches:
        assert all(view.tolist() == indices.tolist() for view in views) and torch.equal(targets, 10 * indices)
    return [batch[-1].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_with_broken_images(workers, capsys):
    whole = epoch(numbers(12), workers)
    capsys.readouterr()
    data = numbers(12, {3, 4, 11})
    stand_in = {3: 5, 4: 5, 11: 0}
    expected = [[stand_in.get(index, index) for index in batch] for batch in whole]
    assert [epoch(data, workers) for _ in range(2)] == [expected] * 2
    told = capsys.readouterr().out.splitlines()
    words = "it is broken; the next readable image stands in for it."
    assert sorted(told) == [f"[rank 0] Cannot read the image {i}.jpg: {words}" for i in (11, 3, 4)]  # each once
    assert data.bad_images.end_epoch() == 3
    assert epoch(data, workers) == expected and capsys.readouterr().out == ""  # printed before
    assert [data.bad_images.end_epoch(), data.bad_images.end_epoch()] == [3, 0]
    assert data.bad_images.known == {3, 4, 11}


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_tolerated_over_several_steps_end_the_run(workers):
    assert len(epoch(numbers(12, {1, 5, 9}, tolerated=3), workers)) == 3
    with pytest.raises(UnreadableImage) as refusal:
        epoch(numbers(12, {1, 5, 9}, tolerated=2), workers)
    assert str(refusal.value) == ("At least 3 of 12 images in ROOT cannot be read and --max-bad-images allows 2 "
                                  "(a share allows 5 at least): 1.jpg, 5.jpg, 9.jpg; "
                                  "python -m script.check_images finds all.")  # fmt: skip


def test_other_processes_images_count_at_the_end_of_the_epoch(monkeypatch):
    bad = numbers(12, {1, 5, 9}, tolerated=2).bad_images
    bad.met = {1}
    monkeypatch.setattr("images.bad_images.gather", lambda met: [met, {5}])
    assert bad.end_epoch() == 2 and bad.known == {1, 5} and bad.met == set()
    monkeypatch.setattr("images.bad_images.gather", lambda met: [met, {9}])
    with pytest.raises(UnreadableImage, match="At least 3 of 12 .*: 1.jpg, 5.jpg, 9.jpg; "):
        bad.end_epoch()


def test_the_count_of_a_checkpoint_goes_on(capsys):
    data = numbers(12, {1, 5, 9}, tolerated=2)
    data.bad_images.restore([5, 9, 12, 40])  # a shorter list has no image 12
    assert data.bad_images.known == {5, 9}
    with pytest.raises(UnreadableImage, match="At least 3 of 12 .*: 1.jpg, 5.jpg, 9.jpg; "):
        epoch(data)
    assert capsys.readouterr().out.count("stands in for it") == 1  # the other two were printed before the resume


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_error_is_one_sentence(workers):
    loader = evaluation_loader(numbers(5, {3}, tolerated=None), 2, world=1, rank=0, num_workers=workers,
                               pin_memory=False)  # fmt: skip
    with pytest.raises(UnreadableImage) as refusal:
        list(read_batches(loader))
    assert str(refusal.value) == ("Cannot read the image 3.jpg: it is broken; evaluation replaces no image: mend or "
                                  "remove this one.")  # fmt: skip


def test_shares_and_numbers_of_tolerated_images():
    # The default, a share, allows a handful in every list.
    assert [tolerated(0.001, n) for n in (4, 471, 5000, 6000, 128_116, 1_281_167)] == [5, 5, 5, 6, 128, 1281]
    assert [tolerated(limit, 100) for limit in (0, 0.29, 1.0, 7.0)] == [0, 29, 1, 7]


# -------------------------------------------------------------------------------- whole runs

RUN = [*SMALL, "--model", "resnet10t", "--input-size", "48", "--batch-size", "6", "--mu", "0.34", "--epochs", "2",
       "--drop-path", "0", "--warmup-epochs", "0", "--max-bad-images", "2"]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """Twelve labelled among 30 train images; two of the labelled ones are broken."""
    root = make_tree(tmp_path / "tree", train=10, labelled=4, val=2)
    (root / "train" / "class1" / "c1_2.png").write_bytes(b"")
    (root / "train" / "class2" / "c2_0.png").write_text("404 Not Found")
    return root


def run(tree, *words):
    data = ["--data-path", tree, "--data-split-file", tree / "labelled.txt"]
    program.main(argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([*map(str, [*RUN, *data, *words])]))


def records(folder):
    """The lines of a log.txt but for times."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_run_goes_on_tells_and_is_the_same_after_a_resume(tree, tmp_path, capsys):
    run(tree, "--output_dir", tmp_path / "whole", "--num_workers", "2")
    told = capsys.readouterr().out
    for name, why in (("c1_2.png", "it is empty"), ("c2_0.png", "it is not an image that Pillow knows")):
        assert told.count(f"{name}: {why}; the next readable image stands in for it.") == 2  # of both sets
    assert "Unreadable images in this epoch: 4." in told
    run(tree, "--output_dir", tmp_path / "half", "--epochs", "1")
    run(tree, "--output_dir", tmp_path / "half", "--resume", tmp_path / "half" / "checkpoint.pth")
    whole, half = records(tmp_path / "whole"), records(tmp_path / "half")
    assert [record["train_bad_images"] for record in whole] == [record["train_bad_images"] for record in half]
    assert whole[0]["train_bad_images"] == 4


def test_too_many_end_the_program_with_one_sentence(tree):
    done = semi_main(*RUN, "--data-path", tree, "--data-split-file", tree / "labelled.txt", "--max-bad-images", "0",
                     "--num_workers", "2", check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("semi_main.py: error: At least 1 of 12 images in ")
    assert "Traceback" not in done.stderr and "script.check_images" in done.stderr


def test_a_broken_validation_image_ends_the_program_with_one_sentence(tree):
    broken = tree / "val" / "class1" / "c1_1.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    done = semi_main(*RUN, "--data-path", tree, "--data-split-file", tree / "labelled.txt", "--epochs", "1",
                     "--num_workers", "1", check=False)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"semi_main.py: error: Cannot read the image {broken}: ") and "mend or remove" in last


def test_two_processes_name_their_broken_images(tree, tmp_path):
    done = semi_main(*RUN, "--data-path", tree, "--data-split-file", tree / "labelled.txt", "--output_dir",
                     tmp_path / "out", processes=2)  # fmt: skip
    told = [line for line in done.stdout.splitlines() if "stands in for it" in line]
    assert {line.split(":")[0].split()[-1].rsplit("/", 1)[-1] for line in told} == {"c1_2.png", "c2_0.png"}
    assert all(line.startswith("[rank ") for line in told)
    counted = [record["train_bad_images"] for record in records(tmp_path / "out")]
    assert len(counted) == 2 and max(counted) <= 4 and sum(counted) >= 2


def test_a_source_of_files_takes_part(tmp_path):
    draw(tmp_path / "a.png"), (tmp_path / "b.JPEG").mkdir(), (tmp_path / "c.JPEG").symlink_to("nowhere")
    samples = Samples(FileSource(tmp_path, ["a.png", "b.JPEG", "c.JPEG"]), np.arange(3), ())
    data = MultiViewDataset(samples, [1, 2, 0], lambda image: image.getpixel((0, 0)), tolerated=2)
    assert [data[i] for i in range(3)] == [((10, 20, 30), 0, 0)] * 3
