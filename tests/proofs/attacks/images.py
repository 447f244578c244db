"""Attacks through images, their names and their folders: in training, predict.py, check_images and show_views."""

import os
import struct
import zlib

from PIL import Image

from tests.proofs.attacks.sandbox import DONE, EITHER, REFUSED, REPORTED, add_run, cases, command, train
from tests.trees import broken_images, draw, special_files

IMAGE = "data/train/class0/c0_0.png"
# Every image once, as a labelled one, or as an unlabelled one too.
READ = "--supervise-only --steps-per-epoch 0 --data-split-file None --max-bad-images 9".split()
WEAK = "--steps-per-epoch 6 --data-split-file None --max-bad-images 9".split()


def _kmsg(path):
    path.symlink_to("/proc/kmsg")


def _pixels(path):
    Image.new("1", (13_000, 13_000)).save(path)


def _long(path):
    Image.new("L", (1, 1000)).save(path)


def _narrow(path):
    Image.new("L", (1, 60_000)).save(path)


def _inflating(path):
    """A PNG whose compressed text is 256 MB of blanks."""
    draw(path)
    text = b"zTXta\0\0" + zlib.compress(b" " * 2**28)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path.write_bytes(path.read_bytes()[:33] + chunk + path.read_bytes()[33:])


def _animated(path):
    frames = [Image.new("L", (40, 40), i) for i in range(200)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def _postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n")


OWN = {"kmsg": _kmsg, "pixels": _pixels, "long": _long, "narrow": _narrow, "inflating": _inflating,
       "animated": _animated, "postscript": _postscript}  # fmt: skip


def make(kind, path):
    """Replace a file by one of OWN, tests.trees.special_files or tests.trees.broken_images."""
    path.unlink(missing_ok=True)
    if kind in OWN:
        OWN[kind](path)
        return
    folder = path.parent / f".kinds {kind}"  # hidden
    folder.mkdir()
    (special_files if "." not in kind else broken_images)(folder)
    (folder / (kind if "." in kind else f"{kind}.jpg")).rename(path)


def training(kind, *words, read=READ):
    """Prepare such a file among the images to train with."""

    def prepare(box):
        make(kind, box / IMAGE)
        return train(*read, *words)

    return prepare


def evaluated(kind, *words):
    """Prepare such a file among the images to evaluate."""

    def prepare(box):
        make(kind, box / "data/val/class0/c0_0.png")
        return train(*words)

    return prepare


def predicted(*kinds):
    """Prepare such files and classify them, each named on the command line."""

    def prepare(box):
        add_run(box, "run", "checkpoint.pth")
        for kind in kinds:
            make(kind, box / "data" / f"{kind}.png")
        names = [f"data/{kind}.png" for kind in kinds]
        return command("predict.py", IMAGE, *names, "--checkpoint", "run/checkpoint.pth", "--output", "out/a.csv")

    return lambda box: (box / "out").mkdir() or prepare(box)


def checked(*kinds):
    """Prepare such files and check them."""

    def prepare(box):
        for i, kind in enumerate(kinds):
            make(kind, box / f"data/train/class{i % 3}/{kind}.png")
        return command("script.check_images", "data/train", "--workers", 2)

    return prepare


def shown(*words, prepare=lambda box: None):
    """Prepare a sandbox and draw views of its images."""

    def prepared(box):
        prepare(box)
        flags = "--data-set SEMI-IMNET --data-path data --input-size 48 --images 3 --output out/views.png".split()
        (box / "out").mkdir()
        return command("script.show_views", *flags, *words)

    return prepared


def arranged(prepare, program=None):
    """Let a function arrange the files, then train on them, or run another program as it says."""

    def prepared(box):
        prepare(box)
        return program(box) if program else train(*READ)

    return prepared


def _check_words(box):
    return command("script.check_images", "data/train", "--workers", 1, "--output", "out.txt", may_write=("out.txt",))


def _predict_words(box):
    add_run(box, "run", "checkpoint.pth")
    return command("predict.py", "data/train", "--checkpoint", "run/checkpoint.pth", "--format", "json")


def _named(*names):
    def rename(box):
        for i, name in enumerate(names):
            (box / f"data/train/class{i}/c{i}_0.png").rename(box / f"data/train/class{i}/{name}.png")
            draw(box / f"data/train/class{i}/broken {name}.png").write_bytes(b"")

    return rename


HOSTILE_NAMES = _named("a\nb", "\x1b[31m\x1b]0;x\x07", os.fsdecode(b"caf\xe9"))


def _class_called(name):
    def rename(box):
        for part in ("train", "val"):
            (box / "data" / part / "class1").rename(box / "data" / part / name)

    return rename


def _circles(box):
    for path, target in (("up", ".."), ("class0/up", "../.."), ("class1/self", "."), ("class2/other", "../class1")):
        (box / "data/train" / path).symlink_to(target)
    (box / "data/train/class0/root").symlink_to("/dev")


def _circles_in_classes(box):
    (box / "data/train/class0/self").symlink_to("."), (box / "data/train/class1/other").symlink_to("../class2")


def _deep(box):
    folder = box / "data/train/class0"
    for _ in range(150):
        folder /= "ten letters"
    folder.mkdir(parents=True)
    draw(folder / "a.png")


def _no_folder(box):
    (box / "data/train").rename(box / "data/other")
    os.mkfifo(box / "data/train")


def _other_kind(box):
    for path in (box / "data/train/class0").iterdir():
        path.rename(path.with_suffix(".heic"))


STANDS_IN, NO_STAND_IN = "stands in for it", "evaluation replaces no image: mend or remove"
UNREADABLE = {
    "fifo": "not a regular file", "socket": "No such device", "dev_zero": "not a regular file",
    "dev_ptmx": "not a regular file", "proc_self_mem": "Input/output", "huge": "larger than", "kmsg": "",
    "bomb.bmp": "bomb", "cut.png": "truncated", "empty.JPEG": "it is empty", "text.JPEG": "not an image",
    "dangling.JPEG": "No such file", "postscript": "PostScript", "inflating": "large",
    "narrow": "too long and narrow",
}  # fmt: skip
CASES = cases(
    "images",
    *((f"{kind}, to train with", training(kind), DONE, f"{words}.*; .*{STANDS_IN}")
      for kind, words in UNREADABLE.items()),
    *((f"{kind}, to evaluate", evaluated(kind), REFUSED, NO_STAND_IN)
      for kind in ("fifo", "dev_zero", "kmsg", "cut.png", "empty.JPEG", "inflating", "narrow")),
    *((f"{kind}, to train with, fast", training(kind, "--data-backend", "fast"), DONE, STANDS_IN)
      for kind in ("fifo", "dev_ptmx", "cut.JPEG", "bomb.bmp", "narrow")),
    ("169 million pixels", training("pixels"), DONE, "Trained in"),
    ("1 x 1,000 pixels, a weak view at 224", training("long", "--input-size", 224, read=WEAK), DONE, "Trained"),
    ("a GIF of 200 frames", training("animated"), DONE, "Trained in"),
    ("workers read a FIFO", training("fifo", "--num_workers", 2), DONE, STANDS_IN),
    ("more than allowed", training("fifo", "--max-bad-images", 0), REFUSED, "script.check_images finds all"),
    *((f"{kind}, predict.py", predicted(kind), REPORTED, f"predict.py: Cannot read the image .*{kind}")
      for kind in ("fifo", "socket", "dev_zero", "dev_ptmx", "kmsg", "bomb.bmp", "cut.png", "narrow")),
    ("all kinds, check_images", checked(*UNREADABLE), REPORTED, r"15  unreadable"),
    ("a FIFO, show_views", shown(prepare=lambda box: make("fifo", box / IMAGE)), EITHER),
    ("names with newline, escape and no UTF-8", arranged(HOSTILE_NAMES), DONE, r"broken a\\nb.png"),
    ("such names, check_images", arranged(HOSTILE_NAMES, _check_words), REPORTED, r"broken \\x1b\[31m"),
    ("such names, predict.py", arranged(HOSTILE_NAMES, _predict_words), REPORTED, r"broken caf\\xe9"),
    ("such names, make_split", arranged(HOSTILE_NAMES, lambda box: command(
        "data_splits.make_split", "data/train", "out", "--fraction", 0.5)), REFUSED, "No list can hold"),
    ("such names, show_views", shown("--images", 12, prepare=HOSTILE_NAMES), EITHER),
    ("a class that is not UTF-8", arranged(_class_called(os.fsdecode(b"\xe9"))), REFUSED, "not UTF-8: rename"),
    ("a class with a newline", arranged(_class_called("a\n\x1b[2Jb")), DONE, "Trained in"),
    ("a class that is a link to its parent", arranged(_circles), REFUSED, "is a link to a folder that"),
    ("links in a circle", arranged(_circles_in_classes), DONE, "Trained in"),
    ("links in a circle, check_images", arranged(_circles, _check_words)),
    ("links in a circle, predict.py", arranged(_circles_in_classes, _predict_words), DONE),
    ("150 folders in each other", arranged(_deep), DONE, "Trained in"),
    ("train/ is a FIFO", arranged(_no_folder), REFUSED, "There is no folder"),
    ("pictures of another kind", arranged(_other_kind), REFUSED, "holds no images but 4 .heic"),
)  # fmt: skip
