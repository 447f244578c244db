"""Damage valid files and flags at random; each case must be read correctly or be refused with one clear error.

    python -m tests.proofs.fuzz [--mutations 10000] [--seed 0]

Each case damages a valid split file, list, CSV file, checkpoint, training state or command line. Our readers must
return what slow_readers.py returns (for a checkpoint: what was saved) or raise a ValueError or OSError with a one-line
message that names the file. A training state is damaged entry by entry and saved whole, with right checksums; a run
must refuse it likewise, or train with it while every moment has the shape of its parameter. Flags must be accepted as
given, or refused in one line that names a word of the command line. Anything else, including a warning, is a failure.
Prints each failure with its case, then a Markdown table, and exits with status 1 if there were failures. The same seed
gives the same cases.
"""

import argparse
import contextlib
import copy
import functools
import io
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3

import options
from images.readers import FileSource, Samples, image_csv, image_list, read_split
from tests.equality import same
from tests.proofs import slow_readers
from training import checkpoint, optimization
from training.checkpoint import TrainState
from utils import printable

# ------------------------------------------------------------------------------- the valid files


@dataclass(frozen=True)
class Subject:
    """A kind of file that is damaged.

    Attributes:
        path: where the damaged files are written.
        valid: content of the undamaged file, bytes.
        read: our reader, path -> content.
        expected: bytes -> what `read` must return, or None if it must refuse the file.
        may_refuse: whether the reader may refuse every file but the undamaged one.
    """

    path: Path
    valid: bytes
    read: Callable
    expected: Callable
    may_refuse: bool = False


NAMES = ["cat/1.jpg", "cat/same.jpg", "cat/sub/2.jpg", "dog/a b.jpg", "dog/c,3,4.jpg", "dog/same.jpg", "dog/é.jpg",
         *(f"n0{i}/n0{i}_{10 * i}.JPEG" for i in range(1, 10))]  # fmt: skip


def _samples(samples):
    return [samples.source.path(i) for i in range(len(samples))], samples.targets.tolist(), samples.classes


def subjects(folder):
    """{kind: Subject} of all kinds of files, which are written below `folder`."""
    root = Path(folder, "data")
    for name in NAMES:
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).touch()
    images = Samples(FileSource(root, NAMES), np.zeros(len(NAMES), np.int64), ("x",))
    entries = [name if "same" in name else name.split("/")[-1] for name in NAMES]
    split = "".join(f"{entry},{i % 3},{i}\n" for i, entry in enumerate(entries)).encode()
    listed = "".join(f"{name}{', '[i % 2]}{i % 4}\n" for i, name in enumerate(NAMES)).encode()
    table = "path,label\n" + "".join(f'"{name}",class{i % 12}\n' for i, name in enumerate(NAMES))
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    content = {
        "model": model.state_dict(),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "epoch": 7,
        "best": {"acc1": 12.5, "epoch": 3},
        "args": argparse.Namespace(lr=0.1, model="x"),
    }
    saved = Path(folder, "checkpoint.pth")
    checkpoint.save(content, saved)
    saved_content = checkpoint.read(saved)
    return {
        "split file": Subject(
            Path(folder, "split.txt"),
            split,
            lambda path: read_split(path, images).tolist(),
            lambda damaged: slow_readers.split(damaged, NAMES),
        ),
        "list": Subject(
            Path(folder, "list.txt"),
            listed,
            lambda path: _samples(image_list(path, root, "--data-path")),
            lambda damaged: slow_readers.image_list(damaged, root),
        ),
        "CSV file": Subject(
            root / "train.csv",
            table.encode(),
            lambda path: _samples(image_csv(path)),
            lambda damaged: slow_readers.image_csv(damaged, root),
        ),
        "checkpoint": Subject(
            Path(folder, "damaged.pth"),
            saved.read_bytes(),
            checkpoint.read,
            lambda damaged: saved_content,
            may_refuse=True,
        ),
    }


# ------------------------------------------------------------------------------- damage: (rng, bytes) -> bytes

TOKENS = (b"\0", b"..", b"../", b"/", b'"', b'""', b",", b"\n", b"\r", b"\r\n", b" ", b"\t", b"-", b"9", b"\xff",
          b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\xb2", b"\xd9\xa3", b"\xed\xa0\x80")  # fmt: skip


def flip_bits(rng, content):
    """Flip one bit or four."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 4))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(rng, content):
    """Cut the end off, anywhere."""
    return content[: rng.randrange(len(content))]


def insert_bytes(rng, content):
    """Insert one of TOKENS, or up to four random bytes."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.choice((rng.choice(TOKENS), rng.randbytes(rng.randrange(1, 5)))) + content[place:]


def _lines(content):
    text = content.isascii() or b"\0" not in content
    return content.splitlines(keepends=True) if text else [content[i : i + 64] for i in range(0, len(content), 64)]


def drop_line(rng, content):
    """Remove a line, or 64 bytes of a binary file."""
    lines = _lines(content)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def double_line(rng, content):
    """Insert a copy of a line (64 bytes of a binary file) anywhere."""
    lines = _lines(content)
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"".join(lines)


def swap_fields(rng, content):
    """Exchange two fields, or two blocks of 16 bytes of a binary file."""
    fields = [content[i : i + 16] for i in range(0, len(content), 16)]
    if b"\0" not in content:
        fields = re.split(rb"([,\n /])", content)
    one, other = (2 * rng.randrange((len(fields) + 1) // 2) for _ in range(2))
    fields[one], fields[other] = fields[other], fields[one]
    return b"".join(fields)


DAMAGE = {
    "flipped bits": flip_bits,
    "cut off": truncate,
    "line dropped": drop_line,
    "line doubled": double_line,
    "fields swapped": swap_fields,
    "bytes inserted": insert_bytes,
}

# ------------------------------------------------------------------------------- a training state


def training_state(seed=0):
    """A small TrainState after a few steps, as a run has one."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    args = options.get_args_parser().parse_args([])
    optimizer = optimization.build_optimizer(args, model)
    scheduler = optimization.build_scheduler(args, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, optimizer, scheduler, scaler, ModelEmaV3(model), classes=("a", "b", "c"))
    for _ in range(3):
        train_a_step(state)
    return state


@functools.cache
def _saved_state():
    return training_state().to_dict(argparse.Namespace(lr=0.1))


def train_a_step(state):
    """One step on noise; raises where the state cannot train."""
    state.optimizer.zero_grad()
    state.model(torch.randn(6, 8)).square().mean().backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.epoch += 1
    state.scheduler.step(state.epoch)


def _places(value, path=()):
    """The path of every entry of nested dictionaries and lists."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from _places(child, (*path, key))


def _at(content, path):
    for key in path:
        content = content[key]
    return content


def _junk(rng):
    shape = tuple(rng.choices((0, 1, 3, 4, 8), k=rng.randrange(3)))
    tensor = torch.zeros(shape, dtype=rng.choice((torch.float32, torch.float64, torch.int64, torch.bool)))
    values = (None, True, 5, -1, 2.5, float("nan"), float("inf"), "x", [], {}, [1], {"x": 1}, (), tensor)
    special = (tensor.to("meta"), torch.zeros(1).expand(4), torch.zeros(99)[50:51])
    return rng.choice((*values, tensor, *special))


def change_element(rng, content, path):
    """Change one number: another one of the same type, sometimes none that is finite."""
    value = _at(content, path)
    if torch.is_tensor(value) and value.numel():
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = rng.choice((0, 1, 7)) if not value.is_floating_point() else (
            rng.choice((0.5, -3.0, 1e30, torch.nan, torch.inf)))  # fmt: skip
    elif type(value) in (int, float):
        value = type(value)(rng.choice((-7, 0, 1, 10**9)))
    _at(content, path[:-1])[path[-1]] = value


def cut_entry(rng, content, path):
    """Cut a tensor, a list or a text."""
    value = _at(content, path)
    if torch.is_tensor(value) and value.ndim or isinstance(value, list | str) and value:
        _at(content, path[:-1])[path[-1]] = value[: rng.randrange(len(value))] if len(value) else value


def drop_entry(rng, content, path):
    """Remove an entry."""
    del _at(content, path[:-1])[path[-1]]


def double_entry(rng, content, path):
    """Enter a value again under another name, or at the end of its list."""
    folder = _at(content, path[:-1])
    if isinstance(folder, list):
        folder.append(folder[path[-1]])
    else:
        folder[rng.choice(("x", 99, "epoch"))] = folder[path[-1]]


def swap_entries(rng, content, path):
    """Exchange two entries."""
    other = rng.choice([place for place in _places(content) if place[: len(path)] != path[: len(place)]] or [path])
    one, two = _at(content, path), _at(content, other)
    _at(content, path[:-1])[path[-1]], _at(content, other[:-1])[other[-1]] = two, one


def insert_junk(rng, content, path):
    """Put a value of any type in the place of an entry."""
    _at(content, path[:-1])[path[-1]] = _junk(rng)


STATE_DAMAGE = dict(
    zip(DAMAGE, (change_element, cut_entry, drop_entry, double_entry, swap_entries, insert_junk), strict=True)
)


def state_case(path, damage, rng):
    """Damage a training state, save it whole, resume from it; returns ('accepted' | 'refused' | 'failed', why).

    A state that is accepted must have the shapes of its network, and train.
    """
    content = copy.deepcopy(_saved_state())
    # In a place of any depth, because most entries are deep inside the optimizer.
    top = rng.choice(list(content))
    below = [(top,), *((top, *rest) for rest in _places(content[top]))] if isinstance(content[top], dict) else [(top,)]
    STATE_DAMAGE[damage](rng, content, rng.choice(below))
    torch.save(content, path)
    state = training_state(seed=1)
    with Outcome() as outcome, contextlib.redirect_stdout(io.StringIO()):
        state.from_dict(checkpoint.read(path), path)
        shapes = [p.shape for p in state.model.parameters()]
        train_a_step(state)
        moments = [each["exp_avg"].shape for each in state.optimizer.state.values()]
        if sorted(shapes) != sorted(moments):
            raise AssertionError("the state is not that of its network")
    if outcome.error is None:
        return "accepted", ""
    error = outcome.error
    if not isinstance(error, ValueError | OSError) or "\n" in str(error) or str(path) not in str(error):
        return "failed", _shown(error)
    return "refused", ""


# ------------------------------------------------------------------------------- flags

FLAGS = {  # flag: (valid values, invalid values); () stands for a flag without a value
    "--batch-size": (("8", "20", "64", "108"), ("0", "-1", "x", "1.5", "")),
    "--mu": (("0.25", "0.5", "0.125", "2", "-1"), ("nan", "half")),  # 2 and -1 are valid with --eval, which ignores it
    "--epochs": (("1", "300"), ("0", "1e3")),
    "--lr": (("0", "5e-4"), ("-1", "inf", "nan")),
    "--mixup": (("0", "0.8"), ("-0.1", "nan")),
    "--cutmix": (("0", "1.0"), ("-1",)),
    "--threshold": (("0", "0.7", "1"), ("1.01", "nan")),
    "--smoothing": (("0", "0.1"), ("1", "-0.1")),
    "--opt-eps": (("1e-8",), ("nan", "-inf")),
    "--opt-betas": (("0.9 0.95",), ("0.9", "0.9 nan", "1 2 3")),
    "--max-bad-images": (("0", "0.01", "7"), ("-1", "1.5", "inf")),
    "--sched": (("cosine", "plateau"), ("linear",)),
    "--data-set": (("IMNET", "SEMI-IMNET"), ("MNIST",)),
    "--data-backend": (("pil", "fast"), ("turbo",)),
    "--model": (("Semiformer_small_patch16", "resnet18"), ()),
    "--pseudo-type": (("cnn", "fuse"), ("CNN",)),
    "--amp": (("auto", "off"), ("on",)),
    "--no-amp": ((),) * 2,
    "--supervise-only": ((),) * 2,
    "--eval": ((),) * 2,
}


def command_line(rng):
    """A random command line: (its words, {flag: text or True}, {the flags with an invalid value})."""
    chosen, wrong = {}, set()
    for flag in rng.sample(sorted(FLAGS), rng.randrange(1, 8)):
        values, invalid = FLAGS[flag]
        if values and invalid and rng.random() < 0.12:
            wrong.add(flag)
            values = invalid
        chosen[flag] = rng.choice(values) if values else True
    words = [[flag] if text is True else [flag, *(text.split() or [""])] for flag, text in chosen.items()]
    return sum(words, []), chosen, wrong


def incompatible(chosen):
    """Whether flags with valid values contradict each other, so that they must be refused."""
    amp, off = chosen.get("--amp"), "--no-amp" in chosen
    if off and amp not in (None, "off"):
        return True
    if "--eval" in chosen:
        return False
    batch, mu = int(chosen.get("--batch-size", 64)), float(chosen.get("--mu", 0.166666667))
    semi = chosen.get("--data-set", "IMNET") == "SEMI-IMNET" and "--supervise-only" not in chosen
    labelled = int(batch * mu) if semi else batch
    if not 0 <= mu <= 1:
        return True
    if chosen.get("--pseudo-type") == "fuse" and chosen.get("--model") != "Semiformer_small_patch16":
        return True
    mixing = float(chosen.get("--mixup", 0.8)) > 0 or float(chosen.get("--cutmix", 1)) > 0
    return labelled == 0 or labelled == batch and semi or mixing and labelled % 2 == 1


# ------------------------------------------------------------------------------- running


class Outcome:
    """A context manager that catches any exception, warnings included, and keeps it as `error`."""

    error: Any = None

    def __enter__(self):
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("error")
        return self

    def __exit__(self, kind, error, trace):
        self._warnings.__exit__(kind, error, trace)
        self.error = error
        return isinstance(error, Exception | SystemExit)


def _shown(error):
    return f"{type(error).__name__}: {str(error)[:300]!r}"


def file_case(subject, content):
    """Read one damaged file; returns ('accepted' | 'refused' | 'failed', why it failed)."""
    subject.path.write_bytes(content)
    expected = subject.expected(content)
    with Outcome() as outcome:
        result = subject.read(subject.path)
    error = outcome.error
    if error is None:
        reason = f"read as {result!r}, not {expected!r}"
        if subject.may_refuse:  # a checkpoint, too long to print
            reason = f"the content read from {subject.path.name} is not what was saved"
        return ("accepted", "") if same(result, expected) else ("failed", reason)
    if not isinstance(error, ValueError | OSError) or "\n" in str(error) or str(subject.path) not in str(error):
        return "failed", _shown(error)
    if expected is not None and not (subject.may_refuse and content != subject.valid):
        return "failed", f"refused a valid file: {_shown(error)}"
    return "refused", ""


def flags_case(words, chosen=None, wrong=()):
    """Parse and check one command line; returns ('accepted' | 'refused' | 'failed', why it failed).

    Without `chosen` the right answer is not known, so that only the form of a refusal is checked.
    """
    with Outcome() as outcome, contextlib.redirect_stderr(io.StringIO()) as printed:
        args = options.get_args_parser().parse_args(words)
        options.check(args)
    error = outcome.error
    if error is None:
        if chosen is None:
            return "accepted", ""
        expected = vars(options.recorded(options.get_args_parser().parse_args([]))) | {
            flag.strip("-").replace("-", "_"): text for flag, text in chosen.items()
        }
        got = vars(options.recorded(args))
        faults = [f"{name} is wrong" for name, value in got.items() if not _has_value(value, expected[name])]
        faults += ["it must be refused"] if wrong or incompatible(chosen) else []
        return ("failed", f"accepted, but {', '.join(faults)}") if faults else ("accepted", "")
    if isinstance(error, SystemExit):
        text = printed.getvalue().partition(": error: ")[2].partition("\nsee ")[0] if error.code == 2 else ""
    else:
        text = str(error)
    known = [flag for action in options.get_args_parser()._actions for flag in action.option_strings]
    named = any(printable(word) in text for word in wrong or [*words, *known])  # it may be spelled otherwise
    if not isinstance(error, SystemExit | ValueError) or "\n" in text or not named:
        return "failed", f"{_shown(error)} {printed.getvalue()[-300:]}"
    if chosen is not None and not wrong and not incompatible(chosen):
        return "failed", f"refused valid flags: {text}"
    return "refused", ""


def _has_value(parsed, expected):
    """Whether a parsed flag has the value that is expected: as text, or its default."""
    if isinstance(expected, str) and isinstance(parsed, list):
        return parsed == [float(word) for word in expected.split()]
    return parsed == (type(parsed)(expected) if isinstance(expected, str) and parsed is not None else expected)


def run(mutations, seed):
    """Run so many cases; returns (Counter of (kind, damage, outcome), [failures as text])."""
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        files = subjects(folder)
        kinds = (*files, "training state", "flags")
        cells = [(kind, damage) for kind in kinds for damage in DAMAGE] + [("flags", "combined")]
        for case in range(mutations):
            kind, damage = cells[case % len(cells)]
            rng = random.Random(f"{seed}/{case}")
            if kind == "training state":
                outcome, why = state_case(Path(folder, "state.pth"), damage, rng)
            elif kind != "flags":
                content = DAMAGE[damage](rng, files[kind].valid)
                outcome, why = file_case(files[kind], content)
            elif damage == "combined":
                outcome, why = flags_case(*command_line(rng))
            else:
                content = "\n".join(command_line(rng)[0]).encode()
                content = DAMAGE[damage](rng, content).decode("utf-8", "replace")
                outcome, why = flags_case([word for word in content.split("\n") if word])
            counts[kind, damage, outcome] += 1
            if outcome == "failed":
                failures.append(f"Case {case} of --seed {seed}, {kind}, {damage}: {why}")
    return counts, failures


def table(counts):
    """The Markdown table of a run: a row for each kind of file and damage, and the total."""
    outcomes = ("accepted", "refused", "failed")
    rows = ["| what | damage | cases | accepted | refused | failed |", "|---|---|--:|--:|--:|--:|"]
    cells = list(dict.fromkeys((kind, damage) for kind, damage, _ in counts))
    for kind, damage in sorted(cells):
        each = [counts[kind, damage, outcome] for outcome in outcomes]
        rows.append(f"| {kind} | {damage} | {' | '.join(f'{n:,}' for n in (sum(each), *each))} |")
    each = [sum(n for key, n in counts.items() if key[2] == outcome) for outcome in outcomes]
    return "\n".join([*rows, f"| **all** | | {' | '.join(f'{n:,}' for n in (sum(each), *each))} |"])


def main(argv=None):
    """Run the cases, print failures and table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default: %(default)s)")
    args = parser.parse_args(argv)
    counts, failures = run(args.mutations, args.seed)
    print(*failures, table(counts), sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
