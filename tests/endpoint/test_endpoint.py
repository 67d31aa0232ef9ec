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
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import hypothesis
import openai
import pytest
import ray
import schemathesis

from endpoint.conftest import all_rows_are_freed, metric, replicas, wait_for
from workflows.cli import run_command_line
from workflows.placement import ServePlacement
from workflows.serve.app import AppArgs
from workflows.serve.config import ServeConfig, ServedRun
from workflows.serve.gateway import api


@pytest.fixture(scope="module")
def endpoint(small_bundle, small_corpus, deployed, port):
    """(base URL, model name)."""
    placement = ServePlacement(min_replicas=2, max_replicas=2, cpus_per_replica=0.25)
    served = ServedRun(run=small_bundle.url, decode=small_corpus.recipe.decode)
    args = AppArgs(
        models={small_bundle.name: served},
        serve=ServeConfig(port=port, tracing_ratio=1, max_queued_requests=48),
        placement=placement,
    )
    return deployed(args), small_bundle.name


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
@hypothesis.settings(
    max_examples=20,
    phases=[hypothesis.Phase.generate],  # the 2,000 that schemathesis lists besides come with the long form
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
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
    answer = case.call(base_url=url, timeout=60)  # a schema may be compiled for 10 s
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


def test_an_answers_id_is_told_once(client, endpoint):
    listed = httpx.get(f"{endpoint[0]}/v1/models", headers={"x-request-id": "mine-1"})
    assert listed.headers.get_list("x-request-id") == ["mine-1"]
    answer = client.completions.create(model=endpoint[1], prompt="RED ", max_tokens=2)
    assert re.fullmatch("[A-Za-z0-9-]+", answer._request_id)


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
    """512 rows at once for two replicas that have 64 in a batch and hold 48 waiting ones each."""
    url = endpoint[0]
    body = {"prompt": ["RED "] * 8, "n": 8, "max_tokens": 24, "diffusion": {"block_length": 1}}
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, **body) for _ in range(8)]
        while not all(answer.done() for answer in answers):
            assert httpx.get(f"{url}/health", timeout=4).status_code == 200
            assert metric(url, "dllm_decode_replicas") == 2
            time.sleep(0.2)
    for answer in [future.result() for future in answers]:
        assert answer.status_code in {200, 429}
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert all_rows_are_freed(url)


def test_the_metrics_count_what_was_answered(endpoint, ask):
    before = metric(endpoint[0], "dllm_generation_tokens_total")
    usage = ask(prompt="RED ", max_tokens=8).json()["usage"]
    assert metric(endpoint[0], "dllm_generation_tokens_total") == before + usage["completion_tokens"]
    assert httpx.get(f"{endpoint[0]}/health").json() == {"status": "ok", "replicas": 2}


def test_a_load_is_put_on_it_and_told(endpoint, tmp_path, capsys):
    words = ["--seconds", "1", "--concurrency", "1,4", "--rate", "6", "--lengths", "4,8", "--prompt", "RED"]
    assert run_command_line(["bench", endpoint[0], *words, "--out", str(tmp_path / "load"), "--output", "json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["load"], one["level"]) for one in told["loads"]] == [("closed", 1), ("closed", 4), ("open", 6)]
    for one in told["loads"]:
        assert one["by_status"] == {"200": one["requests"]}
        assert 0 < one["ttfc_s"]["p50"] <= one["e2e_s"]["p50"] <= one["e2e_s"]["p99"] < 5
        assert one["tokens_per_s"] > 0
        assert one["goodput_per_s"] == pytest.approx(one["requests_per_s"], abs=1e-3)
    assert json.loads((tmp_path / "load" / "bench.json").read_text())["loads"] == told["loads"]
    assert b"<svg" in (tmp_path / "load" / "bench.html").read_bytes()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["http://127.0.0.1:1"], "is it up?"),
        (["{url}", "--model", "other"], "does not exist"),
        (["{url}", "--lengths", "9999"], "exceed the context"),
        (["{url}", "--lengths", "a"], "must be numbers"),
        (["{url}", "--concurrency", ""], "no load"),
        (["{url}", "--body", "[]"], "must be a JSON object"),
        (["{url}", "--prompts", "/nowhere"], "cannot be read"),
    ],
)
def test_a_load_that_cannot_be_put_on_it_is_one_line(endpoint, tmp_path, capsys, words, line):
    given = [word.replace("{url}", endpoint[0]) for word in words]
    assert run_command_line(["bench", *given, "--out", str(tmp_path)]) in (2, 3)
    told = capsys.readouterr().err.strip()
    assert line in told
    assert "\n" not in told


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
        for _ in range(6):
            answers.append(ask(**body))
            begun.set()

    victims = replicas()
    assert len(victims) == 2
    threads = [threading.Thread(target=load) for _ in range(6)]
    with ThreadPoolExecutor(30) as pool:
        streams = [pool.submit(streamed, endpoint[0], {"model": endpoint[1], **body}) for _ in range(45)]
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
    assert len(answers) == 36


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


def test_a_request_leaves_spans_without_its_prompt(ask):
    """This file is the first of those that share the cluster: Ray Serve keeps how it was started."""
    assert ask(prompt="RED VERY SECRET", max_tokens=2).status_code == 200
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve" / "spans"

    def told():
        return "".join(path.read_text() for path in folder.glob("*.json"))

    wait_for(lambda: "DecodeReplica" in told() and "trace_id" in told(), 10)
    assert "SECRET" not in told()
