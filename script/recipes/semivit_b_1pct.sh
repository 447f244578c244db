#!/usr/bin/env bash
# Semi-ViT (Cai et al., NeurIPS 2022) with 1 % of the labels, 8 GPUs of 16 + 80 images. Published top-1: 71.0.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/one_percent.txt START=runs/finetuned/checkpoint.pth OUTPUT=runs/semivit_b_1pct \
#            bash script/recipes/semivit_b_1pct.sh [flags of semi_main.py]
# The paper's table leaves the augmentation and the steps of an epoch open: the former is DeiT's, the latter are one
# pass of the unlabelled images (1,268,356 where 12,811 are labelled).
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${SPLIT:?set SPLIT to the file that lists the labelled images}" "${START:?set START to the checkpoint of semivit_finetune_b.sh on the same labels}"
train --data-set SEMI-IMNET --data-split-file "$SPLIT" --unlabelDataset_exclude_labeledData \
    --model vit_base_patch16_clsgap_224 --finetune "$START" --drop-path 0 \
    --batch-size 96 --mu 0.166666667 --epochs 100 --steps-per-epoch 1981 --evaluate-freq 5 \
    --teacher ema --model-ema-decay 0.9999 --threshold 0.6 --semi-lambda 5 --pseudo-mixup --smoothing 0.1 \
    --opt adamw --weight-decay 0.05 --layer-decay 0.75 --lr 5e-4 --warmup-lr 0 --min-lr 1e-6 --warmup-epochs 5 \
    --sched-on-updates --mixup 0 --cutmix 0 --reprob 0 --no-repeated-aug "$@"
