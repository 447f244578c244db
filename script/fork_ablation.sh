#!/usr/bin/env bash
# Start an ablation from the end of another run's supervised warm-up, so that both share it. The recipe is that of
# run_ddp_example.sh, changed by the flags you add.
# Usage: FORK=runs/base/epoch_29_checkpoint.pth OUTPUT=runs/ablation DATA_ROOT=/path/to/imagenet SPLIT=lists/fixmatch10.txt \
#            bash script/fork_ablation.sh --threshold 0.8
# When started again, it resumes from the newest checkpoint in OUTPUT. Other settings: those of run_ddp_example.sh.
set -euo pipefail
: "${FORK:?set FORK to the checkpoint to fork from, epoch_<n>_checkpoint.pth}" "${OUTPUT:?set OUTPUT to the folder of the ablation}"
export OUTPUT
if ! compgen -G "$OUTPUT/checkpoint*.pth" > /dev/null; then set -- --resume "$FORK" "$@"; fi
exec bash "$(dirname "$0")/run_ddp_example.sh" "$@"
