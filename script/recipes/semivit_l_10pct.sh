#!/usr/bin/env bash
# Semi-ViT (Cai et al., NeurIPS 2022) with 10 % of the labels, 16 GPUs of 8 + 40 images (NNODES=2). Published top-1: 83.3.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt START=runs/finetuned/checkpoint.pth OUTPUT=runs/semivit_l_10pct \
#            bash script/recipes/semivit_l_10pct.sh [flags of semi_main.py]
# The paper's table leaves the augmentation and the layer decay of ViT-L open: they are those of ViT-B. START comes from
# semivit_finetune_b.sh with --model vit_large_patch16_clsgap_224 and MAE's ViT-L.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
train_semivit --model vit_large_patch16_clsgap_224 --drop-path 0.2 --batch-size 48 --steps-per-epoch 1801 \
    --threshold 0.6 --lr 1e-3 --mixup 0.8 --cutmix 1.0 "$@"
