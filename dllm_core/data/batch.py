"""Batch: what a denoiser is trained on, in torch-free arrays."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens.

    x0 int64 [B L] clean ids; xt int64 [B L] noised ids; t float32 [B L] time of each token (row-level times
    are equal along a row, block-level ones along a block); loss_mask bool [B L] tokens that count; counters int64
    [B]: which samples of the whole training these are. segment_ids int32 [B L]: a token sees its own segment only,
    None where all of a row is one. is_real bool [B L]: no token sees filler, None where there is none.
    """

    x0: NDArray[np.int64]
    xt: NDArray[np.int64]
    t: NDArray[np.float32]
    loss_mask: NDArray[np.bool_]
    counters: NDArray[np.int64]
    segment_ids: NDArray[np.int32] | None = None
    is_real: NDArray[np.bool_] | None = None

    def parts(self, rows: int | None) -> list["Batch"]:
        """Its rows in their order, `rows` in each batch and what is left in the last; None: all in one."""
        if rows is None or rows >= len(self.x0):
            return [self]
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        here = {name: array for name, array in arrays.items() if array is not None}
        starts = range(0, len(self.x0), rows)
        return [Batch(**{name: array[first : first + rows] for name, array in here.items()}) for first in starts]
