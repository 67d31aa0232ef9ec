"""Masks of an exact number: k of a unit's n counted tokens, whose nats weigh n / k.

The mean over k, even over 1 to n, is the bound's integral over t under every schedule, because that of
t^(k-1) (1-t)^(n-k) over all masks of k is 1/k each. It has less spread than masks drawn at a time, since no t close to
0 is weighed by 1/t. LLaDA, arXiv:2502.09992, eq. 6.
"""

import numpy as np

from dllm_core.seeding import Bools, Doubles, Ints


def exact_counts(counted: Bools, units: Ints, shares: Doubles, u: Doubles) -> tuple[Bools, Doubles]:
    """(is_masked [N L], the weight n / k of each mask [number of masks], row by row).

    counted bool [N L]: tokens that may be masked; units [N L]: which unit (row, block, document) of its row a token is
    of, below K; shares [N K] in [0, 1): k is 1 + floor(n share) in each unit; u [N L]: the k smallest are masked.
    """
    unit = (units + shares.shape[1] * np.arange(len(units))[:, None])[counted]
    total = np.bincount(unit, minlength=shares.size)
    wanted = 1 + np.floor(total * shares.ravel()).astype(np.int64)  # share < 1: at most n
    order = np.lexsort((u[counted], unit))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - (np.cumsum(total) - total)[unit[order]]
    is_masked = np.zeros_like(counted)
    is_masked[counted] = rank < wanted[unit]
    return is_masked, (total / wanted)[unit][is_masked[counted]]
