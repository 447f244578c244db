#!/usr/bin/env bash
# Evaluate a checkpoint on ImageNet's val/ and print its top-1 next to the published one.
# Usage: CHECKPOINT=semiformer.pth DATA_ROOT=/path/to/imagenet bash script/eval.sh [flags of semi_main.py]
# Other settings: NGPU (number of processes, default 1), OUTPUT (folder of eval.json, default: a new temporary one).
# On a GPU it first evaluates in mixed precision (eval_bf16.json), then in float32, the precision of the published figure.
# Exits with status 1 if top-1 in float32 on 50,000 images of 1,000 classes is more than 0.1 away from the published one.
set -euo pipefail
: "${CHECKPOINT:?set CHECKPOINT to the checkpoint file}" "${DATA_ROOT:?set DATA_ROOT to the folder that holds val/}"
here=$(cd "$(dirname "$0")/.." && pwd)
OUTPUT=${OUTPUT:-$(mktemp -d)}
PYTHON=${PYTHON:-python3}
evaluate() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NGPU:-1}" "$here/semi_main.py" \
        --eval --model Semiformer_small_patch16 --data-set SEMI-IMNET --data-path "$DATA_ROOT" \
        --resume "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
}
evaluate "$@"
amp=$("$PYTHON" - "$OUTPUT/eval.json" <<< 'import json, sys; print(json.load(open(sys.argv[1]))["amp"])')
if [ -n "$amp" ] && [ "$amp" != off ]; then
    mv "$OUTPUT/eval.json" "$OUTPUT/eval_$amp.json"
    evaluate "$@" --amp off
fi
"$PYTHON" - "$OUTPUT" "$amp" <<'PY'
import json, sys
folder, amp = sys.argv[1:]
if amp != "off":
    print(f"ours in {amp} {json.load(open(f'{folder}/eval_{amp}.json'))['acc1']:.2f}")
got = json.load(open(f"{folder}/eval.json"))
print(f"ours {got['acc1']:.2f} (published 75.5)  {got['images']} images, {got['classes']} classes  -> {folder}/eval.json")
sys.exit((got["images"], got["classes"]) == (50_000, 1_000) and abs(got["acc1"] - 75.5) > 0.1)
PY
