"""What a request may hold, and what a bad one is told."""

import json

import pytest

from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import RequestError
from workflows.serve.protocol import ApiError, parse_request


def parse(**fields):
    return parse_request(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 9}, "n"),
        ({"promt": "x"}, "promt"),
        ({"diffusion": {"treshold": 1}}, "diffusion.treshold"),
        ({"logprobs": 3}, "logprobs"),
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
        parse_request(body)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_what_is_not_supported_are_fine():
    request = parse(logprobs=None, presence_penalty=0, best_of=1, logit_bias={})
    assert request.prompts == ["p"]


def test_brackets_in_a_prompt_are_text():
    assert parse(prompt="[" * 500).prompts == ["[" * 500]


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
    with pytest.raises(RequestError, match=r"diffusion\.steps_per_block"):
        parse(diffusion={"steps_per_block": 99}).decode_config(base, 100)


def test_a_request_holds_at_most_64_rows_and_says_which_parameter_makes_them():
    assert len(parse(prompt=["p"] * 8, n=8).rows) == 64
    assert parse(prompt=["a", "b"], n=2).rows == ["a", "a", "b", "b"]
    for fields, place in [({"prompt": ["p"] * 9, "n": 8}, "n"), ({"prompt": ["p"] * 65}, "prompt")]:
        with pytest.raises(RequestError) as caught:
            parse(**fields).rows  # noqa: B018
        assert caught.value.place == place
        assert "prompt" in str(caught.value)


def test_stop_strings_have_limits():
    assert parse(stop="\n").stops == ("\n",)
    for bad in (["a"] * 5, [""], "x" * 65):
        with pytest.raises(RequestError, match="stop"):
            parse(stop=bad).stops  # noqa: B018


def test_what_the_engine_refuses_is_named_as_in_a_request():
    for place, param in (("block_length", "diffusion.block_length"), ("suffix", "suffix")):
        body = ApiError.of(RequestError(place, "must be 4", 5, "say so")).body["error"]
        assert (body["param"], body["message"]) == (param, f"{param}: must be 4, got 5: say so")
