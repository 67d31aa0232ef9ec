"""TokenAutomaton: which tokens may follow each other in a text that matches a regular expression.

A regular expression over characters is compiled to a deterministic automaton over token ids by the library
`outlines-core`. Tokens that lead from every state to the same next one are one class (a letter is as good as any other
to `[a-z]*`), so that a step over the automaton costs its edges between states and classes, not the vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from outlines_core import Index, Vocabulary

from dllm_core.errors import RequestError
from dllm_core.noise.times import GOLDEN
from dllm_core.seeding import Bools, Ints, mixed

MAX_REGEX = 1 << 16
_MAX_KEPT = 32
_NO_WAY = "The vocabulary provided is incompatible"
# Stands behind every text. Without it the library drops what leads from a text that matches to one that does not yet:
# `(ab)+` would have no second `a`.
_STOP = "\0"


@dataclass(frozen=True)
class TokenAutomaton:
    """Over states 0 to S - 1, the first of which it begins in, and one more, S, for behind the end of an answer.

    is_final bool [S + 1]: a text may end there. class_of int [V]: each token's class, -1 where it never occurs; tokens
    of class c are tokens[begins[c] : begins[c + 1]], ascending. after int [S + 1, C]: the next state, -1 for none.
    src, cls, dst int [E]: the same as edges, in order of dst, src and class; pair_src, pair_dst: src and dst alone.
    """

    is_final: Bools
    class_of: Ints
    tokens: Ints
    begins: Ints
    after: Ints
    src: Ints
    cls: Ints
    dst: Ints
    pair_src: Ints
    pair_dst: Ints

    @property
    def end(self) -> int:
        """The state behind an answer's end."""
        return len(self.is_final) - 1

    @property
    def num_classes(self) -> int:
        """Classes of tokens."""
        return len(self.begins) - 1

    def of_class(self, number: int) -> Ints:
        """The tokens of a class, ascending."""
        found: Ints = self.tokens[self.begins[number] : self.begins[number + 1]]
        return found

    def step(self, state: int, token: int) -> int:
        """The state behind a token; -1 where it may not stand."""
        number = self.class_of[token]
        return -1 if number < 0 else int(self.after[state, number])

    def before(self, reached: Bools) -> Bools:
        """The states from which one token, whichever, leads into one of `reached` [S + 1]; the end is none of them."""
        found = np.zeros_like(reached)
        found[self.pair_src[reached[self.pair_dst]]] = True
        return found


def compile_regex(regex: str, spelled: Sequence[bytes | None]) -> TokenAutomaton:
    """The automaton of texts that match all of a regular expression (no look-around, no back-references).

    spelled: each token's bytes, None where it is no text. Raises RequestError where it is no regular expression or no
    tokens spell a text that matches.
    """
    body = checked_regex(regex)
    table: dict[bytes, list[int]] = {}
    for token, text in enumerate(spelled):
        if text and _STOP.encode() not in text:
            table.setdefault(text, []).append(token)
    table[_STOP.encode()] = [len(spelled)]
    try:
        index = Index(f"(?:{body}){_STOP}", Vocabulary(len(spelled) + 1, table))
    except ValueError:
        raise RequestError("constraint", "no tokens spell a text that matches it", regex) from None
    return _of_index(index, len(spelled))


def checked_regex(regex: str) -> str:
    """What stands between its anchors. Raises RequestError where that is no regular expression, or too long a one."""
    if len(regex) > MAX_REGEX:
        raise RequestError("constraint", f"is longer than {MAX_REGEX} characters", len(regex), "shorten it")
    body = _unanchored(regex)
    try:
        Index(body, Vocabulary(1, {_STOP.encode(): [0]}))  # alone: what will stand around it could mend it
    except ValueError as error:
        if not str(error).startswith(_NO_WAY):
            remedy = "write it without look-around, back-references and word boundaries"
            raise RequestError("constraint", f"is no regular expression ({error})", regex, remedy) from None
    return body


def _unanchored(regex: str) -> str:
    """Without ^ in front and $ at the end, which mean nothing where all of a text must match."""
    body = regex.removesuffix("$")
    is_escaped = (len(body) - len(body.rstrip("\\"))) % 2
    return (regex if is_escaped else body).removeprefix("^")


def _of_index(index: Index, size: int) -> TokenAutomaton:
    """Renumber the states, and give tokens that lead everywhere to the same place one class."""
    transitions: dict[int, dict[int, int]] = index.get_transitions()
    first = index.get_initial_state()
    names = {*transitions, *(state for row in transitions.values() for state in row.values()), first}
    number = {state: i for i, state in enumerate([first, *sorted(names - {first})])}
    rows, finals = [], index.get_final_states()
    is_final = np.zeros(len(number) + 1, dtype=bool)
    for state, row in transitions.items():
        tokens = np.fromiter(row, np.int64, len(row))
        states = np.fromiter((number[state] for state in row.values()), np.int64, len(row))
        is_text = tokens < size
        rows.append((number[state], tokens[is_text], states[is_text]))
        is_final[number[state]] = row.get(size) in finals
    # A token's column of the table of states and tokens, as the exclusive or of a random word for each of its entries.
    mark = np.zeros(size, np.uint64)
    for source, tokens, states in rows:
        mark[tokens] ^= mixed(np.uint64(source) * np.uint64(1 << 32) + states.astype(np.uint64) + GOLDEN)
    is_used = np.zeros(size, dtype=bool)
    for _, tokens, _ in rows:
        is_used[tokens] = True
    used = np.flatnonzero(is_used)
    marks, inverse = np.unique(mark[used], return_inverse=True)
    class_of = np.full(size, -1, np.int64)
    class_of[used] = inverse
    order = np.argsort(inverse, kind="stable")
    after = np.full((len(number) + 1, len(marks)), -1, np.int64)
    for source, tokens, states in rows:
        after[source, class_of[tokens]] = states
    src, cls = np.nonzero(after >= 0)
    by_dst = np.argsort(after[src, cls], kind="stable")
    src, cls = src[by_dst], cls[by_dst]
    dst = after[src, cls]
    pairs = np.unique(src * len(is_final) + dst)
    return TokenAutomaton(
        is_final=is_final,
        class_of=class_of,
        tokens=used[order],
        begins=np.searchsorted(inverse[order], np.arange(len(marks) + 1)),
        after=after,
        src=src,
        cls=cls,
        dst=dst,
        pair_src=pairs // len(is_final),
        pair_dst=pairs % len(is_final),
    )


def _interruptibly(make: Callable[[], TokenAutomaton]) -> TokenAutomaton:
    """What it makes, in a thread of its own: no signal is heeded in native code, and `((a{50}){50}){50}` takes minutes.

    What stands here meanwhile wakes to Ctrl-C; the thread goes with the process.
    """
    made: list[TokenAutomaton | BaseException] = []

    def work() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001 (raised below)
            made.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


class AutomatonCache:
    """Automata of one vocabulary, compiled once while they are among the last that were asked for. Thread-safe."""

    def __init__(self, spell: Callable[[], Sequence[bytes | None] | None]) -> None:
        """spell: each token's bytes, None where the tokenizer is not byte-level; asked for when it is needed."""
        self._spell = spell
        self._kept: OrderedDict[str, TokenAutomaton] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, regex: str) -> TokenAutomaton:
        """The automaton of `compile_regex`, with its errors."""
        with self._lock:
            if regex in self._kept:
                self._kept.move_to_end(regex)
                return self._kept[regex]
        spelled = self._spell()
        if spelled is None:
            raise RequestError("constraint", "needs a byte-level tokenizer, which this engine has not", regex)
        automaton = _interruptibly(lambda: compile_regex(regex, spelled))
        self.put(regex, automaton)
        return automaton

    def __contains__(self, regex: str) -> bool:
        with self._lock:
            return regex in self._kept

    def put(self, regex: str, automaton: TokenAutomaton) -> None:
        """Keep one that was compiled elsewhere."""
        with self._lock:
            self._kept[regex] = automaton
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
