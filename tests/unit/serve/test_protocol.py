"""What a request may hold, and what a bad one is told."""

import json
import time

import pytest
import tokenizers
from sentence_pieces import sentence_pieces

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.body import parse_body
from workflows.serve.dialect.chat import ChatRequest
from workflows.serve.dialect.completions import CompletionRequest, FimRequest
from workflows.serve.dialect.errors import ApiError
from workflows.serve.dialect.rows import ServedModel
from workflows.serve.dialect.score import ScoreRequest
from workflows.serve.dialect.spans import EditRequest, InfillRequest

LIMITS = Limits()


def parse(**fields):
    asked = parse_body(CompletionRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    asked.check(LIMITS)
    return asked


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 9}, "n"),
        ({"promt": "x"}, "promt"),
        ({"diffusion": {"treshold": 1}}, "diffusion.treshold"),
        ({"logprobs": 6}, "logprobs"),
        ({"diffusion": {"steps": 1 << 20}}, "diffusion.steps"),
        ({"diffusion": {"frames": "changes"}}, "diffusion.frames"),
        ({"diffusing": True, "logprobs": 0}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
    ],
)
def test_a_bad_parameter_is_named(fields, place):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.place.startswith(place)
    assert ApiError.of(caught.value).body["error"]["param"] == caught.value.place


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (CompletionRequest, {"prompt": "p"}),
        (FimRequest, {"prompt": "p", "suffix": "s"}),
        (ChatRequest, {"messages": [{"role": "user", "content": "p"}]}),
        (InfillRequest, {"segments": ["p", {"hole": 1}]}),
        (EditRequest, {"text": "pq", "span": [0, 1]}),
        (ScoreRequest, {"completion": "p"}),
    ],
)
def test_every_parameter_that_is_missing_or_of_another_kind_is_named(kind, said):
    said = {"model": "m", **said}
    parse_body(kind, json.dumps(said).encode())
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    assert "model" in needed
    bad = [(name, {other: said[other] for other in said if other != name}) for name in needed]
    bad += [(name, {**said, name: {"no": [0]}}) for name in kind.model_fields]
    for name, body in bad:
        with pytest.raises(RequestError) as caught:
            parse_body(kind, json.dumps(body).encode())
        assert caught.value.place.partition(".")[0] == name


@pytest.mark.parametrize(
    ("kind", "said", "line"),
    [
        (InfillRequest, {"segments": ["a", {"hole": 0}]}, "segments.hole: input should be greater than or equal to 1"),
        (InfillRequest, {"segments": ["a", {"hole": 1, "most": 2}]}, "segments.most: unknown parameter"),
        (InfillRequest, {"segments": ["a", 3]}, "segments: input should be a valid string"),
        (CompletionRequest, {"prompt": [[1, "a"]]}, "prompt: input should be a valid integer"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "u"}]}]},
            "messages.content.type: input should be 'text'",
        ),
    ],
)
def test_of_what_may_have_several_forms_the_one_that_was_meant_is_told_of(kind, said, line):
    with pytest.raises(RequestError) as caught:
        parse_body(kind, json.dumps({"model": "m", **said}).encode())
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "p", "temperature": NaN}',
        b'{"model":' + b"[" * 70 + b"]" * 70 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_request_is_refused_in_one_line(body):
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionRequest, body)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_what_is_not_supported_are_fine():
    request = parse(logprobs=None, presence_penalty=0, best_of=1, logit_bias={})
    assert request.prompts == ["p"]


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, FimRequest, InfillRequest, EditRequest, ScoreRequest])
def test_null_is_the_default_of_whatever_has_one(kind):
    said = {
        **{"model": "m", "prompt": "p", "suffix": "s", "messages": [{"role": "user", "content": "p"}]},
        **{"segments": ["p", {"hole": 1}], "text": "pq", "completion": "p"},
    }
    needed = {name: said[name] for name, field in kind.model_fields.items() if field.is_required()}
    nulls = {name: None for name in kind.model_fields if name not in needed}
    assert {"n", "stream", "seed"} & nulls.keys()
    assert parse_body(kind, json.dumps({**needed, **nulls}).encode()) == parse_body(kind, json.dumps(needed).encode())


@pytest.mark.parametrize("text", ["[" * 500, '"[' * 500, "\\" * 3 + "[" * 500])
def test_brackets_in_a_prompt_are_text(text):
    assert parse(prompt=text).prompts == [text]


@pytest.mark.parametrize("text", ["]" * 500, '"]' * 500, "\\" * 3 + "]" * 500])
def test_brackets_in_a_prompt_hide_no_depth(text):
    schema: dict = {}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="body: nested deeper than 64"):
        parse(prompt=text, response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def test_how_deep_a_body_is_takes_time_as_it_is_long():
    began = time.monotonic()
    for body in (b'{"' + b'\\"' * (1 << 17), b'"\\' * (1 << 17), b"[]" * (1 << 17)):
        with pytest.raises(RequestError, match="is not JSON"):
            parse_body(CompletionRequest, body)
    assert time.monotonic() - began < 4


def test_of_alternatives_that_look_alike_the_likeliest_is_told():
    best = [{"token": token, "logprob": -1.0 - i} for i, token in enumerate(["\ufffd", "a", "\ufffd"])]
    told = parse(logprobs=3).told([{"token": "\ufffd", "logprob": -1.0, "top_logprobs": best}], [0])
    assert told["top_logprobs"] == [{"\ufffd": -1.0, "a": -2.0}]


@pytest.mark.parametrize(
    ("kind", "said", "place"),
    [
        (InfillRequest, lambda text: {"segments": [{"hole": 1}, text, {"hole": 1}]}, "segments"),
        (EditRequest, lambda text: {"text": f"a{text}b", "spans": [[0, 1], [len(text) + 1, len(text) + 2]]}, "spans"),
    ],
)
def test_a_text_that_is_kept_is_kept_as_it_is_or_refused(kind, said, place):
    """Some tokenizers compose characters first, as Qwen's does."""
    core = tokenizers.Tokenizer.from_str(Tokenizer.train(["cafe"], TokenizerConfig(vocab_size=260)).json_text)
    core.normalizer = tokenizers.normalizers.NFC()
    tokenizer = Tokenizer(core.to_str(), TokenizerConfig(vocab_size=260))
    model = ServedModel("m", "d", tokenizer, 64, DecodeConfig(), LIMITS, 0, "diffusion")

    def rows(text):
        return parse_body(kind, json.dumps({"model": "m", **said(text)}).encode()).rows(model)

    assert len(rows(" caf\u00e9 ")) == 1
    with pytest.raises(RequestError, match="would change") as caught:
        rows(" cafe\u0301 ")
    assert caught.value.place == place


def test_a_span_and_what_is_kept_between_spans_have_no_space_that_the_text_has_not():
    """Some tokenizers write one before each text, as Llama's does."""
    text, spans = "the cat sat on the mat", [[4, 7], [8, 9], [15, 18]]
    tokenizer = sentence_pieces(text)
    model = ServedModel("m", "d", tokenizer, 64, DecodeConfig(), LIMITS, 0, "diffusion")
    body = {"model": "m", "text": text, "spans": spans}
    [row] = parse_body(EditRequest, json.dumps(body).encode()).rows(model)
    assert f"{row.head}{tokenizer.decode_behind(row.request.middle)}{row.tail}" == text
    edited = [tokenizer.decode_behind(row.request.middle[begin:stop]) for begin, stop in row.request.spans]
    assert edited == [text[begin:stop] for begin, stop in spans]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (CompletionRequest, {"prompt": "the cat", "suffix": " on the mat"}),
        (InfillRequest, {"segments": ["the cat", {"hole": 1}, " on the mat"]}),
        (EditRequest, {"text": "the cat sat on the mat", "span": [7, 11]}),
        (ScoreRequest, {"prompt": "the cat", "completion": " on the mat"}),
    ],
)
def test_what_stands_behind_a_text_is_read_without_a_space_that_it_has_not(kind, said):
    tokenizer = sentence_pieces("the cat sat on the mat")
    model = ServedModel("m", "d", tokenizer, 64, DecodeConfig(), LIMITS, 0, "diffusion")
    asked = parse_body(kind, json.dumps({"model": "m", **said}).encode())
    [ids] = (
        [question.answer for question in asked.questions(model)]
        if kind is ScoreRequest
        else [row.request.suffix for row in asked.rows(model)]
    )
    assert tokenizer.decode_behind(ids) == " on the mat"


def test_seeds_of_choices_differ_and_the_first_is_the_one_asked_for():
    first = parse(seed=5).seeds(6)
    assert first[0] == 5
    assert len(set(first)) == 6
    assert parse(seed=5).seeds(3) == first[:3]
    assert parse().seeds(1) != parse().seeds(1)


def test_options_override_the_recipe_and_impossible_ones_name_themselves():
    base = DecodeConfig(max_tokens=32)
    config = parse(diffusion={"threshold": 0.3, "block_length": 4}, temperature=0.5).decode_config(base, 100)
    assert (config.policy.threshold, config.block_length, config.steps_per_block) == (0.3, 4, 4)
    assert config.temperature == 0.5
    assert parse().decode_config(base, 10).max_tokens == 10
    assert parse(diffusion={"steps": 5}).decode_config(base, 10).steps == 5
    asked = {"unmask": "factor", "factor": 2.0, "cache": "dual"}
    config = parse(diffusion=asked).decode_config(base, 100)
    assert (config.policy.type, config.policy.factor, config.cache) == ("factor", 2.0, "dual")
    kept = base.model_copy(update={"cache": "prefix", "refresh_every": 3})
    assert parse(diffusion={"cache": "none"}).decode_config(kept, 100).refresh_every is None
    for name in ("threshold", "factor"):
        with pytest.raises(RequestError, match=rf"diffusion\.{name}: is for unmask={name}( or editing)?, got"):
            parse(diffusion={"unmask": "entropy", name: 0.5}).decode_config(base, 100)
    for name, value in {"steps_per_block": 99, "threshold": 2, "cfg_scale": -1, "block_length": 0}.items():
        with pytest.raises(RequestError, match=rf"diffusion\.{name}: must be"):
            parse(diffusion={name: value}).decode_config(base, 100)


def test_a_request_holds_at_most_64_rows_and_says_which_parameter_makes_them():
    assert parse(prompt=["p"] * 8, n=8).num_rows == 64
    assert parse(prompt=[7, 8], n=2).num_rows == 2
    for fields, place in [({"prompt": ["p"] * 9, "n": 8}, "n"), ({"prompt": ["p"] * 65}, "prompt")]:
        with pytest.raises(RequestError) as caught:
            parse(**fields)
        assert caught.value.place == place
        assert "prompt" in str(caught.value)


def test_stop_strings_have_limits():
    assert parse(stop="\n").stops == ("\n",)
    for bad in (["a"] * 5, [""], "x" * 65):
        with pytest.raises(RequestError, match="stop"):
            parse(stop=bad)


def test_what_the_engine_refuses_is_named_as_in_a_request():
    for place, param in (
        ("block_length", "diffusion.block_length"),
        ("guidance", "diffusion.cfg_scale"),
        ("constraint", "response_format"),
        ("suffix", "suffix"),
    ):
        body = ApiError.of(RequestError(place, "must be 4", 5, "say so")).body["error"]
        assert (body["param"], body["message"]) == (param, f"{param}: must be 4, got 5: say so")


def test_efforts_are_policies_and_what_is_said_beside_them_counts_more():
    base = DecodeConfig(steps=40)

    def of(**fields):
        return parse(**fields).decode_config(base, 100)

    instant, low, high = (of(reasoning_effort=effort) for effort in ("instant", "low", "high"))
    assert (instant.policy.threshold, instant.steps) == (0.3, 10)
    assert (low.policy.threshold, low.steps) == (0.6, 20)
    assert (high.policy.type, high.steps_per_block, high.steps) == ("low_confidence", base.block_length, 80)
    longer = of(reasoning_effort="high", diffusion={"block_length": 32})  # one position a call still
    assert (longer.block_length, longer.steps_per_block) == (32, 32)
    assert of(reasoning_effort="medium") == base.model_copy(update={"max_tokens": base.max_tokens})
    assert of(diffusion={"effort": "low"}) == low
    assert of(reasoning_effort="low", diffusion={"effort": "high"}) == high
    assert of(reasoning_effort="instant", diffusion={"threshold": 0.7}).policy.threshold == 0.7
    edits = of(diffusion={"unmask": "editing", "threshold": 0.5, "edit_threshold": 0.8})
    assert (edits.policy.threshold, edits.policy.edit_threshold) == (0.5, 0.8)
    assert of(diffusion={"cfg_scale": 1.5, "grow_by": 8}).guidance == 1.5
    with pytest.raises(RequestError, match=r"diffusion\.cfg_scale"):
        of(diffusion={"cfg_scale": -1.0})


@pytest.mark.parametrize(
    ("format_", "place"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}, "response_format.json_schema"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "x" * 70_000}}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x"] * 15_000}}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"required": ["x"]}}}, "response_format.json_schema"),
        ({"type": "json_object", "strict": True}, "response_format.strict"),
    ],
)
def test_a_format_that_cannot_be_kept_is_named(format_, place):
    with pytest.raises(RequestError) as caught:
        parse(response_format=format_).constraint(LIMITS)
    assert caught.value.place == place


def test_a_schema_that_is_nested_too_deep_is_refused():
    schema: dict = {"type": "string"}
    for _ in range(17):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested deeper than 16"):
        parse(response_format={"type": "json_schema", "json_schema": {"schema": schema}}).constraint(LIMITS)


def test_a_constraint_has_one_form():
    assert parse(diffusion={"regex": "[a-z]+"}).constraint(LIMITS) == "[a-z]+"
    assert parse(response_format={"type": "text"}).constraint(LIMITS) is None
    with pytest.raises(RequestError, match=r"diffusion\.regex: is another form of response_format"):
        parse(diffusion={"regex": "a"}, response_format={"type": "json_object"}).constraint(LIMITS)


def test_a_chat_says_who_speaks_and_alternatives_need_logprobs():
    def chat(**fields):
        body = {"model": "m", "messages": [{"role": "user", "content": "p"}], **fields}
        asked = parse_body(ChatRequest, json.dumps(body).encode())
        asked.check(LIMITS)
        return asked

    assert chat(max_tokens=4, max_completion_tokens=9).wanted_tokens == 9
    assert chat().wanted_logprobs is None
    assert chat(logprobs=True).wanted_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).wanted_logprobs == 3
    empty = {"refusal": None, "annotations": [], "audio": None, "tool_calls": [], "function_call": None}
    assert chat(messages=[{"role": "assistant", "content": "a", **empty}]).messages[0].text == "a"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"
    for fields, place in [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.role"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages.tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages.refusal"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ]:
        with pytest.raises(RequestError) as caught:
            chat(**fields)
        assert caught.value.place == place
