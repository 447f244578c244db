#!/usr/bin/env bash
# Set up if needed, then demonstrate the method on real handwritten digits, in minutes on two CPU cores.
# Usage: bash script/demo.sh [--seeds 0 1 2] [--output DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
source script/setup.sh
exec "$PYTHON" -m study.demo "$@"
