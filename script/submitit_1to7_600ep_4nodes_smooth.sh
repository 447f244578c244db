#!/usr/bin/env bash
# Published Slurm run: 1 labelled to 7 unlabelled images, 600 epochs, 4 nodes (32 GPUs), unlabelled smoothing.
# Usage and settings: script/submitit_common.sh
set -euo pipefail
source "$(dirname "$0")/submitit_common.sh"
submit --mu 0.125 --epochs 600 --nodes 4 --lr 1e-3 --unlabel-smooth "$@"
