# Defines train(), which starts semi_main.py on all GPUs. The recipes of this folder source it.
# Settings: DATA_ROOT (folder that holds train/ and val/), OUTPUT (folder of the run), NGPU (processes of a machine,
# default 8), PYTHON (default python3); on several machines NNODES and RDZV (host:port of one of them), the same
# command on each. Flags you add come last and override the others. When started again, a run resumes.
: "${DATA_ROOT:?set DATA_ROOT to the folder that holds train/ and val/}" "${OUTPUT:?set OUTPUT to the folder of the run}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

train() {
    local machines=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        machines=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "${RDZV:?set RDZV to host:port of one machine}")
    fi
    exec "${PYTHON:-python3}" -m torch.distributed.run "${machines[@]}" --nproc_per_node="${NGPU:-8}" \
        "$here/semi_main.py" --data-path "$DATA_ROOT" --num_workers 10 --output_dir "$OUTPUT" --resume auto "$@"
}
