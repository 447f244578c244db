"""Exact equality of checkpoints and other nested values, for the tests and proofs that demand identical results."""

import torch


def same(one, other):
    """Whether two nested values are equal to the bit.

    Dictionaries must have the same keys in the same order, sequences the same length, tensors the same dtype, shape
    and bytes (so NaN equals NaN, and 0.0 differs from -0.0); everything must be of the same type.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if torch.is_tensor(one):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
    return one == other


def _bytes(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)
