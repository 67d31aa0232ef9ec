"""Infilling: holes of several lengths in held-out rows, filled from both sides of the context or from one.

`cut_holes` -> a `Filler` -> `score_holes` -> `summarize_holes`; `score_infill` does the first three for all lengths.
One hole a row, at a place that (seed, length, row id) alone decide: every side, model and policy is asked the same
holes, so their differences are paired.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.forward import padded_length
from dllm_core.decoding.request import Request
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.estimate import Estimate, Proportion, measure_seed, proportion, ratio
from dllm_core.evaluation.config import Side
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.writers import Writer
from dllm_core.model.pattern import CAUSAL
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import AnyObjective, AutoregressiveConfig, BlockDiffusionConfig
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Bools, Ints, Purpose, uniforms64

SIDES: tuple[Side, ...] = ("both", "left", "right")


@dataclass(frozen=True)
class Hole:
    """A hole in a document: `before` and `after` are all else of it, each at least one token. int64 arrays.

    document: the label of an isolated one in its row.
    """

    row_id: int
    before: Ints
    truth: Ints
    after: Ints
    document: int = 0

    def shown(self, side: Side, mask_id: int) -> tuple[Ints, Ints]:
        """The context of one side, the other side's tokens masked."""
        before = np.full_like(self.before, mask_id) if side == "right" else self.before
        after = np.full_like(self.after, mask_id) if side == "left" else self.after
        return before, after


def distances(length: int, side: Side) -> Ints:
    """How far each position of a hole is from the nearest visible token [length]; 1: next to it."""
    from_left = np.arange(1, length + 1)
    from_right = from_left[::-1]
    return {"left": from_left, "right": from_right, "both": np.minimum(from_left, from_right)}[side]


def cut_holes(rows: HeldoutRows, length: int, *, seed: int, never: Collection[int]) -> list[Hole]:
    """At most one hole of `length` tokens in each row; a row without room for it has none.

    Every place is as likely where all tokens are counted and none is in `never` (special tokens, which a filler does
    not give), with a real token of the same document on either side.
    """
    x0, width = rows.x0, rows.x0.shape[1]
    if width < length + 2 or not len(x0):
        return []
    document = np.where(rows.is_real, 0 if rows.segment_ids is None else rows.segment_ids, -1)
    may_hide = rows.counted & rows.is_real & ~np.isin(x0, list(never))
    hidden = np.cumsum(np.pad(may_hide, ((0, 0), (1, 0))), axis=1)
    starts = np.arange(1, width - length)
    is_place: Bools = hidden[:, starts + length] - hidden[:, starts] == length
    is_place &= (document[:, starts - 1] == document[:, starts + length]) & (document[:, starts - 1] >= 0)
    drawn = uniforms64(measure_seed(seed, "infill"), Purpose.EVALUATE, length, rows.ids, 1)[:, 0]
    holes = []
    for row in np.flatnonzero(is_place.any(1)).tolist():
        places = starts[is_place[row]]
        start = int(places[int(drawn[row] * len(places))])
        own = np.flatnonzero(document[row] == document[row, start])
        first, last, stop = int(own[0]), int(own[-1]) + 1, start + length
        ids = x0[row]
        own_ids = (ids[first:start], ids[start:stop], ids[stop:last])
        holes.append(Hole(int(rows.ids[row]), *own_ids, document=int(document[row, start])))
    return holes


@dataclass(frozen=True)
class Filled:
    """What a filler put into a hole, int64 [n], and the denoiser calls that it took."""

    tokens: Ints
    calls: int


class Filler(Protocol):
    """Fills holes of one length. sides: what it can see."""

    sides: tuple[Side, ...]

    def fill(self, holes: Sequence[Hole], side: Side) -> list[Filled]:
        """One answer a hole, in order."""


class EngineFiller:
    """Masked diffusion by the engine, as it is served.

    config: None for one parallel call in which every position takes its likeliest token. sides: a side is hidden by
    masks, which a denoiser of replaced tokens alone has never seen: it can be shown both sides only.
    """

    def __init__(
        self,
        engine: Engine,
        config: DecodeConfig | None,
        mask_id: int,
        *,
        seed: int,
        sides: tuple[Side, ...] = SIDES,
    ) -> None:
        self._engine, self._config, self._mask_id, self._seed, self.sides = engine, config, mask_id, seed, sides

    def fill(self, holes: Sequence[Hole], side: Side) -> list[Filled]:
        """A hole always has something behind it, masks at least, so the engine fills it whole."""
        requests = []
        for hole in holes:
            before, after = (tuple(part.tolist()) for part in hole.shown(side, self._mask_id))
            config = self._config_of(len(hole.truth))
            requests.append(Request(prompt=before, config=config, suffix=after, seed=self._seed + hole.row_id))
        return [Filled(np.array(a.tokens, np.int64), a.num_calls) for a in self._engine.generate(requests)]

    def _config_of(self, length: int) -> DecodeConfig:
        if self._config is not None:
            return self._config.model_copy(update={"max_tokens": length})
        return DecodeConfig(policy=LowConfidencePolicy(), block_length=length, steps_per_block=1, max_tokens=length)


class CausalFiller:
    """Autoregression, token after token, the likeliest each time: it sees what stands before, and nothing behind.

    never: the end and padding, which the engine rules out in a hole too, so that both choose among the same tokens.
    The row is read anew for each token, without a cache: this measures, and does not serve.
    """

    sides: tuple[Side, ...] = ("left",)

    def __init__(
        self,
        denoiser: DenoiserLike,
        mask_id: int,
        device: torch.device,
        *,
        never: Collection[int],
        batch_rows: int = 32,
    ) -> None:
        self._denoiser, self._mask_id, self._device = denoiser, mask_id, device
        self._never, self._batch_rows = sorted({*never, mask_id}), batch_rows

    def fill(self, holes: Sequence[Hole], side: Side) -> list[Filled]:
        """Holes of one length, in order. Raises ValueError for a side that it cannot see."""
        if side not in self.sides:
            raise ValueError(f"autoregression sees the left side only, got {side!r}")
        found: dict[int, Filled] = {}
        widths = [padded_length(len(hole.before) + len(hole.truth)) for hole in holes]
        for width in sorted(set(widths)):  # rows of one width go together: a row's own length decides its padding
            at = [i for i, own in enumerate(widths) if own == width]
            for start in range(0, len(at), self._batch_rows):
                part = at[start : start + self._batch_rows]
                found.update(zip(part, self._filled([holes[i] for i in part], width), strict=True))
        return [found[i] for i in range(len(holes))]

    @torch.inference_mode()
    def _filled(self, holes: list[Hole], width: int) -> list[Filled]:
        """ids[:, i] is the token before position i, the mask where there is none."""
        size, ids = len(holes[0].truth), torch.full((len(holes), width + 1), self._mask_id)
        for row, hole in zip(ids, holes, strict=True):
            row[1 : 1 + len(hole.before)] = torch.from_numpy(hole.before)
        rows, heads = torch.arange(len(holes)), torch.tensor([len(hole.before) for hole in holes])
        for step in range(size):
            shown, read = ids[:, :width].to(self._device), (rows * width + heads + step).to(self._device)
            logits = self._denoiser(shown, read=read, pattern=CAUSAL).cpu()
            logits[:, self._never] = -torch.inf
            ids[rows, heads + step + 1] = logits.argmax(-1)
        return [Filled(row[1 + n : 1 + n + size].numpy(), size) for row, n in zip(ids, heads.tolist(), strict=True)]


class LeftFiller:
    """Writes on from the left as far as the hole goes; an answer that ends inside it is wrong from there on."""

    sides: tuple[Side, ...] = ("left",)

    def __init__(self, writer: Writer, seed: int) -> None:
        self._writer, self._seed = writer, seed

    def fill(self, holes: Sequence[Hole], side: Side) -> list[Filled]:
        """Holes of one length, in order. Raises ValueError for a side that it cannot see."""
        if side != "left":
            raise ValueError(f"blocks are written from the left, got {side!r}")
        if not holes:
            return []
        length = len(holes[0].truth)
        written = self._writer.write([hole.before.tolist() for hole in holes], length, seed=self._seed)
        return [Filled(_padded(answer.tokens, length), answer.num_calls) for answer in written]


def _padded(tokens: Sequence[int], length: int) -> Ints:
    """Tokens up to a length, -1 (no token) behind their end."""
    return np.array([*tokens, *[-1] * (length - len(tokens))], np.int64)


@dataclass(frozen=True)
class HoleScores:
    """Of holes of one length, filled from one side: which positions were right bool [N n], calls [N], row_ids [N]."""

    length: int
    side: Side
    hits: Bools
    calls: Ints
    row_ids: Ints

    def joined(self, other: Self) -> Self:
        """These rows, then those."""
        return replace(
            self,
            hits=np.concatenate([self.hits, other.hits]),
            calls=np.concatenate([self.calls, other.calls]),
            row_ids=np.concatenate([self.row_ids, other.row_ids]),
        )


def sides_seen(objective: AnyObjective, process: AnyNoise) -> tuple[Side, ...]:
    """From which sides a model may be asked for a hole: what is hidden must be hidden by what it knows."""
    if isinstance(objective, AutoregressiveConfig | BlockDiffusionConfig):
        return ("left",)
    return ("both",) if process.type == "uniform" else SIDES


def score_holes(filler: Filler, holes: Sequence[Hole], length: int, side: Side) -> HoleScores:
    """Fill the holes, all of `length`, and compare; a row's score does not depend on the others."""
    filled = filler.fill(holes, side)
    hits = np.zeros((len(holes), length), dtype=bool)
    for row, (hole, answer) in enumerate(zip(holes, filled, strict=True)):
        hits[row] = hole.truth == answer.tokens
    calls = np.array([answer.calls for answer in filled], np.int64)
    return HoleScores(length, side, hits, calls, np.array([hole.row_id for hole in holes], np.int64))


def score_infill(
    filler: Filler,
    rows: HeldoutRows,
    *,
    lengths: Sequence[int],
    sides: Sequence[Side],
    seed: int,
    never: Collection[int],
) -> list[HoleScores]:
    """Every length from every side that the filler sees, in this order; the same holes from every side."""
    return [
        score_holes(filler, holes, length, side)
        for length in lengths
        for holes in [cut_holes(rows, length, seed=seed, never=never)]
        for side in sides
        if side in filler.sides
    ]


@dataclass(frozen=True)
class AtDistance:
    """Accuracy of the tokens that stand `distance` from the nearest visible one."""

    distance: int
    accuracy: Proportion


@dataclass(frozen=True)
class Infilling:
    """exact: whole holes restored; token: tokens restored; tokens_per_call: 1 is autoregressive speed."""

    length: int
    side: Side
    exact: Proportion
    token: Proportion
    by_distance: tuple[AtDistance, ...]
    tokens_per_call: Estimate


def summarize_holes(scores: HoleScores, documents: Ints | None = None) -> Infilling | None:
    """None where no row had room for such a hole. documents [N]: which each hole is in, None: each in its own."""
    hits, rows = scores.hits, len(scores.hits)
    if not rows:
        return None
    distance = distances(scores.length, scores.side)
    by_distance = tuple(
        AtDistance(int(d), proportion(hits[:, distance == d].sum(1), np.full(rows, (distance == d).sum()), documents))
        for d in np.unique(distance)
    )
    whole = np.full(rows, scores.length)
    return Infilling(
        length=scores.length,
        side=scores.side,
        exact=proportion(hits.all(1), np.ones(rows), documents),
        token=proportion(hits.sum(1), whole, documents),
        by_distance=by_distance,
        tokens_per_call=ratio(whole, scores.calls, documents),
    )


def token_gain(scores: HoleScores, other: HoleScores, documents: Ints | None = None) -> Estimate:
    """Token accuracy above that of `other` on the same holes: the paired error, in which hard rows cancel.

    Raises ValueError if the holes are not the same.
    """
    if scores.length != other.length or not np.array_equal(scores.row_ids, other.row_ids):
        raise ValueError("a paired difference needs the same holes on both sides")
    return ratio(scores.hits.sum(1) - other.hits.sum(1), np.full(len(scores.hits), scores.length), documents)
