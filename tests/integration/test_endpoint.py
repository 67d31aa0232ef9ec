"""The endpoint, live on loopback: OpenAI's client, streams, errors, neighbours in the batch, a replica that is killed.

One Ray Serve application for the whole file, over a bundle with random weights.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import hypothesis
import openai
import psutil
import pytest
import schemathesis

from workflows.env import ray_cluster
from workflows.placement import ServePlacement
from workflows.serve.app import AppArgs, ServedRun, start, stop
from workflows.serve.config import ServeConfig
from workflows.serve.gateway import api


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def endpoint(small_bundle, small_corpus):
    """(base URL, model name)."""
    settings = ServeConfig(port=free_port())
    placement = ServePlacement(min_replicas=2, max_replicas=2, cpus_per_replica=0.25)
    with ray_cluster(2):
        served = ServedRun(run=small_bundle.url, decode=small_corpus.recipe.decode)
        url = start(AppArgs(models={small_bundle.name: served}, serve=settings, placement=placement))
        try:
            yield url, small_bundle.name
        finally:
            stop()


@pytest.fixture
def ask(endpoint):
    """POST /v1/completions with the model filled in."""
    url, model = endpoint

    def post(**body):
        return httpx.post(f"{url}/v1/completions", json={"model": model, **body}, timeout=60)

    return post


@pytest.fixture
def client(endpoint):
    return openai.OpenAI(base_url=f"{endpoint[0]}/v1", api_key="unused", max_retries=0)


SCHEMA = schemathesis.openapi.from_dict(api.openapi())


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_no_request_that_the_document_allows_or_forbids_is_a_server_error(case, endpoint):
    fuzzed(case, endpoint)


@pytest.mark.long
@pytest.mark.timeout(3600)
@SCHEMA.parametrize()
@hypothesis.settings(max_examples=1500, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_ten_thousand_requests_that_the_document_allows_or_forbids_are_no_server_error(case, endpoint):
    fuzzed(case, endpoint)


def fuzzed(case, endpoint):
    """One made-up request, of the served model half the time: 4xx in OpenAI's shape or 200, and no 5xx."""
    url, model = endpoint
    if isinstance(case.body, dict) and len(str(case.body)) % 2:
        case.body["model"] = model
    answer = case.call(base_url=url)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


HOT = {"temperature": 1.0, "max_tokens": 16}


def test_openais_client_completes_infills_and_lists_models(client, endpoint):
    assert [model.id for model in client.models.list().data] == [endpoint[1]]
    answer = client.completions.create(model=endpoint[1], prompt="RED ", max_tokens=8, seed=3)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    infill = client.completions.create(model=endpoint[1], prompt="RED", suffix=" 1", max_tokens=5, seed=3)
    assert infill.usage.completion_tokens == 5


def test_openais_client_streams_the_unary_text(client, endpoint):
    body = {"model": endpoint[1], "prompt": "BLUE ", "seed": 9, **HOT}
    unary = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == unary.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == unary.choices[0].finish_reason
    assert chunks[-1].usage == unary.usage


def test_openais_async_client_works_too(endpoint):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{endpoint[0]}/v1", api_key="unused") as client:
            body = {"model": endpoint[1], "prompt": "BLUE ", "seed": 9, **HOT}
            unary = await client.completions.create(**body)
            pieces = [c.choices[0].text async for c in await client.completions.create(**body, stream=True)]
            return unary.choices[0].text, "".join(pieces)

    unary, streamed = asyncio.run(both())
    assert unary == streamed


def test_a_seeded_answer_is_the_same_alone_and_among_others(ask):
    wanted = {"prompt": "GREEN STAR", "seed": 5, **HOT}
    alone = ask(**wanted).json()["choices"][0]["text"]
    others = [{"prompt": "RED " * (i % 5), "seed": i, "temperature": 0.5 * (i % 3), "max_tokens": 4 + i % 13}
              for i in range(40)]  # fmt: skip
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: ask(**body), [part for other in others for part in (other, wanted)]))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["text"] for answer in answers[1::2]} == {alone}


def test_n_choices_differ_and_each_is_a_function_of_the_seed(ask):
    def texts(n):
        return [c["text"] for c in ask(prompt="RED ", n=n, seed=1, temperature=2, max_tokens=16).json()["choices"]]

    assert len(set(texts(4))) == 4
    assert texts(2) == texts(4)[:2]


def test_a_stop_string_ends_the_text_before_it(ask):
    whole = ask(prompt="RED ", seed=2, **HOT).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:2]
    cut = ask(prompt="RED ", seed=2, stop=stop, **HOT).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_echo_and_many_prompts(ask):
    answer = ask(prompt=["RED ", "BLUE "], echo=True, max_tokens=4).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert [c["text"][:4] for c in answer["choices"]] == ["RED ", "BLUE"]


@pytest.mark.parametrize(
    ("verb", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b'{"model": "other", "prompt": "x"}', 404),
        ("POST", "/v1/completions", b'{"prompt": "x"}', 400),
        ("POST", "/v1/completions", b" " * ((1 << 20) + 1), 413),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/v1/nowhere", None, 404),
        ("GET", "/v1/models/", None, 404),
        ("GET", "/v1/models/other", None, 404),
    ],
)
def test_every_refusal_has_openais_shape(endpoint, verb, path, body, status):
    headers = {"content-type": "application/json"} if body is not None else {}
    answer = httpx.request(verb, endpoint[0] + path, content=body, headers=headers, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_a_wrong_content_type_and_an_impossible_length_are_refused(endpoint, ask):
    answer = httpx.post(f"{endpoint[0]}/v1/completions", content=b"prompt=x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for too_long, blamed in [({"prompt": "RED " * 50}, "prompt"), ({"prompt": "R", "max_tokens": 99}, "max_tokens")]:
        answer = ask(**too_long)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (blamed, "context_length_exceeded")


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[0] != "#"}


def all_rows_are_freed(url: str) -> bool:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        load = metrics(url)
        if load["dllm_num_requests_running"] == load["dllm_num_requests_waiting"] == 0:
            return True
        time.sleep(0.2)
    return False


def test_a_disconnect_in_mid_stream_frees_the_row(endpoint):
    url, model = endpoint
    body = {
        "model": model,
        "prompt": "RED ",
        "max_tokens": 24,
        "stream": True,
        "n": 8,
        "diffusion": {"block_length": 1},
    }
    for _ in range(5):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
    assert all_rows_are_freed(url)


def test_more_than_replicas_can_hold_is_refused_while_health_and_metrics_answer(endpoint, ask):
    """1280 rows at once for two replicas that hold 512 waiting ones each, 64 of them in a request."""
    url = endpoint[0]
    body = {"prompt": ["RED "] * 8, "n": 8, "max_tokens": 24, "diffusion": {"block_length": 1}}
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, **body) for _ in range(20)]
        while not all(answer.done() for answer in answers):
            assert httpx.get(f"{url}/health", timeout=4).status_code == 200
            assert metrics(url)["dllm_decode_replicas"] == 2
            time.sleep(0.2)
    for answer in [future.result() for future in answers]:
        assert answer.status_code in {200, 429}
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert all_rows_are_freed(url)


def test_the_metrics_count_what_was_answered(endpoint, ask):
    before = metrics(endpoint[0])["dllm_generation_tokens_total"]
    usage = ask(prompt="RED ", max_tokens=8).json()["usage"]
    assert metrics(endpoint[0])["dllm_generation_tokens_total"] == before + usage["completion_tokens"]
    assert httpx.get(f"{endpoint[0]}/health").json() == {"status": "ok"}


def replicas() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ServeReplica:dllm:DecodeReplica" in " ".join(child.cmdline())]


def streamed(url: str, body: dict) -> list[str]:
    """The events of a stream."""
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


def test_a_killed_replica_costs_no_answer_and_changes_none(endpoint, ask):
    """One of two replicas is killed under requests and 30 streams: all are answered to the end, with the same text."""
    one_by_one = {"block_length": 1}
    body = {"prompt": "GREEN STAR", "seed": 5, "temperature": 1.0, "max_tokens": 24, "diffusion": one_by_one}
    expected = ask(**body).json()["choices"][0]["text"]
    answers: list[httpx.Response] = []
    begun = threading.Event()

    def load():
        for _ in range(12):
            answers.append(ask(**body))
            begun.set()

    victims = replicas()
    assert len(victims) == 2
    threads = [threading.Thread(target=load) for _ in range(6)]
    with ThreadPoolExecutor(30) as pool:
        streams = [pool.submit(streamed, endpoint[0], {"model": endpoint[1], **body}) for _ in range(90)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        os.kill(victims[0].pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    for *told, last in [stream.result() for stream in streams]:
        assert last == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in told) == expected
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200][:3]
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
    assert len(answers) == 72


def test_a_stream_is_server_sent_events(endpoint):
    url, model = endpoint
    body = {"model": model, "prompt": "RED ", "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "text_completion" for event in events[:-1])


def test_the_readmes_python_runs(endpoint):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(block.replace("http://127.0.0.1:8000", endpoint[0]), "README", "exec"), {})
    assert re.search(r" \d+(\.\d+)?\n", shown.getvalue()), "the infill's tokens per call"
