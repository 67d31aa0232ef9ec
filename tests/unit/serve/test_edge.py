"""Who may ask, what every answer carries, and what is refused before a route sees it."""

import asyncio
import hashlib
import http.client
import json
import logging
import os
import re
import threading
import time

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from local_endpoint import local_endpoint

from dllm_core.errors import ConfigError
from workflows.serve import keys
from workflows.serve.dialect.completions import CompletionRequest
from workflows.serve.dialect.score import ScoreRequest
from workflows.serve.edge import OPEN_ROUTES, Edge, EdgeSettings, guard
from workflows.serve.gateway import api
from workflows.serve.keys import KeyRing, read_keys

KEY = "sk-a-long-and-random-key"


def line(name, key):
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def models(small_bundle, small_corpus):
    return {"m": {"run": small_bundle.url, "decode": small_corpus.recipe.decode.model_dump(mode="json")}}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# who may ask\n" + line("first", KEY))
    return path


def operations():
    """(verb, path) of the OpenAPI document, of the page and of the document itself."""
    found = [("GET", "/"), ("GET", "/openapi.json")]
    for path, verbs in api.openapi()["paths"].items():
        found += [(verb.upper(), path.replace("{model}", "m")) for verb in verbs]
    return found


def test_no_route_but_those_that_tell_nothing_answers_without_a_key(models, keys_file):
    asked = operations()
    assert {"/v1/completions", "/v1/score", "/openapi.json", "/v1/models/m"} <= {path for _, path in asked}
    wrong = [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}]
    wrong += [
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
    ]

    async def scenario(client):
        for verb, path in asked:
            for headers in wrong:
                answer = await client.request(verb, path, headers=headers, json={} if verb == "POST" else None)
                if path in OPEN_ROUTES:
                    assert answer.status_code == 200, path
                    continue
                assert answer.status_code == 401, (verb, path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in answer.text
        right = {"authorization": f"Bearer {KEY}"}
        assert (await client.get("/v1/models", headers=right)).status_code == 200
        body = {"model": "m", "prompt": "RED", "max_tokens": 2}
        assert (await client.post("/v1/completions", headers=right, json=body)).status_code == 200

    with local_endpoint(models, keys_file=str(keys_file)) as session:
        session(scenario)


def test_keys_are_rotated_while_it_runs_and_a_broken_file_changes_nothing(keys_file):
    ring = KeyRing(str(keys_file))

    def name_of(key):
        ring._read_at -= 2  # as if a second had passed
        return ring.name_of(f"Bearer {key}")

    assert name_of(KEY) == "first"
    keys_file.write_text(line("second", "sk-other"))
    assert (name_of(KEY), name_of("sk-other")) == (None, "second")
    for broken in ("garbage\n", "", line("a", "x") + line("a", "y")):
        keys_file.write_text(broken)
        assert name_of("sk-other") == "second"
    os.unlink(keys_file)
    assert name_of("sk-other") == "second"


def test_keys_that_change_while_the_first_are_read_are_read_again(keys_file, monkeypatch):
    def read_and_changed(path):
        found = read_keys(path)
        keys_file.write_text(line("second", "sk-other"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(keys, "read_keys", read_and_changed)
        ring = KeyRing(str(keys_file))
    ring._read_at -= 2
    assert (ring.name_of(f"Bearer {KEY}"), ring.name_of("Bearer sk-other")) == (None, "second")


@pytest.mark.parametrize(
    ("text", "message"),
    [("sk-plain-key\n", "line 1 is no key"), ("", "holds no key"), ("a sha256:12\n", "line 1 is no key")],
)
def test_a_file_that_holds_no_keys_is_refused_without_showing_it(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(path)
    assert "sk-plain-key" not in str(caught.value)


def test_every_answer_carries_its_id_and_says_how_to_treat_it(models):
    async def scenario(client):
        given = await client.get("/v1/models", headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        for bad in ("x" * 200, "a b", "<script>"):
            made = await client.get("/v1/nowhere", headers={"x-request-id": bad})
            assert made.headers["x-request-id"] not in ("", bad)
            assert made.headers["x-content-type-options"] == "nosniff"
        page = await client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in page.text.replace("httpx", "").replace('"text/html', "")  # no outside asset

    with local_endpoint(models) as session:
        session(scenario)


def test_an_error_that_nobody_has_foreseen_carries_its_id_too_and_is_counted(models, monkeypatch):
    monkeypatch.setattr(CompletionRequest, "rows", lambda *_: 1 // 0)
    monkeypatch.setattr(ScoreRequest, "questions", lambda *_: 1 // 0)

    async def scenario(client):
        headers = {"x-request-id": "mine-1"}
        body = {"model": "m", "prompt": "RED"}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        await client.post("/v1/score", json={**body, "completion": "A"}, headers=headers)
        return answer, (await client.get("/metrics")).text

    with local_endpoint(models) as session:
        answer, counted = session(scenario)
    assert re.search(r'^dllm_request_errors_total\{.*status="500"\} 2\.0$', counted, re.MULTILINE)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "ZeroDivisionError")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_card_of_every_model_in_the_list_can_be_asked_for(models):
    async def scenario(http):
        client = openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="unused", http_client=http, max_retries=0)
        listed = [model.id for model in (await client.models.list()).data]
        return listed, [(await client.models.retrieve(name)).id for name in listed]

    with local_endpoint({name: models["m"] for name in ("m", "org/m", "a b")}) as session:
        listed, found = session(scenario)
    assert found == listed == ["m", "org/m", "a b"]


def test_other_origins_may_ask_only_where_it_was_said(models):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}

    async def scenario(client):
        preflight = await client.options("/v1/completions", headers=asked)
        answer = await client.get("/v1/models", headers={"origin": "https://a.example"})
        return preflight, answer

    with local_endpoint(models) as session:
        preflight, answer = session(scenario)
        assert preflight.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    with local_endpoint(models, allow_origins=("https://a.example",)) as session:
        preflight, answer = session(scenario)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("asked", ["authorization, x-stainless-os,x-stainless-retry-count", "", "a\xe9"])
def test_an_origin_that_may_ask_may_send_the_headers_that_it_asks_for(models, asked):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    headers["access-control-request-headers"] = asked

    async def scenario(client):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        return await client.options("/v1/completions", headers=encoded)

    with local_endpoint(models, allow_origins=("https://a.example",)) as session:
        allowed = session(scenario).headers["access-control-allow-headers"]
    assert allowed == asked if "stainless" in asked else allowed.startswith("authorization, content-type")


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_a_preflight_leaves_its_connection_usable(protocol):
    """Over a real server: a 204 with a body is answered by a cut, or read as the beginning of the next answer."""
    app = FastAPI()
    app.add_middleware(Edge)
    app.get("/v1/models")(lambda: {"data": []})
    guard(EdgeSettings(allow_origins=frozenset({"https://a.example"})))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
        connection.request("OPTIONS", "/v1/models", headers=asked)
        preflight = connection.getresponse()
        assert (preflight.status, preflight.read()) == (204, b"")
        assert preflight.headers["content-type"] is None
        own = connection.sock
        connection.request("GET", "/v1/models", headers={"Origin": "https://a.example"})
        assert json.loads(connection.getresponse().read()) == {"data": []}
        assert connection.sock is own is not None
    finally:
        guard(EdgeSettings())
        server.should_exit = True
        thread.join()


def test_headers_too_large_are_431_and_the_log_has_no_prompt_and_no_key(models, keys_file, monkeypatch):
    async def scenario(client):
        large = await client.get("/v1/models", headers={"x-large": "a" * 20_000})
        assert large.status_code == 431
        assert set(large.json()["error"]) == {"message", "type", "param", "code"}
        body = {"model": "m", "prompt": "SECRET PROMPT", "max_tokens": 2}
        await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"})

    lines = []
    with local_endpoint(models, keys_file=str(keys_file)) as session:
        monkeypatch.setattr(logging.getLogger("dllm.access"), "info", lines.append)
        session(scenario)
    told = [json.loads(line) for line in lines]
    assert {(one["status"], one["key"]) for one in told} == {(431, None), (200, "first")}
    assert "SECRET" not in "".join(lines)
    assert KEY not in "".join(lines)


def test_a_body_that_never_ends_is_ended_and_one_too_large_is_not_read_to_its_end(models):
    sent = []

    async def endless(parts, wait):
        for _ in range(parts):
            sent.append(1)
            yield b" " * 1000
            await asyncio.sleep(wait)

    async def scenario(client):
        headers = {"content-type": "application/json"}
        began = time.monotonic()
        slow = await client.post("/v1/completions", content=endless(1000, 0.02), headers=headers)
        assert slow.status_code == 408
        assert time.monotonic() - began < 5
        sent.clear()
        large = await client.post("/v1/completions", content=endless(100_000, 0), headers=headers)
        assert large.status_code == 413
        return large

    with local_endpoint(models, request_timeout_s=0.5) as session:
        session(scenario)


def test_an_edge_that_is_cancelled_hands_it_on(models):
    """A client that leaves in mid-answer cancels the handler, and with it the row."""

    async def scenario(client):
        body = {"model": "m", "prompt": "RED", "max_tokens": 24, "diffusion": {"block_length": 1, "steps_per_block": 1}}
        waiting = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for _ in range(200):
            text = (await client.get("/metrics")).text
            if "dllm_num_requests_running 0.0" in text and "dllm_num_requests_waiting 0.0" in text:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the row is still there")

    with local_endpoint(models) as session:
        session(scenario)


def test_a_client_is_told_of_each_route_in_the_document(models):
    async def scenario(client):
        return (await client.get("/openapi.json")).json()

    with local_endpoint(models) as session:
        document = session(scenario)
    assert httpx.Response(200, json=document).json()["paths"].keys() == {
        *("/health", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions"),
        *("/v1/fim/completions", "/v1/infill", "/v1/edit", "/v1/score"),
    }
