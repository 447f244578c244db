#!/usr/bin/env bash
# The run that reaches 75.5 %: Semiformer-S, 10 % of the labels, 600 epochs, 8 GPUs of 108 images, published settings.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt OUTPUT=runs/semiformer_s \
#            bash script/run_ddp_example.sh [flags of semi_main.py]
# Flags you add come last and override the others. NGPU (default 8) is the number of processes. COMPILE=1 and FAST=1 make
# it faster (script/faster.sh).
# When started again, it resumes from the newest checkpoint in OUTPUT.
set -euo pipefail
: "${DATA_ROOT:?set DATA_ROOT to the folder that holds train/ and val/}" "${SPLIT:?set SPLIT to the file that lists the labelled images}"
here=$(cd "$(dirname "$0")/.." && pwd)
OUTPUT=${OUTPUT:-output/semiformer_small}
source "$here/script/faster.sh"
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc_per_node="${NGPU:-8}" "$here/semi_main.py" \
    --model Semiformer_small_patch16 --data-set SEMI-IMNET --data-path "$DATA_ROOT" --data-split-file "$SPLIT" \
    --batch-size 108 --lr 1e-3 --epochs 600 --mu 0.125 --temperature 1.0 --threshold 0.7 --semi-lambda 4 \
    --semi-start-epoch 30 --pseudo-type cnn --unlabel-smooth --mixup 0 --cutmix 0 --no-repeated-aug \
    --evaluate-freq 4 --num_workers 10 --output_dir "$OUTPUT" --resume auto ${faster[@]+"${faster[@]}"} "$@"
