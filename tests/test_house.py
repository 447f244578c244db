"""The house keeps its arrows, its sizes and its manners; it starts with the five packages it names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Programs of their own: nobody imports them, and they may print.
TOOLS = ("script", "tools", "data_splits", "docs")
ALL = None
ARROWS = {
    "run_with_submitit": {"semi_main"},
    "semi_main": ALL,
    "engine": {"pseudo_labels", "losses", "utils"},
    "loading": {"images", "samplers", "transforms", "utils"},
    "datasets": {"cifar", "fashion", "images", "readers", "transforms"},
    "readers": {"images"},
    "cifar": {"readers"},
    "fashion": {"readers"},
    "transforms": {"randaugment"},
    "checkpoint": {"utils"},
    "curves": {"utils"},
    "optimization": set(),
    "output_folder": {"checkpoint", "utils"},
    "report": {"utils"},
    "starts": {"checkpoint", "utils"},
    "models": {"models"},
    "pretrained": {"checkpoint", "models", "transforms"},
    "predict": {"images", "models", "pretrained", "readers", "utils"},
    "hubconf": {"models", "pretrained"},
    **{leaf: set() for leaf in ("pseudo_labels", "losses", "images", "randaugment", "samplers", "utils", "options")},
}
# Packages that a room imports where it needs them, and does without or names in a sentence.
OPTIONAL = {
    "run_with_submitit.py": {"submitit"},
    "checkpoint.py": {"safetensors"},
    "curves.py": {"tensorboard"},
    "report.py": {"matplotlib"},
}
LAUNCHERS = {"run_with_submitit", "semi_main"}


def _ours(path):
    """Not hidden, not a test, not someone's virtual environment."""
    parts = path.relative_to(ROOT).parts
    inside = [ROOT.joinpath(*parts[:i]) for i in range(1, len(parts))]
    return (parts[0] not in ("tests", "shared", "output") and not any(part.startswith(".") for part in parts)
            and not any((folder / "pyvenv.cfg").exists() for folder in inside))  # fmt: skip


FILES = sorted(path for path in ROOT.rglob("*.py") if _ours(path))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
ROOMS = {name: tree for name, tree in TREES.items() if name.split("/")[0] not in TOOLS}
SCRIPTS = sorted((ROOT / "script").glob("*.sh"))


def room(name):
    """engine.py -> engine, models/blocks.py -> models."""
    return name.split("/")[0].removesuffix(".py")


def imports(tree, within=None):
    """First parts of the names of all modules a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(within if node.level else node.module.split(".")[0])
    return names


def called(node):
    """The name of the function a call calls: 'print', 'sys.exit'."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else None


def below_main(tree):
    """All nodes but those of a function named main and of the `if __name__ == "__main__"` block."""
    for node in tree.body:
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if not guard and not (isinstance(node, ast.FunctionDef) and node.name == "main"):
            yield from ast.walk(node)


def faults(tree, tool=False):
    """What the house does not have, as 'line: what'."""
    found = []
    forbidden = {"eval", "exec"} | (set() if tool else {"print"})
    for node in ast.walk(tree):
        if called(node) in forbidden:
            found.append(f"{node.lineno}: {called(node)}")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(each) if each else "bare" for each in caught}
            names &= {"bare", "Exception", "BaseException"}
            found += [f"{node.lineno}: except {name}" for name in names]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.end_lineno - node.lineno + 1 > 80:
                found.append(f"{node.lineno}: {node.name} is longer than 80 lines")
    leaving = {"exit", "quit", "sys.exit", "os._exit", "os.abort"}
    return found + [f"{node.lineno}: {called(node)}" for node in below_main(tree) if called(node) in leaving]


def undocumented(tree):
    """Public functions and classes of a module without a docstring, and the module itself."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    names = [node.name for node in public if not ast.get_docstring(node)]
    return names + ([] if ast.get_docstring(tree) else ["the module"])


def absolute_paths(text):
    """Absolute paths and home folders in the commands of a shell script, /dev/null aside."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = re.findall(r"""(?:^|(?<=[\s="'(:<>`,-]))(?:/(?!/)|~)[\w./~-]*""", "\n".join(lines), re.MULTILINE)
    return [path for path in found if path not in ("/dev/null", "/")]


def test_the_walk_sees_the_house():
    assert {"semi_main.py", "engine.py", "utils.py", "models/__init__.py", "models/blocks.py"} <= set(ROOMS)
    assert not [name for name in TREES if name.startswith("tests") or "site-packages" in name]


@pytest.mark.parametrize("name", ROOMS)
def test_arrows(name):
    project = {room(each) for each in ROOMS}
    used = imports(ROOMS[name], within=room(name)) & project
    assert room(name) in ARROWS, f"{name} is a new room: give it its arrows here"
    allowed = ARROWS[room(name)]
    allowed = project - LAUNCHERS if allowed is ALL else allowed
    assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_there_is_no_circle():
    def module(name):
        return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    edges, modules = {}, set(map(module, ROOMS))
    for name, tree in ROOMS.items():
        package = module(name.rpartition("/")[0])
        seen = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                seen |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
                seen |= {f"{base}.{alias.name}" for alias in node.names} & modules or {base}
        edges[module(name)] = seen & modules
    done = []
    while len(done) < len(edges):
        free = [name for name, needs in edges.items() if name not in done and needs <= set(done)]
        assert free, f"these import each other: {sorted(set(edges) - set(done))}"
        done += free
    assert done.index("utils") < done.index("engine") < done.index("semi_main")
    assert done.index("models.blocks") < done.index("models.semiformer") < done.index("models")


def test_only_the_launcher_imports_submitit():
    assert {name for name, tree in TREES.items() if "submitit" in imports(tree)} <= {"run_with_submitit.py"}


def test_nobody_imports_a_tool():
    tools = {Path(name).stem for name in TREES} - {Path(name).stem for name in ROOMS} | set(TOOLS)
    assert not {name: imports(tree) & tools for name, tree in ROOMS.items() if imports(tree) & tools}


@pytest.mark.parametrize("name", TREES)
def test_manners(name):
    assert faults(TREES[name], tool=name not in ROOMS or name == "utils.py") == []


@pytest.mark.parametrize("name", TREES)
def test_sizes_and_docstrings(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 400
    assert undocumented(TREES[name]) == []


def test_scripts_have_no_absolute_path():
    found = {path.name: absolute_paths(path.read_text()) for path in SCRIPTS}
    assert not any(found.values()), found


# -------------------------------------------------------------------------------- the inspectors


@pytest.mark.parametrize("source, expected", [
    ("x = eval('1')", ["1: eval"]), ("exec('1')", ["1: exec"]), ("model.eval()", []),
    ("try:\n    f()\nexcept:\n    pass", ["3: except bare"]),
    ("try:\n    f()\nexcept Exception as e:\n    pass", ["3: except Exception"]),
    ("try:\n    f()\nexcept (OSError, Exception):\n    pass", ["3: except Exception"]),
    ("try:\n    f()\nexcept (OSError, ValueError):\n    pass", []),
    ("def f():\n    exit()", ["2: exit"]), ("def f():\n    import sys\n    sys.exit(1)", ["3: sys.exit"]),
    ("def main():\n    sys.exit(1)", []), ("if __name__ == '__main__':\n    sys.exit(1)", []),
    ("def f():\n    print(1)", ["2: print"]),
    ("def f():\n" + "    x = 1\n" * 79, []),
    ("def f():\n" + "    x = 1\n" * 80, ["1: f is longer than 80 lines"]),
])  # fmt: skip
def test_faults_are_found(source, expected):
    assert faults(ast.parse(source)) == expected
    assert not [fault for fault in faults(ast.parse(source), tool=True) if "print" in fault]


def test_missing_docstrings_are_found():
    source = "def f():\n    pass\nclass C:\n    pass\ndef _g():\n    pass\ndef h():\n    'It does.'\n"
    assert undocumented(ast.parse(source)) == ["f", "C", "the module"]


def test_imports_are_found():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    from i import j\n"
    assert imports(ast.parse(source), within="models") == {"a", "c", "d", "models", "i"}


@pytest.mark.parametrize("text, expected", [
    ("#!/bin/bash\n# IMAGENET=/path/to/imagenet\ncd data/imagenet && ls ../x 2>/dev/null", []),
    ("python semi_main.py \\\n  --data-path /data/imagenet", ["/data/imagenet"]),
    ("OUT=/tmp/out", ["/tmp/out"]), ('cd "/home/me"', ["/home/me"]), ("cd ~/runs", ["~/runs"]),
    ("true\n/usr/bin/python x.py", ["/usr/bin/python"]), ("A=${A:-/data/x}", ["/data/x"]),
    ("python x.py --data-path ${1:?folder} --out $OUT/run", []), ("echo $((4 / 2))", []),
    ("x https://github.com/a/b", [])])  # fmt: skip
def test_absolute_paths_are_found(text, expected):
    assert absolute_paths(text) == expected


# -------------------------------------------------------------------------------- the five packages

BLOCKED = ("matplotlib", "sklearn", "scipy", "pandas", "tensorboard", "tensorboardX", "pytest", "_pytest",
           "hypothesis", "submitit", "apex", "wandb", "cv2", "onnx", "onnxscript", "onnxruntime")  # fmt: skip
IMPORT = f'''
import sys

class Without:
    """A finder to which some packages are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {BLOCKED}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " was not blocked")
import semi_main
print(callable(semi_main.main), semi_main.get_args_parser().prog)
'''


def test_importing_semi_main_needs_the_five_packages_only():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True Semiformer training and evaluation\n"


def test_the_rooms_import_the_five_packages_only():
    known = {"torch", "torchvision", "timm", "numpy", "PIL"} | sys.stdlib_module_names | set(map(room, ROOMS))
    for name, tree in ROOMS.items():
        foreign = imports(tree, within=room(name)) - known
        assert foreign <= OPTIONAL.get(name, set()), name
