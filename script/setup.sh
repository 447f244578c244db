# Sets $PYTHON to a Python that has all required packages: the current one, or one that it sets up in .venv.
# Usage: source script/setup.sh   (from the repository root)
_has_everything() {
    "$1" - <<'PY' 2>/dev/null
import importlib.metadata as m, sys
from pathlib import Path
from packaging.requirements import Requirement  # a dependency of pytest and matplotlib
import matplotlib, numpy, onnx, onnxruntime, onnxscript, pytest, safetensors, sklearn, submitit, tensorboard, tqdm
import timm, torch, torchvision  # fails if torch and torchvision do not match
lines = [l for f in ("requirements.txt", "requirements-dev.txt") for l in Path(f).read_text().splitlines() if ">=" in l]
sys.exit(any(not r.specifier.contains(m.version(r.name), prereleases=True) for r in map(Requirement, lines)))
PY
}

PYTHON=${PYTHON:-python3}
if ! _has_everything "$PYTHON"; then
    if ! { [ -x .venv/bin/python ] && _has_everything .venv/bin/python; }; then
        echo "Installing the packages of requirements-dev.txt into .venv (once; takes some minutes and gigabytes)..."
        "$PYTHON" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
        _has_everything .venv/bin/python || { echo "The packages in .venv cannot be imported: remove .venv and try again." >&2; exit 1; }
    fi
    PYTHON=.venv/bin/python
fi
export PYTHON=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)/$(basename "$PYTHON")
echo "Using $PYTHON ($("$PYTHON" -c 'import torch; print("torch", torch.__version__)'))"
