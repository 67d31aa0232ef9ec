"""Work: what a request is expected to cost, and how many replicas the work in hand is worth. Pure; no Ray.

A request's cost is its denoiser calls, which its length and policy decide: a hundred waiting requests of 4 tokens are
less work than one of 4,096. So what replicas report, and what they are scaled by, is predicted calls, summed over rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dllm_core.decoding.request import Request

_KEPT = 1 - 1 / 1024  # of what earlier calls say, with each call
_LEAST_SPREAD = 0.05  # rows^2, as where every twentieth call has a row more: below it a line through calls is chance


def predicted_work(request: Request, is_ancestral: bool = False) -> int:
    """The most denoiser calls that a row can take; a policy may need fewer, and a few more only for edits.

    is_ancestral: the model replaces tokens, and takes `steps` calls over the whole canvas. Guidance makes two of each.
    """
    config = request.config
    blocks, rest = divmod(request.num_asked, config.block_length)
    if rest and (not blocks or request.middle is not None):  # no last block that others stand before
        blocks, rest = blocks + 1, 0
    calls = config.steps if is_ancestral else blocks * config.steps_per_block + config.steps_of(rest)
    return max(1, calls) * (2 if config.guidance else 1)


@dataclass(frozen=True)
class ScalingRule:
    """target: calls x rows that one replica is meant to have in hand. Up when work has stood above for `up_after_s`.

    Down by one replica when what there is to do has fitted into one fewer, with `slack` to spare, for `down_after_s`:
    the work in hand, and the time that replicas are busy. Work in hand alone would say too little: of a load that is
    just carried none piles up, and ended replicas would be started again a minute later, for ever.
    """

    minimum: int
    maximum: int
    target: float
    up_after_s: float = 2.0
    down_after_s: float = 60.0
    slack: float = 0.8

    def wanted(self, work: float) -> int:
        """Replicas that the work in hand asks for."""
        needed = math.ceil(work / self.target) if work > 0 else 0
        return min(self.maximum, max(self.minimum, needed))


@dataclass
class Scaler:
    """Holds a number of replicas to a rule over time. above, below: since when work has asked for more or fewer."""

    rule: ScalingRule
    above: float | None = None
    below: float | None = None

    def decide(self, now: float, current: int, work: float, busy: float) -> int:
        """How many there are to be from now on. now: seconds, by a clock that may be set back. busy: shares of
        time, over all replicas.
        """
        rule, wanted = self.rule, self.rule.wanted(work)
        if wanted > current:
            self.below = None
            self.above = now if self.above is None else min(self.above, now)
            if now - self.above >= rule.up_after_s or current < rule.minimum or not current:
                self.above = None
                return wanted
            return current
        self.above = None
        fewer = current - 1
        room = fewer * rule.slack
        fits = fewer >= rule.minimum and work <= rule.target * room and busy <= room
        if not fits:
            self.below = None
            return min(current, rule.maximum)
        self.below = now if self.below is None else min(self.below, now)
        if now - self.below < rule.down_after_s:
            return current
        self.below = now  # the next one has its own time to wait
        return fewer


class Fullness:
    """How much of what it could do an engine does: its time in calls, less what fuller batches would have shared.

    A call over n rows takes a + b n seconds, of which a is the same for every n: nearly all on a GPU, half of one row's
    on a core. Batches that are full to a share f do in (f a + b n) what they take a + b n for. a and b are the line
    through the calls so far, old ones forgotten; before their rows have varied, a call counts as all its time.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, n, n^2, t, n t
        self._taken_s = 0.0

    def tick(self, rows: int, seconds: float, fill: float) -> None:
        """A call. fill: the share of the batch's room that it took."""
        if not rows:
            return
        count, n, nn, t, nt = (_KEPT * sum_ for sum_ in self._sums)
        self._sums = (count + 1, n + rows, nn + rows * rows, t + seconds, nt + rows * seconds)
        self._taken_s += seconds - (1.0 - min(1.0, fill)) * min(seconds, self.fixed_s)

    @property
    def fixed_s(self) -> float:
        """What a call takes whatever its rows: a."""
        count, n, nn, t, nt = self._sums
        spread = nn / count - (n / count) ** 2 if count else 0.0
        if spread < _LEAST_SPREAD:
            return 0.0
        slope = (nt / count - n * t / count**2) / spread
        return min(t / count, max(0.0, (t - slope * n) / count))

    def taken_s(self) -> float:
        """Seconds of full calls since this was last asked."""
        taken, self._taken_s = self._taken_s, 0.0
        return taken


class Ledger:
    """What each replica has in hand, of what was sent from here."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[str, int]] = {}
        self._turn = 0

    def begin(self, replica: str, request: str, work: int) -> None:
        """A request was sent; one that is sent again counts where it is now."""
        self._sent[request] = (replica, work)

    def end(self, request: str) -> None:
        """It has come back, or never will."""
        self._sent.pop(request, None)

    def ranked(self, replicas: Sequence[str]) -> list[str]:
        """The least loaded first; those alike take turns."""
        held = dict.fromkeys(replicas, 0)
        for replica, work in self._sent.values():
            if replica in held:
                held[replica] += work
        self._turn += 1
        at = self._turn % max(1, len(replicas))
        return sorted([*replicas[at:], *replicas[:at]], key=held.__getitem__)
