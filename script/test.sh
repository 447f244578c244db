#!/usr/bin/env bash
# Set up if needed, then run every test. Arguments go to pytest: bash script/test.sh -k policies
set -euo pipefail
cd "$(dirname "$0")/.."
source script/setup.sh
exec "$PYTHON" -m pytest "$@"
