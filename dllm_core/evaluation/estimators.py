"""Estimators of a row's negative log-likelihood, in nats: which one fits is decided by how the model was trained.

| name | of | one draw is |
|---|---|---|
| exact | autoregression | -log p(x) itself |
| exact-count | masks in continuous time | k of a row's (or block's) n counted tokens masked, n/k times their nats |
| stratified-time | replaced tokens, chains of T steps, models told t | the bound's rate at a time of a row (or block) |

The last two bound -log p(x) from above in the mean over draws; with the same denoiser they have the same mean. A masked
language model bounds nothing: it has no estimator.

Law: a draw is a pure function of (seed, draw, row id): of no batch, no worker, no other row.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.data.loader import TokenRows
from dllm_core.data.noising import block_numbers
from dllm_core.model.pattern import CAUSAL, AttentionPattern, training_pattern
from dllm_core.model.visibility import document_starts
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import snapped, terminal_nats
from dllm_core.noise.exact_count import exact_counts
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective.autoregressive import shifted
from dllm_core.objective.config import AnyObjective, AutoregressiveConfig, MaskedLMConfig
from dllm_core.objective.diffusion import chain_rate
from dllm_core.objective.loss import DenoiserLike
from dllm_core.objective.vocabulary import LogitsLaw, nll
from dllm_core.seeding import Bools, Doubles, Ints, Purpose, uniforms, uniforms64


@dataclass(frozen=True)
class HeldoutRows:
    """x0 int64 [N L]; counted bool [N L]: tokens that are scored, given all others; ids [N]: which rows these are.

    is_real bool [N L]: no token sees filler. segment_ids int [N L]: isolated documents, None where a row is one.
    """

    x0: Ints
    counted: Bools
    ids: Ints
    is_real: Bools
    segment_ids: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, tokens: TokenRows, ids: Ints) -> "HeldoutRows":
        """A split's rows: what is learned counts, prompts are given."""
        return cls(tokens.x0, tokens.is_learned, ids, tokens.is_real, tokens.segment_ids)

    def units(self, block_length: int | None) -> Ints:
        """What has one time, or one number of masks, by its number in its row [N L]: the row, or each block."""
        if block_length is None:
            return np.zeros(self.x0.shape, np.int64)
        labels = np.zeros(self.x0.shape, np.int32) if self.segment_ids is None else self.segment_ids
        return block_numbers(document_starts(torch.from_numpy(labels)).numpy(), block_length)


@dataclass(frozen=True)
class Draw:
    """Which draw: its number, and that it is the `stratum`-th of `strata` that divide its range among them."""

    seed: int
    number: int
    stratum: int = 0
    strata: int = 1

    def shares(self, ids: Ints, count: int) -> Doubles:
        """Uniforms in this stratum of [0, 1), [N count]: those of `strata` draws are spread over all of it."""
        return (self.stratum + uniforms64(self.seed, Purpose.EVALUATE_STRATUM, self.number, ids, count)) / self.strata


class Estimator(Protocol):
    """name: as in `evaluation.json`. is_exact: every draw is the same, so one is enough."""

    name: str
    is_exact: bool

    def nats(self, denoiser: DenoiserLike, rows: HeldoutRows, draw: Draw) -> Doubles:
        """One draw of each row's nats, float64 [N]."""


class ExactNLL:
    """-sum_i log p(x_i | x_<i): the likelihood of an autoregressive model, without any draw."""

    name, is_exact = "exact", True

    def __init__(self, mask_id: int, device: torch.device) -> None:
        self._mask_id, self._device = mask_id, device

    def nats(self, denoiser: DenoiserLike, rows: HeldoutRows, draw: Draw) -> Doubles:
        """The same for every draw."""
        logits = ask(denoiser, rows, before(rows, self._mask_id), rows.counted, CAUSAL, self._device)
        return _by_row(rows, rows.counted, _plain(logits, rows, rows.counted, self._mask_id))


class ExactCount:
    """(n/k) times the nats of k of n counted tokens (`exact_counts`). block_length: n and k of each block."""

    name, is_exact = "exact-count", False

    def __init__(self, mask_id: int, device: torch.device, block_length: int | None = None) -> None:
        self._mask_id, self._device, self._block_length = mask_id, device, block_length

    def nats(self, denoiser: DenoiserLike, rows: HeldoutRows, draw: Draw) -> Doubles:
        """One number of masks a row or block."""
        units = rows.units(self._block_length)
        shares = draw.shares(rows.ids, int(units.max(initial=0)) + 1)
        u = uniforms64(draw.seed, Purpose.EVALUATE, draw.number, rows.ids, rows.x0.shape[1])
        is_masked, weight = exact_counts(rows.counted, units, shares, u)
        xt = np.where(is_masked, self._mask_id, rows.x0)
        logits = ask(denoiser, rows, xt, is_masked, training_pattern(self._block_length), self._device)
        return _by_row(rows, is_masked, weight * _plain(logits, rows, is_masked, self._mask_id))


class StratifiedTime:
    """The bound's rate at a time drawn from (0, 1], one a row or block, with the process's own noise; exact weights.

    Times are crowded where few tokens are noised and each costs the more: by the share of noise (`crowded`), so that a
    figure and its spread are those of every schedule. One that is steep at 0 has half of its noise where even times, or
    ones that are crowded by t, hardly ever fall.

    steps: T of a chain in discrete time, whose bound is that of decoding in T calls. Where a schedule stops at
    alpha(1) > 0, the step from pure noise is paid too. Source: MDLM, arXiv:2406.07524; UDLM, arXiv:2412.10193.
    """

    name, is_exact = "stratified-time", False

    def __init__(
        self,
        process: InterpolatingProcess,
        device: torch.device,
        *,
        block_length: int | None = None,
        steps: int | None = None,
        time_conditioning: bool = False,
    ) -> None:
        self._process, self._device, self._block_length = process, device, block_length
        self._steps, self._time_conditioning = steps, time_conditioning
        self._end = float(process.schedule.alpha(np.float64(1)))

    def nats(self, denoiser: DenoiserLike, rows: HeldoutRows, draw: Draw) -> Doubles:
        """One time a row or block."""
        units = rows.units(self._block_length)
        shares = draw.shares(rows.ids, int(units.max(initial=0)) + 1)
        times, weight = (np.take_along_axis(part, units, axis=1) for part in self._times(shares))
        length = rows.x0.shape[1]
        u = uniforms(draw.seed, Purpose.EVALUATE, draw.number, rows.ids, length)
        v = None
        if self._process.replaces:
            v = uniforms64(draw.seed, Purpose.EVALUATE_REPLACE, draw.number, rows.ids, length)
        found = self._cost(denoiser, rows, self._process.corrupt(rows.x0, times, u, v), times, weight)
        if self._end > 1e-9:
            found += self._cost(denoiser, rows, self._process.prior(rows.x0, v), np.ones_like(times), None)
        return found

    def _times(self, shares: Doubles) -> tuple[Doubles, Doubles]:
        """Times of uniforms, in float64 since float32 has none below 1e-45, and dt over their density."""
        if self._steps is not None:
            return snapped(shares, self._steps), np.ones_like(shares)
        noise, weights = crowded(shares)
        t: Doubles = self._process.schedule.at_noise((1 - self._end) * noise)
        fall = self._process.fall(t)  # 0 where alpha ends flat, and so is the rate
        return t, np.divide((1 - self._end) * weights, fall, out=np.zeros_like(weights), where=fall > 0)

    def _cost(
        self, denoiser: DenoiserLike, rows: HeldoutRows, noised: Ints, times: Doubles, weight: Doubles | None
    ) -> Doubles:
        """Weighted nats of what noise has made of rows; weight None: of the canvas that decoding begins with."""
        xt = np.where(rows.counted, noised, rows.x0)
        read = rows.counted
        if not self._process.replaces:  # else a clean look is evidence too, and costs nats
            read = read & (xt == self._process.mask_id)
        when = {"t": torch.from_numpy(times).float().to(self._device)} if self._time_conditioning else {}
        logits = ask(denoiser, rows, xt, read, training_pattern(self._block_length), self._device, **when)
        law = LogitsLaw(logits, self._process.mask_id)
        x0, seen, t = (torch.from_numpy(part[read]).to(self._device) for part in (rows.x0, xt, times))
        if weight is None:
            return _by_row(rows, read, _doubles(terminal_nats(self._process, law, x0)))
        if self._steps is None:
            nats = self._process.nelbo_rate(law, x0, seen, t)
        else:
            nats = chain_rate(self._process, law, x0, seen, t, self._steps)
        return _by_row(rows, read, weight[read] * _doubles(nats))


def crowded(shares: Doubles) -> tuple[Doubles, Doubles]:
    """(t, weight) of uniforms in [0, 1): shares of noise in (0, 1] of density 3/4 + 1/12 t^(-2/3), and one over it.

    Evenly drawn ones would give no finite variance: a mask's cost is 1/t, and is met with a chance of t; random text
    of the hybrid process has 1/(2t) and a root of t. Away from 0 the weight is near 1, so a row's nats vary little
    over t. It is the root s^3 of s^3 + s/3 = 4/3 (1 - share).
    """
    s = 2 / 3 * np.sinh(np.arcsinh(18 * (1 - shares)) / 3)
    return np.minimum(s**3, 1.0), 1 / (0.75 + s**-2 / 12)


def estimator_of(
    objective: AnyObjective,
    process: InterpolatingProcess,
    device: torch.device,
    *,
    block_length: int | None = None,
    steps: int | None = None,
    time_conditioning: bool = False,
) -> Estimator | None:
    """The estimator of least spread for a model; None for a masked language model, which has no likelihood."""
    if isinstance(objective, MaskedLMConfig):
        return None
    if isinstance(objective, AutoregressiveConfig):
        return ExactNLL(process.mask_id, device)
    if isinstance(process, AbsorbingProcess) and steps is None and not time_conditioning:
        return ExactCount(process.mask_id, device, block_length)
    return StratifiedTime(process, device, block_length=block_length, steps=steps, time_conditioning=time_conditioning)


def before(rows: HeldoutRows, mask_id: int) -> Ints:
    """What a causal model is shown of rows [N L]: the token before each place, the mask where a document begins."""
    segment_ids = None if rows.segment_ids is None else torch.from_numpy(rows.segment_ids)
    shown: Ints = shifted(torch.from_numpy(rows.x0), segment_ids, mask_id).numpy()
    return shown


def estimator_of_bundle(bundle: ModelBundle, device: str) -> Estimator | None:
    """By what the bundle says of itself: the recipe may be another's."""
    said = bundle.manifest
    return estimator_of(
        said.objective,
        bundle.process,
        torch.device(device),
        block_length=said.block_length,
        steps=said.steps,
        time_conditioning=bundle.config.model.time_conditioning,
    )


def ask(
    denoiser: DenoiserLike,
    rows: HeldoutRows,
    shown: Ints,
    read: Bools,
    pattern: AttentionPattern,
    device: torch.device,
    **when: Tensor,
) -> Tensor:
    """Logits fp32 [n V] at `read` [N L] of what is `shown` [N L] in an objective's training pass.

    Filler is always told of: whether there is any in a batch must not choose the kernel.
    """
    given = np.concatenate([shown, rows.x0], axis=1) if pattern.has_clean_half else shown
    isolated: dict[str, Any] = {"is_real": rows.is_real, "segment_ids": rows.segment_ids, "read": read}
    told = {name: torch.from_numpy(part).to(device) for name, part in isolated.items() if part is not None}
    return denoiser(torch.from_numpy(given).to(device), pattern=pattern, **told, **when).float()


def _plain(logits: Tensor, rows: HeldoutRows, read: Bools, mask_id: int) -> Doubles:
    """-log p(x0) float64 [n] at the positions `read`."""
    return _doubles(nll(logits, torch.from_numpy(rows.x0[read]).to(logits.device), mask_id))


def _doubles(values: Tensor) -> Doubles:
    found: Doubles = values.detach().double().cpu().numpy()
    return found


def _by_row(rows: HeldoutRows, read: Bools, nats: Doubles) -> Doubles:
    """Sums of nats [n] at the positions `read` by their rows, in float64 [N]."""
    return np.bincount(np.nonzero(read)[0], nats, minlength=len(rows.x0)).astype(np.float64)
