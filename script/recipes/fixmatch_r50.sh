#!/usr/bin/env bash
# FixMatch (Sohn et al., NeurIPS 2020) with ResNet-50 and 100,000 labels, from scratch, 8 GPUs of 4 + 28 images.
# Published top-1 (TorchSSL): 56.34.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/100k.txt OUTPUT=runs/fixmatch_r50 \
#            bash script/recipes/fixmatch_r50.sh [flags of semi_main.py]
# TorchSSL's cosine ends at cos(7 pi / 16) of the rate; this one ends at 0.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${SPLIT:?set SPLIT to the file that lists the labelled images}"
train --data-set SEMI-IMNET --data-split-file "$SPLIT" --model resnet50 --drop-path 0 \
    --batch-size 32 --mu 0.125 --epochs 1000 --steps-per-epoch 2000 --evaluate-freq 10 --labelled-view weak \
    --threshold 0.95 --semi-lambda 1 --model-ema-decay 0.999 --smoothing 0 --mixup 0 --cutmix 0 --no-repeated-aug \
    --opt sgd --momentum 0.9 --weight-decay 3e-4 --lr 0.03 --warmup-epochs 0 --min-lr 0 --sched-on-updates "$@"
