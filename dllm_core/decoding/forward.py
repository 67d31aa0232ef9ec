"""One forward over the rows of a tick: what each reads, and the logits at its open positions."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dllm_core.decoding.state import DecodeState, Span
from dllm_core.model.cache import KeyValueStore, sent
from dllm_core.model.denoiser import Denoiser, Part

_PAD_TO = 16  # few lengths, so few shapes; and no matrix product has fewer rows than `Denoiser` asks for
_PAD_KEPT_TO = 8  # beside kept keys the denoiser itself sees to its rows


@dataclass(frozen=True)
class Pass:
    """A row's part in a forward. is_blind: all that was given is masked; `config.guidance` leads away from that."""

    state: DecodeState
    span: Span
    slot: int | None
    is_blind: bool

    @property
    def width(self) -> int:
        """Positions that it takes; a single one beside kept ones needs no padding, and a few need less."""
        if self.span.needs_keys and self.span.width == 1:
            return 1
        return padded_length(self.span.width, _PAD_TO if self.slot is None else _PAD_KEPT_TO)


def passes_of(state: DecodeState, store: KeyValueStore | None) -> list[Pass]:
    """What a row's next call takes: one pass, and a blind one under guidance."""
    passes = []
    for is_blind, slot in enumerate(state.slots or (None,) * state.num_passes):
        kept = 0 if store is None or slot is None else int(store.lengths[slot])
        passes.append(Pass(state, state.span(kept), slot, bool(is_blind)))
    return passes


def padded_length(length: int, to: int = _PAD_TO) -> int:
    """The positions that a row of this length takes in a forward."""
    return -(-length // to) * to


def forwards(
    denoiser: Denoiser, rows: Sequence[DecodeState], store: KeyValueStore | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Which rows, and fp32 logits [n V] at the open positions of each one's current block, row after row.

    Grouped by padded width, so that a row's own span alone decides its padding: one that is padded to its longest
    neighbour would be summed in another order, and exact ties of confidence, which a canvas of masks is full of, would
    fall another way. An answer would depend on its neighbours in its last bit. Groups go through the denoiser together
    where it can join them, else one by one.
    """
    groups = defaultdict[tuple[int, bool], list[tuple[int, Pass]]](list)
    for i, row in enumerate(rows):
        for one in passes_of(row, store):
            groups[one.width, one.slot is not None].append((i, one))
    in_order = [
        (width, sorted(group, key=lambda item: (item[1].state.slots, item[0], item[1].is_blind)))  # as they are kept
        for (width, _), group in sorted(groups.items(), key=lambda item: item[0])
    ]
    joins = len(in_order) > 1 and getattr(denoiser, "can_join", False)
    for some in [in_order] if joins else [[one] for one in in_order]:
        passes = [[one for _, one in group] for _, group in some]
        parts = [_part(denoiser, own, width, store) for own, (width, _) in zip(passes, some, strict=True)]
        logits = _logits(denoiser, passes, parts)
        yield (
            [i for _, group in some for i, one in group if not one.is_blind],
            _guided(logits, [one for own in passes for one in own]),
        )


def _part(denoiser: Denoiser, passes: Sequence[Pass], width: int, store: KeyValueStore | None) -> Part:
    """What passes of one width show the denoiser."""
    mask_id, pad_id = denoiser.config.mask_id, denoiser.config.pad_id
    ids = np.full((len(passes), width), pad_id, dtype=np.int64)
    is_real = np.zeros((len(passes), width), dtype=bool)
    read = []
    for i, one in enumerate(passes):
        ids[i, : one.span.width] = one.state.input_ids(mask_id, one.span, is_blind=one.is_blind)
        is_real[i, : one.span.width] = True
        read.append(i * width + one.state.open_in_block() - one.span.begin)
    cache, slots = None, [one.slot for one in passes if one.slot is not None]
    if store is not None and slots:
        is_full = passes[0].state.pattern.kind == "full"
        cache = store.rows(slots, [one.span.begin for one in passes] if is_full else None)
    device = denoiser.device
    real = torch.from_numpy(is_real) if cache is not None else sent(is_real, device)
    return Part(sent(ids, device), real, sent(np.concatenate(read), device), cache)


def _logits(denoiser: Denoiser, passes: Sequence[Sequence[Pass]], parts: Sequence[Part]) -> Tensor:
    """One forward: fp32 [n V] at the open positions of each pass's current block, pass after pass."""
    pattern = passes[0][0].state.pattern
    if len(parts) > 1:
        logits = denoiser.together(parts, pattern)
    else:
        when = {}
        if denoiser.config.model.time_conditioning:
            when["t"] = sent(np.array([one.state.times[1] for one in passes[0]], np.float32), denoiser.device)
        part = parts[0]
        logits = denoiser(part.input_ids, part.is_real, part.read, pattern=pattern, cache=part.cache, **when)
    for own, part in zip(passes, parts, strict=True):
        if part.cache is not None and pattern.kind != "full":
            part.cache.commit([one.state.settled_stop - one.span.begin for one in own])
    return logits.float()


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
