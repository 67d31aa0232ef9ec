"""Replicas follow the work in hand: a simulation of the policy over bursty loads, and what work is."""

import random
from types import SimpleNamespace

import pytest

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from workflows.placement import ServePlacement
from workflows.serve.scaling import ByWork
from workflows.serve.work import Ledger, Scaler, ScalingRule, predicted_work

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
