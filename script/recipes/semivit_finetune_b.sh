#!/usr/bin/env bash
# The start of Semi-ViT-B: MAE's ViT-B/16, fine-tuned on the labels alone, 8 GPUs of 64 images.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt START=mae_pretrain_vit_base.pth OUTPUT=runs/finetuned \
#            bash script/recipes/semivit_finetune_b.sh [flags of semi_main.py]
# The paper's table leaves mixing and augmentation open here: they are those of Semi-ViT-B.
# Other settings: those of common.sh. Ours: not run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${SPLIT:?set SPLIT to the file that lists the labelled images}" "${START:?set START to the pretrained file of MAE}"
train --data-set SEMI-IMNET --data-split-file "$SPLIT" --supervise-only \
    --model vit_base_patch16_clsgap_224 --finetune "$START" --drop-path 0.1 --batch-size 64 --epochs 100 \
    --evaluate-freq 5 --opt adamw --weight-decay 0.05 --layer-decay 0.65 --lr 5e-4 --warmup-lr 0 --min-lr 1e-6 \
    --warmup-epochs 5 --sched-on-updates --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --no-repeated-aug "$@"
