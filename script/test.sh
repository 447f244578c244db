#!/usr/bin/env bash
# Set up if needed, then check style and run every test. Arguments go to pytest: bash script/test.sh -k policies
# With --slurm first: the tests that need a Slurm instead, on one of two nodes that lives as long as they run.
set -euo pipefail
cd "$(dirname "$0")/.."
source script/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [[ ${1:-} != --slurm ]]; then
    # Two processes of one thread each, a file at a time: most tests wait for one core, and files share their fixtures.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
fi
trap 'bash tests/proofs/slurm_sandbox.sh stop' EXIT
if said=$(bash tests/proofs/slurm_sandbox.sh start 2>&1); then
    eval "$said"
    said=ready
fi
SLURM_SANDBOX_STATE=$said "$PYTHON" -m pytest -rs -m slurm "${@:2}"
