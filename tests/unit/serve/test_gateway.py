"""The gateway over HTTP, with replicas whose every step is scripted: retries, deadlines, refusals, freed rows."""

import asyncio
import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import pytest
from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.errors import ConfigError
from workflows.serve.config import ServeConfig
from workflows.serve.dialect.completions import CompletionRequest
from workflows.serve.gateway import Gateway, api
from workflows.serve.progress import ElsewhereError, LoopEndedError, NotLoadedError, Progress

TEXT = "RED CIRCLE 17"


class Call:
    """A call of a replica, as Ray Serve hands it to the gateway: rows whose every step is scripted, told as they come.

    What is wrong with Ray or the replica ends the call, anything else its row alone.
    """

    def __init__(self, requests, rows):
        self.requests, self._rows, self.is_open = requests, rows, True

    async def __aiter__(self):
        told = asyncio.Queue()

        async def follow(place, steps):
            try:
                async for step in steps:
                    told.put_nowait([(place, step)])
            except Exception as error:  # noqa: BLE001 (told, as a replica does)
                told.put_nowait(error if isinstance(error, RayError | ElsewhereError) else [(place, error)])

        tasks = [asyncio.create_task(follow(place, steps)) for place, steps in enumerate(self._rows)]
        while tasks:
            message = await told.get()
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self):
        self.is_open = False


class Replicas:
    """Decodes the i-th row of its life as `script(i)` says. loads: what each replica answers; None: it hangs."""

    def __init__(self, script, loads=()):
        self._script, self._loads, self.calls = script, loads, []
        self.decode = SimpleNamespace(remote=self._decode)

    def options(self, stream):
        return self

    def broadcast(self, method):
        async def asked():
            if not self._loads:  # as Ray Serve answers for none
                raise DeploymentUnavailableError(DeploymentID("DecodeReplica"))
            return [SimpleNamespace(get_async=functools.partial(told, load)) for load in self._loads]

        async def told(load):
            if load is None:
                await asyncio.Event().wait()
            if isinstance(load, Exception):
                raise load
            return load

        return SimpleNamespace(_fetch_replica_results_async=asked)

    def _decode(self, name, digest, requests, detail, end_id):
        begun = sum(len(call.requests) for call in self.calls)
        rows = [self._script(begun + place) for place in range(len(requests))]
        self.calls.append(Call(requests, rows))
        return self.calls[-1]


@pytest.fixture
def served(small_bundle, small_corpus, monkeypatch):
    """A function: scripted replicas -> a function that sends one request to a gateway in front of them."""
    ours = Gateway.func_or_class.__mro__[1]  # below Ray's own wrapping

    def of(replicas, timeout_s=30.0, may_rest=False, **settings):
        decode = small_corpus.recipe.decode.model_dump(mode="json")
        told = ServeConfig(request_timeout_s=timeout_s, **settings).model_dump(mode="json")
        gateway = ours(replicas, told, may_rest)
        gateway.reconfigure({small_bundle.name: {"run": small_bundle.url, "decode": decode}})
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=gateway))

        def together(bodies, path="/v1/completions"):
            """Answers to these, each sent when what the one before has begun is done."""

            async def sent():
                transport = httpx.ASGITransport(app=api)
                async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                    tasks = []
                    for body in bodies:
                        model = {"model": small_bundle.name}
                        post = client.post(path, json={**model, **body}) if body else client.get(path)
                        tasks.append(asyncio.create_task(post))
                        await asyncio.sleep(0.1 if len(bodies) > 1 else 0)
                    answers = await asyncio.gather(*tasks)
                await asyncio.sleep(0.05)
                replicas.left_open = [call.is_open for call in replicas.calls]  # the end of the loop closes all
                return answers

            return asyncio.run(sent())

        def send(path="/v1/completions", **body):
            return together([body], path)[0]

        send.together = together
        return send

    return of


@pytest.fixture
def steps(small_corpus):
    """A function: token counts -> a row's progress at these; an exception is raised, None never ends, a float waits."""
    ids = small_corpus.tokenizer.encode(TEXT)

    async def run(*script):
        for step in script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
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


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_rows_that_were_open_when_their_replica_died_are_tried_again(served, steps, stream):
    first = [("end",), (2, None), (1, 0.05, ActorDiedError()), ("end",)]
    replicas = Replicas(lambda i: steps(*first[i]) if i < 4 else steps(1, 3, "end"))
    answer = served(replicas)(prompt="RED", n=4, seed=3, stream=stream)
    if stream:
        texts = dict.fromkeys(range(4), "")
        for event in events(answer)[:-1]:
            [choice] = json.loads(event)["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == dict.fromkeys(range(4), TEXT)
    else:
        assert [choice["text"] for choice in answer.json()["choices"]] == [TEXT] * 4
    died, again = replicas.calls
    assert again.requests == died.requests[1:3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_its_replica_gave_up_is_tried_again(served, steps, stream):
    """As Ray Serve tells of a replica that is shut down: by a cancellation that nobody here has asked for."""

    class GivesUp(Call):
        async def __aiter__(self):
            yield [(0, await anext(self._rows[0]))]
            raise asyncio.CancelledError

    class Stopping(Replicas):
        def _decode(self, *call):
            made = super()._decode(*call)
            if len(self.calls) == 1:
                self.calls[0] = made = GivesUp(made.requests, made._rows)
            return made

    answer = served(Stopping(lambda i: steps(1, 3, "end")), timeout_s=5.0)(prompt="RED", stream=stream)
    assert answer.status_code == 200
    assert "error" not in answer.text


def test_rows_for_which_there_is_no_room_are_refused_before_anything_is_sent(served, steps, monkeypatch):
    """A replica has 64 in a batch and lets as many wait as is said."""
    monkeypatch.setattr("workflows.serve.routing._num_replicas", 2)
    replicas = Replicas(lambda i: steps(*((None,) if i < 128 else ("end",))))
    send = served(replicas, timeout_s=1.0, max_queued_requests=1)
    many = {"prompt": ["RED"] * 8, "n": 8}
    answers = send.together([many, many, {"prompt": "RED", "n": 3}, {"prompt": "RED", "n": 3, "stream": True}])
    assert [answer.status_code for answer in answers] == [408, 408, 429, 429]
    assert {answer.headers["retry-after"] for answer in answers[2:]} == {"1"}
    assert [len(call.requests) for call in replicas.calls] == [32] * 4  # in a call for each replica
    assert send(prompt="RED", n=2).status_code == 200


def test_places_are_given_back_by_rows_that_end_and_by_requests_that_are_refused(served, steps):
    replicas = Replicas(lambda i: steps(*((None,) if i < 63 else ("end",))))
    send = served(replicas, timeout_s=0.6, max_queued_requests=1)
    whole, other = send.together([{"prompt": ["RED"] * 8, "n": 8}, {"prompt": "RED", "n": 2}])  # of 65; one has ended
    assert (whole.status_code, other.status_code) == (408, 200)
    for body in ({"prompt": "RED", "max_tokens": 999}, {"prompt": ["RED " * 90] * 8, "n": 8}) * 3:
        assert send(**body).status_code == 400
    assert [answer.status_code for answer in send.together([{"prompt": "RED", "n": 8}] * 2)] == [200, 200]


def test_a_request_that_is_given_up_while_its_rows_are_made_in_a_thread_keeps_no_place(served, steps, monkeypatch):
    made = CompletionRequest.rows

    def slowly(asked, model):
        time.sleep(0.8)
        return made(asked, model)

    monkeypatch.setattr(CompletionRequest, "rows", slowly)
    send = served(Replicas(lambda i: steps("end")), timeout_s=0.4, max_queued_requests=1)
    many = {"prompt": ["RED"] * 8, "n": 8, "user": "x" * (16 << 10)}  # so large that a thread reads it
    assert send(**many).status_code == 408
    monkeypatch.setattr(CompletionRequest, "rows", made)
    assert send(**many).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_a_replica_cannot_begin_is_tried_elsewhere_and_what_broke_in_it_is_not(served, steps, stream):
    def told(error):
        return RayTaskError("decode", "", error).as_instanceof_cause()

    over, broken = told(LoopEndedError("the decoding loop has ended")), told(RuntimeError("decoding failed"))
    as_by_grpc = (over.cause, NotLoadedError("m"))  # which wraps nothing
    for elsewhere in (over, told(NotLoadedError("m")), *as_by_grpc):
        replicas = Replicas(lambda i, error=elsewhere: steps(error) if i == 0 else steps("end"))
        assert TEXT in served(replicas)(prompt="RED", stream=stream).text
        assert len(replicas.calls) == 2
    replicas = Replicas(lambda i: steps(broken) if i == 0 else steps("end"))
    answer = served(replicas)(prompt="RED", stream=stream)
    assert (answer.status_code, len(replicas.calls)) == (503, 1)


def test_all_chunks_of_a_stream_say_that_it_was_made_at_one_time(served, steps, monkeypatch):
    monkeypatch.setattr(time, "time", itertools.count(1_700_000_000).__next__)
    *told, _ = events(served(Replicas(lambda i: steps(1, 2, "end")))(prompt="RED", stream=True))
    assert len(told) == 3
    assert len({json.loads(event)["created"] for event in told}) == 1


def test_replicas_that_keep_dying_end_a_stream_with_an_error_event(served, steps):
    answer = served(Replicas(lambda i: steps(4, ActorDiedError())))(prompt="RED", stream=True)
    assert is_refusal(json.loads(events(answer)[-1]), "server_error")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_a_408_and_frees_its_rows(served, steps, stream):
    replicas = Replicas(lambda i: steps(None))
    answer = served(replicas, timeout_s=0.2)(prompt="RED", n=3, stream=stream)
    assert answer.status_code == 408
    assert is_refusal(answer.json(), "timeout_error", "request_timeout")
    assert replicas.left_open == [False]


def test_a_stream_that_takes_too_long_ends_with_an_error_event_and_frees_its_rows(served, steps):
    replicas = Replicas(lambda i: steps(4, None))
    told = events(served(replicas, timeout_s=0.5)(prompt="RED", n=3, stream=True))
    assert [json.loads(event)["choices"][0]["index"] for event in told[:-1]] == [0, 1, 2]
    assert is_refusal(json.loads(told[-1]), "timeout_error", "request_timeout")
    assert replicas.left_open == [False]


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_is_refused_frees_the_others(served, steps, stream):
    full = RayTaskError("stream", "", BackPressureError(num_queued_requests=9, max_queued_requests=9))
    replicas = Replicas(lambda i: steps(full.as_instanceof_cause()) if i == 1 else steps(None))
    answer = served(replicas)(prompt="RED", n=3, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert is_refusal(answer.json(), "rate_limit_error", "rate_limit_exceeded")
    assert replicas.left_open == [False]


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


def test_health_is_told_to_who_asks_by_head(served, steps):
    for loads, status in (([{"running": 0, "waiting": 0}], 200), ([ActorDiedError()], 503)):
        served(Replicas(steps, loads))

        async def asked():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://gateway") as client:
                return await client.head("/health")

        assert asyncio.run(asked()).status_code == status


def test_a_replica_that_hangs_makes_no_other_unwell(served, steps, monkeypatch):
    monkeypatch.setattr("workflows.serve.calls._TOLD_WITHIN_S", 0.1)
    send = served(Replicas(steps, [None, {"running": 2, "waiting": 0}]))
    assert send("/health").json() == {"status": "ok", "replicas": 1}
    assert {"dllm_decode_replicas 1.0", "dllm_num_requests_running 2.0"} <= {*send("/metrics").text.splitlines()}
    assert served(Replicas(steps, [None]))("/health").status_code == 503


def test_a_model_that_a_replica_could_not_load_is_named_and_all_is_well_without_it(served, steps):
    load = {"running": 0, "waiting": 0, "work": 0}
    send = served(Replicas(steps, [{**load, "not_loaded": ("b", "a")}, {**load, "not_loaded": ("b",)}, load]))
    assert send("/health").json() == {"status": "ok", "replicas": 3, "not_loaded": ["a", "b"]}


def test_no_replica_is_well_where_they_may_rest(served, steps):
    assert served(Replicas(steps, []), may_rest=True)("/health").json() == {"status": "ok", "replicas": 0}
    assert served(Replicas(steps, [ActorDiedError()]), may_rest=True)("/health").status_code == 503


@pytest.mark.parametrize(
    ("models", "line"),
    [
        ({}, "models: none is said"),
        ({"m": {"run": "s3://b/runs/m", "decodes": {}}}, "models.m.decodes: unknown name"),
        ({"m": {"run": "s3://b/runs/m", "decode": {"cache": "dula"}}}, "models.m.decode.cache: "),
    ],
)
def test_models_that_cannot_be_meant_are_a_line_with_their_place(models, line):
    gateway = Gateway.func_or_class.__mro__[1](Replicas(None), ServeConfig().model_dump(mode="json"))
    with pytest.raises(ConfigError) as error:
        gateway.reconfigure(models)
    assert str(error.value).startswith(line)


def test_a_gateway_reads_no_weights(small_bundle, tmp_path):
    """Of many gigabytes they would be fetched from S3 and hashed by each gateway, for nothing."""
    shutil.copytree(small_bundle.store.path(small_bundle.prefix), tmp_path / small_bundle.prefix)
    (tmp_path / small_bundle.key("bundle/model.safetensors")).unlink()
    gateway = Gateway.func_or_class.__mro__[1](Replicas(None), ServeConfig().model_dump(mode="json"))
    gateway.reconfigure({"m": {"run": str(tmp_path / small_bundle.prefix)}})
    assert gateway._model("m").digest == read_bundle(small_bundle).digest


def test_a_prompt_without_room_for_an_answer_is_blamed_itself(served, steps):
    send = served(Replicas(steps))
    for body, param in [
        ({"prompt": [5] * 40, "max_tokens": 1}, "prompt"),
        ({"prompt": "R", "suffix": "RED" * 40}, "suffix"),
        ({"prompt": [5] * 20, "max_tokens": 30}, "max_tokens"),
    ]:
        error = send(**body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


@pytest.mark.parametrize("ids", [[-1], [1 << 40], [[5], [-7]], [300_000]])
def test_token_ids_that_there_are_not_are_refused_whether_they_are_echoed_or_not(served, steps, ids):
    for echo in (True, False):
        answer = served(Replicas(steps))(prompt=ids, echo=echo)
        assert answer.status_code == 400
        assert is_refusal(answer.json(), "invalid_request_error")
        assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_a_trailing_slash_is_another_route(served, steps, path):
    answer = served(Replicas(steps, [{"running": 0, "waiting": 0}]))(path)
    assert answer.status_code == 404
    assert is_refusal(answer.json(), "invalid_request_error")


def test_neither_a_gateway_nor_who_deploys_has_use_for_torch():
    """Their start would be seconds longer and each one 250 MB larger."""
    told = "import sys, workflows.serve.gateway, workflows.serve.replica; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
