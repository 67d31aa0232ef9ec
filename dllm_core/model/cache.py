"""KeyValueStore: keys and values of positions that no later call changes, so that a forward computes new ones only.

Exact under `causal`, and under `block_causal` where whole blocks are kept: there nothing sees what stands behind it (or
its block), so a kept key is the one that a whole forward would compute. Under `full` attention every key changes with
every token: there a forward over a part of a row writes over that part's keys and takes the others as they were, which
is exact where no token has changed since they were computed, and an approximation else.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_core.model.config import ModelConfig
from dllm_core.model.pattern import AttentionPattern
from dllm_core.seeding import Ints

_PAD_TO = 16  # keys are read in multiples of it: few shapes, and a softmax that sums in one order however many follow
_PAD_TO_ON_GPU = 128  # fewer shapes still, for each is recorded: `model/recorder.py`
_MIN_QUERIES = 4  # a CPU's product of one or two rows takes other kernels, which sum in another order


class KeyValueStore:
    """Slots [layers, 2, rows, kv_heads, capacity, head_dim]: one a row, taken and released; rows and capacity grow.

    A layer's keys stand turned to their positions (RoPE), its values as they are.
    """

    def __init__(
        self,
        model: ModelConfig,
        rows: int = 0,
        capacity: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._pad_to = _PAD_TO if torch.device(device).type == "cpu" else _PAD_TO_ON_GPU
        shape = (model.layers, 2, rows, model.num_kv_heads, self.padded(capacity), model.head_dim)
        # Zeros: what no query sees has weight 0, but 0 times a stray NaN is NaN.
        self.slots = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths: Ints = np.zeros(rows, np.int64)
        self.written: Ints = np.zeros(rows, np.int64)
        self._free = list(range(rows))  # a heap: rows that come together lie together, and need not be gathered

    @property
    def capacity(self) -> int:
        """Positions that a slot holds."""
        return self.slots.shape[4]

    def take(self, capacity: int) -> int:
        """A free slot with room for so many positions, empty. What is too small is copied into twice the room."""
        rows, held = len(self.lengths), self.capacity
        grown = max(2 * rows, 1) if not self._free else rows
        deeper = max(2 * held, self.padded(capacity)) if capacity > held else held
        if (grown, deeper) != (rows, held):
            old = self.slots
            self.slots = old.new_zeros((*old.shape[:2], grown, old.shape[3], deeper, old.shape[5]))
            self.slots[:, :, :rows, :, :held] = old
            self.lengths, self.written = (np.pad(part, (0, grown - rows)) for part in (self.lengths, self.written))
            self._free += range(rows, grown)  # still a heap
        return heapq.heappop(self._free)

    def padded(self, length: int) -> int:
        """How many positions' keys are read, where so many are wanted."""
        return -(-length // self._pad_to) * self._pad_to

    def release(self, slot: int, *, is_spoilt: bool = False) -> None:
        """Forget a row. is_spoilt: what was kept may be no number, and must not meet the weight 0 of an unseen key."""
        if is_spoilt:
            self.slots[:, :, slot] = 0
        self.lengths[slot] = self.written[slot] = 0
        heapq.heappush(self._free, slot)

    def rows(self, slots: Sequence[int], begins: Sequence[int] | None = None) -> "KeyValues":
        """The rows of one forward, in this order. begins: under `full`, where its positions stand in each row."""
        return KeyValues(self, np.array(slots, np.int64), None if begins is None else np.array(begins, np.int64))


class KeyValues:
    """The rows of a forward in a store. lengths int64 [B]: positions that are kept of each.

    A forward reads what is kept and changes nothing of it: its own keys and values lie behind, where the next forward
    overwrites them, unless `commit` keeps them. Under `full` its positions begin where that is said, their keys and
    values take the place of those that stood there, and all are kept.
    """

    def __init__(self, store: KeyValueStore, slots: Ints, begins: Ints | None = None) -> None:
        self._store, self._slots, self._begins = store, slots, begins

    @property
    def lengths(self) -> Ints:
        """Kept positions of each row [B]."""
        return self._store.lengths[self._slots]

    def commit(self, counts: Ints | Sequence[int]) -> None:
        """Keep the first counts[i] of the positions that the last forward gave row i; the others are forgotten.

        Raises ValueError for more than there were. The caller vouches that no later token is seen by what is kept:
        under `block_causal`, that blocks are whole.
        """
        counts = np.asarray(counts, np.int64)
        if (counts < 0).any() or (counts > self._store.written[self._slots]).any():
            raise ValueError(f"commit: {counts.tolist()} of {self._store.written[self._slots].tolist()} new positions")
        self._store.lengths[self._slots] += counts
        self._store.written[self._slots] = 0

    def open(self, pattern: AttentionPattern, width: int, is_real: Tensor | None = None) -> "NewPositions":
        """Room for a forward's `width` positions, of which is_real bool [B width] says which are; padding stands at the
        end. It is behind what is kept, and under `full` where these rows begin.

        Raises ValueError for a pattern without kept keys, rows that do not say where they begin or do so behind what is
        kept, padding elsewhere and more than the slots hold.
        """
        store, device = self._store, self._store.slots.device
        if pattern.kind not in ("causal", "block_causal", "full"):
            raise ValueError(f"cache: under {pattern.kind} attention no key is kept")
        if (pattern.kind == "full") != (self._begins is not None):
            raise ValueError("cache: under full attention, and nowhere else, rows say where positions begin")
        if self._begins is not None and (self._begins > self.lengths).any():
            raise ValueError(f"cache: {self._begins.tolist()} lie behind the {self.lengths.tolist()} kept positions")
        counts = np.full(len(self._slots), width)
        if is_real is not None:
            real = is_real.cpu().numpy()
            counts = real.sum(1)
            if (real != (np.arange(width) < counts[:, None])).any():
                raise ValueError("cache: padding of new positions must stand at the end")
        begins = self.lengths if self._begins is None else self._begins
        totals = np.maximum(self.lengths, begins + counts)
        longest = store.padded(int(totals.max(initial=1)))
        if longest > store.capacity:
            raise ValueError(f"cache: {int(totals.max())} positions exceed the capacity of {store.capacity}")
        if self._begins is None:
            store.written[self._slots] = counts
        else:
            store.lengths[self._slots] = totals
        row, column = np.nonzero(np.arange(width) < counts[:, None])
        first = int(self._slots[0]) if len(self._slots) else 0
        is_run = bool((self._slots == first + np.arange(len(self._slots))).all())

        offsets = sent(begins[:, None] + np.arange(max(width, _MIN_QUERIES)), device)
        keys, block = torch.arange(longest, device=device), pattern.block_length or 1
        stops = sent(np.maximum(totals, 1), device)  # an empty row's queries see something too
        sees = (keys < stops[:, None, None]).repeat(1, offsets.shape[1], 1)
        if pattern.kind != "full":
            sees &= keys // block <= offsets[:, :, None] // block
        return NewPositions(
            slots=store.slots[..., :longest, :],
            rows=slice(first, first + len(self._slots)) if is_run else sent(self._slots, device),
            offsets=offsets[:, :width].clamp(max=longest - 1),  # padding may stand behind the last slot
            attention=store.slots.new_zeros(sees.shape).masked_fill_(~sees, -torch.inf)[:, None],
            at=(sent(self._slots[row], device), sent(begins[row] + column, device)),
            of=(sent(row, device), sent(column, device)),
        )


@dataclass(frozen=True)
class NewPositions:
    """Where a forward's new keys and values go, and what its queries see.

    slots [layers 2 rows G K d]; offsets int64 [B n]: positions counted from a row's first; attention, as exact as slots
    are, [B 1 n|4 K]: 0 where a query sees a key, else -inf; at: (slot, offset) and of: (row, column) of each real new
    position [m].
    """

    slots: Tensor
    rows: slice | Tensor
    offsets: Tensor
    attention: Tensor
    at: tuple[Tensor, Tensor]
    of: tuple[Tensor, Tensor]

    @property
    def reach(self) -> int:
        """Positions K that there are keys for."""
        return self.slots.shape[4]

    def layer(self, number: int) -> "LayerKeyValues":
        """One layer's part of them."""
        return LayerKeyValues(self, number)


@dataclass(frozen=True)
class LayerKeyValues:
    """One layer's slots during a forward."""

    new: NewPositions
    number: int

    @property
    def num_rows(self) -> int:
        """Rows that have slots; rows of a batch behind them are padding."""
        return len(self.new.offsets)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [B G n d] -> kept and new ones together [B G K d] each."""
        slots = self.new.slots[self.number]
        (slot, offset), (row, column) = self.new.at, self.new.of
        slots[:, slot, :, offset] = torch.stack([keys, values]).permute(1, 3, 0, 2, 4)[row, column].to(slots.dtype)
        both = slots[:, self.new.rows].to(keys.dtype)
        return both[0], both[1]


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device. A GPU is not waited for: it has its own copy of the bytes before this is over."""
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
