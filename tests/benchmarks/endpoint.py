"""The endpoint against its own engine in this process: one JSON line of added latency, throughput and idle cost.

    python tests/benchmarks/endpoint.py RUN [--tokens 32] [--seconds 10]

One replica with one thread, and an engine with one thread here; they take turns, so neither slows the other. Added
latency: the median of a unary request's end to end over that of the same row decoded alone. Throughput: tokens a second
that 32 clients get, over what the engine alone makes of the same requests, 32 rows at a time. First frame: a stream's
first event, over the engine's first call. Idle: CPU seconds a second of every process of the endpoint.
"""

import argparse
import asyncio
import statistics
import time

import httpx
import psutil
import torch
from figures import tell

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from workflows.bench.load import Load, Mix, drive
from workflows.env import ray_cluster
from workflows.placement import ServePlacement
from workflows.serve.app import AppArgs, start, stop
from workflows.serve.config import ServeConfig, ServedRun
from workflows.target import find_run

PROMPT = "def read("
CLIENTS, ROUNDS = 32, 30


def engine_alone(engine: Engine, requests: list[Request]) -> tuple[float, int]:
    """Seconds and tokens of these requests, 32 rows at a time, the next as soon as one ends."""
    began, tokens, waiting, busy = time.perf_counter(), 0, list(reversed(requests)), 0
    while waiting or busy:
        while waiting and busy < CLIENTS:
            engine.add(waiting.pop())
            busy += 1
        for update in engine.step():
            if update.state.finish_reason is not None:
                busy -= 1
                tokens += update.state.num_committed
    return time.perf_counter() - began, tokens


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """User and system time so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


async def first_frame(url: str, body: dict) -> float:
    """Seconds to a stream's first frame."""
    async with httpx.AsyncClient() as client:
        began = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json={**body, "diffusing": True}) as answer:
            async for line in answer.aiter_lines():
                if line:
                    return time.perf_counter() - began
    raise AssertionError("no frame came")


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipe, run = find_run(asked.run, [])
    engine = Engine(read_bundle(RunDir.at(asked.run)))
    tokenizer = read_bundle(run).tokenizer()
    config = recipe.decode.model_copy(update={"max_tokens": asked.tokens})
    prompt = tuple(tokenizer.encode(PROMPT))
    body = {"model": run.name, "prompt": PROMPT, "max_tokens": asked.tokens}
    args = AppArgs(
        models={run.name: ServedRun(run=run.url, decode=recipe.decode)},
        serve=ServeConfig(port=8765),
        placement=ServePlacement(max_replicas=1, cpus_per_replica=1),
    )
    with ray_cluster(2):
        url = start(args)
        try:
            figures = measured(url, body, engine, Request(prompt, config), asked)
        finally:
            stop()
    tell("endpoint", **figures)


def measured(url: str, body: dict, engine: Engine, request: Request, asked: argparse.Namespace) -> dict:
    """All figures."""
    alone, served, first_call, first_event = [], [], [], []
    with httpx.Client() as client:
        for number in range(ROUNDS):
            began = time.perf_counter()
            row = engine.add(request)
            engine.step()
            first_call.append(time.perf_counter() - began)
            while engine.step():
                pass
            alone.append(time.perf_counter() - began)
            began = time.perf_counter()
            answer = client.post(f"{url}/v1/completions", json={**body, "seed": 0})
            served.append(time.perf_counter() - began)
            assert answer.status_code == 200, (row, number)
            first_event.append(asyncio.run(first_frame(url, body)))
    lengths = [asked.tokens // 4, asked.tokens // 2, asked.tokens]
    mix = Mix(body["model"], [PROMPT], lengths, {})
    answered = asyncio.run(drive(url, Load("closed", CLIENTS, asked.seconds), mix, {}, lambda _: None))
    good = [one for one in answered if one.whole is not None]
    span = max(one.began + one.whole for one in good)
    requests = [
        Request(request.prompt, request.config.model_copy(update={"max_tokens": mix.request(i)["max_tokens"]}), seed=i)
        for i in range(len(good))
    ]
    seconds, tokens = engine_alone(engine, requests)
    endpoint = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith(("ray::Serve", "ray::Proxy"))
    ]
    time.sleep(1)
    before, began = cpu_seconds(endpoint), time.perf_counter()
    time.sleep(10)
    idle = (cpu_seconds(endpoint) - before) / (time.perf_counter() - began)
    median = statistics.median
    return {
        "engine_ms": round(1000 * median(alone), 2),
        "added_ms_p50": round(1000 * (median(served) - median(alone)), 2),
        "first_frame_added_ms_p50": round(1000 * (median(first_event) - median(first_call)), 2),
        "served_tokens_per_s": round(sum(one.tokens for one in good) / span, 1),
        "served_over_alone": round(sum(one.tokens for one in good) / span / (tokens / seconds), 3),
        "failed": len(answered) - len(good),
        "idle_cpu": round(idle, 4),
        "idle_processes": len(endpoint),
    }


if __name__ == "__main__":
    main()
