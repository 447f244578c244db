#!/usr/bin/env bash
# Published Slurm run: 1 labelled to 7 unlabelled images, 300 epochs, 2 nodes (16 GPUs).
# Usage and settings: script/submitit_common.sh
set -euo pipefail
source "$(dirname "$0")/submitit_common.sh"
submit --mu 0.125 --epochs 300 --nodes 2 "$@"
