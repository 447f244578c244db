#!/usr/bin/env bash
# Semi-ViT (Cai et al., NeurIPS 2022) with 10 % of the labels, 8 GPUs of 16 + 80 images. Published top-1: 79.7.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt START=runs/finetuned/checkpoint.pth OUTPUT=runs/semivit_b_10pct \
#            bash script/recipes/semivit_b_10pct.sh [flags of semi_main.py]
# The paper's table leaves the augmentation open: it is ours, DeiT's.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
train_semivit --model vit_base_patch16_clsgap_224 --drop-path 0.1 --batch-size 96 --steps-per-epoch 1801 \
    --threshold 0.5 --lr 5e-4 --mixup 0.8 --cutmix 1.0 "$@"
