"""Documents -> rows of fixed length. Wrap packing: one document after the other, each closed by an end token."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dllm_core.config.base import Frozen

IntRows = NDArray[np.int32]


class PackingConfig(Frozen):
    """Section `packing`."""

    type: Literal["wrap"] = "wrap"
    seq_len: int = Field(64, ge=8, le=1 << 20)


def wrap(documents: Iterable[list[int]], seq_len: int, eos_id: int) -> tuple[IntRows, IntRows]:
    """(rows [N seq_len], number of counted tokens [N]).

    Every document is followed by one end token, which counts. The last row is filled up with end tokens that
    do not.
    """
    stream = [token for document in documents for token in (*document, eos_id)]
    num_rows = -(-len(stream) // seq_len)
    rows = np.full(num_rows * seq_len, eos_id, dtype=np.int32)
    rows[: len(stream)] = stream
    counts = np.full(num_rows, seq_len, dtype=np.int32)
    if num_rows:
        counts[-1] = len(stream) - (num_rows - 1) * seq_len
    return rows.reshape(num_rows, seq_len), counts
