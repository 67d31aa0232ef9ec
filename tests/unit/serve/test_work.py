"""Replicas follow the work in hand: a simulation of the policy over bursty loads, and what work is."""

import asyncio
import itertools
import random
from types import SimpleNamespace

import pytest
from conftest import in_long

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from workflows.placement import ServePlacement
from workflows.serve.routing import STANDS_STILL, LeastWorkRouter
from workflows.serve.scaling import ByWork
from workflows.serve.work import Fullness, Ledger, Scaler, ScalingRule, predicted_work

RULE = ScalingRule(minimum=1, maximum=4, target=100, up_after_s=2, down_after_s=20)
CALLS_PER_S = 50.0  # of one replica, summed over its rows


def simulated(rule, arrivals, seconds, seed=0, start=1):
    """(second, replicas, work) in a world where work arrives, and each replica does so much of it a second."""
    rng = random.Random(seed)
    scaler, work, replicas, starting, told = Scaler(rule), 0.0, start, [], []
    for tick in range(seconds * 2):
        now = tick / 2
        asked, power = work + arrivals(now, rng) / 2, replicas * CALLS_PER_S / 2
        busy = replicas * min(1.0, asked / power) if replicas else 0.0
        work = max(0.0, asked - power)
        wanted = scaler.decide(now, replicas + len(starting), work, busy)
        starting = [at for at in starting if at > now]
        running = replicas
        while replicas + len(starting) < wanted:
            starting.append(now + 5)  # a replica takes 5 s to start
        replicas = min(wanted, running + sum(at <= now + 0.5 for at in starting))
        starting = [at for at in starting if at > now + 0.5][: wanted - replicas]
        told.append((now, replicas, work))
    return told


def test_a_recipe_that_an_older_version_recorded_is_read():
    assert ServePlacement.checked({"target_ongoing_requests": 8.0, "max_replicas": 3}).max_replicas == 3


def test_a_steady_load_settles_and_stays():
    told = simulated(RULE, lambda now, rng: 130 + rng.uniform(-20, 20), 300)
    settled = {replicas for now, replicas, _ in told if now > 60}
    assert len(settled) == 1  # no flapping
    assert settled <= {3, 4}
    assert max(work for now, _, work in told if now > 60) < RULE.target


@pytest.mark.parametrize("seed", range(5))
def test_bursts_are_followed_up_and_down_and_bounds_are_kept(seed):
    def bursts(now, rng):
        return 180.0 if now % 120 < 40 else 5.0

    told = simulated(RULE, bursts, 480, seed)
    assert {replicas for _, replicas, _ in told} <= {1, 2, 3, 4}
    for burst in range(1, 4):
        within = [replicas for now, replicas, _ in told if burst * 120 + 20 < now < burst * 120 + 40]
        assert max(within) == 4
    assert told[-1][2] == 0.0


def test_one_long_spike_does_not_start_replicas_and_idleness_ends_them_one_by_one():
    told = simulated(RULE, lambda now, rng: 400.0 if 10 <= now < 11 else 0.0, 60)
    assert max(replicas for _, replicas, _ in told) <= 4
    down = simulated(RULE, lambda now, rng: 0.0, 120, start=4)
    counts = [replicas for _, replicas, _ in down]
    assert sorted(counts, reverse=True) == counts
    assert set(counts) == {4, 3, 2, 1}


def test_a_moment_of_work_is_waited_out():
    scaler = Scaler(RULE)
    assert scaler.decide(0.0, 1, 900, 1) == 1
    assert scaler.decide(1.0, 1, 900, 1) == 1
    assert scaler.decide(1.5, 1, 10, 1) == 1
    assert scaler.decide(3.0, 1, 900, 1) == 1  # the clock began anew
    assert scaler.decide(5.0, 1, 900, 1) == 4


@pytest.mark.parametrize(("work", "before", "after"), [(900, 1, 4), (0, 4, 3)])
def test_a_clock_that_is_set_back_costs_no_more_than_the_wait_begun_anew(work, before, after):
    scaler = Scaler(RULE)
    assert scaler.decide(3600.0, before, work, 0) == before
    waits = RULE.up_after_s if work else RULE.down_after_s
    assert [scaler.decide(now, before, work, 0) for now in (5.0, 5.0 + waits)] == [before, after]


KINDS = pytest.mark.parametrize(
    ("call_s", "row_s", "target"),
    [(2.46e-3, 2.03e-3, 512), (4.8e-3, 2e-3, 512), (20e-3, 0.1e-3, 4000)],
    ids=["core", "gpu", "idle gpu"],
)


@KINDS
def test_a_full_batch_counts_as_all_its_time_and_others_without_what_fuller_ones_would_share(call_s, row_s, target):
    fullness, rng = Fullness(), random.Random(0)
    for _ in range(400):  # before its rows have varied, a call is all its time
        fullness.tick(3, call_s + 3 * row_s, 3 / 64)
    assert fullness.taken_s() == pytest.approx(400 * (call_s + 3 * row_s))
    for _ in range(3000):
        rows = rng.randint(1, 64)
        fullness.tick(rows, (call_s + rows * row_s) * rng.uniform(0.95, 1.05), rows / 64)
    assert fullness.fixed_s == pytest.approx(call_s, rel=0.25)
    fullness.taken_s()
    fullness.tick(64, call_s + 64 * row_s, 1.0)
    assert fullness.taken_s() == pytest.approx(call_s + 64 * row_s)
    fullness.tick(16, call_s + 16 * row_s, 0.25)
    full = (call_s + 64 * row_s) * 16 / 64  # these rows' share of a full call
    assert fullness.taken_s() == pytest.approx(full, rel=0.15)
    assert fullness.taken_s() == 0


def of_batches(rule, call_s, row_s, load, seconds, start):
    """(second, replicas, share of what they can do, calls in hand) of replicas that decode 64 rows together.

    load: by second, rows' calls a second, in shares of what one replica does with full batches. Rows that are in
    hand progress alike; those beyond the batches wait. What replicas report is what `Fullness` makes of their calls.
    """
    rng, scaler, told = random.Random(1), Scaler(rule), []
    meters, starting, waiting = [Fullness() for _ in range(start)], [], 0.0
    capacity = 64 / (call_s + 64 * row_s)
    for now in range(seconds):
        each = load(now) * capacity / len(meters) + waiting / len(meters)
        rows = each * call_s / max(1e-9, 1 - each * row_s) if each < capacity else 64.0
        rows = min(64.0, rows)
        done = rows / (call_s + rows * row_s) * len(meters) if rows >= 1 else each * len(meters)
        waiting = max(0.0, waiting + load(now) * capacity - done)
        for meter in meters:
            left = 1.0 if rows >= 1 else each * (call_s + row_s)  # of the second, at work
            while left > 0:
                count = max(1, min(64, round(rng.gauss(rows, rows**0.5))))
                meter.tick(count, call_s + count * row_s, count / 64)
                left -= call_s + count * row_s
        busy = sum(min(1.0, meter.taken_s()) for meter in meters)
        work = 16 * rows * len(meters) + waiting
        told.append((now, len(meters), load(now) / len(meters), work))
        wanted = scaler.decide(now, len(meters) + len(starting), work, busy)
        starting = (starting + [now + 10] * wanted)[: max(0, wanted - len(meters))]
        meters = meters[:wanted] + [Fullness() for at in starting if at <= now]
        starting = [at for at in starting if at > now]
    return told


@KINDS
def test_a_fleet_falls_after_a_burst_to_what_its_load_needs_and_stays_there(call_s, row_s, target):
    rule = ScalingRule(minimum=1, maximum=16, target=target, up_after_s=2, down_after_s=20)
    told = of_batches(rule, call_s, row_s, lambda now: 9.0 if 60 <= now < 180 else 2.0, 600, start=3)
    assert max(replicas for now, replicas, *_ in told if 60 <= now < 200) >= 9
    after = [replicas for now, replicas, *_ in told if now >= 220]
    assert after[-1] in (3, 4)  # 2.0 of work at 0.8 of three
    assert sorted(after, reverse=True) == after  # never up again: what was ended was not needed
    assert max(share for now, _, share, _ in told if now >= 220) < 1
    assert max(work for now, *_, work in told if now >= 500) < target * after[-1]


@KINDS
@pytest.mark.parametrize("load", [0.7, *in_long(0.3, 2.3, 5.1)])
def test_a_steady_load_of_batches_is_never_starved_and_moves_no_replica_for_ever(call_s, row_s, target, load):
    rule = ScalingRule(minimum=1, maximum=16, target=target, up_after_s=2, down_after_s=10)
    told = of_batches(rule, call_s, row_s, lambda now: load, 600, start=16)
    counts = [replicas for _, replicas, *_ in told]
    assert sum(a != b for a, b in itertools.pairwise(counts)) <= 16
    assert len(set(counts[300:])) == 1
    assert counts[-1] <= max(1, load / 0.8 + 2)
    assert max(share for *_, share, _ in told) < 1


def test_to_zero_and_back_where_it_is_asked_for():
    rule = ScalingRule(minimum=0, maximum=2, target=100, up_after_s=2, down_after_s=10)
    scaler = Scaler(rule)
    assert [scaler.decide(now, 1, 0, 0) for now in (0.0, 5.0, 10.0)] == [1, 1, 0]
    assert scaler.decide(11.0, 0, 1, 0) == 1  # at once: somebody waits
    assert Scaler(RULE).decide(0.0, 0, 0, 0) == 1


def test_the_policy_reads_what_replicas_report():
    policy = ByWork(target=100, up_after_s=0, down_after_s=0)

    def context(now, current, work, requests=0.0):
        return SimpleNamespace(
            capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=5, current_time=now,
            current_num_replicas=current, target_num_replicas=current, total_num_requests=requests,
            aggregated_metrics={
                "work": {f"r{i}": part for i, part in enumerate(work)},
                "busy": {f"r{i}": float(part > 0) for i, part in enumerate(work)},
            },
        )  # fmt: skip

    assert policy(context(1.0, 2, [150.0, 160.0]))[0] == 4
    assert policy(context(1.5, 2, [10.0, 10.0]))[0] == 2  # they are busy with it
    assert policy(context(2.0, 0, [], requests=3))[0] == 1
    assert policy(context(3.0, 0, []))[0] == 0


def test_work_is_the_most_calls_that_an_engine_makes(small_bundle):
    engine = Engine(read_bundle(small_bundle))
    for config in (
        DecodeConfig(block_length=4, steps_per_block=2, max_tokens=9),
        DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8, policy={"type": "low_confidence"}),
        DecodeConfig(block_length=16, steps_per_block=16, max_tokens=16, guidance=0.5),
    ):
        request = Request((7, 8), config, seed=1)
        [answer] = engine.generate([request])
        assert 1 <= answer.num_calls * (2 if config.guidance else 1) <= predicted_work(request)
    assert predicted_work(Request((), DecodeConfig(max_tokens=4096))) > 100 * predicted_work(
        Request((), DecodeConfig(max_tokens=4))
    )
    assert predicted_work(Request((), DecodeConfig(steps=7)), is_ancestral=True) == 7


def test_what_was_sent_is_spread_by_work_and_forgotten_when_it_comes_back():
    ledger, replicas = Ledger(), ["a", "b"]
    ledger.begin(ledger.ranked(replicas)[0], "long", 4096)
    long_one = ledger.ranked(replicas)[1]
    for number in range(40):  # forty short ones beside it are still less
        assert ledger.ranked(replicas)[0] != long_one
        ledger.begin(ledger.ranked(replicas)[0], f"short-{number}", 40)
    ledger.end("long")
    assert ledger.ranked(replicas)[0] == long_one
    for number in range(40):
        ledger.end(f"short-{number}")
    assert {ledger.ranked(replicas)[0] for _ in range(2)} == {*replicas}  # those alike take turns
    assert ledger.ranked(["c"]) == ["c"]
    assert ledger.ranked([]) == []
    ledger.end("never sent")


def test_who_stands_still_is_asked_last_however_little_it_has_in_hand():
    router = LeastWorkRouter.__new__(LeastWorkRouter)  # what Ray's own class needs is not asked for here
    router.initialize_state()
    stats = {"still": {STANDS_STILL: True}, "busy": {STANDS_STILL: False}, "new": {}}
    replicas = [SimpleNamespace(replica_id=name, routing_stats=told) for name, told in stats.items()]
    router._ledger.begin("busy", "long", 4096)

    def asked() -> list[str]:
        return [one.replica_id for [one] in asyncio.run(router.choose_replicas(replicas))]

    assert asked() == ["new", "busy", "still"]
    stats["still"][STANDS_STILL] = False
    assert asked()[-1] == "busy"
    for told in stats.values():
        told[STANDS_STILL] = True
    assert asked()[-1] == "busy"
