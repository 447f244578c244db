#!/usr/bin/env bash
# FlexMatch (Zhang et al., NeurIPS 2021) with ResNet-50 and 100,000 labels, from scratch, 8 GPUs of 4 + 28 images.
# Published top-1 (TorchSSL): 58.15.
# Usage: DATA_ROOT=/path/to/imagenet SPLIT=lists/100k.txt OUTPUT=runs/flexmatch_r50 \
#            bash script/recipes/flexmatch_r50.sh [flags of semi_main.py]
# The settings are those of fixmatch_r50.sh. Ours: not run.
set -euo pipefail
exec bash "$(dirname "$0")/fixmatch_r50.sh" --confidence flex "$@"
