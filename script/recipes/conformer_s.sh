#!/usr/bin/env bash
# Conformer-S (Peng et al., ICCV 2021), supervised with all labels, 8 GPUs of 128 images. Published top-1: 83.4.
# Usage: DATA_ROOT=/path/to/imagenet OUTPUT=runs/conformer_s \
#            bash script/recipes/conformer_s.sh [flags of semi_main.py]
# The settings that are not named are the defaults, which are DeiT's.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
train --data-set IMNET --model Conformer_small_patch16 --batch-size 128 --lr 1e-3 --epochs 300 "$@"
