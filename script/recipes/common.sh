# Defines train(), which starts semi_main.py on all GPUs, and train_semivit(). The recipes of this folder source it.
# Settings: DATA_ROOT (folder that holds train/ and val/), OUTPUT (folder of the run), NGPU (processes of a machine,
# default 8), PYTHON (default python3); on several machines NNODES and RDZV (host:port of one of them), the same
# command on each; COMPILE=1 and FAST=1 (script/faster.sh). Flags you add come last and override the others. When started
# again, a run resumes.
: "${DATA_ROOT:?set DATA_ROOT to the folder that holds train/ and val/}" "${OUTPUT:?set OUTPUT to the folder of the run}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$here/script/faster.sh"

train() {
    local machines=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        machines=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "${RDZV:?set RDZV to host:port of one machine}")
    fi
    exec "${PYTHON:-python3}" -m torch.distributed.run "${machines[@]}" --nproc_per_node="${NGPU:-8}" \
        "$here/semi_main.py" --data-path "$DATA_ROOT" --num_workers 10 --output_dir "$OUTPUT" --resume auto \
        ${faster[@]+"${faster[@]}"} "$@"
}

# What the recipes of Semi-ViT share; their own flags follow.
train_semivit() {
    : "${SPLIT:?set SPLIT to the file that lists the labelled images}"
    : "${START:?set START to the checkpoint of semivit_finetune_b.sh on the same labels}"
    train --data-set SEMI-IMNET --data-split-file "$SPLIT" --unlabelDataset_exclude_labeledData --finetune "$START" \
        --mu 0.166666667 --epochs 100 --evaluate-freq 5 --teacher ema --model-ema-decay 0.9999 --semi-lambda 5 \
        --pseudo-mixup --smoothing 0.1 --opt adamw --weight-decay 0.05 --layer-decay 0.75 --warmup-lr 0 --min-lr 1e-6 \
        --warmup-epochs 5 --sched-on-updates --no-repeated-aug "$@"
}
