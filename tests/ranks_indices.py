"""Run on every rank by test_end_to_end: writes which images this rank's loaders of epoch 0 give, one file a rank."""

import json
import sys
from pathlib import Path

import semi_main
import utils
from tests.trees import parse, training_batches

out, *words = sys.argv[1:]
args = parse(*words)
run = semi_main.Run(args, utils.init_distributed("cpu", args.dist_url))
seen = {}
for name, views, order in (
    ("labelled", run.labelled, run.labelled_order),
    ("unlabelled", run.unlabelled, run.unlabelled_order),
):
    batches = training_batches(views, order, 1, len(order), seed=args.seed, rank=run.rank)
    seen[name] = [int(batch[-1]) for batch in batches]
Path(out, f"rank{run.rank}.json").write_text(json.dumps(seen))
