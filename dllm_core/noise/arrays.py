"""One spelling for numpy and torch: the namespace that an array belongs to."""

import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor; both sides of a call are of one kind


def array_namespace(array: Array) -> Any:
    """`numpy` or `torch`, by the array's type; torch is never imported for a numpy caller."""
    if isinstance(array, np.ndarray | np.generic | float | int):
        return np
    return sys.modules["torch"]
