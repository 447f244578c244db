"""How the reference numbers' weights and images are made (see tests/data/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def load(name):
    return np.load(DATA / name) if name.endswith(".npz") else json.loads((DATA / name).read_text())


def _value(key, shape, seed):
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape)
    if last == "running_mean":
        return 0.1 * rng.standard_normal(shape)
    if last == "running_var":
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return rng.uniform(0.8, 1.2, shape) if last.endswith("weight") else 0.02 * rng.standard_normal(shape)
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def fill(model, seed):
    """Give every tensor of the model the value its own name and the seed define; float64."""
    model.double()
    state = model.state_dict()
    filled = {k: torch.as_tensor(_value(k, tuple(v.shape), seed)).to(v.dtype) for k, v in state.items()}
    model.load_state_dict(filled)
    return model


def images(seed, n=2, size=224):
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.standard_normal((n, 3, size, size)))
