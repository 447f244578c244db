"""Small real image trees and ways to start the program, for the tests."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from images.fashion import write_idx

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "Semiformer_micro_patch16", "--input-size", "48", "--device", "cpu", "--num_workers", "0",
         "--mixup", "0", "--cutmix", "0", "--no-repeated-aug", "--data-set", "SEMI-IMNET"]  # fmt: skip


def draw(path, colour=(10, 20, 30), mode="RGB", size=(12, 10)):
    """A one-colour image file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "TIFF" if mode == "CMYK" and path.suffix.lower() == ".tif" else None
    image = Image.new("RGB", size, colour)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path, kind)
    return path


def tree(root, classes):
    """{class: file names} as one-colour JPEG files; the red value counts the files."""
    count = 0
    for name, files in classes.items():
        for file in files:
            draw(root / name / file, (count, 0, 0))
            count += 1
    return root


def paths(samples):
    """The relative path of every image."""
    return [samples.source.path(i) for i in range(len(samples))]


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote at protocol 2: strings as bytes, numpy by its old name (see `python2`)."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        """A `str` of Python 2."""
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python2(path, content):
    """Pickle `content` into a file, in the format of CIFAR's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Python2(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))


def make_cifar(root, name, train=(4, 4, 4, 4, 4), test=4, classes=("cat", "dog"), seed=0):
    """CIFAR in its own format, of noise: images a batch; targets go round the classes. Returns {file: (N, 3072)}."""
    rng, ten = np.random.default_rng(seed), name == "CIFAR10"
    folder = Path(root, "cifar-10-batches-py" if ten else "cifar-100-python")
    sizes = {f"data_batch_{i + 1}": n for i, n in enumerate(train)} if ten else {"train": sum(train)}
    written = {}
    for file, n in {**sizes, "test_batch" if ten else "test": test}.items():
        written[file] = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [i % len(classes) for i in range(n)]
        filenames = [f"{i}.png" for i in range(n)]
        keys = {"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": [0] * n}
        python2(folder / file, {"data": written[file], "filenames": filenames, "batch_label": file, **keys})
    names = {"label_names": list(classes)} if ten else {"fine_label_names": list(classes), "coarse_label_names": ["x"]}
    python2(folder / ("batches.meta" if ten else "meta"), names)
    return written


def make_fashion(root, train=40, test=6, seed=0):
    """A set in Fashion-MNIST's format, of noise, with its own SHA256SUMS; classes go round. Returns train's targets."""
    rng = np.random.default_rng(seed)
    for prefix, n in (("train", train), ("t10k", test)):
        write_idx(root, f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(root, f"{prefix}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return [i % 10 for i in range(train)]


def make_inat(root, year, train=((2, 7), (0, 8), (2, 9), (1, 10)), val=((0, 11), (1, 12), (2, 13))):
    """iNaturalist in its own format: pairs (category, image id). Categories 0 and 1 share genus and kingdom."""
    kinds = [
        ("Bufo bufo", "Bufo", "Animalia"),
        ("Bufo viridis", "Bufo", "Animalia"),
        ("Acer rubrum", "Acer", "Plantae"),
    ]
    entries = [{"id": i, "name": n, "genus": g, "kingdom": k} for i, (n, g, k) in enumerate(kinds)]
    Path(root, "categories.json").write_text(json.dumps(entries))
    for part, pairs in (("train", train), ("val", val)):
        images = [{"id": i, "file_name": f"train_val{year}/Group/{c}/{i}.jpg"} for c, i in pairs]
        annotations = [{"id": 100 + i, "image_id": i, "category_id": c} for c, i in pairs]
        content = {"info": {}, "images": images, "annotations": annotations}
        Path(root, f"{part}{year}.json").write_text(json.dumps(content))
        for c, i in pairs:
            draw(Path(root, f"train_val{year}", str(c), f"{i}.jpg"), (i, 0, 0))


def make_list(path, root, lines):
    """A list of images, each drawn below `root`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    for line in lines:
        draw(Path(root, line.replace(",", " ").split()[0]))


def make_places(root, lists, prefix="", train=2, unlabelled=3, val=2):
    """Places205's lists: images of class 0, 1, 0, ... and an unlabelled list without classes."""
    parts = (("ltrain", train, "{}/{}.jpg {}"), ("utrain", unlabelled, "u/{1}.jpg"))
    for part, n, line in parts:
        make_list(Path(lists, f"{prefix}semi_{part}.txt"), root, [line.format("ab"[i % 2], i, i % 2) for i in range(n)])
    make_list(Path(lists, "semi_val.txt"), root, [f"val/{i}.jpg {i % 2}" for i in range(val)])


def make_semi_inat(root, train=(0, 2), val=(0, 1, 3)):
    """Semi-iNat's lists with these targets, and an unlabelled list of three images."""
    for part, lines in (
        ("train", [f"l_train/{i}.jpg,{c}" for i, c in enumerate(train)]),
        ("unlabel", ["u_train/0.jpg,-1", "u_train/1.jpg", "l_train/0.jpg,0"]),
        ("val", [f"val/{i}.jpg,{c}" for i, c in enumerate(val)]),
    ):
        make_list(Path(root, "semi_list", f"semi-{part}.txt"), Path(root, "data"), lines)


def make_tree(root, classes=3, train=8, val=5, labelled=4, size=40, seed=0):
    """An ImageNet-layout tree of PNG noise with a colour a class, and `labelled.txt`; returns the root."""
    rng = np.random.default_rng(seed)
    lines = []
    for part, count in (("train", train), ("val", val)):
        for c in range(classes):
            folder = Path(root, part, f"class{c}")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (size, size + 8, 3)) + 50 * np.eye(3, dtype=int)[c % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"c{c}_{i}.png")
            if part == "train":
                lines += [f"c{c}_{i}.png,0,{i}\n" for i in range(labelled)]
    Path(root, "labelled.txt").write_text("".join(lines))
    return Path(root)


def semi_main(*words, processes=0, env=None, check=True, timeout=300):
    """Run semi_main.py as a user would: plainly, or with `processes` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "semi_main.py"), *map(str, words)],
                          capture_output=True, text=True, timeout=timeout, env=environment)  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def broken_images(root):
    """A file of every kind that cannot be read: {name: words of the reason}."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    kinds = {
        "cut.JPEG": (lambda content: content[:-200], "truncated"),
        "cut.png": (lambda content: content[:-60], "truncated"),
        "half.webp": (lambda content: content[: len(content) // 2], ""),
        "empty.JPEG": (lambda content: b"", "it is empty"),
        "text.JPEG": (lambda content: b"404 Not Found", "it is not an image that Pillow knows"),
        "bomb.bmp": (lambda content: content[:18] + (60_000).to_bytes(4, "little") * 2 + content[26:], "bomb"),
    }
    for name, (spoil, _) in kinds.items():
        path = Path(root, name)
        noise.save(path)
        path.write_bytes(spoil(path.read_bytes()))
    Path(root, "folder.JPEG").mkdir()
    Path(root, "dangling.JPEG").symlink_to("nowhere")
    Path(root, "loop.JPEG").symlink_to("loop.JPEG")
    others = {"folder.JPEG": "Is a directory", "dangling.JPEG": "No such file", "loop.JPEG": "Too many levels"}
    return {name: words for name, (_, words) in kinds.items()} | others
