"""The gateway over HTTP, with replicas whose every step is scripted: retries, deadlines, refusals, freed rows."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from workflows.serve.config import ServeConfig
from workflows.serve.gateway import Gateway, api
from workflows.serve.loop import Progress

TEXT = "RED CIRCLE 17"


class Call:
    """A call of a replica, as Ray Serve hands it to the gateway."""

    def __init__(self, steps):
        self._steps, self.is_open = steps, True

    def __aiter__(self):
        return self._steps

    def __await__(self):
        return self._end().__await__()

    async def _end(self):
        return [step async for step in self._steps][-1]

    def cancel(self):
        self.is_open = False


class Replicas:
    """Answers the i-th call of its life with `script(i)`."""

    def __init__(self, script, loads=()):
        self._script, self._loads, self.calls = script, loads, []
        self.stream = self.generate = SimpleNamespace(remote=self._call)

    def options(self, stream):
        return self

    def broadcast(self, method):
        async def results_async(timeout_s, return_exceptions):
            return list(self._loads)

        return SimpleNamespace(results_async=results_async)

    def _call(self, name, request, detail):
        self.calls.append(Call(self._script(len(self.calls))))
        return self.calls[-1]


@pytest.fixture
def served(small_bundle, small_corpus, monkeypatch):
    """A function: scripted replicas -> a function that sends one request to a gateway in front of them."""
    ours = Gateway.func_or_class.__mro__[1]  # below Ray's own wrapping

    def of(replicas, timeout_s=30.0, may_rest=False):
        decode = small_corpus.recipe.decode.model_dump(mode="json")
        gateway = ours(replicas, ServeConfig(request_timeout_s=timeout_s).model_dump(mode="json"), may_rest)
        gateway.reconfigure({small_bundle.name: {"run": small_bundle.url, "decode": decode}})
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=gateway))

        def send(path="/v1/completions", **body):
            async def sent():
                transport = httpx.ASGITransport(app=api)
                async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                    if not body:
                        return await client.get(path)
                    answer = await client.post(path, json={"model": small_bundle.name, **body})
                await asyncio.sleep(0.05)
                replicas.left_open = [call.is_open for call in replicas.calls]  # the end of the loop closes all
                return answer

            return asyncio.run(sent())

        return send

    return of


@pytest.fixture
def steps(small_corpus):
    """A function: token counts -> a row's progress at these; an exception is raised, None never ends."""
    ids = small_corpus.tokenizer.encode(TEXT)

    async def run(*script):
        for step in script:
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.Event().wait()
            count = len(ids) if step == "end" else step
            yield Progress(ids[:count], count, count, "length" if step == "end" else None)

    return run


def events(answer):
    return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]


def is_refusal(body, kind, code=None):
    error = body["error"]
    return set(error) == {"message", "type", "param", "code"} and (error["type"], error["code"]) == (kind, code)


@pytest.mark.parametrize("stop", [None, " 1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_in_mid_answer_is_tried_again_and_no_text_comes_twice(served, steps, stream, stop):
    def script(i):
        return [steps(1, 2, ActorDiedError()), steps(ActorDiedError()), steps(2, 3, "end")][i]

    replicas = Replicas(script)
    answer = served(replicas)(prompt="RED", stop=stop, stream=stream)
    assert answer.status_code == 200
    if stream:
        told = events(answer)
        assert told[-1] == "[DONE]"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in told[:-1])
    else:
        text = answer.json()["choices"][0]["text"]
    assert text == (TEXT if stop is None else TEXT.partition(stop)[0])
    assert len(replicas.calls) == 3


def test_replicas_that_keep_dying_end_a_stream_with_an_error_event(served, steps):
    answer = served(Replicas(lambda i: steps(4, ActorDiedError())))(prompt="RED", stream=True)
    assert is_refusal(json.loads(events(answer)[-1]), "server_error")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_a_408_and_frees_its_rows(served, steps, stream):
    replicas = Replicas(lambda i: steps(None))
    answer = served(replicas, timeout_s=0.2)(prompt="RED", n=3, stream=stream)
    assert answer.status_code == 408
    assert is_refusal(answer.json(), "timeout_error", "request_timeout")
    assert replicas.left_open == [False] * 3


def test_a_stream_that_takes_too_long_ends_with_an_error_event_and_frees_its_rows(served, steps):
    replicas = Replicas(lambda i: steps(4, None))
    told = events(served(replicas, timeout_s=0.5)(prompt="RED", n=3, stream=True))
    assert [json.loads(event)["choices"][0]["index"] for event in told[:-1]] == [0, 1, 2]
    assert is_refusal(json.loads(told[-1]), "timeout_error", "request_timeout")
    assert replicas.left_open == [False] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_is_refused_frees_the_others(served, steps, stream):
    full = RayTaskError("stream", "", BackPressureError(num_queued_requests=9, max_queued_requests=9))
    replicas = Replicas(lambda i: steps(full.as_instanceof_cause()) if i == 1 else steps(None))
    answer = served(replicas)(prompt="RED", n=3, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert is_refusal(answer.json(), "rate_limit_error", "rate_limit_exceeded")
    assert replicas.left_open == [False] * 3


def test_the_load_is_the_sum_over_the_replicas_that_answer(served, steps):
    loads = [{"running": 2, "waiting": 1}, ActorDiedError(), {"running": 3, "waiting": 0}]
    lines = served(Replicas(steps, loads))("/metrics").text.splitlines()
    for line in ("dllm_decode_replicas 2.0", "dllm_num_requests_running 5.0", "dllm_num_requests_waiting 1.0"):
        assert line in lines


@pytest.mark.parametrize("error", [ActorDiedError(), BackPressureError(num_queued_requests=9, max_queued_requests=9)])
def test_health_is_503_when_no_replica_answers(served, steps, error):
    for loads in ([error], []):
        answer = served(Replicas(steps, loads))("/health")
        assert answer.status_code == 503
        assert is_refusal(answer.json(), "server_error")
    answer = served(Replicas(steps, [error, {"running": 0, "waiting": 0}]))("/health")
    assert answer.json() == {"status": "ok", "replicas": 1}


def test_no_replica_is_well_where_they_may_rest(served, steps):
    assert served(Replicas(steps, []), may_rest=True)("/health").json() == {"status": "ok", "replicas": 0}
    assert served(Replicas(steps, [ActorDiedError()]), may_rest=True)("/health").status_code == 503


def test_a_prompt_without_room_for_an_answer_is_blamed_itself(served, steps):
    send = served(Replicas(steps))
    for body, param in [
        ({"prompt": [5] * 40, "max_tokens": 1}, "prompt"),
        ({"prompt": "R", "suffix": "RED" * 40}, "suffix"),
        ({"prompt": [5] * 20, "max_tokens": 30}, "max_tokens"),
    ]:
        error = send(**body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_a_trailing_slash_is_another_route(served, steps, path):
    answer = served(Replicas(steps, [{"running": 0, "waiting": 0}]))(path)
    assert answer.status_code == 404
    assert is_refusal(answer.json(), "invalid_request_error")
