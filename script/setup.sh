# Source me: leaves in $PYTHON a Python that has everything, the current one or that of .venv in the repository.
# Usage: source script/setup.sh   (from the repository root)
_has_everything() {
    "$1" - <<'PY' 2>/dev/null
import importlib.metadata as m, re, sys
from pathlib import Path
import matplotlib, numpy, onnx, onnxruntime, onnxscript, pytest, safetensors, sklearn, submitit, tensorboard, timm, torch, torchvision  # a pair that does not match fails here
lines = [l for f in ("requirements.txt", "requirements-dev.txt") for l in Path(f).read_text().splitlines() if ">=" in l]
number = lambda text: [int(n) for n in re.findall(r"\d+", text)[:3]]
sys.exit(any(number(m.version(name)) < number(least) for name, least in (l.split(">=") for l in lines)))
PY
}

PYTHON=${PYTHON:-python3}
if ! _has_everything "$PYTHON"; then
    if ! { [ -x .venv/bin/python ] && _has_everything .venv/bin/python; }; then
        echo "Installing what requirements-dev.txt lists into .venv (some minutes, some GB; once)..."
        "$PYTHON" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
        _has_everything .venv/bin/python || { echo "The packages in .venv do not import: remove .venv and try again." >&2; exit 1; }
    fi
    PYTHON=.venv/bin/python
fi
export PYTHON=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)/$(basename "$PYTHON")
echo "Using $PYTHON ($("$PYTHON" -c 'import torch; print("torch", torch.__version__)'))"
