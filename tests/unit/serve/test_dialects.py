"""Every decoding route over HTTP, before a real engine: what it answers is what the engine answers, in each shape."""

import asyncio
import json
import math
import re

import jsonschema
import numpy as np
import openai
import pytest
from conftest import make_small_bundle, make_small_corpus
from local_endpoint import local_endpoint

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import OpenHole, Request, with_holes

MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """(corpus, run) of a model whose tokenizer marks turns."""
    root = tmp_path_factory.mktemp("chatty")
    corpus = make_small_corpus(root, tokenizer={"vocab_size": 300, "chat": MARKERS})
    return corpus, make_small_bundle(corpus, root)


@pytest.fixture(scope="module")
def session(chatty):
    """A function: a coroutine function of a client -> what it returns, before that model as `m`."""
    corpus, run = chatty
    decode = corpus.recipe.decode.model_dump(mode="json")
    with local_endpoint({"m": {"run": run.url, "decode": decode}}) as session:
        yield session


@pytest.fixture(scope="module")
def served(session):
    """A function: (path, body or list of bodies, stream?) -> JSON answers, in order; events where it streams."""

    def ask(path, *bodies, status=200):
        async def scenario(client):
            answers = [await client.post(path, json={"model": "m", **body}) for body in bodies]
            await asyncio.sleep(0)
            return answers

        answers = session(scenario)
        assert {answer.status_code for answer in answers} == {status}, answers[0].text
        found = [events(a.text) if "event-stream" in a.headers["content-type"] else a.json() for a in answers]
        return found if len(found) > 1 else found[0]

    return ask


def events(text):
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


@pytest.fixture(scope="module")
def engine(chatty):
    return Engine(read_bundle(chatty[1]))


def test_infill_fills_every_hole_as_the_engine_does(served, engine, chatty):
    tokenizer, config = chatty[0].tokenizer, chatty[0].recipe.decode
    segments = ["RED ", {"hole": 3}, " AND ", {"hole": 2}, " END"]
    answer = served("/v1/infill", {"segments": segments, "seed": 4, "temperature": 1.0})
    request = Request(
        tuple(tokenizer.encode("RED ")),
        config.model_copy(update={"temperature": 1.0}),
        tuple(tokenizer.encode(" END")),
        seed=4,
    )
    request = with_holes(request, [OpenHole(3, 3), tuple(tokenizer.encode(" AND ")), OpenHole(2, 2)])
    [alone] = engine.generate([request])
    [choice] = answer["choices"]
    assert choice["text"] == "RED " + tokenizer.decode(alone.tokens) + " END"
    assert choice["holes"] == [tokenizer.decode(alone.tokens[:3]), tokenizer.decode(alone.tokens[-2:])]
    assert answer["usage"]["diffusion"]["canvas_tokens"] == answer["usage"]["completion_tokens"] == 5
    assert answer["object"] == "infill"


def test_neighbouring_holes_are_told_apart(served):
    segments = ["RED ", {"hole": 2}, {"hole": 3}, " END", {"hole": 1}]
    [choice] = served("/v1/infill", {"segments": segments, "seed": 4, "temperature": 1.0})["choices"]
    assert len(choice["holes"]) == 3


def test_a_prompt_is_counted_once_however_many_choices_it_has(session):
    async def scenario(client):
        async def counted():
            lines = (await client.get("/metrics")).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("dllm_prompt_tokens_total"))

        async def asked(**how):
            before, body = await counted(), {"model": "m", "max_tokens": 4, "seed": 1, **how}
            usage = (await client.post("/v1/completions", json=body)).json()["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert await counted() - before == usage["prompt_tokens"]
            return usage

        one = await asked(prompt="RED CIRCLE 17")
        many = await asked(prompt="RED CIRCLE 17", n=4)
        both = await asked(prompt=["RED CIRCLE 17", "BLUE"], n=2)
        other = await asked(prompt="BLUE")
        assert many["prompt_tokens"] == one["prompt_tokens"]
        assert many["diffusion"]["canvas_tokens"] == 4 * one["diffusion"]["canvas_tokens"]
        assert both["prompt_tokens"] == one["prompt_tokens"] + other["prompt_tokens"]

    session(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_to_the_first_token_is_not_that_of_the_whole_answer(session, stream):
    async def scenario(client):
        async def seconds(name):
            lines = (await client.get("/metrics")).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(f"dllm_{name}_seconds_sum"))

        names = ("time_to_first_token", "e2e_request_latency")
        before = [await seconds(name) for name in names]
        one_by_one = {"prompt": "RED", "max_tokens": 24, "diffusion": {"block_length": 1}, "stream": stream}
        await client.post("/v1/completions", json={"model": "m", **one_by_one})
        return [await seconds(name) - was for name, was in zip(names, before, strict=True)]

    first, whole = session(scenario)
    assert 0 < first < 0.9 * whole


def test_an_edit_changes_its_spans_and_nothing_else(served):
    text = "RED CIRCLE 17 BLUE STAR 23"
    bodies = [{"text": text, "span": [4, 10], "strength": 1.0, "seed": seed, "temperature": 2.0} for seed in range(6)]
    made = [answer["choices"][0]["text"] for answer in served("/v1/edit", *bodies)]
    assert all(one.startswith("RED ") and one.endswith(" 17 BLUE STAR 23") for one in made)
    assert len({*made}) > 1
    spans = [[0, 3], [14, 18]]
    bodies = [{"text": text, "spans": spans, "strength": 1.0, "seed": seed, "temperature": 2.0} for seed in range(6)]
    made = [answer["choices"][0]["text"] for answer in served("/v1/edit", *bodies)]
    assert all(" CIRCLE 17 " in one and one.endswith(" STAR 23") for one in made)
    assert len({*made}) > 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/infill", {"segments": ["no hole"]}, "segments"),
        ("/v1/infill", {"segments": [{"hole": 0}]}, "segments.hole"),
        ("/v1/infill", {"segments": [{"hole": 1 << 40}]}, "segments"),
        ("/v1/infill", {"segments": ["a", {"hole": 3}], "stop": "x"}, "stop"),
        ("/v1/edit", {"text": "abc", "span": [2, 1]}, "span"),
        ("/v1/edit", {"text": "abc", "span": [0, 4]}, "span"),
        ("/v1/edit", {"text": "abc"}, "span"),
        ("/v1/edit", {"text": "abc", "spans": [[0, 2], [1, 3]]}, "spans"),
        ("/v1/edit", {"text": "abc", "span": [0, 1], "strength": 0}, "strength"),
        ("/v1/edit", {"text": "abc", "span": [0, 1], "max_tokens": 3}, "max_tokens"),
        ("/v1/infill", {"segments": ["RED " * 80, {"hole": 3}]}, "segments"),
        ("/v1/edit", {"text": "RED " * 80, "span": [0, 3]}, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "RED " * 80}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "RED"}], "max_completion_tokens": 999},
            "max_completion_tokens",
        ),
        ("/v1/fim/completions", {"prompt": "a"}, "suffix"),
        ("/v1/score", {"completion": ""}, "completion"),
        ("/v1/score", {"completion": "RED " * 80}, "completion"),
        ("/v1/score", {"completion": "a", "draws": 1}, "draws"),
        ("/v1/completions", {"prompt": "a", "diffusion": {"regex": "("}}, "diffusion.regex"),
        ("/v1/completions", {"prompt": "a", "diffusion": {"regex": "a"}, "stop": "x"}, "diffusion.regex"),
        (
            "/v1/infill",
            {
                "segments": [{"hole": 12}],
                "diffusion": {"unmask": "remasking", "block_length": 1, "steps_per_block": 400},
            },
            "diffusion.steps_per_block",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served, path, body, param):
    error = served(path, body, status=400)["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"


def test_fim_is_a_completion_between_both_sides(served):
    body = {"prompt": "RED ", "suffix": " 17", "max_tokens": 5, "seed": 3, "temperature": 1.0}
    fim, completion = (served(path, body) for path in ("/v1/fim/completions", "/v1/completions"))
    assert fim["choices"] == completion["choices"]


def test_a_chat_is_its_turns_spelled_out_and_ends_at_the_end_of_a_turn(served, chatty):
    tokenizer = chatty[0].tokenizer
    messages = [{"role": "developer", "content": "SAY"}, {"role": "user", "content": "RED"}]
    spelled = [
        *(tokenizer.role_id("system"), *tokenizer.encode("SAY"), tokenizer.end_of_turn_id),
        *(tokenizer.role_id("user"), *tokenizer.encode("RED"), tokenizer.end_of_turn_id),
        tokenizer.role_id("assistant"),
    ]
    for seed in range(4):
        how = {"max_tokens": 12, "seed": seed, "temperature": 1.0}
        chat = served("/v1/chat/completions", {"messages": messages, **how})
        plain = served("/v1/completions", {"prompt": spelled, **how, "logprobs": 0})
        assert chat["object"] == "chat.completion"
        names = plain["choices"][0]["logprobs"]["tokens"]
        text = plain["choices"][0]["text"]
        if "<|end|>" not in names:
            assert chat["choices"][0]["message"]["content"] == text
        else:
            assert chat["choices"][0]["finish_reason"] == "stop"
            assert text.startswith(chat["choices"][0]["message"]["content"])
        assert chat["choices"][0]["message"]["role"] == "assistant"
        streamed = served("/v1/chat/completions", {"messages": messages, **how, "stream": True})
        deltas = [event["choices"][0]["delta"] for event in streamed]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == chat["choices"][0]["message"]["content"]
        assert [event["choices"][0]["finish_reason"] for event in streamed][-1] == chat["choices"][0]["finish_reason"]


def test_openais_client_sends_a_message_back_as_it_came(session):
    turns = [{"role": "user", "content": "RED"}]

    async def scenario(http):
        client = openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="unused", http_client=http, max_retries=0)
        for _ in range(2):
            how = {"model": "m", "max_tokens": 4, "n": None, "stream": None}
            answer = await client.chat.completions.create(messages=turns, **how)
            turns.extend([answer.choices[0].message, {"role": "user", "content": "AND"}])
        return answer

    assert session(scenario).choices[0].message.role == "assistant"


def test_a_model_without_turns_says_so(small_bundle, small_corpus):
    said = {"run": small_bundle.url, "decode": small_corpus.recipe.decode.model_dump(mode="json")}
    with local_endpoint({"m": said}) as session:
        body = {"model": "m", "messages": [{"role": "user", "content": "RED"}]}
        answer = session(lambda client: client.post("/v1/chat/completions", json=body))
    assert answer.status_code == 400
    assert "tokenizer.chat" in answer.json()["error"]["message"]


def test_log_probabilities_are_those_of_the_call_that_committed(served, engine, chatty):
    tokenizer, config = chatty[0].tokenizer, chatty[0].recipe.decode
    body = {"prompt": "RED ", "max_tokens": 8, "seed": 2, "temperature": 1.0, "logprobs": 3, "echo": True}
    told = served("/v1/completions", body)["choices"][0]
    prompt = tuple(tokenizer.encode("RED "))
    request = Request(prompt, config.model_copy(update={"max_tokens": 8, "temperature": 1.0}), seed=2, top_logprobs=3)
    engine.add(request)
    sure = {}
    while updates := engine.step():
        for update in updates:
            for (position, token, confidence), ids in zip(update.commits, update.best_tokens, strict=True):
                sure[position - len(prompt)] = (token, confidence, ids.tolist())
    logprobs = told["logprobs"]
    head = len(prompt)  # is echoed, and nobody was asked for it
    assert logprobs["tokens"][:head] == [tokenizer.token_text(token) for token in prompt]
    assert logprobs["token_logprobs"][:head] == logprobs["top_logprobs"][:head] == [None] * head
    assert len(logprobs["tokens"]) >= head + 4
    for i, (name, log_prob, best) in enumerate(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ):
        if i < head:
            continue
        token, confidence, ids = sure[i - head]
        assert (name, log_prob) == (tokenizer.token_text(token), pytest.approx(math.log(confidence), abs=1e-5))
        assert list(best) == list(dict.fromkeys(tokenizer.token_text(one) for one in ids))
        assert max(best.values()) >= log_prob - 1e-6
        assert told["text"][logprobs["text_offset"][i] :].startswith(name) or not name.isascii()
    assert np.exp(list(logprobs["top_logprobs"][head].values())).sum() <= 1 + 1e-5
    streamed = served("/v1/completions", {**body, "stream": True})
    parts = [event["choices"][0]["logprobs"] for event in streamed if event["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in part[name]] == logprobs[name]


def test_an_echoed_prompt_is_told_token_by_token_though_none_of_them_is_text(served, chatty):
    tokenizer = chatty[0].tokenizer
    prompt = [tokenizer.pad_id, tokenizer.role_id("user")]
    body = {"prompt": prompt, "max_tokens": 2, "seed": 1, "logprobs": 1, "echo": True}
    whole, streamed = served("/v1/completions", body, {**body, "stream": True})
    told = whole["choices"][0]["logprobs"]
    assert told["tokens"][:2] == [tokenizer.token_text(token) for token in prompt]
    assert (len(told["tokens"]), told["token_logprobs"][:2], told["text_offset"][:3]) == (4, [None] * 2, [0] * 3)
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    assert [one for part in parts for one in part["tokens"]] == told["tokens"]


@pytest.mark.parametrize("frames", ["whole", "changes"])
def test_frames_end_in_the_text_that_is_answered(served, frames):
    body = {"prompt": "RED ", "max_tokens": 12, "seed": 5, "temperature": 1.0, "diffusion": {"block_length": 4}}
    answer = served("/v1/completions", body)
    ask = {**body, "diffusing": True, "diffusion": {"block_length": 4, "frames": frames}}
    told = served("/v1/completions", {**ask, "stream_options": {"include_usage": True}})
    *frames_, empty, usage = told
    assert empty["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}]
    assert usage["usage"] == answer["usage"]
    last = frames_[-1]
    assert last["choices"][0]["delta"]["content"] == answer["choices"][0]["text"]
    assert last["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    progress = [frame["diffusion_meta"]["diffusion_progress"] for frame in frames_]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    calls = [frame["diffusion_meta"]["num_calls"] for frame in frames_]
    assert calls == list(range(1, answer["usage"]["diffusion"]["num_calls"] + 1))
    if frames == "whole":
        assert all("░" in frame["choices"][0]["delta"]["content"] for frame in frames_[:-1] if frame["choices"])
        return
    canvas = {}
    for frame in frames_:
        for position, text, confidence in frame["diffusion_meta"]["changed"]:
            canvas[position] = (text, confidence)
    shown = [canvas[position] for position in sorted(canvas) if canvas[position][0]]
    assert all(0 < confidence <= 1 for _, confidence in shown)
    text = "".join(text for text, _ in shown)
    assert "�" in text or text == answer["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/v1/infill", "/v1/edit"])
def test_documents_stream_whole_and_show_frames(served, path):
    body = {
        "/v1/infill": {"segments": ["RED ", {"hole": 4}, " END"]},
        "/v1/edit": {"text": "RED CIRCLE 17", "span": [4, 10], "strength": 1.0},
    }[path]
    body = {**body, "seed": 9, "temperature": 1.0, "n": 2}
    whole = served(path, body)["choices"]
    streamed = served(path, {**body, "stream": True})
    for choice in whole:
        pieces = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
    shown = served(path, {**body, "diffusing": True})
    finals = [event["choices"][0] for event in shown if event["choices"][0]["finish_reason"]]
    assert {one["index"]: one["delta"]["content"] for one in finals} == {c["index"]: c["text"] for c in whole}
    assert {one["index"]: one.get("holes") for one in finals} == {c["index"]: c.get("holes") for c in whole}


def test_schemas_and_expressions_are_kept(served):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    how = {"max_tokens": 32, "temperature": 1.0, "prompt": ""}
    for seed in range(3):
        format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        [choice] = served("/v1/completions", {**how, "seed": seed, "response_format": format_})["choices"]
        jsonschema.validate(json.loads(choice["text"]), schema)
        [choice] = served("/v1/completions", {**how, "seed": seed, "diffusion": {"regex": "(AB|C){3}[0-9]?"}})[
            "choices"
        ]
        assert re.fullmatch("(AB|C){3}[0-9]?", choice["text"])
    [choice] = served("/v1/completions", {**how, "max_tokens": 30, "response_format": {"type": "json_object"}})[
        "choices"
    ]
    assert isinstance(json.loads(choice["text"]), dict)


def test_scores_are_estimates_with_their_errors(served, chatty):
    one, two = served(
        "/v1/score",
        {"prompt": "RED ", "completion": ["CIRCLE 17", "A"], "draws": 16},
        {"prompt": "RED ", "completion": "CIRCLE 17", "draws": 16},
    )
    assert one["data"][0]["nats"] == two["data"][0]["nats"]  # of no other completion
    first, second = one["data"]
    assert first["error"] > 0
    assert first["draws"] == 16
    assert second["tokens"] == 1
    assert second["error"] == 0.0  # a single token is exact
    assert first["bits_per_byte"] == pytest.approx(first["nats"] / 9 / math.log(2))
    assert (one["estimator"], one["is_exact"]) == ("exact-count", False)
    many = served("/v1/score", {"prompt": "RED ", "completion": "CIRCLE 17", "draws": 256, "seed": 1})["data"][0]
    assert abs(many["nats"] - first["nats"]) < 5 * math.hypot(first["error"], many["error"])
