"""When two checkpoints are the same: what the proofs and the tests of an exact resume ask."""

import torch


def same(one, other):
    """Whether two checkpoints' contents are equal to the bit: keys and their order, types and values of tensors."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other
