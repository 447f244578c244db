"""The documents are alive: links, anchors, paths, commands with every flag, and the messages they quote."""

import argparse
import ast
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

import options
import semi_main
from samplers import training_order
from tests.test_house import TREES, imports
from tests.trees import ROOT, python_calls
from training.optimization import learning_rates

DOCS = {str(path.relative_to(ROOT)): path.read_text()
        for pattern in ("*.md", "docs/*.md", "data_splits/*.md") for path in ROOT.glob(pattern)}  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Programs whose flags a text may name without a command of ours around them.
FOREIGN = {"--slurm", "--export", "--requeue", "--signal", "--time", "--ntasks-per-node", "--gpus-per-node", "--nodes",
           "--cpus-per-task", "--standalone", "--kill-on-bad-exit", "--max_restarts", "--dependency",
           "--shm-size"}  # fmt: skip
FOLDERS = "script|docs|data_splits|tests|study|benchmarks"
WRAPPERS = {"run_ddp_example.sh", "fork_ablation.sh", "eval.sh", "demo.sh"}


def prose(text):
    """The text without its code blocks."""
    return BLOCK.sub("", text)


def anchors(text):
    """The anchors a code host makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(text, *languages):
    return [body for language, body in BLOCK.findall(text) if language in languages]


def dead_links(name, text):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path
        if "://" in target:
            continue
        if not file.exists() or anchor and anchor not in anchors(file.read_text() if path else text):
            dead.append(target)
    return dead


# -------------------------------------------------------------------------------- commands


def commands(script):
    """The words of each simple command of a bash script that is plain enough for that; heredocs are left out."""
    script = re.sub(r"<<'?(\w+)'?.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                yield words
                words = []
            else:
                words.append(word)


def spans(text):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def all_commands(text):
    """The words of the commands of a document, in bash blocks and in the text."""
    inline = [span for span in spans(text) if re.match(r"(python|bash|torchrun) \S", span)]
    return [words for script in [*blocks(text, "bash"), *inline] for words in commands(script)]


class Caught(BaseException):
    """The parser of a tool, instead of the tool's work."""


@pytest.fixture(scope="module")
def parser_of():
    """A script's own parser, at the moment its main would parse."""

    def caught(self, args=None, namespace=None):
        raise Caught(self)

    def find(path):
        if path == "semi_main.py":
            return options.Parser(path, parents=[semi_main.get_args_parser()])
        if "argparse" not in imports(TREES[path]):
            return argparse.ArgumentParser(path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as stopped:
            patch.setattr("sys.argv", [path])
            patch.setattr(argparse.ArgumentParser, "parse_args", caught)
            runpy.run_path(str(ROOT / path), run_name="__main__")
        return stopped.value.args[0]

    parsers = {}
    return lambda path: parsers.get(path) or parsers.setdefault(path, find(path))


def through(wrapper, words, settings, folder):
    """The words after python of the command of ours that a wrapper would run."""
    calls = python_calls(wrapper, folder, *words, **dict(setting.split("=", 1) for setting in settings))
    return next(call for call in calls if call[0].startswith("-m") or call[0].endswith(".py"))


def python_part(words, folder):
    """(script, its words) of a command that runs Python code of ours, directly or by a wrapper; else None."""
    settings = []
    while words and re.match(r"\w+=", words[0]):
        settings.append(words.pop(0))
    if not words:
        return None
    if words[0] == "bash" and words[1].endswith(".sh"):
        name = os.path.basename(words[1])
        if name not in WRAPPERS and not name.startswith("submitit_1to"):
            return None
        words = ["python", *through(words[1], words[2:], settings, folder)]
    if words[0] == "srun":
        words = words[next(i for i, word in enumerate(words) if word == "python") :]
    if words[:3] == ["python", "-m", "torch.distributed.run"]:
        words = ["torchrun", *words[3:]]
    if words[0] == "torchrun":
        parsed = torchrun_parser().parse_args(words[1:])
        words = ["python", parsed.training_script, *parsed.training_script_args]
    if words[0] != "python" or len(words) < 2:
        return None
    if words[1] == "-m" and (ROOT / words[2].split(".")[0]).is_dir():
        return words[2].replace(".", "/") + ".py", words[3:]
    if not words[1].endswith(".py"):
        return None
    return os.path.relpath(os.path.join(ROOT, words[1]), ROOT), words[2:]


def refused(command, parser_of, folder):
    """Why the tool of a command would refuse its flags; None if it would not, or if it is not ours."""
    for word in command:
        if re.match(r"(script|docs|data_splits|tests|study|benchmarks)/[\w/]+\.\w+$", word) and word.endswith(
            (".py", ".sh", ".txt")
        ):
            if not (ROOT / word).is_file():
                return f"there is no {word}"
    found = python_part(list(command), folder)
    if found is None:
        return None
    path, words = found
    if not (ROOT / path).is_file():
        return f"there is no {path}"
    parser = parser_of(path)
    parser.allow_abbrev = False  # of the tools that have a parser of argparse's
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(parser, "error", lambda message: (_ for _ in ()).throw(ValueError(message)))
        try:
            args = parser.parse_args(words)
            if path in ("semi_main.py", "run_with_submitit.py"):
                options.check(args)
        except ValueError as error:
            return f"{path}: {error}"
        except SystemExit as end:
            return None if end.code == 0 else str(end.code)


@pytest.mark.parametrize("name", DOCS)
def test_links_and_anchors_are_alive(name):
    assert dead_links(name, DOCS[name]) == []


@pytest.mark.parametrize("name", DOCS)
def test_bash_blocks_are_bash(name):
    for block in blocks(DOCS[name], "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr + block


@pytest.mark.parametrize("name", DOCS)
def test_commands_are_accepted_by_the_tools_they_name(name, parser_of, tmp_path):
    for i, command in enumerate(all_commands(DOCS[name])):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert refused(command, parser_of, folder) is None, " ".join(command)


@pytest.mark.parametrize("name", DOCS)
def test_named_files_and_flags_exist(name, parser_of):
    known = FOREIGN.union(
        *(parser_of(path)._option_string_actions for path in ("semi_main.py", "run_with_submitit.py"))
    )
    for path in TREES:
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / path).read_text()))
    for span in spans(DOCS[name]):
        assert {flag for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span)} <= known, span
        if re.fullmatch(
            r"(script|tests|docs|models|images|training|study|benchmarks|data_splits|\.ci|\.github)/[\w./*-]+", span
        ):
            assert list(ROOT.glob(span)), span


@pytest.mark.parametrize("path", [path for path in TREES if "__main__" in (ROOT / path).read_text()])
def test_every_tool_answers_help(path, parser_of):
    parser = parser_of(path)
    assert "usage: " + parser.prog in parser.format_help()
    assert not [action.option_strings for action in parser._actions if action.help is None]


HELP_OF_ALL = """
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, (module, end.code)
    assert "usage: " in printed.getvalue(), module
"""


def test_programs_start_from_the_repository_without_pythonpath():
    """`python -m study.study` and the like find the packages beside them; one process, as importing takes seconds."""
    programs = [
        path
        for path in TREES
        if {"argparse", "options"} & imports(TREES[path]) and "__main__" in (ROOT / path).read_text()
    ]
    modules = [path.removesuffix(".py").replace("/", ".") for path in programs]
    assert {"semi_main", "predict", "script.export", "study.study", "tests.proofs.fuzz"} <= set(modules)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP_OF_ALL, *modules],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------- quoted messages


def templates():
    """A pattern for every text of the modules and tools that has 15 fixed characters or more."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
                     for part in parts]  # fmt: skip
            if sum(len(text.strip()) for text in fixed if text) >= 15:
                found.add("".join(".*" if text is None else re.escape(text.rstrip("\n")) for text in fixed))
    return [re.compile(pattern) for pattern in found]


def test_quoted_messages_are_those_of_the_code():
    patterns, quoted = templates(), 0
    for text in blocks(DOCS["docs/troubleshooting.md"], "text"):
        for line in text.splitlines():
            line = re.sub(r"^[\w.]+: error: ", "", line)
            assert any(pattern.fullmatch(line) for pattern in patterns), line
            quoted += 1
    assert quoted >= 15


# -------------------------------------------------------------------------------- the figures of reproduce.md


def published(script, parser_of, folder):
    """The flags that a script of a published run gives, and its number of processes."""
    path, words = python_part(["DATA_ROOT=data", "SPLIT=list", "bash", script], folder)
    args = parser_of(path).parse_args(words)
    return args, 8 if path == "semi_main.py" else args.nodes * args.ngpus


def test_the_published_runs_have_the_steps_that_reproduce_tells(parser_of, tmp_path):
    rows = re.findall(r"^\| `(script/(?:run_|submitit_)\w.*)` \| (.*) \|$", DOCS["docs/reproduce.md"], re.MULTILINE)
    slurm = {f"script/{path.name}" for path in ROOT.glob("script/submitit_1to*.sh")}
    assert {script for script, _ in rows} == {"script/run_ddp_example.sh"} | slurm
    for script, row in rows:
        args, world = published(script, parser_of, tmp_path)
        images = len(training_order(128_116, world, 0, args.seed, args.repeated_aug))
        labelled, unlabelled = options.labelled_and_unlabelled(args)
        steps, semi_steps = images // args.batch_size, images // labelled
        in_all = args.semi_start_epoch * steps + (args.epochs - args.semi_start_epoch) * semi_steps
        expected = f"{world} | {labelled} + {unlabelled} | {steps} | {semi_steps:,} | {args.epochs} | {in_all:,} | "
        assert row.startswith(expected), script


@pytest.mark.parametrize("epochs, lr", [(600, 1e-3), (600, 4e-3), (300, 1e-3)])
def test_the_learning_rates_of_reproduce_are_the_schedule(parser_of, epochs, lr):
    args = parser_of("semi_main.py").parse_args(["--epochs", str(epochs), "--lr", str(lr)])
    rates = learning_rates(args)
    table = [line.strip("| ").split(" | ") for line in DOCS["docs/reproduce.md"].splitlines()]
    (header,) = [row[1:] for row in table if row[:2] == ["epoch", "0"]]
    (row,) = [row[1:] for row in table if row[0] == f"{epochs} epochs, lr {lr:.0e}".replace("e-0", "e-")]
    assert row[: len(header)] == [f"{rates[e]:.4g}" for e in map(int, header) if e < epochs]


# -------------------------------------------------------------------------------- the inspectors


@pytest.mark.parametrize("text, expected", [
    ("[a](README.md) [b](#two-words) [c](docs/study.md)\n## Two, words\n", []),
    ("[a](nowhere.md) [b](#three)\n## Two words\n", ["nowhere.md", "#three"]),
    ("[a](https://github.com/a/b) `[b](nowhere.md)` \n```text\n[c](nowhere)\n```\n", ["nowhere.md"]),
])  # fmt: skip
def test_dead_links_are_found(text, expected):
    assert dead_links("README.md", text.replace("README.md", "CITATION.cff")) == expected


@pytest.mark.parametrize("command, reason", [
    ("python semi_main.py --lr 1e-3", None),
    ("python semi_main.py --learning-rate 1", "semi_main.py: unrecognized flag --learning-rate"),
    ("python semi_main.py --thresh 0.7", "semi_main.py: unrecognized flag --thresh: did you mean --threshold?"),
    ("python semi_main.py --threshold 7", "semi_main.py: --threshold 7.0 must be from 0 to 1"),
    ("torchrun --nproc_per_node 8 semi_main.py --mu x", "semi_main.py: argument --mu: invalid float value: 'x'"),
    ("srun --export=ALL python semi_main.py --opt-level O1", "semi_main.py: --opt-level had no effect in the published "
     "code and does nothing here: leave it out"),
    ("DATA_ROOT=data SPLIT=list bash script/run_ddp_example.sh --treshold 1",
     "semi_main.py: unrecognized flag --treshold: did you mean --threshold?"),
    ("DATA_ROOT=data SPLIT=list bash script/submitit_1to7_300ep_2nodes.sh --nodes 4", None),
    ("python -m script.gone", "there is no script/gone.py"),
    ("python -m script.check_images data --workers 2", None),
    ("python -m script.check_images", "script/check_images.py: the following arguments are required: ROOT"),
    ("ls data", None),
])  # fmt: skip
def test_dead_commands_are_found(command, reason, parser_of, tmp_path):
    (words,) = [words for words in commands(command) if words]
    assert refused(words, parser_of, tmp_path) == reason


def test_commands_are_taken_apart():
    script = "A=1 python x.py --a 'b c' \\\n  --d | tee log && ls\n# no\ncat > x <<'E'\npython y.py\nE\n"
    assert [words for words in commands(script) if words] == [
        ["A=1", "python", "x.py", "--a", "b c", "--d"], ["tee", "log"], ["ls"], ["cat"], ["x"]]  # fmt: skip
