"""Conversations and pairs: what is read, what is learned, and that no text can play a marker."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import draws, small_text
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.config.overrides import parse_json_object
from dllm_core.data.corpus import ChatRecord, PairRecord, PreferenceRecord, TextRecord
from dllm_core.data.encoding import Encoder, encode_documents
from dllm_core.data.packing import PairsPacking, WrapPacking
from dllm_core.data.records import BadRecord, Document, from_json, is_blank
from dllm_core.data.tokenizer import ChatTemplate, Tokenizer, TokenizerConfig
from dllm_core.errors import ConfigError

MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
texts = st.text(max_size=12) | st.sampled_from([*MARKERS, "<|mask|> a", "RED 1"])
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=5
).map(lambda found: [*found, {"role": "assistant", "content": "yes"}])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(vocab_size=320, chat=ChatTemplate())
    return Tokenizer.train(small_text(40).split("\n\n"), config)


def parsed(record, values) -> Document | BadRecord:
    raw = json.dumps(values).encode()
    return from_json(record, "file", 0, raw)


@settings(max_examples=draws(80), deadline=None)
@given(conversation=messages)
def test_the_assistants_turns_and_their_ends_are_learned_and_nothing_else(tokenizer, conversation):
    document = parsed(ChatRecord(), {"messages": conversation})
    run = encode_documents(tokenizer, [document])
    expected_ids, expected_learned = [], []
    for message in conversation:
        own = tokenizer.encode(message["content"])
        is_learned = message["role"] == "assistant"
        expected_ids += [tokenizer.role_id(message["role"]), *own, tokenizer.end_of_turn_id]
        expected_learned += [False, *[is_learned] * len(own), is_learned]
    assert run.ids.tolist() == expected_ids
    assert run.is_learned.tolist() == expected_learned


@given(conversation=messages)
def test_no_text_spells_a_marker(tokenizer, conversation):
    run = encode_documents(tokenizer, [parsed(ChatRecord(), {"messages": conversation})])
    markers = {tokenizer.role_id(role) for role in ("system", "user", "assistant")} | {tokenizer.end_of_turn_id}
    assert sum(int(i) in markers for i in run.ids) == 2 * len(conversation)


@given(prompt=texts, answer=texts)
def test_a_pair_learns_its_answer_alone(tokenizer, prompt, answer):
    run = encode_documents(tokenizer, [parsed(PairRecord(), {"prompt": prompt, "answer": answer})])
    head, tail = tokenizer.encode(prompt), tokenizer.encode(answer)
    assert run.ids.tolist() == head + tail
    assert run.is_learned.tolist() == [False] * len(head) + [True] * len(tail)


def test_plain_documents_take_the_bulk_path_and_are_learned_whole(tokenizer):
    documents = [parsed(TextRecord(), {"text": text}) for text in ("RED", "", "BLUE 2")]
    run = encode_documents(tokenizer, documents)
    assert run.is_learned is None
    assert np.diff(run.offsets).tolist() == [len(tokenizer.encode(text)) for text in ("RED", "", "BLUE 2")]


@given(st.text(max_size=6) | st.text(" \t\n\r\x1c\u00a0\u2003\u3000", max_size=6))
def test_blank_is_what_strip_leaves_nothing_of(text):
    assert is_blank(text) == (not text.strip())


@pytest.mark.parametrize("raw", [b"", b" \t\r", "\u3000".encode()])
def test_a_blank_line_of_json_is_a_blank_document(raw):
    document = from_json(TextRecord(), "file", 7, raw)
    assert isinstance(document, Document)
    assert is_blank(document.text)


@given(prompt=texts, answers=st.lists(texts, min_size=2, max_size=2, unique=True))
def test_a_preference_is_two_pairs_of_one_prompt(tokenizer, prompt, answers):
    chosen, rejected = answers
    document = parsed(PreferenceRecord(), {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    run = encode_documents(tokenizer, [document])
    pairs = [parsed(PairRecord(), {"prompt": prompt, "answer": answer}) for answer in answers]
    apart = encode_documents(tokenizer, pairs)
    assert run.num_documents == 2
    assert all(np.array_equal(getattr(run, name), getattr(apart, name)) for name in ("ids", "offsets", "is_learned"))
    assert document.text == f"{prompt}\n{chosen}\n{rejected}"
    assert document.pieces == [prompt, chosen, rejected]


@given(turns=messages, answers=st.lists(texts, min_size=2, max_size=2, unique=True), as_lists=st.booleans())
def test_a_preferences_prompt_may_be_a_conversation_of_which_nothing_is_learned(tokenizer, turns, answers, as_lists):
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    chosen, rejected = said if as_lists else answers
    values = {"prompt": turns, "chosen": chosen, "rejected": rejected}
    run = encode_documents(tokenizer, [parsed(PreferenceRecord(conversations=True), values)])
    for k, answer in enumerate(said):
        alone = encode_documents(tokenizer, [parsed(ChatRecord(), {"messages": [*turns, *answer]})])
        own = slice(int(run.offsets[k]), int(run.offsets[k + 1]))
        assert run.ids[own].tolist() == alone.ids.tolist()
        learned = len(tokenizer.encode(answers[k])) + 1  # and the end of the turn
        assert run.is_learned[own].tolist() == [False] * (len(alone.ids) - learned) + [True] * learned


@pytest.mark.parametrize("kind", ["plain", "pair", "preference"])
def test_what_is_taken_many_times_is_encoded_once_and_stands_beside_no_copy_of_its_own(tokenizer, monkeypatch, kind):
    answers = {"chosen": "c", "rejected": "r"}
    values = [{"text": f"{i} text", "prompt": f"{i} p", "answer": "a" * i, **answers} for i in range(4)]
    record = {"plain": TextRecord(), "pair": PairRecord(), "preference": PreferenceRecord()}[kind]
    packing = PairsPacking(seq_len=64) if kind == "preference" else WrapPacking(seq_len=16)
    documents, times, asked = [parsed(record, value) for value in values], (3, 0, 1, 2), []
    apart, together = Encoder(tokenizer, packing), Encoder(tokenizer, packing)
    for turn in (0, 2, 3, 0, 3, 0):  # all of them, then those that are taken again
        apart.add(replace(documents[turn]))
    flat = tokenizer.encode_flat
    monkeypatch.setattr(tokenizer, "encode_flat", lambda texts: asked.extend(texts) or flat(texts))
    for document, count in zip(documents, times, strict=True):
        together.add(document, count)
    found = together.rows()
    assert len(asked) == 3 * {"plain": 1, "pair": 2, "preference": 4}[kind]
    expected = apart.rows()
    for name in ("ids", "num_tokens", "is_learned", "starts"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert (together.kept, [item.reason for item in together.removed]) == (3, ["weight"])


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_side_of_a_preference_is_its_prompts_whatever_the_turns_of_its_answers(longer):
    def preference(follow_up):
        turns = [("assistant", "no"), ("user", follow_up), ("assistant", "well")]
        answers = {"chosen": "yes", "rejected": "never"}
        answers[longer] = [{"role": role, "content": text} for role, text in turns]
        prompt = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
        return parsed(PreferenceRecord(conversations=True), {"prompt": prompt, **answers})

    assert [preference(text).subject for text in ("sure?", "really?")] == ["why?\nso"] * 2


BAD_PREFERENCES = [
    ({}, "no field 'prompt'"),
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is not a string"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
    ({"prompt": [{"role": "user", "content": "x"}], "chosen": "b", "rejected": "c"}, "'prompt' is not a string"),
]


@pytest.mark.parametrize(("values", "reason"), BAD_PREFERENCES, ids=[reason for _, reason in BAD_PREFERENCES])
def test_what_is_no_preference_is_kept_with_its_reason(values, reason):
    record = parsed(PreferenceRecord(), values)
    assert isinstance(record, BadRecord)
    assert reason in record.reason


def test_an_answer_of_no_assistant_is_none():
    turns = [{"role": "user", "content": "x"}]
    record = parsed(PreferenceRecord(conversations=True), {"prompt": turns, "chosen": turns, "rejected": "y"})
    assert isinstance(record, BadRecord)
    assert "'chosen' holds no message of the assistant" in record.reason


BAD_CHATS = [
    ({}, "no field 'messages'"),
    ({"messages": []}, "no list of messages"),
    ({"messages": "hello"}, "no list of messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "without a role"),
    ({"messages": ["x"]}, "without a role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
    ({"messages": [{"role": "assistant"}]}, "no field 'content'"),
    ({"messages": [{"role": "assistant", "content": 3}]}, "is not a string"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "holds a call of a tool"),
    ({"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]}, "holds a call of a tool"),
]


@pytest.mark.parametrize(("values", "reason"), BAD_CHATS, ids=[reason for _, reason in BAD_CHATS])
def test_what_is_no_conversation_is_kept_with_its_reason(values, reason):
    record = parsed(ChatRecord(), values)
    assert isinstance(record, BadRecord)
    assert reason in record.reason


TWICE = [
    (TextRecord(), '{"text": "a", "id": 1, "text": "b"}', "'text' is there twice"),
    (PairRecord(), '{"prompt": "a", "answer": "b", "answer": "c"}', "'answer' is there twice"),
    (ChatRecord(), '{"messages": 1, "messages": [{"role": "assistant", "content": ""}]}', "'messages' is there twice"),
    (ChatRecord(), '{"messages": [{"role": "assistant", "content": "x", "content": "y"}]}', "'content' is there twice"),
    (ChatRecord(), '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "without a role"),
]


@pytest.mark.parametrize(("record", "line", "reason"), TWICE, ids=[line for _, line, _ in TWICE])
def test_of_a_field_that_stands_twice_neither_is_taken(record, line, reason):
    found = from_json(record, "file", 7, line.encode())
    assert isinstance(found, BadRecord)
    assert reason in found.reason
    assert (found.offset, found.raw) == (7, line.encode())


def test_a_message_without_calls_may_have_their_fields():
    answer = {"role": "assistant", "content": "x"}
    empty = {"tool_calls": [], "function_call": None}
    assert parsed(ChatRecord(), {"messages": [answer | empty]}) == parsed(ChatRecord(), {"messages": [answer]})


def test_what_stands_twice_beside_a_records_fields_costs_it_nothing():
    assert from_json(TextRecord(), "file", 7, b'{"id": 1, "text": "a", "id": 2}') == Document("a", "file", 7)


def test_looking_for_what_stands_twice_takes_time_for_each_name_and_not_for_each_pair_of_names():
    names = ",".join(f'"a name of many {i}": 1' for i in (*range(8000), 7999))
    begun = time.process_time()
    assert from_json(TextRecord(), "file", 7, f'{{"text": "a", {names}}}'.encode()) == Document("a", "file", 7)
    with pytest.raises(ConfigError, match="the key is there twice, got 'a name of many 7999'"):
        parse_json_object(f"{{{names}}}", "asked")
    assert time.process_time() - begun < 2


def test_a_tokenizer_without_markers_refuses_conversations(tokenizer):
    plain = Tokenizer.train(["RED"], TokenizerConfig(vocab_size=300))
    with pytest.raises(ConfigError, match=r"tokenizer\.chat: missing"):
        encode_documents(plain, [parsed(ChatRecord(), {"messages": [{"role": "assistant", "content": "x"}]})])
