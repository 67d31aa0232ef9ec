"""One forward over the rows of a tick: what each reads, and the logits at its open positions."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dllm_core.decoding.state import DecodeState, Span
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser

_PAD_TO = 16  # few lengths, so few forwards; and no matrix product has fewer rows than `Denoiser` asks for


@dataclass(frozen=True)
class Pass:
    """A row's part in a forward. is_blind: all that was given is masked; `config.guidance` leads away from that."""

    state: DecodeState
    span: Span
    slot: int | None
    is_blind: bool

    @property
    def width(self) -> int:
        """Positions that it takes; a single one beside kept ones needs no padding."""
        return 1 if self.span.needs_keys and self.span.width == 1 else padded_length(self.span.width)


def passes_of(state: DecodeState, store: KeyValueStore | None) -> list[Pass]:
    """What a row's next call takes: one pass, and a blind one under guidance."""
    passes = []
    for is_blind, slot in enumerate(state.slots or (None,) * state.num_passes):
        kept = 0 if store is None or slot is None else int(store.lengths[slot])
        passes.append(Pass(state, state.span(kept), slot, bool(is_blind)))
    return passes


def padded_length(length: int) -> int:
    """The positions that a row of this length takes in a forward."""
    return -(-length // _PAD_TO) * _PAD_TO


def forwards(
    denoiser: Denoiser, rows: Sequence[DecodeState], store: KeyValueStore | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Which rows, and fp32 logits [n V] at the open positions of each one's current block, row after row.

    One forward for each padded width, so that a row's own span alone decides its padding: one that is padded to its
    longest neighbour would be summed in another order, and exact ties of confidence, which a canvas of masks is full
    of, would fall another way. An answer would depend on its neighbours in its last bit.
    """
    groups = defaultdict[tuple[int, bool], list[tuple[int, Pass]]](list)
    for i, row in enumerate(rows):
        for one in passes_of(row, store):
            groups[one.width, one.slot is not None].append((i, one))
    for (width, has_slots), group in sorted(groups.items(), key=lambda item: item[0]):
        passes = [one for _, one in group]
        logits = _logits(denoiser, passes, width, store if has_slots else None)
        yield [i for i, one in group if not one.is_blind], _guided(logits, passes)


def _logits(denoiser: Denoiser, passes: Sequence[Pass], width: int, store: KeyValueStore | None) -> Tensor:
    """One forward: fp32 [n V] at the open positions of each pass's current block, pass after pass."""
    mask_id, pad_id = denoiser.config.mask_id, denoiser.config.pad_id
    pattern = passes[0].state.pattern
    ids = np.full((len(passes), width), pad_id, dtype=np.int64)
    is_real = np.zeros((len(passes), width), dtype=bool)
    read = np.zeros((len(passes), width), dtype=bool)
    for i, one in enumerate(passes):
        ids[i, : one.span.width] = one.state.input_ids(mask_id, one.span, is_blind=one.is_blind)
        is_real[i, : one.span.width] = True
        read[i, one.state.open_in_block() - one.span.begin] = True
    given = [torch.from_numpy(part).to(denoiser.device) for part in (ids, is_real, read)]
    cache = None
    if store is not None:
        begins = [one.span.begin for one in passes] if pattern.kind == "full" else None
        cache = store.rows([one.slot for one in passes if one.slot is not None], begins)
    when = {}
    if denoiser.config.model.time_conditioning:
        when["t"] = torch.tensor([one.state.times[1] for one in passes], device=denoiser.device)
    logits: Tensor = denoiser(*given, pattern=pattern, cache=cache, **when).float()
    if cache is not None and pattern.kind != "full":
        cache.commit([one.state.settled_stop - one.span.begin for one in passes])
    return logits


def _guided(logits: Tensor, passes: Sequence[Pass]) -> Tensor:
    """Logits [n V] of the passes that see, led away from the blind ones: blind + (1 + w) (seen - blind).

    Classifier-free guidance without a trained unconditional model: SMDM, arXiv:2410.18514, section 4; LLaDA's
    `cfg_scale`. Its blind pass masks what was given.
    """
    if not any(one.is_blind for one in passes):
        return logits
    counts = [len(one.state.open_in_block()) for one in passes]
    parts = torch.split(logits, counts)
    seen = []
    for part, one, behind, blind in zip(parts, passes, [*passes[1:], None], [*parts[1:], None], strict=True):
        if one.is_blind:
            continue
        if behind is None or blind is None or not behind.is_blind:
            seen.append(part)
            continue
        seen.append(blind + (1 + one.state.request.config.guidance) * (part - blind))
    return torch.cat(seen)
