"""One spelling for numpy and torch: the namespace that an array belongs to, and what the two spell differently."""

import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor; both sides of a call are of one kind


def array_namespace(array: Array) -> Any:
    """`numpy` or `torch`, by the array's type; torch is never imported for a numpy caller."""
    if isinstance(array, np.ndarray | np.generic | float | int):
        return np
    return sys.modules["torch"]


def widened(array: Array) -> Array:
    """The same values in float64."""
    return np.asarray(array, np.float64) if array_namespace(array) is np else array.double()


def log_softmax_without(logits: Array, left_out: int) -> Array:
    """Log-softmax [... V] with an id ruled out; torch's own kernel takes two passes over V, the formula seven."""
    xp = array_namespace(logits)
    kept = logits.copy() if xp is np else logits.clone()
    kept[..., left_out] = -np.inf
    if xp is not np:
        return xp.log_softmax(kept, -1)
    shifted = kept - kept.max(-1)[..., None]
    return shifted - np.log(np.exp(shifted).sum(-1))[..., None]


def cast(array: Array, like: Array) -> Array:
    """The values in the type of `like`; what is rounded goes to the nearest, what becomes an id is cut off."""
    return array.astype(like.dtype) if array_namespace(array) is np else array.to(like.dtype)


def picked(values: Array, ids: Array) -> Array:
    """The entries [...] of values [... V] at ids [...]."""
    if array_namespace(values) is np:
        return np.take_along_axis(values, ids[..., None], -1)[..., 0]
    return values.gather(-1, ids[..., None])[..., 0]


def vocabulary(values: Array) -> Array:
    """The ids [V] that the last axis of values [... V] runs over."""
    xp = array_namespace(values)
    return np.arange(values.shape[-1]) if xp is np else xp.arange(values.shape[-1], device=values.device)


def softplus(x: Array) -> Array:
    """The logarithm of 1 + exp(x), whose gradient keeps x and nothing else."""
    if array_namespace(x) is np:
        return np.logaddexp(x, 0)
    softplus = sys.modules["torch"].nn.functional.softplus
    return softplus(x, threshold=80)  # above it x is taken; exp(80) still fits float32
