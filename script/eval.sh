#!/usr/bin/env bash
# Evaluate a checkpoint on ImageNet's val/ and print its top-1 next to the published one.
# Usage: CHECKPOINT=semiformer.pth DATA_ROOT=/path/to/imagenet bash script/eval.sh [flags of semi_main.py]
# Other settings: NGPU (number of processes, default 1), OUTPUT (folder of eval.json, default: a new temporary one).
# Exits with status 1 if top-1 on 50,000 images of 1,000 classes differs from the published one by more than 0.1.
set -euo pipefail
: "${CHECKPOINT:?set CHECKPOINT to the checkpoint file}" "${DATA_ROOT:?set DATA_ROOT to the folder that holds val/}"
here=$(cd "$(dirname "$0")/.." && pwd)
OUTPUT=${OUTPUT:-$(mktemp -d)}
PYTHON=${PYTHON:-python3}
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NGPU:-1}" "$here/semi_main.py" \
    --eval --model Semiformer_small_patch16 --data-set SEMI-IMNET --data-path "$DATA_ROOT" \
    --resume "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
"$PYTHON" - "$OUTPUT/eval.json" <<'PY'
import json, sys
got, published = json.load(open(sys.argv[1])), 75.5
print(f"ours {got['acc1']:.2f} (published 75.5)  {got['images']} images, {got['classes']} classes  -> {sys.argv[1]}")
sys.exit((got["images"], got["classes"]) == (50_000, 1_000) and abs(got["acc1"] - published) > 0.1)
PY
