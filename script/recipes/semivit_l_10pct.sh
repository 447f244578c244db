#!/usr/bin/env bash
# Semi-ViT (Cai et al., NeurIPS 2022) with 10 % of the labels, 16 GPUs of 8 + 40 images (NNODES=2). Published top-1: 83.3.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt START=runs/finetuned/checkpoint.pth OUTPUT=runs/semivit_l_10pct \
#            bash script/recipes/semivit_l_10pct.sh [flags of semi_main.py]
# The paper's table leaves the augmentation and the layer decay of ViT-L open: they are those of ViT-B. START comes from
# semivit_finetune_b.sh with --model vit_large_patch16_clsgap_224 and MAE's ViT-L.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${SPLIT:?set SPLIT to the file that lists the labelled images}" "${START:?set START to the checkpoint of semivit_finetune_b.sh on the same labels}"
train --data-set SEMI-IMNET --data-split-file "$SPLIT" --unlabelDataset_exclude_labeledData \
    --model vit_large_patch16_clsgap_224 --finetune "$START" --drop-path 0.2 \
    --batch-size 48 --mu 0.166666667 --epochs 100 --steps-per-epoch 1801 --evaluate-freq 5 \
    --teacher ema --model-ema-decay 0.9999 --threshold 0.6 --semi-lambda 5 --pseudo-mixup --smoothing 0.1 \
    --opt adamw --weight-decay 0.05 --layer-decay 0.75 --lr 1e-3 --warmup-lr 0 --min-lr 1e-6 --warmup-epochs 5 \
    --sched-on-updates --mixup 0.8 --cutmix 1.0 --no-repeated-aug "$@"
