#!/usr/bin/env bash
# DeiT-S (Touvron et al., ICML 2021), supervised with all labels, 8 GPUs of 128 images. Published top-1: 79.9.
# Usage: DATA_ROOT=/path/to/imagenet OUTPUT=runs/deit_s \
#            bash script/recipes/deit_s.sh [flags of semi_main.py]
# The settings that are not named are the defaults, which are DeiT's.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
train --data-set IMNET --model deit_small_patch16_224 --batch-size 128 --lr 1e-3 --epochs 300 "$@"
