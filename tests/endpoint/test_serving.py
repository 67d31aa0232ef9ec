"""The endpoint under what happens to endpoints: kills, upgrades, growth, overload, clients that leave, a long day.

Each in a quick form, and as a `long` one at the length that the README quotes. One application for the whole file.
"""

import asyncio
import os
import random
import re
import signal
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import httpx
import pytest
from conftest import runs_by_kind

from endpoint.conftest import metric, replicas, wait_for
from workflows.placement import ServePlacement
from workflows.serve.app import AppArgs, deploy
from workflows.serve.config import ServeConfig, ServedRun

CALL_BY_CALL = {"block_length": 1, "steps_per_block": 1}
QUICK_AND_LONG = [pytest.param(False, id="quick"), pytest.param(True, id="long", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def served(tmp_path_factory, deployed, port):
    """The application's arguments and its URL: two models at hand, the first of them served."""
    of = runs_by_kind(tmp_path_factory, {"first": {}, "second": {"objective": {"type": "autoregressive"}}})
    models = {}
    for kind in ("first", "second"):
        corpus, run = of(kind)
        models[kind] = ServedRun(run=run.url, decode=corpus.recipe.decode)
    args = AppArgs(
        models={"first": models["first"]},
        serve=ServeConfig(port=port, max_queued_requests=64),
        placement=ServePlacement(
            min_replicas=1, max_replicas=2, target_work=120, up_after_s=1, down_after_s=4, cpus_per_replica=0.25
        ),
    )
    return args, deployed(args), models


def body(seed=5, **more):
    return {"model": "first", "prompt": "RED ", "max_tokens": 24, "seed": seed, "temperature": 1.0, **more}


def ask(url, **more):
    return httpx.post(f"{url}/v1/completions", json=body(**more), timeout=60)


def cpu_of_replicas() -> dict[int, float]:
    """By process id, seconds."""
    return {process.pid: sum(process.cpu_times()[:2]) for process in replicas()}


class Background:
    """Requests from several threads while something happens to the endpoint; `answers` when it is over."""

    begun: ClassVar[list["Background"]] = []

    def __init__(self, url: str, clients: int = 4, **more) -> None:
        Background.begun.append(self)
        self._url, self._more, self._over = url, more, threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._tasks = [self._pool.submit(self._run) for _ in range(clients)]

    def _run(self) -> list[httpx.Response]:
        found = []
        while not self._over.is_set():
            found.append(ask(self._url, **self._more))
        return found

    def answers(self) -> list[httpx.Response]:
        self._over.set()
        return [answer for task in self._tasks for answer in task.result()]


@pytest.fixture(autouse=True)
def _no_load_is_left():
    """A test that fails in the middle of its load must not put it on the next one."""
    yield
    while Background.begun:
        Background.begun.pop().answers()


def gateways_of(url):
    """Those that the metrics tell of."""
    return {*re.findall(r'gateway="(\w+)"', httpx.get(f"{url}/metrics", timeout=10).text)}


def texts(answers):
    return {answer.json()["choices"][0]["text"] for answer in answers}


def test_a_second_model_is_loaded_and_dropped_with_nothing_restarted_and_no_request_lost(served):
    args, url, models = served
    before = [process.pid for process in replicas()]
    load = Background(url, diffusion=CALL_BY_CALL)
    expected = ask(url, diffusion=CALL_BY_CALL).json()["choices"][0]["text"]
    deploy(args.model_copy(update={"models": models}))
    wait_for(lambda: len(httpx.get(f"{url}/v1/models").json()["data"]) == 2)
    second = [ask(url, model="second") for _ in range(4)]
    assert {answer.status_code for answer in second} == {200}
    assert texts(second).isdisjoint({ask(url).json()["choices"][0]["text"]})
    deploy(args)
    wait_for(lambda: ask(url, model="second").status_code == 404)
    answers = load.answers()
    assert {answer.status_code for answer in answers} == {200}
    assert texts(answers) == {expected}
    assert {*before} <= {process.pid for process in replicas()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_long", QUICK_AND_LONG)
def test_memory_and_files_stay_as_they_are(served, is_long):
    """Every kind of request over and over: after a warm-up, RSS and open files of every process of ours are flat."""
    _, url, _ = served
    # What a test before has started goes in its own time.
    wait_for(lambda: metric(url, "dllm_decode_replicas") == 1 and len(replicas()) == 1, 120)

    def rounds(count):
        with httpx.Client(timeout=60) as client:
            for number in range(count):
                client.post(f"{url}/v1/completions", json=body(seed=number)).raise_for_status()
                client.post(f"{url}/v1/completions", json=body(seed=number, stream=True)).raise_for_status()
                client.post(f"{url}/v1/completions", json=body(seed=number, diffusing=True)).raise_for_status()
                infill = {"model": "first", "segments": ["RED ", {"hole": 4}, " END"], "seed": number}
                client.post(f"{url}/v1/infill", json=infill).raise_for_status()
                assert client.post(f"{url}/v1/completions", json={"prompt": number}).status_code == 400

    def held():
        return {p.pid: (p.memory_info().rss, p.num_fds()) for p in replicas("")}

    rounds(400 if is_long else 8)
    before = held()
    rounds(2000 if is_long else 10)
    after = held()
    assert before.keys() == after.keys()
    grown = {pid: (after[pid][0] - before[pid][0]) / (1 << 20) for pid in before}
    print({pid: f"{mib:+.1f} MiB" for pid, mib in grown.items()})
    assert max(grown.values()) < (32 if is_long else 24)
    assert all(after[pid][1] <= before[pid][1] + 8 for pid in before)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_long", QUICK_AND_LONG)
def test_work_starts_replicas_and_its_end_ends_them_with_no_request_lost(served, is_long):
    """1 -> 2 -> 1, and as `long` three times over."""
    _, url, _ = served
    for _ in range(3 if is_long else 1):
        wait_for(lambda: metric(url, "dllm_decode_replicas") == 1, 120)
        load = Background(url, clients=24, diffusion=CALL_BY_CALL)
        wait_for(lambda: metric(url, "dllm_decode_replicas") == 2, 120)
        before = cpu_of_replicas()

        def both_are_sent_to(before=before):
            worked = [spent - before[pid] for pid, spent in cpu_of_replicas().items()]
            return min(worked) > 0.2 * max(worked) > 0.1

        wait_for(both_are_sent_to, 60)
        answers = load.answers()
        assert {answer.status_code for answer in answers} == {200}
        assert len(texts(answers)) == 1
        wait_for(lambda: metric(url, "dllm_decode_replicas") == 1, 120)


@pytest.mark.long
def test_the_last_replica_ends_where_it_may_and_the_next_request_starts_one(served):
    args, url, _ = served
    expected = ask(url).json()["choices"][0]["text"]
    deploy(args.model_copy(update={"placement": args.placement.model_copy(update={"min_replicas": 0})}))
    for _ in range(2):
        wait_for(lambda: replicas() == [], 120)
        health = httpx.get(f"{url}/health", timeout=10)
        assert (health.status_code, health.json()) == (200, {"status": "ok", "replicas": 0})
        answer = ask(url)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected
    deploy(args)
    wait_for(lambda: metric(url, "dllm_decode_replicas") == 1, 120)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_replicas_cost_no_answer_and_change_none(served):
    """A random replica every 10 s for 5 minutes. The quick form kills one, in test_endpoint.py."""
    _, url, _ = served
    expected = ask(url, diffusion=CALL_BY_CALL).json()["choices"][0]["text"]
    load = Background(url, clients=6, diffusion=CALL_BY_CALL)
    kills = 30
    for _ in range(kills):
        time.sleep(10)
        wait_for(lambda: replicas() != [])
        os.kill(random.choice(replicas()).pid, signal.SIGKILL)
    time.sleep(3)
    answers = load.answers()
    print(f"{len(answers)} answers over {kills} kills")
    assert {answer.status_code for answer in answers} == {200}, Counter(a.text for a in answers if a.status_code != 200)
    assert texts(answers) == {expected}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_long", QUICK_AND_LONG)
def test_clients_that_leave_free_their_rows_and_disturb_nobody(served, is_long):
    """Quick: 60 at random moments, half of them streams. Long: 1,000."""
    _, url, _ = served
    expected = ask(url, diffusion=CALL_BY_CALL).json()["choices"][0]["text"]
    rng, count = random.Random(3), 1000 if is_long else 60

    async def leave(client):
        how = body(seed=rng.randrange(1 << 30), diffusion=CALL_BY_CALL, stream=rng.random() < 0.5, n=rng.randint(1, 4))
        task = asyncio.create_task(client.post(f"{url}/v1/completions", json=how))
        await asyncio.sleep(rng.random() * 0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def all_leave():
        async with httpx.AsyncClient(timeout=60) as client:
            gate = asyncio.Semaphore(10)

            async def one():
                async with gate:
                    await leave(client)

            await asyncio.gather(*(one() for _ in range(count)))

    load = Background(url, clients=1, diffusion=CALL_BY_CALL)
    asyncio.run(all_leave())
    answers = load.answers()
    assert {answer.status_code for answer in answers} == {200}
    assert texts(answers) == {expected}
    wait_for(lambda: metric(url, "dllm_num_requests_running") + metric(url, "dllm_num_requests_waiting") == 0, 10)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_long", QUICK_AND_LONG)
def test_more_than_can_be_answered_is_refused_quickly_and_the_rest_is_answered(served, is_long):
    """Twelve clients with 64 rows a request, who ask again at once: several times what the queues hold.

    Quick: 8 s. Long: 10 minutes. A refusal takes less than 100 ms, or, on a machine too slow for that, a tenth of an
    answer, which it slows down as much.
    """
    _, url, _ = served
    alone = statistics.median(timed(url)[1] for _ in range(5))
    over = time.monotonic() + (600 if is_long else 8)

    def client():
        found = []
        with httpx.Client(timeout=60) as connected:  # a new one each time would be most of what is timed
            while time.monotonic() < over:
                found.append(timed(url, connected, prompt=["RED "] * 8, n=8, diffusion=CALL_BY_CALL))
        return found

    with ThreadPoolExecutor(12) as pool:
        found = [item for task in [pool.submit(client) for _ in range(12)] for item in task.result()]
    by_status = Counter(answer.status_code for answer, _ in found)
    assert by_status.keys() <= {200, 429}
    assert by_status[200] > 0
    assert by_status[429] > 0
    assert all(answer.headers["retry-after"] for answer, _ in found if answer.status_code == 429)
    refused = sorted(took for answer, took in found if answer.status_code == 429)
    answered = statistics.median(took for answer, took in found if answer.status_code == 200)
    half, most = (refused[len(refused) * share // 100] for share in (50, 95))
    print(f"{dict(by_status)}; refused in {1000 * half:.0f} ms (p50), {1000 * most:.0f} ms (p95), {answered=:.1f} s")
    assert half < max(0.1, answered / 10)
    assert most < max(0.1, answered / 3)
    began = time.monotonic()
    wait_for(lambda: timed(url)[1] < max(10 * alone, 1.0), 10)
    assert time.monotonic() - began < 10


def timed(url, client=httpx, **more):
    began = time.monotonic()
    answer = client.post(f"{url}/v1/completions", json=body(**more), timeout=60)
    return answer, time.monotonic() - began


def test_an_upgrade_under_load_loses_no_request_and_every_gateway_is_counted(served):
    """The last of this file: what it has changed stays, since to change it back takes as long."""
    args, url, _ = served
    before = {process.pid for process in [*replicas(), *replicas("Gateway")]}
    load = Background(url, clients=2, diffusion=CALL_BY_CALL)
    changed = args.model_copy(
        update={
            "serve": args.serve.model_copy(update={"max_batch_tokens": 2048}),
            "placement": args.placement.model_copy(update={"gateways": 2}),
        }
    )
    deploy(changed)
    wait_for(lambda: not before & {process.pid for process in [*replicas(), *replicas("Gateway")]})
    answers = load.answers()
    wait_for(lambda: len(gateways_of(url)) == 2)
    counted = metric(url, "dllm_request_success_total")
    for more in range(1, 9):
        assert ask(url).status_code == 200
        assert metric(url, "dllm_request_success_total") == counted + more  # whichever gateway is asked
    assert Counter(answer.status_code for answer in answers).keys() == {200}
    assert len(texts(answers)) == 1
