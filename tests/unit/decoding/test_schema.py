"""What is written of a JSON schema: no text that breaks it, whatever it holds, and nothing without end."""

import json
import random
import re
import subprocess
import sys

import jsonschema
import pytest
from conftest import draws
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dllm_core.decoding.automaton import MAX_REGEX, TokenAutomaton, compile_regex
from dllm_core.decoding.pattern import in_json_string
from dllm_core.decoding.schema import json_object_regex, schema_regex
from dllm_core.errors import RequestError

# Few enough that texts come from every corner: all that JSON is written with, what it escapes, and what dialects of
# patterns do not agree on (a digit that is not ASCII, a space, a line's end).
CHARACTERS = [*'{}[]:,"\\ -+.0123456789truefalsnbEABxyz_/$\n\t\x00', "é", "٣", "\ufeff", "\u2028", "²"]
SPELLED: list[bytes | None] = [character.encode() for character in dict.fromkeys(CHARACTERS)]

BYTES = [bytes([byte]) for byte in range(128)]


def texts(automaton: TokenAutomaton, seed: int, number: int) -> list[str]:
    """Texts that an automaton lets through, by a walk that may end wherever it may."""
    rng, found = random.Random(seed), []
    for _ in range(number):
        state, parts = 0, []
        for _ in range(400):
            ways = [token for token in range(len(SPELLED)) if automaton.step(state, token) >= 0]
            if automaton.is_final[state] and (not ways or rng.random() < 0.2):
                found.append(b"".join(parts).decode())
                break
            token = rng.choice(ways)
            parts.append(SPELLED[token])
            state = automaton.step(state, token)
    return found


def automaton_of(schema: dict) -> TokenAutomaton | None:
    """None where a schema is refused, large, or of texts with other characters; what is written is an expression."""
    try:
        regex = schema_regex(json.dumps(schema))
    except RequestError:
        return None
    if len(regex) > 4000:  # seconds to compile
        return None
    try:
        return compile_regex(regex, SPELLED)
    except RequestError as error:
        if "no tokens spell" in str(error):
            return None
        raise


patterns = st.recursive(
    st.sampled_from(
        [
            *(*"aé.-]/$#", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\.", r"\/", r"\x41", r"\u00e9", r"\x22", r"\\"),
            *("[ab]", "[^ab]", "[a-z0-9]", '[ -~"]', r"[^\n\d]", r"[\D]", r"[^\W]", r"[\w.-]", r"[^\S ]", "[&&a]"),
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}", "*?"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        inner.map("({})".format),
        inner.map("^{}$".format),
    ),
    max_leaves=5,
)


@settings(max_examples=draws(150), deadline=None)
@given(pattern=patterns, seed=st.integers(0, 1000))
@example(pattern="^a$|^b$", seed=0)
@example(pattern="a|b", seed=0)
@example(pattern="[^x]+", seed=1)
def test_a_string_is_json_and_keeps_its_pattern(pattern, seed):
    schema = {"type": "string", "pattern": pattern}
    automaton = automaton_of(schema)
    assume(automaton is not None)
    for text in texts(automaton, seed, 20):
        jsonschema.validate(json.loads(text), schema)
        assert re.search(pattern, json.loads(text))


def test_a_pattern_is_all_of_a_string_and_keeps_its_own_meaning():
    """Texts over few letters, against the pattern read by Python."""
    letters = ["a", "b", "1", "_", " ", "-", "é", "]"]
    for pattern in ("a|b", "^a$|^b1?$", "^(a|b)+$", r"[^\d]{2}", r"\w-\w", r"[a\]]", "[a-]", ".{2}", r"\S", r"\x61"):
        regex = in_json_string(pattern)
        automaton = compile_regex(regex, [letter.encode() for letter in letters])
        for first in ["", *range(len(letters))]:
            for second in [""] if first == "" else ["", *range(len(letters))]:
                state, text = 0, ""
                for token in (first, second):
                    if token != "" and state >= 0:
                        state, text = automaton.step(state, token), text + letters[token]
                kept = state >= 0 and bool(automaton.is_final[state])
                whole = re.fullmatch(pattern.replace("é", ""), text) is not None
                assert kept == whole or (whole and not text.isascii()), (pattern, text)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 3) -> dict:
    """Over all keywords that are kept, alone and beside each other; most come to some text."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "values", "types", "any", "$ref"]
    kind = draw(st.sampled_from([*kinds, *(["array", "object", "map", "anyOf"] * 3 if depth else [])]))
    counts = sorted(draw(st.tuples(st.integers(0, 3), st.integers(0, 3))))
    said: dict = {"title": "t", "default": 3} if draw(st.booleans()) else {}
    if kind == "string":
        said |= draw(st.sampled_from([{}, {"minLength": counts[0]}, {"minLength": counts[0], "maxLength": counts[1]}]))
    elif kind == "pattern":
        return {**said, "type": "string", "pattern": draw(patterns)}
    elif kind == "values":
        of = draw(
            st.lists(
                st.sampled_from(['a"b', "", "\\n", "\n$", 3, 1.5, -0.0, None, True, [1, {"a": []}], {}]), min_size=1
            )
        )
        said |= draw(
            st.sampled_from([{"enum": of}, {"const": of[0]}, {"enum": of, "type": ["string", "number", "null"]}])
        )
        return said
    elif kind == "types":
        return {**said, "type": ["string", "integer", "null", "array"], "maxItems": 1, "maxLength": 2}
    elif kind == "any":
        return said
    elif kind == "$ref":
        return {**said, "$ref": draw(st.sampled_from(["#/$defs/a", "#/$defs/b", "#/$defs/a~1~0b", "#"]))}
    elif kind == "array":
        said |= draw(st.sampled_from([{}, {"minItems": counts[0]}, {"minItems": counts[0], "maxItems": counts[1]}]))
        said["items"] = draw(schemas(depth - 1))
    elif kind == "object":
        names = draw(st.lists(st.sampled_from(["x", 'y"z', "\\", "n\n", "", "é.*"]), max_size=3, unique=True))
        said["properties"] = {name: draw(schemas(depth - 1)) for name in names}
        said["required"] = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        said |= draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}]))
    elif kind == "map":
        said |= {"type": "object", "additionalProperties": draw(schemas(depth - 1))}
    elif kind == "anyOf":
        return {**said, "anyOf": draw(st.lists(schemas(depth - 1), min_size=1, max_size=3))}
    return said | {"type": kind} if kind != "map" else said


@settings(max_examples=draws(100), deadline=None)
@given(schema=schemas(), a=schemas(depth=1), b=schemas(depth=2), seed=st.integers(0, 1000))
@example(schema={"properties": {"a": {}}}, a={}, b={}, seed=0)
@example(
    schema={"properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]}, a={}, b={}, seed=0
)
@example(schema={"properties": {'a"b': {"type": "integer"}}, "required": ['a"b']}, a={}, b={}, seed=0)
def test_whatever_is_let_through_parses_and_validates(schema, a, b, seed):
    schema = {"$defs": {"a": a, "b": b, "a/~b": {"type": "integer"}}, **schema}
    automaton = automaton_of(schema)
    assume(automaton is not None)
    for text in texts(automaton, seed, 10):
        try:
            jsonschema.validate(json.loads(text), schema)
        except RecursionError:
            assume(False)  # an alternative that is the whole again, on which no validator ends


@pytest.mark.parametrize(
    ("schema", "some"),
    [
        ({"type": "integer", "properties": {"a": {}}}, "-7"),
        ({"type": "object", "additionalProperties": False}, "{}"),
        ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}}, '{"b":null,"c":null}'),
        ({"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"]}, '{"b":2}'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"k": 1, "l": 2}'),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, "[1,2, 3]"),
        ({"type": "array", "items": {"$ref": "#"}}, "[[], [[]]]"),
        ({"type": "string", "enum": ["a", 1]}, '"a"'),
        ({"type": "string", "pattern": "^[0-9]{2}$", "minLength": 0}, '"12"'),
        ({"type": "array"}, '[1, "a", {"b": true}, [null]]'),
        ({}, "-1.5e3"),
    ],
)
def test_what_keeps_a_schema_is_let_through(schema, some):
    jsonschema.validate(json.loads(some), schema)
    automaton, state = compile_regex(schema_regex(json.dumps(schema)), BYTES), 0
    for byte in some.encode():
        state = automaton.step(state, byte)
    assert automaton.is_final[state]


def test_a_free_object_is_an_object():
    for text in texts(compile_regex(json_object_regex(), SPELLED), 0, 50):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ("{", "is no JSON"),
        ('{"const": NaN}', "is no JSON"),
        ('{"const": 1e999}', "is no JSON|no value of its type"),
        ("[]", "holds what is no schema"),
        ('{"type": "integer", "minimum": 3}', "has keywords that are not kept: minimum"),
        ('{"type": "array", "items": {"type": "integer", "multipleOf": 2}}', "not kept: multipleOf"),
        ('{"type": "nope"}', "is no JSON schema that can be kept"),
        ('{"type": "object", "required": ["a"]}', "required has names that properties lack: a"),
        ('{"properties": {"a": {}}, "required": ["a", "b"]}', "required has names that properties lack: b"),
        ('{"properties": {"a": {}}, "required": "a"}', "required must be a list"),
        ('{"type": "string", "pattern": "a+", "maxLength": 2}', "has lengths beside a pattern"),
        ('{"type": "string", "pattern": "a+", "minLength": 2}', "has lengths beside a pattern"),
        ('{"anyOf": [{"type": "object"}], "required": ["a"]}', "has required beside anyOf"),
        ('{"anyOf": [{"type": "string"}], "type": "integer"}', "has type beside anyOf"),
        ('{"$ref": "#/$defs/a", "$defs": {"a": {}}, "type": "string"}', r"has type beside \$ref"),
        ('{"enum": ["a"], "minLength": 2}', "has minLength beside enum"),
        ('{"const": "a", "enum": ["b"]}', "has const beside enum"),
        ('{"enum": ["a"], "type": "integer"}', "no value of its type"),
        ('{"enum": []}', "no value"),
        ('{"anyOf": []}', "anyOf must be a list"),
        ('{"type": "string", "maxLength": -1}', "maxLength must be a count, got -1"),
        ('{"type": "string", "minLength": true}', "minLength must be a count, got True"),
        ('{"type": "array", "minItems": 1.5}', "minItems must be a count, got 1.5"),
        ('{"type": "array", "maxItems": "2"}', "maxItems must be a count, got '2'"),
        ('{"type": "array", "minItems": 2, "maxItems": 1}', "minItems is above maxItems"),
        ('{"$ref": "#"}', "describes no text"),
        ('{"properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "describes no text"),
        ('{"$ref": "http://a.example/b"}', "does not lead into the schema"),
        ('{"$ref": "#/$defs/b"}', "leads nowhere"),
        ('{"items": {"$id": "b", "$ref": "#/c"}}', r"has an \$id below its root"),
        ('{"minLength": 1, "minItems": 1}', "has keywords of several types"),
        ('{"type": "string", "pattern": "a\\"b"}', "which no JSON string has unescaped"),
        ('{"type": "string", "pattern": "a\\\\nb"}', "which no JSON string has unescaped"),
        ('{"type": "string", "pattern": "a)|(b"}', r"has '\)' at character 1"),
        ('{"type": "string", "pattern": "(?x)a#"}', r"has '\?' at character 1"),
        ('{"type": "string", "pattern": "(?=a)b"}', "not kept"),
        ('{"type": "string", "pattern": "a^b"}', r"has '\^' at character 1"),
        ('{"type": "string", "pattern": "[a"}', "has an end, which is not kept"),
        ('{"type": "string", "pattern": "(a"}', "has an end, which is not kept"),
        ('{"type": "string", "pattern": 5}', "pattern must be a string"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_a_line(schema, line):
    with pytest.raises(RequestError, match=line) as refused:
        schema_regex(schema)
    assert refused.value.place == "constraint"
    assert "\n" not in str(refused.value)


def optional_in_each_other(width: int, levels: int) -> dict:
    """References to the next level from optional properties: width ** (2 * levels) times the innermost."""
    levels_ = {
        f"a{i}": {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/a{i + 1}"} for j in range(width)}}
        for i in range(levels)
    }
    return {"$defs": {**levels_, f"a{levels}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def arrays_in_each_other(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        optional_in_each_other(16, 3),
        optional_in_each_other(32, 3),
        arrays_in_each_other(14),
        {"enum": ["a" * MAX_REGEX]},
    ],
    ids=["1.8 kB", "3.3 kB", "arrays", "long"],
)
def test_an_expression_too_long_is_refused_before_it_is_made(schema):
    told = (
        "import resource, sys; from dllm_core.decoding.schema import schema_regex; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2); "
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); schema_regex(sys.stdin.read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", told], input=json.dumps(schema), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"comes to a regular expression of more than {MAX_REGEX} characters" in done.stderr.splitlines()[-1]


def test_what_many_references_share_is_written_once():
    """Each level of this names the next 300 times; what it comes to, had nobody counted, is 300 ** 4 references."""
    levels = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 300} for i in range(3)}
    with pytest.raises(RequestError, match="comes to a regular expression"):
        schema_regex(json.dumps({"$ref": "#/$defs/a0", "$defs": {**levels, "a3": {"type": "null"}}}))
