"""Small real image trees, command lines and ways to start the program, for the tests."""

import json
import multiprocessing
import os
import pickle
import runpy
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import MultiViewDataset
from images.fashion import write_idx
from images.loading import TrainingLoader
from options import get_args_parser

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
            draw(Path(root, f"train_val{year}", str(c), f"{i}.jpg"), (i, 0, 0), size=(32, 32))


def make_list(path, root, lines):
    """A list of images, each drawn below `root`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    for line in lines:
        draw(Path(root, line.replace(",", " ").split()[0]), size=(32, 32))


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


def parse(*words):
    """The flags of semi_main.py on a command line."""
    return get_args_parser().parse_args([str(word) for word in words])


# Its processes start in milliseconds, with PyTorch, torchvision and timm imported: they are forked from a server that
# has done nothing but import. Not from the tests' own process, because once that has computed gradients on a machine
# with a GPU, PyTorch cannot compute any in a fork of it.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.trees", "semi_main"])


def run_as_main(program, words, env, output, anew=False):
    """In a forked process: run a Python program, a path or a module, with this environment.

    Args:
        output: the files that it prints to and reports errors to.
        anew: replace the process by a new Python, as a user starts it.
    """
    for descriptor, file in zip((1, 2), output):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if anew:
        of_a_module = [] if program.endswith(".py") else ["-m"]
        os.execve(sys.executable, [sys.executable, *of_a_module, program, *words], env)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # of data workers: the default, no longer the fork server
    torch.set_num_threads(1)
    sys.argv = [program, *words]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def forked(program, *words, environments=({},), timeout=300):
    """Run a Python program (a path, or a module as after `python -m`) as if it were started, but forked.

    It runs in one process for each of `environments`, which are added to this one, all at the same time. Returns a
    list of CompletedProcess. AssertionError where they do not end in time.
    """
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{rank}.out", f"{folder}/{rank}.err") for rank in range(len(environments))]
        processes = [
            FORKSERVER.Process(target=run_as_main, args=(str(program), words, {**os.environ, **env}, output))
            for env, output in zip(environments, outputs)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        late = [process.kill() for process in processes if process.exitcode is None]
        printed = [[Path(file).read_text() for file in output] for output in outputs]
        codes = [process.exitcode for process in processes]
    done = [subprocess.CompletedProcess(words, code, *text) for code, text in zip(codes, printed)]
    assert not late, done
    return done


class BrokenViews(MultiViewDataset):
    """Its unlabelled images raise an error that nobody expects."""

    def load(self, i):
        if len(self.transforms) == 2:
            raise LookupError("this image is unreadable")
        return super().load(i)


def training_batches(dataset, order, size, steps, *, seed=0, epoch=0, rank=0, stream=0, workers=0, image_bytes=0):
    """The iterator over an epoch's batches of a training set, as a run loads them."""
    loader = TrainingLoader(dataset, order, seed=seed, rank=rank, stream=stream, image_bytes=image_bytes)
    loader.start(epoch, size, steps, workers)
    return loader.read()


def ranks(number):
    """The environments in which torchrun starts this many processes."""
    return [{"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)} for rank in range(number)]


def semi_main(*words, processes=0, check=True, timeout=300):
    """Run semi_main.py: plainly, or with `processes` as under torchrun; what all of them printed, in one piece."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--dist_url", f"file://{folder}/meeting"] if processes else words
        done = forked(ROOT / "semi_main.py", *words, environments=ranks(processes) or [{}], timeout=timeout)
    out, err = "".join(each.stdout for each in done), "".join(each.stderr for each in done)
    status = max(abs(each.returncode) for each in done)
    assert not check or status == 0, out[-2000:] + err[-4000:]
    return subprocess.CompletedProcess(words, status, out, err)


def python_calls(script, folder, *words, **settings):
    """The words after `python` of each command with which a script of ours would call it; none of them is run.

    The script runs in `folder` with these settings in its environment. CalledProcessError where it fails.
    """
    python, calls = Path(folder, "python"), Path(folder, "python.calls")
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$0.calls"; echo END >> "$0.calls"\n')
    python.chmod(0o755)
    calls.write_text("")
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python), **{name: str(value) for name, value in settings.items()}}
    subprocess.run(["bash", ROOT / script, *map(str, words)], cwd=folder, env=env, check=True, timeout=60)
    return [call.splitlines() for call in calls.read_text().split("END\n")[:-1]]


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


def special_files(root, suffix=".jpg"):
    """What is no regular file of a sensible size, as names in a folder: {name: words of the reason}."""
    os.mkfifo(Path(root, f"fifo{suffix}"))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(Path(root, f"socket{suffix}")))  # a socket's path must be short
    for name in ("dev/zero", "dev/ptmx", "proc/self/mem"):
        Path(root, f"{name.replace('/', '_')}{suffix}").symlink_to(f"/{name}")
    with open(Path(root, f"huge{suffix}"), "wb") as file:
        file.truncate(2**30 + 1)  # of which no byte is on the disk
    reasons = {name: "it is not a regular file" for name in ("fifo", "dev_zero", "dev_ptmx")}
    reasons |= {"socket": "No such device", "proc_self_mem": "Input/output error", "huge": "it is larger than"}
    return {f"{name}{suffix}": words for name, words in reasons.items()}
