"""Run on every rank by test_end_to_end: writes which images this rank's loaders of epoch 0 give, one file a rank."""

import json
import sys
from pathlib import Path

import semi_main
import utils
from images.loading import read_batches, training_loader
from tests.trees import parse

out, *words = sys.argv[1:]
args = parse(*words)
run = semi_main.Run(args, utils.init_distributed("cpu", args.dist_url))
seen = {}
for name, views, order in (
    ("labelled", run.labelled, run.labelled_order),
    ("unlabelled", run.unlabelled, run.unlabelled_order),
):
    loader = training_loader(
        views, order, 1, len(order), seed=args.seed, epoch=0, rank=run.rank, num_workers=0, pin_memory=False, stream=0
    )
    seen[name] = [int(batch[-1]) for batch in read_batches(loader)]
Path(out, f"rank{run.rank}.json").write_text(json.dumps(seen))
