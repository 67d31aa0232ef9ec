"""One denoiser call over the rows of a tick: which token each open position would take, and how sure it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dllm_core.decoding.config import AnyRevisingPolicy
from dllm_core.decoding.constraint import draw, likeliest
from dllm_core.decoding.forward import forwards
from dllm_core.decoding.state import DecodeState
from dllm_core.model.cache import KeyValueStore, sent
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.process import NoiseProcess
from dllm_core.seeding import Doubles, Floats, Ints, Purpose, Words, seeds_of, uniforms, uniforms64

_LOWEST = -1e4  # of log p: stands for -inf where p is 0
_COOLEST = 1e-37  # of what float32 holds: logs that differ at all are infinitely far apart there


@dataclass(frozen=True)
class Proposal:
    """For one row: positions int64 [n] of the open ones in its block, their tokens [n] and confidence [n].

    score [n]: what its policy ranks them by. held [n]: how sure it is of what stands there already, where the policy
    revises. best_tokens, best_log_probs [n k]: the likeliest, surest first, k as the request's `top_logprobs` says.
    """

    positions: Ints
    tokens: Ints
    confidence: Floats
    score: Floats
    held: Floats
    best_tokens: Ints
    best_log_probs: Floats


@torch.inference_mode()
def propose(
    denoiser: Denoiser,
    process: NoiseProcess,
    rows: Sequence[DecodeState],
    store: KeyValueStore | None = None,
) -> list[Proposal | None]:
    """What one call says of each row; None where that is no number.

    store: where rows that have slots keep keys and values. What such a row computes is kept in turn.
    """
    eos_id, pad_id = denoiser.config.eos_id, denoiser.config.pad_id
    order: list[int] = []
    packed: list[Tensor] = []
    most = max(row.request.top_logprobs for row in rows)
    for at, logits in forwards(denoiser, rows, store):
        order += at
        packed.append(_choose(logits, process, [rows[i] for i in at], eos_id, pad_id, most))
    verdict = torch.cat(packed).cpu().numpy()  # the one transfer, for which alone the host waits
    positions = [rows[i].open_in_block() for i in order]
    parts = np.split(verdict, np.cumsum([len(at) for at in positions])[:-1])
    proposals = {
        i: None if np.isnan(part[:, 2]).any() else _proposal(at, part, rows[i].request.top_logprobs)
        for i, at, part in zip(order, positions, parts, strict=True)
    }
    return [proposals[i] for i in range(len(rows))]


def _choose(
    logits: Tensor, process: NoiseProcess, rows: Sequence[DecodeState], eos_id: int, pad_id: int, most: int
) -> Tensor:
    """What is made of logits [n V] at the open positions of the rows' current blocks: fp64 [n 4 + 2 most], as
    `_proposal` takes it apart; a score is no number where a logit is none.
    """
    device = logits.device
    positions = [row.open_in_block() for row in rows]
    of_row = sent(np.repeat(np.arange(len(rows)), [len(part) for part in positions]), device)
    if pad_id != eos_id:  # some tokenizers pad with the end token, which an answer must be able to hold
        logits[:, pad_id] = -torch.inf  # no answer holds padding; the process itself rules the mask out
    may_end = np.concatenate([at >= row.request.open_end for row, at in zip(rows, positions, strict=True)])
    logits[:, eos_id] = logits[:, eos_id].where(sent(may_end, device), -torch.inf)
    log_probs: Tensor = process.x0_log_probs(logits)
    highest, tokens = log_probs.max(-1)  # not a number where any of the logits is none
    hot = np.array([row.request.config.temperature > 0 for row in rows])
    is_hot = sent(hot, device)[of_row]
    if rows[0].is_ancestral:
        law = functional.one_hot(tokens, log_probs.shape[-1]).double()
        if hot.any():
            ranked, order = _ranked(log_probs, rows, of_row)
            drawn = torch.zeros_like(ranked).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))
            law = torch.where(is_hot[:, None], drawn, law)
        probs = _reverse_step(law, process, rows, of_row)
        # Fine enough for the rare jumps of a short step over a large vocabulary.
        fine = uniforms64(*_coordinates(rows, positions))[:, 0]
        tokens = _inverted(probs, sent(fine, device))
        log_probs = probs.log()
    elif hot.any():
        draws = uniforms(*_coordinates(rows, positions))[:, 0]
        ranked, order = _ranked(log_probs, rows, of_row)
        drawn = order.gather(-1, _inverted(ranked, sent(draws, device))[:, None])[:, 0]
        tokens = torch.where(is_hot, drawn, tokens)
    if any(row.automaton is not None for row in rows):
        tokens = _constrained(tokens, log_probs, rows, positions, eos_id)
    confidence = log_probs.gather(-1, tokens[:, None])[:, 0].exp()
    score = _scores(log_probs, confidence, rows, of_row)
    score = score.where(highest.isfinite(), torch.nan)
    held = confidence
    if any(isinstance(row.request.config.policy, AnyRevisingPolicy) for row in rows):
        standing = sent(np.concatenate([row.canvas[at] for row, at in zip(rows, positions, strict=True)]), device)
        held = log_probs.gather(-1, standing[:, None])[:, 0].exp()
    columns = [tokens[:, None], confidence[:, None], score[:, None], held[:, None]]
    if most:
        columns += _likeliest(log_probs, min(most, log_probs.shape[-1]))
    return torch.cat([column.double() for column in columns], dim=1)


def _likeliest(log_probs: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [n most] and their logs, of equals the first: of `topk` which they are depends on `most`,
    and so on what other rows of the batch ask for.
    """
    bits = log_probs.float().view(torch.int32).long()
    rank = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # rises with the number
    keys = (rank << 32) - torch.arange(log_probs.shape[-1], device=log_probs.device)
    tokens = keys.topk(most, dim=-1).indices
    return tokens, log_probs.gather(-1, tokens)


def _coordinates(rows: Sequence[DecodeState], positions: Sequence[Ints]) -> tuple[Words, Purpose, Ints, Ints, int]:
    """Of one draw for each position [n]: a pure function of its row's seed, the row's call and where it stands."""
    lengths = [len(at) for at in positions]
    seeds = np.repeat(seeds_of(row.request.seed for row in rows), lengths)
    calls = np.repeat(np.array([row.num_calls for row in rows]), lengths)
    return seeds, Purpose.DECODE, calls, np.concatenate(positions), 1


def _proposal(positions: Ints, packed: Doubles, top: int) -> Proposal:
    """Of columns [n 4 + 2 m]: token, confidence, score, held, and the m >= top likeliest tokens and their logs."""
    most = (packed.shape[1] - 4) // 2
    return Proposal(
        positions,
        packed[:, 0].astype(np.int64),
        packed[:, 1].astype(np.float32),
        packed[:, 2].astype(np.float32),
        packed[:, 3].astype(np.float32),
        packed[:, 4 : 4 + min(top, most)].astype(np.int64),
        packed[:, 4 + most : 4 + most + min(top, most)].astype(np.float32),
    )


def _constrained(
    tokens: Tensor,
    log_probs: Tensor,
    rows: Sequence[DecodeState],
    positions: Sequence[Ints],
    eos_id: int,
) -> Tensor:
    """Tokens [n] of which those of rows with a constraint are one string each that leaves its answer a way to match.

    Their laws go to the host, a block's positions each: the one copy beside the verdict, and theirs alone.
    """
    chosen = tokens.cpu().numpy().copy()
    splits = np.cumsum([0, *(len(part) for part in positions)])
    for row, at, begin, stop in zip(rows, positions, splits[:-1], splits[1:], strict=True):
        part = log_probs[begin:stop]
        if row.automaton is None or part.max(-1).values.isnan().any():  # the latter fails, alone
            continue
        found = None
        if row.request.config.temperature > 0:
            found = draw(row.automaton, row, eos_id, at, _laws(part, row), uniforms(*_coordinates([row], [at]))[:, 0])
        if found is None:
            found = likeliest(row.automaton, row, eos_id, at, part.double().cpu().numpy())
        chosen[begin:stop] = np.where(found < 0, chosen[begin:stop], found)
    return sent(chosen, tokens.device)


def _laws(log_probs: Tensor, row: DecodeState) -> Iterator[Doubles]:
    """Logs of one row's laws of tokens [n V] at its temperature: as top_k and top_p cut it off, then the whole one."""
    ranked, order = _ranked(log_probs, [row], torch.zeros(len(log_probs), dtype=torch.int64, device=log_probs.device))
    yield torch.zeros_like(ranked).scatter_(-1, order, ranked).log().cpu().numpy()
    yield (log_probs.double() / _heat(row)).log_softmax(-1).cpu().numpy()


def _heat(row: DecodeState) -> float:
    """A row's temperature, if it is not 0 far enough above it to divide by."""
    temperature = row.request.config.temperature
    return max(temperature, _COOLEST) if temperature else 0.0


def _scores(log_probs: Tensor, confidence: Tensor, rows: Sequence[DecodeState], of_row: Tensor) -> Tensor:
    """What each row's policy ranks positions by [n]."""
    score, kinds = confidence, [row.request.config.policy.ranks_by for row in rows]
    for kind in {*kinds} - {"confidence"}:
        if kind == "margin":
            best = log_probs.topk(2, dim=-1).values.exp()
            own = best[:, 0] - best[:, 1]
        else:
            own = (log_probs.exp() * log_probs.clamp_min(_LOWEST)).sum(-1)  # 0 log 0 = 0
        is_kind = sent(np.array([row_kind == kind for row_kind in kinds]), score.device)[of_row]
        score = torch.where(is_kind, own.to(score.dtype), score)
    return score


def _reverse_step(law: Tensor, process: NoiseProcess, rows: Sequence[DecodeState], of_row: Tensor) -> Tensor:
    """The law of each open position a step of the reverse process on, fp64 [n V]: `posterior` of the denoiser's law.

    Temperature and top_p have shaped that law, and temperature 0 has taken its likeliest token; the noise is drawn all
    the same.
    """
    xt = sent(np.concatenate([row.canvas[row.open_in_block()] for row in rows]), law.device)
    times = sent(np.array([row.times for row in rows], np.float64), law.device)[of_row]
    probs: Tensor = process.posterior(law, xt, times[:, 0], times[:, 1])
    return probs


def _ranked(log_probs: Tensor, rows: Sequence[DecodeState], of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities at each row's temperature, falling, 0 beyond its top_k and then its top_p, and their ids.

    fp64 and int64 [n V]. A float32 tail is cut off. They do not sum to 1 where something is left out.
    """
    device = log_probs.device
    temperature = sent(np.array([_heat(row) or 1.0 for row in rows], np.float32), device)[of_row]
    top_p = sent(np.array([row.request.config.top_p for row in rows], np.float64), device)[of_row]
    size = log_probs.shape[-1]
    top_k = sent(np.array([min(row.request.config.top_k or size, size) for row in rows], np.int64), device)[of_row]
    probs = (log_probs.double() / temperature[:, None]).softmax(-1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(torch.arange(size, device=device) >= top_k[:, None], 0.0)
    before = ranked.cumsum(-1) - ranked
    least = torch.finfo(torch.float64).tiny  # so that a top_p of hardly any leaves the first
    crossed = before >= (top_p[:, None] * ranked.sum(-1, keepdim=True)).clamp_min(least)
    return ranked.masked_fill(crossed, 0.0), order  # the token that crosses top_p stays


def _inverted(weights: Tensor, draws: Tensor) -> Tensor:
    """Indices [n] drawn by inversion from weights fp64 [n V], one uniform [n] each: no draw depends on the batch."""
    cumulative = weights.cumsum(-1)
    target = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)[:, 0]
