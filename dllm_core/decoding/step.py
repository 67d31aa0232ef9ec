"""One denoiser call over the rows of a tick: which token each open position would take, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dllm_core.decoding.state import DecodeState
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.process import NoiseProcess
from dllm_core.seeding import Floats, Ints

_PAD_TO = 16  # few lengths, so few forwards; and no matrix product has fewer rows than `Denoiser` asks for


@dataclass(frozen=True)
class Proposal:
    """For one row: positions int64 [n] of the open ones in its block, their tokens [n] and confidence [n]."""

    positions: Ints
    tokens: Ints
    confidence: Floats


@torch.inference_mode()
def propose(
    denoiser: Denoiser,
    process: NoiseProcess,
    rows: Sequence[DecodeState],
    eos_id: int,
    pad_id: int,
    store: KeyValueStore | None = None,
) -> list[Proposal]:
    """One forward for each padded length among the rows, so that a row's own length alone decides its padding.

    A row padded to its longest neighbour would be summed in another order, and exact ties of confidence, which a
    canvas of masks is full of, would fall another way: an answer would depend on its neighbours in its last bit.

    store: where every row keeps what is settled. Then a forward reads what stands behind that, which is what counts as
    a row's length, and what it settles is kept in turn.
    """
    proposals: dict[int, Proposal] = {}
    kept = [0 if store is None or row.slot is None else int(store.lengths[row.slot]) for row in rows]
    widths = [_width(row, n) for row, n in zip(rows, kept, strict=True)]
    for width in sorted(set(widths)):
        at = [i for i, own in enumerate(widths) if own == width]
        chosen, begins = [rows[i] for i in at], [kept[i] for i in at]
        logits = _logits(denoiser, chosen, begins, width, store)
        proposals.update(zip(at, _choose(logits, process, chosen, eos_id, pad_id), strict=True))
    return [proposals[i] for i in range(len(rows))]


def padded_length(length: int) -> int:
    """The positions that a row of this length takes in a forward."""
    return -(-length // _PAD_TO) * _PAD_TO


def _width(row: DecodeState, kept: int) -> int:
    """Positions that a row takes in a forward; a single one behind what is kept needs no padding."""
    length = row.read_stop - kept
    return 1 if kept and length == 1 else padded_length(length)


def _logits(
    denoiser: Denoiser, rows: Sequence[DecodeState], kept: Sequence[int], width: int, store: KeyValueStore | None
) -> Tensor:
    """One forward: fp32 [n V] at the open positions of each row's current block, row after row."""
    mask_id, pad_id = denoiser.config.mask_id, denoiser.config.pad_id
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    is_real = np.zeros((len(rows), width), dtype=bool)
    read = np.zeros((len(rows), width), dtype=bool)
    for i, (row, begin) in enumerate(zip(rows, kept, strict=True)):
        new = row.input_ids(mask_id)[begin:]
        ids[i, : len(new)] = new
        is_real[i, : len(new)] = True
        read[i, row.open_in_block() - begin] = True
    given = [torch.from_numpy(part).to(denoiser.device) for part in (ids, is_real, read)]
    cache = None if store is None else store.rows([row.slot for row in rows if row.slot is not None])
    when = {}
    if denoiser.config.model.time_conditioning:
        when["t"] = torch.tensor([row.times[1] for row in rows], device=denoiser.device)
    logits: Tensor = denoiser(*given, pattern=rows[0].pattern, cache=cache, **when).float()
    if cache is not None:
        cache.commit([row.settled_stop - begin for row, begin in zip(rows, kept, strict=True)])
    return logits


def _choose(
    logits: Tensor, process: NoiseProcess, rows: Sequence[DecodeState], eos_id: int, pad_id: int
) -> list[Proposal]:
    """The tokens of logits [n V] at the open positions of the rows' current blocks."""
    device = logits.device
    positions = [row.open_in_block() for row in rows]
    of_row = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in positions])).to(device)
    logits[:, pad_id] = -torch.inf  # no answer holds padding; the process itself rules the mask out
    holes = torch.tensor([bool(row.request.suffix) for row in rows], device=device)
    logits[:, eos_id] = torch.where(holes[of_row], -torch.inf, logits[:, eos_id])
    log_probs: Tensor = process.x0_log_probs(logits)
    tokens = log_probs.argmax(-1)
    hot = np.array([row.request.config.temperature > 0 for row in rows])
    is_hot = torch.from_numpy(hot).to(device)[of_row]
    if rows[0].is_ancestral:
        probs = _reverse_step(log_probs, process, rows, of_row, is_hot)
        draws = np.concatenate([row.fine_uniforms(at) for row, at in zip(rows, positions, strict=True)])
        tokens = _inverted(probs, torch.from_numpy(draws).to(device))
        log_probs = probs.log()
    elif hot.any():
        draws = np.concatenate([row.uniforms(at) for row, at in zip(rows, positions, strict=True)])
        ranked, order = _ranked(log_probs, rows, of_row)
        drawn = order.gather(-1, _inverted(ranked, torch.from_numpy(draws).to(device))[:, None])[:, 0]
        tokens = torch.where(is_hot, drawn, tokens)
    confidence = log_probs.gather(-1, tokens[:, None])[:, 0].exp()
    packed = torch.stack([tokens.double(), confidence.double()]).cpu().numpy()  # one transfer; ids are exact
    splits = np.cumsum([len(part) for part in positions])[:-1]
    return [
        Proposal(at, part[0].astype(np.int64), part[1].astype(np.float32))
        for at, part in zip(positions, np.split(packed, splits, axis=1), strict=True)
    ]


def _reverse_step(
    log_probs: Tensor, process: NoiseProcess, rows: Sequence[DecodeState], of_row: Tensor, is_hot: Tensor
) -> Tensor:
    """The law of each open position a step of the reverse process on, fp64 [n V]: `posterior` of the denoiser's law.

    Temperature and top_p shape that law, and temperature 0 takes its likeliest token; the noise is drawn all the same.
    """
    ranked, order = _ranked(log_probs, rows, of_row)
    drawn = torch.zeros_like(ranked).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))
    surest = functional.one_hot(log_probs.argmax(-1), log_probs.shape[-1]).double()
    xt = torch.from_numpy(np.concatenate([row.canvas[row.open_in_block()] for row in rows])).to(log_probs.device)
    times = torch.tensor([row.times for row in rows], device=log_probs.device, dtype=torch.float64)[of_row]
    law: Tensor = process.posterior(torch.where(is_hot[:, None], drawn, surest), xt, times[:, 0], times[:, 1])
    return law


def _ranked(log_probs: Tensor, rows: Sequence[DecodeState], of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities at each row's temperature, falling, 0 beyond its top_p, and their ids; fp64 and int64 [n V].

    In fp64: a float32 tail is cut off. They do not sum to 1 below a top_p of 1.
    """
    device = log_probs.device
    temperature = torch.tensor([row.request.config.temperature or 1.0 for row in rows], device=device)[of_row]
    top_p = torch.tensor([row.request.config.top_p for row in rows], device=device, dtype=torch.float64)[of_row]
    probs = (log_probs.double() / temperature[:, None]).softmax(-1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    return ranked.masked_fill(before >= top_p[:, None], 0.0), order  # the token that crosses top_p stays


def _inverted(weights: Tensor, draws: Tensor) -> Tensor:
    """Indices [n] drawn by inversion from weights fp64 [n V], one uniform [n] each: no draw depends on the batch."""
    cumulative = weights.cumsum(-1)
    target = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)[:, 0]
