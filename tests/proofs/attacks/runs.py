"""Attacks on the output folder of a run, and resumes with other flags or other data."""

import os
import shutil

from tests.proofs.attacks.sandbox import DONE, EITHER, REFUSED, add_run, cases, fill, start, train, until

# ------------------------------------------------------------------------------- resumes with other flags


def resumed(*words, files=(), spoil=None):
    """Prepare a run of two epochs, of which these files are left, and go on with it to the third, with these flags."""

    def prepare(box):
        add_run(box, "out", *files)
        if spoil:
            spoil(box)
        return train("--epochs", 3, "--resume", "auto", *words)

    return prepare


def _rename_a_class(box):
    for part in ("train", "val"):
        os.rename(box / "data" / part / "class1", box / "data" / part / "other")


def _add_a_class(box):
    for part in ("train", "val"):
        shutil.copytree(box / "data" / part / "class1", box / "data" / part / "class9")
        for path in (box / "data" / part / "class9").iterdir():
            path.rename(path.with_name(f"9{path.name}"))


def _damage(*names):
    def spoil(box):
        for name in names:
            path = box / "out" / name
            path.write_bytes(path.read_bytes()[:-100_000])

    return spoil


def _fork_into_another_run(box):
    add_run(box, "out")
    add_run(box, "other")
    return train("--resume", "other/checkpoint.pth", may_write=("out/run.lock",))


def _fork(box):
    add_run(box, "other")
    return train("--epochs", 3, "--resume", "other/checkpoint.pth")


CHANGES = {"--lr": "1e-06", "--weight-decay": "5.0", "--sched": "step", "--seed": "7", "--batch-size": "8",
       "--warmup-epochs": "2", "--input-size": "64", "--threshold": "0.1"}  # fmt: skip
RESUMES = cases(
    "resume",
    *((f"another {flag}", resumed(flag, value), DONE, f"(?s)Changed since .*: {flag} .* -> {value}\n.*Trained in")
      for flag, value in CHANGES.items()),
    ("fewer epochs", resumed("--epochs", 1), DONE, "Nothing left to train: out/checkpoint.pth is at epo"),
    ("another --opt", resumed("--opt", "sgd"), REFUSED, "is not of this network and --opt .*: keep"),
    ("another --model", resumed("--model", "lcnet_050"), REFUSED, "is of another network"),
    ("no average", resumed("--no-model-ema"), DONE, "--model-ema True -> False"),
    ("a class renamed", resumed(spoil=_rename_a_class), REFUSED, "is of other classes than the data"),
    ("a class more", resumed(spoil=_add_a_class), REFUSED, "The head in .* has 3 classes, but"),
    ("into another run", _fork_into_another_run, REFUSED, "out holds another run"),
    ("from another folder", _fork, DONE, "Trained in"),
    ("auto, a damaged file", resumed(spoil=_damage("checkpoint.pth")), DONE,
     "Warning: .*checkpoint.pth.* damaged .*going on from the older out/checkpoint.prev.pth, of epoch 0"),
    ("auto, only damaged files", resumed(spoil=_damage("checkpoint.pth", "checkpoint.prev.pth")), REFUSED,
     "No checkpoint of out is complete .*move them away"),
    ("auto, nothing", lambda box: train("--resume", "auto"), DONE, "out holds no checkpoint yet"),
    ("auto, no folder", lambda box: train("--output_dir", "", "--resume", "auto"), REFUSED, "name that"),
    ("a file that is not there", lambda box: train("--resume", "x.pth"), REFUSED, "no checkpoint x.pth"),
    ("a name with a newline", lambda box: train("--resume", "a\n\x1b[2Jb"), REFUSED, "no checkpoint"),
)  # fmt: skip

# ------------------------------------------------------------------------------- the output folder


def into(*words, make=None, **settings):
    """Prepare an output folder and train there, with these flags."""

    def prepare(box):
        if make:
            make(box)
        return train(*words, **settings)

    return prepare


def with_file(name, content, *words, runs=True, **settings):
    """Prepare a file in the output folder, of a run or a new one: bytes, or a function of its path; then train there.

    A run that is there is resumed.
    """

    def prepare(box):
        if runs:
            add_run(box)
        (box / "out").mkdir(exist_ok=True)
        fill(box / "out" / name, content)
        return train("--epochs", 3, *(["--resume", "auto"] if runs else []), *words, **settings)

    return prepare


def _second(box):
    start(train("--epochs", 9999), box, box.parent / "first")
    until((box / "out" / "checkpoint.pth").exists)
    return train("--resume", "auto")


def _over(box):
    add_run(box)
    return train("--seed", 1, may_write=("out/run.lock",))


def _link_to_a_folder(box):
    (box / "elsewhere").mkdir()
    (box / "out").symlink_to("elsewhere")
    return train(may_write=("out", "elsewhere"))


def _precious(path):
    """A link to a file outside of the output folder."""
    (path.parent.parent / "precious.txt").write_text("precious\n")
    path.symlink_to("../precious.txt")


GARBAGE = bytes(range(256)) * 40
FILES = [
    ("log.txt", "garbage", GARBAGE, DONE, "lines are not of epochs up to 1, now in log.dropped.txt"),
    ("log.txt", "lines of other types", b'[1]\n{"epoch": "x"}\n5\n', DONE, "now in log.dropped.txt"),
    ("log.txt", "a folder", os.mkdir, REFUSED, "log.txt"),
    ("log.txt", "a FIFO", os.mkfifo, REFUSED, "log.txt"),
    ("log.txt", "a link to a file elsewhere", _precious, REFUSED, "log.txt"),
    ("log.dropped.txt", "a FIFO", os.mkfifo, REFUSED, "log.dropped.txt"),
    ("run.json", "garbage", GARBAGE, DONE, "Trained in"),
    ("run.json", "a list nested deep", b"[" * 100_000, DONE, "Trained in"),
    ("run.json", "a folder", os.mkdir, REFUSED, "run.json"),
    ("run.json", "a FIFO", os.mkfifo, REFUSED, "run.json"),
    ("run.json", "a link to a file elsewhere", _precious, REFUSED, "run.json"),
    ("run.lock", "garbage", GARBAGE, DONE, "Trained in"),
    ("run.lock", "a folder", os.mkdir, REFUSED, "run.lock"),
    ("run.lock", "a FIFO", os.mkfifo, REFUSED, "run.lock"),
    ("run.lock", "a link to a file elsewhere", _precious, REFUSED, "run.lock"),
    ("run.lock", "a link to /dev/zero", lambda path: path.symlink_to("/dev/zero"), REFUSED, "run.lock"),
    ("checkpoint.pth", "a FIFO", os.mkfifo, DONE, "checkpoint.prev.pth"),
    ("checkpoint.pth", "a folder", os.mkdir, EITHER, "checkpoint.pth"),
    ("checkpoint.prev.pth.tmp", "a folder", os.mkdir, EITHER, ""),
    ("checkpoint.pth.17.tmp", "what a killed run leaves", GARBAGE, DONE, "Trained in"),
    ("checkpoint.pth.17.tmp", "a folder", os.mkdir, DONE, "Trained in"),
    ("best.pth", "a link to a file elsewhere", _precious, DONE, "Trained in"),
]  # fmt: skip
FOLDERS = cases(
    "output folder",
    ("a second run while the first one lives", _second, REFUSED, "out is in use by process"),
    ("a run over another", _over, REFUSED, "out holds another run"),
    ("--overwrite", lambda box: add_run(box) and train("--overwrite"), DONE, "--overwrite: the files of the"),
    ("--overwrite and --resume auto", resumed("--overwrite"), REFUSED, "contradict each other"),
    ("it is a file", into("--output_dir", "data/labelled.txt"), REFUSED, "data/labelled.txt"),
    ("it is below a file", into("--output_dir", "data/labelled.txt/x"), REFUSED, "data/labelled.txt/x"),
    ("it is a device", into("--output_dir", "/dev/null"), REFUSED, "/dev/null"),
    ("it is /proc", into("--output_dir", "/proc"), REFUSED, "/proc"),
    ("it is a FIFO", into(make=lambda box: os.mkfifo(box / "out")), REFUSED, "out"),
    ("it is a link to a folder", _link_to_a_folder, DONE, "Trained in"),
    ("it is a link to nothing", into(make=lambda box: (box / "out").symlink_to("none")), REFUSED, "out"),
    ("its name has a newline", into("--output_dir", "a\nb", may_write=("a\nb",)), DONE, "Trained in"),
    ("its name has an escape", into("--output_dir", "\x1b[2J", may_write=("\x1b[2J",)), DONE, "Trained in"),
    ("its name is not UTF-8", into("--output_dir", "\udce9", may_write=("\udce9",)), DONE, "Trained in"),
    ("its name is too long", into("--output_dir", "x" * 300), REFUSED, "xxx"),
    ("a file with a newline in its name", into("--output_dir", "a\nb", make=lambda box:
                                                     (box / "a\nb").write_text("")), REFUSED, "b"),
    *((f"{name}: {what}", with_file(name, content), ends, words) for name, what, content, ends, words
      in FILES),
    ("log.txt: a FIFO, in a new run", with_file("log.txt", os.mkfifo, runs=False), REFUSED, "log.txt"),
    ("log.txt: a link to a file elsewhere, in a new run", with_file("log.txt", _precious, runs=False),
     REFUSED, "log.txt"),
)  # fmt: skip
CASES = RESUMES + FOLDERS
