"""Constraints with any-order commits: the likeliest block that leaves the whole answer a way to match.

A policy commits a block's positions in any order, so that a mask over next tokens, which keeps text from left to right
possible, says too little: a late token may leave no way to fill what stands before it. Here a call proposes all open
positions of the block together, as one string of the automaton: the likeliest (Viterbi), or one drawn from the model's
law given that the answer matches (backward sums, forward draws). Any part of that string leaves the rest possible, so
the policy may commit what it likes. DINGO's dynamic program, arXiv:2505.23061, with what stands behind the block, and
may still grow, taken in: a state from which no answer can be finished is never entered.

Behind an end token anything may stand: it costs the likeliest token there, or in a draw nothing, and is proposed as end
tokens. All of an answer counts, given pieces too; behind a hole before something given no end token may stand.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dllm_core.decoding.automaton import TokenAutomaton
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import EditingPolicy
from dllm_core.decoding.state import DecodeState
from dllm_core.errors import RequestError
from dllm_core.seeding import Bools, Doubles, Floats, Ints

_OPEN = -1


@dataclass(frozen=True)
class _Step:
    """What a position adds to a path: to each edge by its class [C], to an end there, and where one came before.

    Logs, of sums too: a weight of many unlikely tokens is 0 in float64, where a low temperature makes them far apart.
    """

    by_class: Doubles
    end: float
    stay: float


def check_keepable(request: Request, *, is_ancestral: bool) -> None:
    """Refuse what takes tokens back that others were chosen to fit, and what cuts an answer off."""
    problem = ""
    if is_ancestral:
        problem = "needs masks, and the model has tokens for noise"
    elif isinstance(request.config.policy, EditingPolicy):
        problem = "cannot be kept by a policy that replaces tokens"
    elif request.stop:
        problem = "cannot be kept by an answer that a stop string cuts off"
    if problem:
        raise RequestError("constraint", problem, request.constraint)


def is_possible(automaton: TokenAutomaton, state: DecodeState, eos_id: int) -> bool:
    """Whether any answer matches that holds what was given and committed."""
    tokens, may_end = _answer(state, eos_id)
    return bool(_alive(automaton, tokens, may_end, eos_id)[0][0])


def likeliest(automaton: TokenAutomaton, state: DecodeState, eos_id: int, positions: Ints, log_probs: Doubles) -> Ints:
    """Tokens [n] of the likeliest string at open positions [n] of one block, -1 behind the answer. log_probs [n V]."""
    tokens, may_end = _answer(state, eos_id)
    found = np.full(len(positions), -1)
    inside, first, stop = _block(state, positions, len(tokens))
    if not len(inside):
        return found
    alive = _alive(automaton, tokens, may_end, eos_id, first)
    best, best_token = _best_of_classes(automaton, log_probs[inside])
    steps, rows = [], iter(range(len(inside)))
    for at in range(first, stop):
        if tokens[at] != _OPEN:
            steps.append(_fixed(automaton, int(tokens[at]), may_end[at], eos_id))
            continue
        row = log_probs[inside[i := next(rows)]]
        steps.append(_Step(best[i], row[eos_id] if may_end[at] else -np.inf, row.max()))
    scores = [np.full(automaton.end + 1, -np.inf)]
    scores[0][_state_before(automaton, tokens[:first], may_end, eos_id)] = 0.0
    for step, reached in zip(steps, alive[1:], strict=False):
        scores.append(np.where(reached, _reached(automaton, scores[-1], step), -np.inf))
    classes = np.array(_traced(automaton, scores, steps))[tokens[first:stop] == _OPEN]
    is_text = classes >= 0
    found[inside] = eos_id
    found[inside[is_text]] = best_token[is_text, classes[is_text]]
    return found


def draw(
    automaton: TokenAutomaton,
    state: DecodeState,
    eos_id: int,
    positions: Ints,
    laws: Iterable[Doubles],
    uniforms: Floats,
) -> Ints | None:
    """Tokens [n] drawn from the law of strings at open positions [n] of one block, given that the answer matches.

    laws: each [n V], logs of weights of which a position's need not sum to 1; the first that leaves a string is taken:
    what top_p cuts off may leave none. uniforms [n]: a position's own. -1 behind the answer; None if no law leaves any.
    """
    tokens, may_end = _answer(state, eos_id)
    inside, first, stop = _block(state, positions, len(tokens))
    if not len(inside):
        return np.full(len(positions), -1)
    behind = np.where(_alive(automaton, tokens, may_end, eos_id, stop)[0], 0.0, -np.inf)
    start, of_token = _state_before(automaton, tokens[:first], may_end, eos_id), automaton.class_of[automaton.tokens]
    for law in laws:
        steps, rows = [], iter(inside)
        for at in range(first, stop):
            if tokens[at] != _OPEN:
                steps.append(_fixed(automaton, int(tokens[at]), may_end[at], eos_id))
                continue
            row = law[next(rows)]
            by_class = _log_sums(row[automaton.tokens], of_token, automaton.num_classes)
            whole = _log_sums(row, np.zeros(len(row), np.int64), 1)[0]
            steps.append(_Step(by_class, row[eos_id] if may_end[at] else -np.inf, whole))
        sums = [behind]
        for step in reversed(steps):
            sums.append(_summed(automaton, sums[-1], step))
        sums.reverse()
        if sums[0][start] > -np.inf:
            break
    else:
        return None
    found, at, rows = np.full(len(positions), -1), start, iter(inside)
    for i, step in enumerate(steps):
        if tokens[first + i] != _OPEN:
            at = _stepped(automaton, at, int(tokens[first + i]), may_end[first + i], eos_id)
            continue
        row = next(rows)
        found[row], at = _drawn(automaton, at, step, sums[i + 1], law[row], uniforms[row], eos_id)
    return found


def _answer(state: DecodeState, eos_id: int) -> tuple[Ints, Bools]:
    """What stands in the answer [n], -1 where it is open or may still grow, and where an end token may stand [n]."""
    head, stop = len(state.request.prompt), state.answer_stop
    tokens = np.full(state.request.region_length, _OPEN)
    held = state.canvas[head:stop]
    is_held = state.is_final[head:stop] | (held != state.mask_id)
    here = np.where(is_held, held, _OPEN)
    tokens[: stop - head] = np.where(state.is_closed[head:stop], eos_id, here)
    return tokens, head + np.arange(len(tokens)) >= state.request.open_end


def _block(state: DecodeState, positions: Ints, length: int) -> tuple[Ints, int, int]:
    """Which of a block's positions [n] are open places of the answer, and the stretch of it that they lie in."""
    at = positions - len(state.request.prompt)
    inside = np.flatnonzero((at < length) & (state.canvas[positions] == state.mask_id))
    return (inside, int(at[inside[0]]), int(at[inside[-1]]) + 1) if len(inside) else (inside, 0, 0)


def _alive(automaton: TokenAutomaton, tokens: Ints, may_end: Bools, eos_id: int, first: int = 0) -> list[Bools]:
    """From which states [S + 1] an answer can be finished: before each position from `first` on, and at its end."""
    found = [automaton.is_final.copy()]
    found[0][automaton.end] = True
    for token, ends in zip(tokens[first:][::-1], may_end[first:][::-1], strict=True):
        behind = found[-1]
        if token != _OPEN:
            found.append(_before_token(automaton, behind, int(token), ends, eos_id))
            continue
        reached = automaton.before(behind)
        if behind[automaton.end]:
            reached |= automaton.is_final & ends
            reached[automaton.end] = True
        found.append(reached)
    return found[::-1]


def _before_token(automaton: TokenAutomaton, behind: Bools, token: int, ends: bool, eos_id: int) -> Bools:
    """The states [S + 1] from which a token that stands leads into one of `behind` [S + 1]."""
    found = np.zeros_like(behind)
    if (number := automaton.class_of[token]) >= 0:
        after = automaton.after[:, number]
        found = (after >= 0) & behind[after]
    if token == eos_id and ends:
        found |= automaton.is_final & behind[automaton.end]
    found[automaton.end] = behind[automaton.end]
    return found


def _fixed(automaton: TokenAutomaton, token: int, ends: bool, eos_id: int) -> _Step:
    """The step of a token that stands: its own class alone, and behind the end whatever it is."""
    by_class = np.full(automaton.num_classes, -np.inf)
    if (number := automaton.class_of[token]) >= 0:
        by_class[number] = 0.0
    return _Step(by_class, 0.0 if token == eos_id and ends else -np.inf, 0.0)


def _stepped(automaton: TokenAutomaton, state: int, token: int, ends: bool, eos_id: int) -> int:
    """The state behind a token that stands; a possible answer has one."""
    if state == automaton.end or (token == eos_id and ends):
        return automaton.end
    return automaton.step(state, token)


def _state_before(automaton: TokenAutomaton, tokens: Ints, may_end: Bools, eos_id: int) -> int:
    """The state behind tokens that stand at the answer's begin."""
    state = 0
    for token, ends in zip(tokens.tolist(), may_end.tolist(), strict=False):
        state = _stepped(automaton, state, token, ends, eos_id)
    return state


def _best_of_classes(automaton: TokenAutomaton, log_probs: Doubles) -> tuple[Doubles, Ints]:
    """The highest log p in each class [n C], and the first token that has it [n C]."""
    ordered = log_probs[:, automaton.tokens]
    best = np.maximum.reduceat(ordered, automaton.begins[:-1], axis=1)
    of_token = np.repeat(np.arange(automaton.num_classes), np.diff(automaton.begins))
    places = np.where(ordered == best[:, of_token], np.arange(ordered.shape[1]), ordered.shape[1])
    return best, automaton.tokens[np.minimum.reduceat(places, automaton.begins[:-1], axis=1)]


def _reached(automaton: TokenAutomaton, before: Doubles, step: _Step) -> Doubles:
    """The best score of a path into each state [S + 1], a position on."""
    after = np.full(automaton.end + 1, -np.inf)
    values = before[automaton.src] + step.by_class[automaton.cls]
    begins = np.flatnonzero(np.diff(automaton.dst, prepend=-1))
    after[automaton.dst[begins]] = np.maximum.reduceat(values, begins)
    into = np.where(automaton.is_final, before, -np.inf).max() + step.end
    after[automaton.end] = max(into, before[automaton.end] + step.stay)
    return after


def _traced(automaton: TokenAutomaton, scores: list[Doubles], steps: list[_Step]) -> list[int]:
    """The classes of the best path, -1 for an end token and what stands behind it."""
    at, path = int(scores[-1].argmax()), []
    for before, step in zip(scores[-2::-1], reversed(steps), strict=True):
        if at == automaton.end:
            finals = np.where(automaton.is_final, before, -np.inf)
            path.append(-1)
            at = at if before[at] + step.stay >= finals.max() + step.end else int(finals.argmax())
            continue
        edges = slice(*np.searchsorted(automaton.dst, [at, at + 1]))
        edge = edges.start + (before[automaton.src[edges]] + step.by_class[automaton.cls[edges]]).argmax()
        path.append(int(automaton.cls[edge]))
        at = int(automaton.src[edge])
    return path[::-1]


def _summed(automaton: TokenAutomaton, behind: Doubles, step: _Step) -> Doubles:
    """The log weight of all ways on from each state [S + 1], a position earlier."""
    values = step.by_class[automaton.cls] + behind[automaton.dst]
    found = _log_sums(values, automaton.src, automaton.end + 1)
    ends = np.where(automaton.is_final, step.end + behind[automaton.end], -np.inf)
    found = np.logaddexp(found, ends)
    found[automaton.end] = step.stay + behind[automaton.end]
    return found


def _log_sums(values: Doubles, groups: Ints, number: int) -> Doubles:
    """Logs [number] of the summed exponentials of the values [n] of each group [n]."""
    highest = np.full(number, -np.inf)
    np.maximum.at(highest, groups, values)
    highest = np.where(highest > -np.inf, highest, 0.0)
    with np.errstate(divide="ignore"):
        found: Doubles = np.log(np.bincount(groups, np.exp(values - highest[groups]), number)) + highest
    return found


def _drawn(
    automaton: TokenAutomaton, state: int, step: _Step, behind: Doubles, law: Doubles, u: float, eos_id: int
) -> tuple[int, int]:
    """A token and the state behind it, by inversion: first a class, then within it."""
    if state == automaton.end:
        return eos_id, state
    after = automaton.after[state]
    logs = np.where(after >= 0, step.by_class + behind[after], -np.inf)
    logs = np.append(logs, step.end + behind[automaton.end] if automaton.is_final[state] else -np.inf)
    ways = np.exp(logs - logs.max())
    cumulative = np.cumsum(ways)
    target = float(u) * cumulative[-1]
    number = min(int(np.searchsorted(cumulative, target, side="right")), int(np.flatnonzero(ways)[-1]))
    if number == automaton.num_classes:
        return eos_id, automaton.end
    tokens = automaton.of_class(number)
    weights = np.exp(law[tokens] - law[tokens].max())
    within = np.cumsum(weights)
    rest = (target - (cumulative[number - 1] if number else 0.0)) / ways[number] * within[-1]
    chosen = min(int(np.searchsorted(within, rest, side="right")), int(np.flatnonzero(weights)[-1]))
    return int(tokens[chosen]), int(after[number])
