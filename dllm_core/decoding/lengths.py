"""Holes of unknown length: decoded at several lengths at once, grown and shrunk to where the model is surest.

A masked model fills the positions it is given; how many there should be it only says by how sure it is of what it puts
there. What is compared is the mean log-confidence of the tokens that calls committed, each at the call that did. Where
a call commits one token, and the denoiser is exact, that is the answer's log-likelihood a token, given its length.
Where a call commits more, of confidence c_i each, it is known to lie between sum log(1 - sum(1 - c_i)) and
sum log(min c_i) over calls, divided by the tokens (Frechet's bounds: a call does not see how its tokens hang together).

Up to 8 lengths are all decoded, and the surest of all is the answer. Of more lengths one call each is asked first,
whose proposals are taken at once: every length up to 63 above the least, then steps of a 32nd of what was added. CAL,
arXiv:2602.00476, searches by that first call alone. The surest four of it are decoded with a ladder of doubling steps
as rows of one batch, and from the best one on the hole grows and shrinks by halves of what is untried, till neither
makes the model surer. The first calls also find a right length among wrong ones, to which no step by step search leads.
Several such holes take turns, the others as they stand.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dllm_core.decoding.answer import Answer, answer_of
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import OpenHole, Piece, Request, with_holes
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.errors import RequestError

_MAX_SWEEPS = 3
_FEW = 8  # lengths, all of which are decoded
_PROMISING = 4  # lengths of the first calls that are
_EVERY_OF = 32  # a first call for every length up to 63 above the least, then of one in more and more
_LEAST_CONFIDENCE = 1e-12
_NOTHING = Answer([], "error", 0, 0)  # of a length that cannot be


@dataclass(frozen=True)
class Filled:
    """The best answer, the request that it answers, and the lengths of its holes in order.

    log_confidence: mean over the committed tokens, nats. num_rows, num_calls, num_positions: what the search took, all
    lengths tried and those of which one call was asked.
    """

    answer: Answer
    request: Request
    lengths: tuple[int, ...]
    log_confidence: float
    num_rows: int
    num_calls: int
    num_positions: int


def infill(engine: Engine, request: Request, pieces: Sequence[Piece]) -> Filled:
    """Fill the holes of `pieces`, which stand between the request's prompt and suffix, at the lengths that suit best.

    A hole at the very end is decoded at its full length: an end token says how long it should be. `middle` of the
    request says nothing. Raises RequestError as `Engine.add` does, and where no length fits.
    """
    search = _Search(engine, request, tuple(pieces))
    holes = search.holes
    if engine.is_ancestral:
        raise RequestError("middle", "a hole of unknown length needs masks, and the model has tokens for noise")
    if not holes:
        raise RequestError("middle", "has no open position: there is nothing to fill")
    for hole in holes:
        if not 1 <= hole.least <= hole.most:
            problem = "a hole's lengths must be at least 1, and the least not above the most"
            raise RequestError("middle", problem, [hole.least, hole.most])
    return search.best()


class _Search:
    """What was decoded so far, by the holes' lengths."""

    def __init__(self, engine: Engine, request: Request, pieces: tuple[Piece, ...]) -> None:
        self._engine, self._request, self._pieces = engine, request, pieces
        self.holes = [piece for piece in pieces if isinstance(piece, OpenHole)]
        self._done: dict[tuple[int, ...], tuple[float, Answer]] = {}
        self._glanced: dict[tuple[int, ...], tuple[float, Answer]] = {}  # by one call that fills all
        self._refusal: RequestError | None = None  # a length at which no answer keeps the constraint
        given = len(request.prompt) + len(request.suffix) + sum(len(p) for p in pieces if isinstance(p, tuple))
        self._room = engine.context_length - given

    def best(self) -> Filled:
        """Turn by turn, until a sweep over the holes changes no length."""
        is_open_end = not self._request.suffix and isinstance(self._pieces[-1], OpenHole)
        lengths = [hole.least for hole in self.holes]
        if sum(lengths) > self._room:
            problem = f"its holes need {sum(lengths)} positions at least, and the context has room for {self._room}"
            raise RequestError("middle", problem, remedy="shorten the prompt or the holes")
        searched = list(range(len(self.holes)))
        if is_open_end:
            lengths[searched.pop()] += min(self.holes[-1].most - lengths[-1], self._room - sum(lengths))
        for _ in range(_MAX_SWEEPS):
            before = tuple(lengths)
            for i in searched:
                lengths[i] = self._turn(lengths, i)
            if tuple(lengths) == before or len(searched) < 2:
                break
        self._decode([tuple(lengths)])
        score, answer = self._done[tuple(lengths)]
        if score == -np.inf and self._refusal is not None:
            raise self._refusal
        answers = [done for _, done in [*self._done.values(), *self._glanced.values()]]
        return Filled(
            answer=answer,
            request=with_holes(self._request, self._pieces, lengths),
            lengths=tuple(lengths),
            log_confidence=score,
            num_rows=len(answers),
            num_calls=sum(done.num_calls for done in answers),
            num_positions=sum(done.num_positions for done in answers),
        )

    def _turn(self, lengths: Sequence[int], i: int) -> int:
        """The best length of hole i, the others as they are."""
        hole, others = self.holes[i], sum(lengths) - lengths[i]
        most = min(hole.most, self._room - others)
        tried = list(range(hole.least, most + 1))
        if len(tried) > _FEW:
            glanced = {n: (*lengths[:i], n, *lengths[i + 1 :]) for n in _spaced(hole.least, most)}
            self._decode(glanced.values(), at_once=True)
            promising = sorted(glanced, key=lambda n: -self._glanced[glanced[n]][0])[:_PROMISING]
            tried = sorted({*_ladder(hole.least, most), *promising})
        while True:
            keys = {n: (*lengths[:i], n, *lengths[i + 1 :]) for n in tried}
            self._decode(keys.values())
            best = max(tried, key=lambda n: self._done[keys[n]][0])
            below = max((n for n in tried if n < best), default=best)
            above = min((n for n in tried if n > best), default=best)
            wanted = {(best + below) // 2, (best + above) // 2}
            if self._done[keys[best]][0] == -np.inf:  # none of them can be: one between may
                wanted = {(some + other) // 2 for some, other in itertools.pairwise(tried)}
            wanted -= set(tried)
            if not wanted:
                return best
            tried = sorted({*tried, *wanted})

    def _decode(self, wanted: Iterable[tuple[int, ...]], *, at_once: bool = False) -> None:
        """Decode at lengths that were not yet, as one batch; at_once: by a single call that fills all."""
        if self._engine.num_active or self._engine.num_waiting:
            raise RequestError("infill", "the engine is busy", remedy="give the search one of its own")
        request, done = (self._in_one_call(), self._glanced) if at_once else (self._request, self._done)
        rows: dict[int, tuple[int, ...]] = {}
        with self._engine.left_empty():
            for lengths in wanted:
                if lengths not in done:
                    try:
                        rows[self._engine.add(with_holes(request, self._pieces, lengths))] = lengths
                    except RequestError as error:
                        if error.place != "constraint":
                            raise
                        done[lengths], self._refusal = (-np.inf, _NOTHING), error
            sure: dict[int, list[float]] = {row: [] for row in rows}
            while rows and (updates := self._engine.step()):
                for update in updates:
                    sure[update.row].extend(update.confidence.tolist())
                    if update.state.finish_reason is not None:
                        answer = answer_of(update.state, self._engine.eos_id)
                        logs = np.log(np.maximum(sure[update.row], _LEAST_CONFIDENCE))
                        score = -np.inf if answer.finish_reason == "error" else float(logs.mean())
                        done[rows[update.row]] = (score, answer)

    def _in_one_call(self) -> Request:
        """The request in one block and one step, which must commit all of it; the likeliest tokens, nothing drawn."""
        alike = self._request.config.model_dump(include={"guidance", "max_tokens"})
        length = self._engine.context_length
        config = DecodeConfig(policy=LowConfidencePolicy(), block_length=length, steps_per_block=1, **alike)
        return replace(self._request, config=config, stop=())


def _ladder(least: int, most: int) -> list[int]:
    """Lengths to begin with: steps that double, both ends among them."""
    lengths, step = [least], 1
    while lengths[-1] < most:
        lengths.append(min(lengths[-1] + step, most))
        step *= 2
    return lengths


def _spaced(least: int, most: int) -> list[int]:
    """Lengths to ask of: every one at first, then ever wider apart, both ends among them."""
    lengths = [least]
    while lengths[-1] < most:
        lengths.append(min(lengths[-1] + max(1, (lengths[-1] - least) // _EVERY_OF), most))
    return lengths
