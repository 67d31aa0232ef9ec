"""Answers under a regular expression or JSON schema: all match, whatever is committed first, and by the stated law."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PROCESS, VOCABULARY, new_denoiser, requests, revising

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.automaton import compile_regex
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.constraint import draw, is_possible, likeliest
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import EditingPolicy
from dllm_core.decoding.schema import schema_regex
from dllm_core.decoding.state import DecodeState
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.errors import RequestError
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.uniform import UniformProcess

# Ids 3 to 22 of `rows`, some of them several letters, one half of a two-byte one.
TEXTS = ["a", "b", "c", "ab", "ba", "abc", "1", "2", "12", " ", ",", "(", ")", "aa", "bc", "cab", "é", "", "", ""]
SPELLED = [None, None, None, *(text.encode() for text in TEXTS[:-3]), b"\xc3", b"\xa9", b"b,"]
FEW = [None, None, None, b"a", b"b", b"ab"]  # small enough to list all strings


class Speller:
    """A tokenizer of these tokens."""

    def decode(self, ids: list[int]) -> str:
        return b"".join(SPELLED[i] or b"" for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes | None]:
        return SPELLED


letters = st.sampled_from(
    ["a", "b", "c", "1", "2", "é", "[abc]", "[a-c]*", r"\d", "(ab|ba)", "(a|bc)+", " ?", "x?", "."]
)
regexes = st.lists(letters, min_size=1, max_size=5).map("".join)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


def new_engine(denoiser: Denoiser, **options: object) -> Engine:
    return Engine.over(denoiser, PROCESS, 300, tokenizer=Speller(), **options)


def answer_text(tokens: list[int]) -> str:
    assert all(SPELLED[token] is not None for token in tokens)
    return b"".join(SPELLED[token] for token in tokens).decode("utf-8")  # whole code points, or it raises


@settings(max_examples=draws(60), deadline=None)
@given(regex=regexes, batch=st.lists(requests(), min_size=1, max_size=4), revised=st.none() | revising)
def test_every_answer_matches_whatever_is_committed_first(denoiser, regex, batch, revised):
    """With neighbours of other kinds, which get the tokens that they get alone."""
    constrained = replace(batch[0], constraint=regex)
    if revised is not None and not isinstance(revised, EditingPolicy):
        constrained = replace(constrained, config=constrained.config.model_copy(update={"policy": revised}))
    engine = new_engine(denoiser)
    try:
        engine.add(constrained)
    except RequestError as error:
        assume("no answer of at most" not in str(error) and "no tokens spell" not in str(error))
        raise
    [answer, *others] = new_engine(denoiser).generate([constrained, *batch[1:]])
    assert re.fullmatch(regex, answer_text(answer.tokens))
    assert new_engine(denoiser).generate([constrained]) == [answer]
    assert others == [new_engine(denoiser).generate([request])[0] for request in batch[1:]]
    assert not constrained.suffix or len(answer.tokens) == constrained.config.max_tokens


@settings(max_examples=draws(60), deadline=None)
@given(
    regex=regexes,
    request=requests(suffixes=st.just(())),
    pieces=st.lists(st.none() | st.sampled_from([3, 4, 5, 9]), min_size=1, max_size=9).filter(lambda p: None in p),
)
def test_given_pieces_count_and_what_they_rule_out_is_refused(denoiser, regex, request, pieces):
    request = replace(request, middle=tuple(pieces), constraint=regex)
    is_open_end = pieces[-1] is None
    choices = [[piece] if piece is not None else list(range(3, VOCABULARY)) for piece in pieces]
    engine = new_engine(denoiser)
    try:
        [answer] = engine.generate([request])
    except RequestError:
        assume(sum(piece is None for piece in pieces) <= 2)  # few enough to try all
        for tokens in itertools.product(*choices):
            ends = range(len(tokens) + 1) if is_open_end else [len(tokens)]
            for end in ends:
                if end <= max((i for i, piece in enumerate(pieces) if piece is not None), default=-1):
                    continue
                text = b"".join(SPELLED[token] for token in tokens[:end])
                assert not matches(regex, text)
        return
    assert re.fullmatch(regex, answer_text(answer.tokens))
    kept = zip(answer.tokens, pieces, strict=False)
    assert all(piece is None or token == piece for token, piece in kept)


def matches(regex: str, text: bytes) -> bool:
    try:
        return re.fullmatch(regex, text.decode("utf-8")) is not None
    except UnicodeDecodeError:
        return False


def row_of(length: int, *, may_end: bool = True, middle: tuple | None = None, block: int = 5) -> DecodeState:
    config = DecodeConfig(max_tokens=length, block_length=block, steps_per_block=1)
    request = Request((3,), config, () if may_end else (4,), middle=middle)
    region = np.where(request.region < 0, MASK, request.region)
    return DecodeState.start(request, region, is_open=request.region < 0, mask_id=MASK)


def strings(length: int, regex: str, may_end: bool) -> list[tuple[int, ...]]:
    """All canvases whose text up to the end matches, end tokens behind it."""
    found = []
    for stop in range(length + 1) if may_end else [length]:
        for tokens in itertools.product([3, 4, 5], repeat=stop):
            if re.fullmatch(regex, "".join(FEW[token].decode() for token in tokens)):
                found.append(tokens + (EOS,) * (length - stop))
    return found


small = st.sampled_from(["a*b", "(ab)+", "[ab]{3}", "a?b?a?", "(a|bb)*", "b+a", "ab|ba|a", "a{2,4}b*"])


def cost_of(law: np.ndarray, tokens: tuple[int, ...]) -> float:
    """log p of a canvas: its tokens and its end token, and behind it whatever is likeliest."""
    total, has_ended = 0.0, False
    for row, token in zip(law, tokens, strict=True):
        total += row.max() if has_ended else row[token]
        has_ended |= token == EOS
    return total


@settings(max_examples=draws(100), deadline=None)
@given(regex=small, length=st.integers(1, 5), may_end=st.booleans(), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_the_proposal_is_the_likeliest_of_all_strings_and_any_part_of_it_leaves_the_rest(
    regex, length, may_end, seed, share
):
    rng = np.random.default_rng(seed)
    law = np.log(rng.dirichlet(np.full(len(FEW), 0.5), length))
    automaton = compile_regex(regex, FEW)
    state = row_of(length, may_end=may_end)
    all_strings = strings(length, regex, may_end)
    assert is_possible(automaton, state, EOS) == bool(all_strings)
    assume(all_strings)
    found = likeliest(automaton, state, EOS, state.open_in_block(), law)
    best = max(cost_of(law, tokens) for tokens in all_strings)
    assert tuple(found) in all_strings
    assert cost_of(law, tuple(found)) == pytest.approx(best, abs=1e-9)
    chosen = rng.random(length) < share
    state.canvas[state.open_in_block()[chosen]] = found[chosen]
    state.is_final[state.open_in_block()[chosen]] = True
    assert is_possible(automaton, state, EOS)


@pytest.mark.parametrize("regex", ["a*b", "[ab]{3}", "a?b?a?", "(a|bb)*"])
@pytest.mark.parametrize("may_end", [True, False])
def test_a_draw_has_the_law_of_what_matches(regex, may_end):
    """Chi-square against the list of all strings; a string's weight is that of its tokens and its end."""
    rng = np.random.default_rng(7)
    length, number = 3, draws(5_000)
    law = rng.dirichlet(np.full(len(FEW), 1.0), length)
    automaton, state = compile_regex(regex, FEW), row_of(length, may_end=may_end)
    all_strings = strings(length, regex, may_end)
    weights = []
    for tokens in all_strings:
        stop = tokens.index(EOS) + 1 if EOS in tokens else length
        weights.append(np.prod([law[i, token] for i, token in enumerate(tokens[:stop])]))
    expected = np.array(weights) / sum(weights) * number
    counts = dict.fromkeys(all_strings, 0)
    for u in rng.random((number, length)):
        counts[tuple(draw(automaton, state, EOS, state.open_in_block(), [np.log(law)], u))] += 1
    chi_square = ((np.array(list(counts.values())) - expected) ** 2 / expected).sum()
    freedom = len(all_strings) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize(
    "regex", ["a{9}[ab]{9}|b+abba{20}", "a{9}[ab]{9}|[ab]{9}a{9}"], ids=["beside likely dead ends", "whenever it is"]
)
def test_a_draw_is_one_where_all_that_matches_is_unlikelier_than_float64_holds(regex):
    """At a low temperature: `a` by 90 nats a token, nine of them in each text that is not hopeless."""
    automaton, state = compile_regex(regex, FEW[:-1]), row_of(18, may_end=False, block=18)
    law = np.zeros((18, len(FEW) - 1))
    law[:, 3] = -90.0
    found = [
        draw(automaton, state, EOS, state.open_in_block(), [law], u) for u in np.random.default_rng(3).random((40, 18))
    ]
    counts = [sum(tuple(one[9 * i : 9 * i + 9]) == (4,) * 9 for one in found) for i in (0, 1)]
    assert counts[1] == 40 if "+" in regex else sum(counts) == 40 and 8 < counts[0] < 32


@pytest.mark.parametrize(
    ("regex", "texts"),
    [("^a+$", ["a", "aaa"]), (r"\)$", []), ("a|b", ["a", "b"]), ("(ab)+", ["ab", "abab"]), ("(a,)*a", ["a", "a,a"])],
)
def test_a_text_that_matches_is_a_path_and_no_other(regex, texts):
    automaton = compile_regex(regex, SPELLED)
    for tokens in itertools.chain.from_iterable(itertools.product(range(3, VOCABULARY), repeat=n) for n in range(4)):
        state = 0
        for token in tokens:
            state = automaton.step(state, token) if state >= 0 else -1
        text = b"".join(SPELLED[token] for token in tokens)
        assert (state >= 0 and bool(automaton.is_final[state])) == matches(regex, text)
    assert all(re.fullmatch(regex, text) for text in texts)


def test_an_escaped_dollar_is_no_anchor():
    dollar = [None, b"a", b"$"]
    assert compile_regex(r"a\$", dollar).num_classes == 2
    assert compile_regex(r"^a$", dollar).num_classes == 1


def test_a_law_that_leaves_nothing_gives_way_to_the_next():
    automaton, state = compile_regex("ab", FEW), row_of(2)
    cut = np.full((2, len(FEW)), -np.inf)
    cut[:, 4] = 0.0  # only b is left
    whole = np.zeros((2, len(FEW)))
    at, u = state.open_in_block(), np.array([0.3, 0.9])
    assert draw(automaton, state, EOS, at, [cut], u) is None
    assert tuple(draw(automaton, state, EOS, at, [cut, whole], u)) in {(3, 4), (5, EOS)}


def test_what_a_mask_from_left_to_right_would_let_through_is_seen():
    """The last place is surest of `b`; to the left `a` is likeliest, which is a fine beginning, and a dead end here."""
    automaton, state = compile_regex("a{4}|ba{2}b", FEW), row_of(4, may_end=False, block=4)
    law = np.full((4, len(FEW)), 0.01)
    law[:, 3], law[3, 3], law[3, 4] = 0.9, 1e-9, 0.99
    at = state.open_in_block()
    assert list(likeliest(automaton, state, EOS, at, np.log(law))) == [4, 3, 3, 4]
    state.canvas[at[3]], state.is_final[at[3]] = 4, True  # a policy commits the surest first
    assert is_possible(automaton, state, EOS)
    state.canvas[at[0]], state.is_final[at[0]] = 3, True  # what a left-to-right mask lets stand beside it
    assert not is_possible(automaton, state, EOS)


@pytest.mark.parametrize("pattern", [CAUSAL, AttentionPattern("block_causal", 4)], ids=["causal", "blocks"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_models_that_read_from_left_to_right_keep_constraints_too(denoiser, pattern, temperature):
    engine = new_engine(denoiser, pattern=pattern)
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=10, temperature=temperature)
    rows = [
        Request((3, 4), config, seed=seed, constraint=regex)
        for seed in range(6)
        for regex in ("(ab|12)+,", r"\(a*\)", "[abc]{5,}")
    ]
    for row, answer in zip(rows, engine.generate(rows), strict=True):
        assert re.fullmatch(row.constraint, answer_text(answer.tokens))


def test_a_growing_canvas_counts_what_it_may_still_grow(denoiser):
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=16, grow_by=4, policy=LowConfidencePolicy())
    request = Request((3,), config, constraint="[ab]{20,}c")
    [answer] = new_engine(denoiser).generate([request])
    text = answer_text(answer.tokens)
    assert re.fullmatch("[ab]{20,}c", text)
    assert len(answer.tokens) > 4
    with pytest.raises(RequestError, match="no answer of at most 16 tokens"):
        new_engine(denoiser).add(replace(request, constraint="[ab]{40,}c"))


def test_a_constraint_that_cannot_be_kept_is_refused_in_one_line(denoiser):
    config = DecodeConfig(max_tokens=4)

    def line(regex: str, engine: Engine | None = None, **said: object) -> str:
        with pytest.raises(RequestError) as refused:
            (engine or new_engine(denoiser)).add(Request((3,), config, constraint=regex, **said))
        assert refused.value.place == "constraint"
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "is no regular expression" in line("(a")
    assert "is no regular expression" in line("(?=a)b")
    assert "is no regular expression" in line("a)|(b")
    assert "no tokens spell a text" in line("zzz")
    assert "no answer of at most 4 tokens" in line("(a ){9}")
    assert "no answer of at most 2 tokens" in line("a+", middle=(4, None))
    assert "a stop string cuts off" in line("a+", stop=("a",))
    editing = config.model_copy(update={"policy": EditingPolicy()})
    with pytest.raises(RequestError, match="a policy that replaces tokens"):
        new_engine(denoiser).add(Request((3,), editing, constraint="a+"))
    noisy = UniformProcess(vocab_size=VOCABULARY, mask_id=MASK)
    ancestral = Engine.over(denoiser, noisy, 300, is_ancestral=True, tokenizer=Speller())
    assert "tokens for noise" in line("a+", ancestral)
    assert "needs a byte-level tokenizer" in line("a+", Engine.over(denoiser, PROCESS, 300))


def test_a_row_that_is_no_number_fails_alone_beside_and_under_a_constraint(denoiser):
    broken = new_denoiser()
    broken.embed.register_forward_hook(lambda _, ids, out: out.masked_fill((ids[0] == 9)[..., None], torch.nan))
    config = DecodeConfig(max_tokens=4, block_length=4, steps_per_block=4)
    good, bad = Request((3,), config, constraint="[ab]+"), Request((9,), config, constraint="[ab]+")
    answers = new_engine(broken).generate([bad, good])
    assert [answer.finish_reason == "error" for answer in answers] == [True, False]
    assert answers[1] == new_engine(denoiser).generate([good])[0]


SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}}},
    {"type": "array", "items": {"enum": ["red", "green", 7, None]}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "on": {"type": "boolean"},
            "at": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            "of": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/kind"}]},
        },
        "required": ["on", "of"],
        "$defs": {"kind": {"const": "kind"}},
    },
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2,4}$"},
    {"type": ["integer", "null"]},
]


@pytest.fixture(scope="module")
def json_engine() -> Engine:
    """A byte-level tokenizer of its own training, whose tokens are several characters long, and random weights."""
    texts = [json.dumps({"name": "red", "age": 7, "on": True, "of": None, "kind": [1, 2, "green"]}) * 3] * 20
    tokenizer = Tokenizer.train(texts, TokenizerConfig(vocab_size=400))
    torch.manual_seed(0)
    config = DenoiserConfig(
        model=ModelConfig(dim=32, layers=2, heads=2, ffn_dim=48),
        vocab_size=tokenizer.vocab_size,
        context_length=128,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    denoiser = Denoiser(config).eval()
    with torch.no_grad():
        denoiser.head.weight.mul_(4)
    return Engine.over(denoiser, AbsorbingProcess(mask_id=tokenizer.mask_id), 4096, tokenizer=tokenizer)


def json_answers(engine: Engine, schemas: list, seeds: int) -> None:
    policies = [ThresholdPolicy(threshold=0.3), LowConfidencePolicy()]
    rows = [
        (
            schema,
            Request(
                (5, 6, 7),
                DecodeConfig(
                    policy=policies[seed % 2],
                    max_tokens=90,
                    block_length=(7, 30, 90)[seed % 3],
                    steps_per_block=5,
                    temperature=(0.0, 1.0, 0.7)[seed % 3],
                    top_p=(1.0, 0.9)[seed % 2],
                    cache=("none", "dual")[seed // 2 % 2],
                ),
                seed=seed,
                constraint=schema_regex(json.dumps(schema)),
            ),
        )
        for schema in schemas
        for seed in range(seeds)
    ]
    for (schema, _), answer in zip(rows, engine.generate([row for _, row in rows]), strict=True):
        text = engine._tokenizer.decode(answer.tokens)
        jsonschema.validate(json.loads(text), schema)


def test_answers_under_a_json_schema_parse_and_validate(json_engine):
    json_answers(json_engine, SCHEMAS, 4)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> dict:
    kinds = ["integer", "boolean", "null", "string", "enum"] + (["array", "object"] if depth else [])
    match draw(st.sampled_from(kinds)):
        case "string":
            return {"type": "string", "maxLength": draw(st.integers(0, 4))}
        case "enum":
            return {"enum": draw(st.lists(st.sampled_from(["a", "b c", 3, None, True]), min_size=1, max_size=3))}
        case "array":
            return {"type": "array", "items": draw(schemas(depth - 1)), "maxItems": draw(st.integers(1, 2))}
        case "object":
            names = draw(st.lists(st.sampled_from(["x", "y z", "n"]), min_size=1, max_size=2, unique=True))
            parts = {name: draw(schemas(depth - 1)) for name in names}
            return {"type": "object", "properties": parts, "required": draw(st.permutations(names))}
        case kind:
            return {"type": kind}


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_thousand_schemas_all_validate(json_engine):
    drawn = []

    @settings(max_examples=1000, deadline=None, database=None)
    @given(schemas())
    def collect(schema):
        drawn.append(schema)

    collect()
    for schema in drawn[:1000]:
        json_answers(json_engine, [schema], 3)
    print(f"{len(drawn[:1000])} schemas x 3 seeds, all answers valid")


INTERRUPTED = """
import signal, time
from dllm_core.decoding.automaton import AutomatonCache
signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C is
signal.setitimer(signal.ITIMER_REAL, 0.5)
try:
    AutomatonCache(lambda: [b"a", b"aa"]).get("((a{50}){50}){50}")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_expression_that_takes_minutes_is_left_at_once_by_ctrl_c():
    told = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=20)
    assert told.stdout == "interrupted\n", told.stderr
    assert told.returncode == 0


def test_tokens_are_spelled_by_their_bytes(json_engine):
    tokenizer = json_engine._tokenizer
    spelled = tokenizer.token_bytes()
    text = 'Grüße, {"name": "日本"}\n\t'
    assert b"".join(spelled[token] for token in tokenizer.encode(text)).decode() == text
    assert all(spelled[token] is None for token in tokenizer.special_ids)
