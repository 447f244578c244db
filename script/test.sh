#!/usr/bin/env bash
# Set up if needed, then check the style and run every test.
# Usage: bash script/test.sh [arguments of pytest, e.g. -k policies]
#        bash script/test.sh --slurm [arguments of pytest]   the tests that need Slurm, on a sandbox of two nodes
#        bash script/test.sh --proofs                        the long proofs, one after the other; half an hour or more
set -euo pipefail
cd "$(dirname "$0")/.."
source script/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
case ${1:-} in
--proofs)
    status=0
    "$PYTHON" -m pytest -m proof || status=$?
    for proof in "tests.proofs.prove_resume --kills 30" tests.proofs.prove_memory \
        "tests.proofs.fuzz --mutations 10000" tests.proofs.attack tests.proofs.prove_starts benchmarks.measure_lists; do
        printf '\n## python -m %s\n\n' "$proof"
        "$PYTHON" -m $proof || status=$?  # unquoted: a module and its flags
    done
    exit $status
    ;;
--slurm)
    trap 'bash tests/proofs/slurm_sandbox.sh stop' EXIT
    if output=$(bash tests/proofs/slurm_sandbox.sh start 2>&1); then
        eval "$output"  # exports SLURM_CONF
        output=ready
    fi
    SLURM_SANDBOX_STATE=$output "$PYTHON" -m pytest -rs -m slurm "${@:2}"
    ;;
*)
    # Two processes of one thread each, because most tests use one core. Each takes one half of the files, so that the
    # tests of a file share fixtures, and the one that is done first takes tests from the end of the other's half.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$PYTHON" -m pytest -n 2 --dist worksteal -m "not proof and not slurm" "$@"
    ;;
esac
