"""A network with its levers of speed and memory on and off: in every form the same function."""

import importlib
import sys
from functools import partial

import torch
from trees import ROOT

from models import save_memory

sys.path.append(str(ROOT / "script"))
published = importlib.import_module("published_formulation")


def _saving(model):
    save_memory(model.to(memory_format=torch.channels_last))
    return model


def _compiled(model):
    torch._dynamo.reset()
    model.compile(backend="eager")  # what is traced is what counts; inductor takes minutes
    return model.to(memory_format=torch.channels_last)


FORMS = {
    "ours": lambda model: model,
    "published": published.as_published,
    **{f"{lever} alone": partial(published.as_published, levers=(lever,)) for lever in published.PARTS},
    "checkpointed": _saving,
    "compiled": _compiled,
}
