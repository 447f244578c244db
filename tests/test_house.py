"""The structure of the code: who may import whom, no circle, docstrings; training starts with five packages."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {"semi_main", "run_with_submitit", "predict", "hubconf"}
TOOLS = {"script", "study", "benchmarks", "data_splits", "docs", "tests"}  # run by a person; nothing else imports them
# What the method and the packages may import of this project, beside their own package. The rest is free.
MAY_IMPORT = {
    "confidence": {"utils"},
    "pseudo_labels": {"confidence", "utils"},
    "pseudo_mixup": set(),
    "losses": set(),
    "engine": {"pseudo_labels", "pseudo_mixup", "losses", "utils"},
    "images": {"samplers", "utils"},
    "training": {"utils"},
}
# Optional packages: imported where they are needed, and named in a sentence where they are missing.
OPTIONAL = {
    "run_with_submitit.py": {"submitit"},
    "training/checkpoint.py": {"safetensors"},
    "models/pretrained.py": {"safetensors"},  # of which timm's own weights are files, so that timm requires it
    "training/tensorboard_log.py": {"tensorboard"},
    "training/report.py": {"matplotlib"},
}


def _ours(path):
    """Not hidden, not a test (but the proofs, which are programs), not someone's virtual environment."""
    parts = path.relative_to(ROOT).parts
    inside = [ROOT.joinpath(*parts[:i]) for i in range(1, len(parts))]
    if parts[0] in ("shared", "output") or parts[0] == "tests" and parts[1] != "proofs":
        return False
    return not any(part.startswith(".") for part in parts) and not any((f / "pyvenv.cfg").exists() for f in inside)


FILES = sorted(path for path in ROOT.rglob("*.py") if _ours(path))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {name: tree for name, tree in TREES.items() if name.split("/")[0] not in TOOLS}
SCRIPTS = sorted((ROOT / "script").glob("*.sh"))


def package(name):
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
    """What the code must not contain, as 'line: what'."""
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


def test_all_files_are_found():
    assert {"semi_main.py", "engine.py", "utils.py", "models/__init__.py", "images/loading.py"} <= set(MODULES)
    assert not [name for name in TREES if "/test_" in name or "site-packages" in name]


@pytest.mark.parametrize("name", [name for name in MODULES if package(name) in MAY_IMPORT])
def test_the_method_knows_no_file_and_the_packages_know_no_flag(name):
    project = {package(each) for each in TREES}
    allowed = MAY_IMPORT[package(name)] | {package(name)}
    assert imports(MODULES[name], within=package(name)) & project <= allowed


def test_programs_and_tools_are_imported_by_nobody():
    forbidden = PROGRAMS | TOOLS
    found = {name: imports(tree, within=package(name)) & forbidden for name, tree in MODULES.items()}
    assert {name: used for name, used in found.items() if used} == {"run_with_submitit.py": {"semi_main"}}


def test_there_is_no_circle():
    def module(name):
        return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    modules = set(map(module, MODULES))
    graph = {}
    for name, tree in MODULES.items():
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used |= {f"{node.module}.{alias.name}" for alias in node.names} & modules or {node.module}
        graph[module(name)] = used & modules
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("utils") < order.index("engine") < order.index("semi_main")
    assert order.index("models.blocks") < order.index("models.semiformer") < order.index("models")


def test_only_the_launcher_imports_submitit():
    assert {name for name, tree in TREES.items() if "submitit" in imports(tree)} <= {"run_with_submitit.py"}


@pytest.mark.parametrize("name", TREES)
def test_no_eval_no_bare_except_no_exit_no_print(name):
    assert faults(TREES[name], tool=name not in MODULES or name == "utils.py") == []


@pytest.mark.parametrize("name", TREES)
def test_docstrings(name):
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


def test_running_needs_the_five_packages_only():
    known = {"torch", "torchvision", "timm", "numpy", "PIL"} | sys.stdlib_module_names | set(map(package, MODULES))
    for name, tree in MODULES.items():
        foreign = imports(tree, within=package(name)) - known
        assert foreign <= OPTIONAL.get(name, set()), name
