"""How many replicas an endpoint takes: the project's own scaling rule over a simulated fleet, a day and a burst.

    python tests/benchmarks/fleet.py [--requests-per-s 10000] [--part 40] [--call-ms 2.46 --row-ms 2.03]

One JSON line. `--part` of the fleet is simulated, with the same part of the requests: replicas are told times `part`.
A replica decodes up to ROWS rows together, and a call over n rows takes call_ms + row_ms n; all of its rows progress
alike, others wait in order, and beyond `max_queued_requests` they are refused. The defaults are one core and a million
parameters, from README.md (`decode.py`, blocks of 16 in 8 calls: 446 tokens/s alone, 857 of 8 rows): 4.48 ms and
18.67 ms a call. A request takes a log-normal number of calls and is predicted, as `predicted_work` does, to take the
most that it can: 32 for the 14 of README.md's first example. Requests come as a Poisson process whose rate is a sine
between 20 % and 100 % of the most, with a burst on it; the day is cut to two hours, so the wave is 12 times as steep.
`utilisation` is time in calls, `carried` what was answered, as a share of what full batches would have answered.

`is_checked`: the same code with a fixed fleet and random routing, over theory. Rows that share a processor, whatever
its speed at each number of them, are so many in the long run as their mean size alone says: P(n) ~ the product over
k = 1..n of arrivals x calls x call(k) / k. Symmetric queues, Kelly, Reversibility and Stochastic Networks, 1979, 3.3.
"""

import argparse
import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from figures import tell
from numpy.typing import NDArray

from dllm_core.decoding.config import MAX_ROWS
from workflows.placement import ServePlacement
from workflows.serve.config import ServeConfig
from workflows.serve.work import Scaler, ScalingRule

ROWS = MAX_ROWS
LOOK_BACK = 4  # seconds over which Ray Serve averages what replicas report, once a second: `app.build`
PREDICTED = 32 / 14
DRAINS_S = 300.0  # after a burst: its requests are told with it so long
PLACEMENT, SERVE = ServePlacement(), ServeConfig()
OPTIONS = (
    ("requests-per-s", 10_000.0, "at the wave's top"),
    ("part", 40, "one replica and its requests in so many are simulated"),
    ("call-ms", 2.46, "of a denoiser call, whatever its rows"),
    ("row-ms", 2.03, "of a call, for each of its rows"),
    ("calls-p50", 32.0, "denoiser calls of a request"),
    ("calls-p95", 128.0, "denoiser calls of a request"),
    ("start-s", 60.0, "until a new replica answers"),
    ("target-work", PLACEMENT.target_work, "as in the section `placement.serve`"),
    ("down-after-s", 2.0, "of the whole fleet; a part has as much longer for one as it is smaller"),
    ("day-s", 7200, "of the wave"),
    ("burst-at", 0.25, "of the day; 0.5 is the top, 2 never comes"),
    ("seed", 0, "of everything"),
)


@dataclass(frozen=True)
class Load:
    """What is asked for. peak: requests a second at the wave's top, of the part that is simulated."""

    peak: float
    day_s: float
    calls_p50: float
    calls_p95: float
    burst_at: float
    burst_times: float = 3.0
    burst_s: float = 300.0
    trough: float = 0.2

    def rate(self, second: float) -> float:
        """Requests a second: the wave begins at its trough."""
        height = self.trough + (1 - self.trough) * (1 - math.cos(2 * math.pi * second / self.day_s)) / 2
        return self.peak * height * (self.burst_times if self.in_burst(second) else 1.0)

    def in_burst(self, second: float, after: float = 0.0) -> bool:
        """Whether a burst is on, or has ended less than `after` seconds ago."""
        return 0 <= second - self.burst_at * self.day_s < self.burst_s + after

    @property
    def sigma(self) -> float:
        """Of the logarithm of calls, whose 95th percentile is 1.645 standard deviations above its median."""
        return math.log(self.calls_p95 / self.calls_p50) / 1.6449

    @property
    def mean_calls(self) -> float:
        """Denoiser calls of a request."""
        return self.calls_p50 * math.exp(self.sigma**2 / 2)


@dataclass
class Row:
    """A request that came `at` a second and takes so many calls."""

    at: float
    calls: float
    waited: float = 0.0


@dataclass
class Replica:
    """Rows that share one denoiser. calls: so many has each row that was there from the first taken."""

    call_s: float
    row_s: float
    calls: float = 0.0
    since: float = 0.0
    rows: list[tuple[float, int, Row]] = field(default_factory=list)
    waiting: deque[Row] = field(default_factory=deque)
    held: float = 0.0  # predicted calls of all that was sent here, as the router's ledger has it
    done: float = 0.0  # calls that the rows in the batch have taken
    busy_s: float = 0.0
    taken_s: float = 0.0  # as `work.Fullness` counts, which has call_s and row_s from the calls themselves
    version: int = 0

    @property
    def tick_s(self) -> float:
        """Seconds of a denoiser call."""
        return self.call_s + self.row_s * len(self.rows)

    def advance(self, now: float) -> None:
        """Let the time go by until `now`, in which no row comes or goes."""
        if count := len(self.rows):
            passed = (now - self.since) / self.tick_s
            self.calls += passed
            self.done += passed * count
            self.busy_s += now - self.since
            self.taken_s += (now - self.since) * (1 - (1 - count / ROWS) * self.call_s / self.tick_s)
        self.since = now

    def admit(self, row: Row, number: int) -> None:
        """Into the batch, at `since`. A call is under way: half of one goes by before its first."""
        row.waited = self.since - row.at + (self.tick_s / 2 if self.rows else 0.0)
        heapq.heappush(self.rows, (self.calls + row.calls, number, row))


class Fleet:
    """Replicas, a router and a scaler in simulated seconds. rule None: a fixed fleet with random routing."""

    def __init__(self, load: Load, replica: tuple[float, float], rule: ScalingRule | None, start_s: float, seed: int):
        self._load, self._replica, self._start_s = load, replica, start_s
        self._scaler = None if rule is None else Scaler(rule)
        self._random, self._numbers = random.Random(seed), np.random.default_rng(seed)
        self._ends: list[tuple[float, int, int, Replica]] = []
        self._starting: list[float] = []
        self._number = itertools.count()  # heaps never compare rows or replicas
        self._told: deque[tuple[float, float]] = deque(maxlen=LOOK_BACK)
        self.replicas, self._leaving = list[Replica](), list[Replica]()
        self.ended: list[tuple[float, float, float]] = []  # came, waited, took
        self.refused, self.sizes = list[float](), list[int]()
        self.changes, self.busy_s, self.up_s = 0, 0.0, 0.0

    def start(self, count: int) -> None:
        """Replicas that are there from the first."""
        self.replicas += [Replica(*self._replica) for _ in range(count)]

    def run(self, start: int, stop: int) -> None:
        """From one second to another."""
        for second in range(start, stop):
            count = int(self._numbers.poisson(self._load.rate(second + 0.5)))
            times = second + np.sort(self._numbers.random(count))
            calls = np.maximum(1.0, self._numbers.lognormal(math.log(self._load.calls_p50), self._load.sigma, count))
            for at, needed in zip(times.tolist(), calls.tolist(), strict=True):
                self._end_until(at)
                self._take(Row(at, needed))
            self._end_until(second + 1.0)
            self._look(second + 1.0)

    def _take(self, row: Row) -> None:
        if self._scaler is None:
            replica = self._random.choice(self.replicas)
        else:  # what the router's ledger does; of replicas alike, any
            replica = min(self.replicas, key=lambda one: one.held)
        if len(replica.waiting) >= SERVE.max_queued_requests:
            self.refused.append(row.at)
            return
        replica.held += row.calls * PREDICTED
        if len(replica.rows) < ROWS:
            replica.advance(row.at)
            replica.admit(row, next(self._number))
            self._plan(replica)
        else:
            replica.waiting.append(row)

    def _plan(self, replica: Replica) -> None:
        replica.version += 1
        if replica.rows:
            first = replica.since + max(0.0, replica.rows[0][0] - replica.calls) * replica.tick_s
            heapq.heappush(self._ends, (first, next(self._number), replica.version, replica))

    def _end_until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            at, _, version, replica = heapq.heappop(self._ends)
            if version != replica.version:
                continue
            replica.advance(at)
            row = heapq.heappop(replica.rows)[2]
            replica.held -= row.calls * PREDICTED
            replica.done -= row.calls
            self.ended.append((row.at, row.waited, at - row.at))
            while replica.waiting and len(replica.rows) < ROWS:
                replica.admit(replica.waiting.popleft(), next(self._number))
            self._plan(replica)

    def _look(self, now: float) -> None:
        """Once a second: replicas report, Ray Serve's controller asks the policy and starts or ends some."""
        for replica in [*self.replicas, *self._leaving]:
            replica.advance(now)
        busy = sum(replica.taken_s for replica in self.replicas)
        for replica in [*self.replicas, *self._leaving]:
            self.busy_s += replica.busy_s
            replica.busy_s = replica.taken_s = 0.0
        self._leaving = [replica for replica in self._leaving if replica.rows]
        self.up_s += len(self.replicas) + len(self._leaving)
        self._told.append((sum(replica.held - replica.done for replica in self.replicas), busy))
        self.start(sum(at <= now for at in self._starting))
        self._starting = [at for at in self._starting if at > now]
        self.sizes.append(len(self.replicas) + len(self._starting) + len(self._leaving))
        if self._scaler is None:
            return
        current = len(self.replicas) + len(self._starting)
        work, busy = (sum(values) / len(self._told) for values in zip(*self._told, strict=True))
        wanted = self._scaler.decide(now, current, work, busy)
        self.changes += wanted != current
        self._starting += [now + self._start_s] * max(0, wanted - current)
        for _ in range(current - wanted):
            if self._starting:
                self._starting.pop()
            else:  # it takes no more, and ends when its rows have
                self._leaving.append(self.replicas.pop())


def theory(rate: float, mean_calls: float, call_s: float, row_s: float) -> tuple[float, float]:
    """(share of the time busy, mean seconds a request) of one replica with Poisson arrivals and no queue."""
    weights = [1.0]
    for rows in range(1, 10 * ROWS):
        weights.append(weights[-1] * rate * mean_calls * (call_s + row_s * min(rows, ROWS)) / min(rows, ROWS))
    total = sum(weights)
    return 1 - weights[0] / total, sum(n * weight for n, weight in enumerate(weights)) / total / rate


def checked(load: Load, replica: tuple[float, float], seed: int) -> dict[str, float]:
    """Sixteen replicas at 0.7 of what they can do, for ten minutes after two: simulated over computed."""
    rate = 0.7 * ROWS / (replica[0] + replica[1] * ROWS) / load.mean_calls
    steady = Load(16 * rate, 720.0, load.calls_p50, load.calls_p95, burst_at=2.0, trough=1.0)
    fleet = Fleet(steady, replica, None, 0.0, seed)
    fleet.start(16)
    fleet.run(0, 120)
    fleet.busy_s = fleet.up_s = 0.0
    fleet.run(120, 720)
    took = [took for at, _, took in fleet.ended if at > 120]
    busy, seconds = theory(rate, load.mean_calls, *replica)
    return {"busy": round(fleet.busy_s / fleet.up_s / busy, 3), "seconds": round(float(np.mean(took)) / seconds, 3)}


def quantiles(values: NDArray[np.float64]) -> list[float]:
    """p50, p95, p99; of nothing none."""
    return [round(float(value), 3) for value in np.percentile(values, (50, 95, 99))] if len(values) else []


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default, meaning in OPTIONS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--maximum", type=int, help="replicas of the whole fleet; default: 3 times those of the top")
    asked = parser.parse_args()
    load = Load(asked.requests_per_s / asked.part, asked.day_s, asked.calls_p50, asked.calls_p95, asked.burst_at)
    replica = (asked.call_ms / 1000, asked.row_ms / 1000)
    capacity = ROWS / (replica[0] + replica[1] * ROWS) / load.mean_calls
    at_top = load.peak / capacity
    maximum = math.ceil(3 * at_top) if asked.maximum is None else math.ceil(asked.maximum / asked.part)
    minimum, down_s = math.ceil(load.trough * at_top), asked.down_after_s * asked.part
    rule = ScalingRule(minimum, maximum, asked.target_work, PLACEMENT.up_after_s, down_s)
    fleet = Fleet(load, replica, rule, asked.start_s, asked.seed)
    fleet.start(min(maximum, math.ceil(load.trough * at_top / 0.7)))
    fleet.run(0, asked.day_s)
    in_burst = np.array([load.in_burst(at, DRAINS_S) for at, _, _ in fleet.ended])
    _, waited, took = np.array(fleet.ended).T
    tell(
        "fleet",
        **vars(asked),
        requests=len(fleet.ended) + len(fleet.refused),
        requests_per_s_of_a_replica=round(capacity, 2),
        replicas_busy_at_top=round(at_top * asked.part),
        replicas_p50=int(np.median(fleet.sizes)) * asked.part,
        replicas_mean=round(float(np.mean(fleet.sizes)) * asked.part),
        replicas_max=max(fleet.sizes) * asked.part,
        replicas_allowed=maximum * asked.part,
        utilisation=round(fleet.busy_s / fleet.up_s, 3),
        carried=round(len(fleet.ended) / capacity / fleet.up_s, 3),
        changes=fleet.changes,
        refused=len(fleet.refused),
        refused_in_burst=sum(load.in_burst(at, DRAINS_S) for at in fleet.refused),
        late=int((took > SERVE.request_timeout_s).sum()),
        wait_s_wave=quantiles(waited[~in_burst]),
        wait_s_burst=quantiles(waited[in_burst]),
        took_s_wave=quantiles(took[~in_burst]),
        took_s_burst=quantiles(took[in_burst]),
        is_checked=checked(load, replica, asked.seed),
    )


if __name__ == "__main__":
    main()
