"""A network with its optimizations of speed and memory on and off: every form computes the same function."""

from functools import partial

import torch

from benchmarks import published_formulation as published
from models import enable_grad_checkpointing


def _saving(model):
    enable_grad_checkpointing(model.to(memory_format=torch.channels_last))
    return model


def _compiled(model):
    torch._dynamo.reset()
    model.compile(backend="eager")  # what is traced is what counts; inductor takes minutes
    return model.to(memory_format=torch.channels_last)


FORMS = {
    "ours": lambda model: model,
    "published": published.as_published,
    **{f"{name} alone": partial(published.as_published, optimizations=(name,)) for name in published.PARTS},
    "checkpointed": _saving,
    "compiled": _compiled,
}
