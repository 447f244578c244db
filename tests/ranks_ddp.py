"""Run on every rank by test_ranks: gradients of two batches under DDP, eager and compiled, and whether DDP warned."""

import json
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from torch._dynamo.backends.registry import lookup_backend

import semi_main
import utils
from models import build_model, channels_last, enable_grad_checkpointing
from tests.trees import parse

out, meeting = sys.argv[1:]
torch.manual_seed(0)
device = utils.init_distributed("cpu", meeting)
world, rank = utils.world_and_rank()
networks, images = {}, torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)[:, rank::2]
graphs = {}
plain = channels_last(build_model("Semiformer_micro_patch16", 10, 32).double())
for checkpointed in (False, True):
    base = deepcopy(plain)
    if checkpointed:
        enable_grad_checkpointing(base)
    for compiled in (False, True):
        name, model = f"{checkpointed} {compiled}", deepcopy(base)
        torch._dynamo.reset()
        if compiled:
            graphs[str(checkpointed)] = 0

            def backend(graph, inputs, key=str(checkpointed)):
                graphs[key] += 1
                return lookup_backend("aot_eager")(graph, inputs)

            words = ["--compile", "--grad-checkpointing"] if checkpointed else ["--compile"]
            semi_main.compile_network(parse(*words), model, backend=backend)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = semi_main._distributed(model, device)
            with wrapped.no_sync():
                sum(x.square().sum() for x in wrapped(images[0])).backward()
            sum(x.square().sum() for x in wrapped(images[1])).backward()
        networks[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        # aot_eager lays out gradients by itself
        assert compiled or not [w for w in caught if "strides" in str(w.message)]
eager = networks["False False"]
largest = max(float(g.abs().max()) for g in eager.values())
differences = {
    name: max(float((eager[key] - g).abs().max()) for key, g in gradients.items()) / largest
    for name, gradients in networks.items()
}
same = {name: list(gradients) == list(eager) for name, gradients in networks.items()}
Path(out, f"rank{rank}.json").write_text(json.dumps({"differences": differences, "same": same, "graphs": graphs}))
utils.leave_group()
