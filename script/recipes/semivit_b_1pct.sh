#!/usr/bin/env bash
# Semi-ViT (Cai et al., NeurIPS 2022) with 1 % of the labels, 8 GPUs of 16 + 80 images. Published top-1: 71.0.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/one_percent.txt START=runs/finetuned/checkpoint.pth OUTPUT=runs/semivit_b_1pct \
#            bash script/recipes/semivit_b_1pct.sh [flags of semi_main.py]
# The paper's table leaves the augmentation and the steps of an epoch open: the former is DeiT's, the latter are one
# pass of the unlabelled images (1,268,356 where 12,811 are labelled).
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
train_semivit --model vit_base_patch16_clsgap_224 --drop-path 0 --batch-size 96 --steps-per-epoch 1981 \
    --threshold 0.6 --lr 5e-4 --mixup 0 --cutmix 0 --reprob 0 "$@"
