# Defines submit(), which submits a job with the settings that the five published Slurm runs share and its arguments.
# The scripts submitit_<run>.sh source it.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt bash script/submitit_<run>.sh [flags]
# Flags you add come last and override the others, e.g. --local. Other settings: PARTITION (default learnfair; empty for
# the cluster's default), SHARED_FOLDER (for the job folders, default output/jobs), COMMENT, PYTHON (default python3);
# COMPILE=1 and FAST=1 make it faster (script/faster.sh).
: "${DATA_ROOT:?set DATA_ROOT to the folder that holds train/ and val/}" "${SPLIT:?set SPLIT to the file that lists the labelled images}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/script/faster.sh"

submit() {
    exec "${PYTHON:-python3}" "$here/run_with_submitit.py" \
        --partition "${PARTITION-learnfair}" --shared_folder "${SHARED_FOLDER:-}" --comment "${COMMENT:-}" \
        --model Semiformer_small_patch16 --data-set SEMI-IMNET --data-path "$DATA_ROOT" --data-split-file "$SPLIT" \
        --batch-size 108 --lr 1e-3 --temperature 1.0 --threshold 0.7 --semi-lambda 4 --semi-start-epoch 30 \
        --pseudo-type cnn --mixup 0 --cutmix 0 --no-repeated-aug --evaluate-freq 10 --num_workers 10 \
        ${faster[@]+"${faster[@]}"} "$@"
}
