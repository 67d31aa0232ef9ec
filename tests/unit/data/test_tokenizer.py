"""Any text is spelled and comes back; no text spells a special token."""

import json
import pickle
from itertools import pairwise

import pytest
from conftest import draws, small_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dllm_core.data.tokenizer import ChatTemplate, Tokenizer, TokenizerConfig
from dllm_core.errors import ConfigError, DataError

CONFIG = TokenizerConfig(vocab_size=300)
SPECIALS = ("<|mask|>", "<|eos|>", "<|pad|>")
texts = st.text() | st.lists(st.sampled_from([*SPECIALS, "<|", "mask", "|>", " RED", "\n", "Ġ", "é"])).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(small_text(40).split("\n\n"), CONFIG)


def in_bulk(tokenizer: Tokenizer, batch: list[str]) -> list[list[int]]:
    ids, offsets = tokenizer.encode_flat(batch)
    return [ids[start:stop].tolist() for start, stop in pairwise(offsets)]


@settings(max_examples=draws(300), deadline=None)
@given(text=texts)
@example(text="<|mask|><|eos|> a<|pad|>\x00\r\n\u2028\ufeff\U0010ffff")
def test_any_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=draws(50), deadline=None)
@given(batch=st.lists(texts, max_size=5))
def test_a_text_has_the_same_ids_alone_and_in_a_batch(tokenizer, batch):
    assert in_bulk(tokenizer, batch) == [tokenizer.encode(text) for text in batch]


@settings(max_examples=draws(50), deadline=None)
@given(text=texts, data=st.data())
def test_special_ids_are_left_out_of_a_decoded_text(tokenizer, text, data):
    ids = tokenizer.encode(text)
    for special in tokenizer.special_ids:
        ids.insert(data.draw(st.integers(0, len(ids))), special)
    assert tokenizer.decode(ids) == text


def test_a_cut_character_shows_as_a_replacement_and_never_fails(tokenizer):
    ids = tokenizer.encode("€")
    assert len(ids) > 1
    assert set(tokenizer.decode(ids[:1])) == {"\ufffd"}


@settings(max_examples=draws(100), deadline=None)
@given(text=texts, cut=st.integers(0, 9), data=st.data())
@example(text="a\u20ac\U0001f600e\u0301", cut=0, data=None)
def test_what_tokens_look_like_beside_each_other_adds_up_to_the_text(tokenizer, text, cut, data):
    """Whole, cut anywhere, and with places where nothing stands yet, which end what stands before them."""
    ids = tokenizer.encode(text)[cut:]
    looks = tokenizer.token_texts(ids)
    assert len(looks) == len(ids)
    assert "".join(looks) == tokenizer.decode(ids)
    if data is not None and ids:
        at = data.draw(st.integers(0, len(ids)))
        looks = tokenizer.token_texts([*ids[:at], None, *ids[at:]])
        assert looks[at] == ""
        assert "".join(looks) == tokenizer.decode(ids[:at]) + tokenizer.decode(ids[at:])


def test_every_token_has_a_look_and_the_looks_of_a_text_make_the_text(tokenizer):
    assert [tokenizer.token_text(i) for i in (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id)] == list(SPECIALS)
    text = "BLACK ARROW 17\n"
    assert "".join(tokenizer.token_text(i) for i in tokenizer.encode(text)) == text


def test_training_merges_what_is_frequent_and_keeps_to_the_size(tokenizer):
    assert tokenizer.vocab_size == CONFIG.vocab_size
    assert len(tokenizer.encode(small_text(40))) < 0.6 * len(small_text(40))
    assert len({tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_training_is_a_function_of_its_texts(tokenizer):
    assert Tokenizer.train(small_text(40).split("\n\n"), CONFIG).digest == tokenizer.digest
    assert Tokenizer.train(small_text(41).split("\n\n"), CONFIG).digest != tokenizer.digest


def test_a_literal_special_token_in_the_training_texts_stays_text():
    taught = Tokenizer.train(["<|mask|> is a token", "and so is <|eos|>"] * 50, CONFIG)
    assert not taught.special_ids & set(taught.encode("<|mask|><|eos|>"))
    assert taught.decode(taught.encode("<|mask|><|eos|>")) == "<|mask|><|eos|>"


def test_a_copy_in_another_process_and_one_read_from_a_file_are_the_same_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.json_text, encoding="utf-8")
    for copy in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.from_file(path, CONFIG)):
        assert copy.digest == tokenizer.digest
        assert (copy.mask_id, copy.eos_id, copy.pad_id) == (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id)
        assert copy.encode("RED <|mask|> ä") == tokenizer.encode("RED <|mask|> ä")


def test_a_file_that_pads_and_truncates_does_neither(tokenizer):
    values = json.loads(tokenizer.json_text)
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": tokenizer.pad_id,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    other = Tokenizer(json.dumps(values), CONFIG)
    text = "BLACK ARROW 17, and more of it"
    assert other.encode(text) == in_bulk(other, [text])[0] == tokenizer.encode(text)


_LONG = {"direction": "Right", "max_length": 6000, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        pytest.param(None, "truncation", _LONG, id="truncates beyond every probe"),
        pytest.param("model", "dropout", 0.5, id="leaves out merges at random"),
    ],
)
def test_what_a_file_asks_for_its_own_training_changes_no_ids(tokenizer, section, key, value):
    values = json.loads(tokenizer.json_text)
    (values if section is None else values[section])[key] = value
    other = Tokenizer(json.dumps(values), CONFIG)
    text = small_text(5) + "".join(chr(0x100 + i % 500) for i in range(5000))
    ids = tokenizer.encode(text)
    assert len(ids) > _LONG["max_length"]
    assert other.encode(text) == in_bulk(other, [text])[0] == ids
    assert other.engine == tokenizer.engine


@pytest.mark.parametrize("in_vocabulary", [True, False])
def test_markers_that_are_added_move_no_other_token(tokenizer, tmp_path, in_vocabulary):
    values = json.loads(tokenizer.json_text)
    vocabulary, added = values["model"]["vocab"], values["added_tokens"]
    for name in ("<|im_start|>", "<|im_end|>"):  # behind the last id, as Qwen's and LLaDA's; some files list them twice
        added.append({**added[0], "id": len({**vocabulary, **{one["content"]: 0 for one in added}}), "content": name})
        vocabulary |= {name: added[-1]["id"]} if in_vocabulary else {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    config = CONFIG.model_copy(update={"path": str(tmp_path / "tokenizer.json")})
    chat = ChatTemplate(user="<|im_start|>", end="<|im_end|>")
    plain, chatty = (Tokenizer.given(config.model_copy(update={"chat": one})) for one in (None, chat))
    assert (chatty.role_id("user"), chatty.end_of_turn_id) == (300, 301)
    assert (chatty.role_id("system"), chatty.role_id("assistant")) == (302, 303)
    assert [chatty.token_text(i) for i in range(300)] == [plain.token_text(i) for i in range(300)]


@pytest.mark.parametrize("field", ["mask_token", "eos_token", "pad_token"])
def test_a_tokenizer_without_a_special_token_is_refused_by_its_field(tokenizer, field):
    with pytest.raises(ConfigError, match=rf"tokenizer\.{field}: not in the tokenizer, got '<\|nope\|>'"):
        Tokenizer(tokenizer.json_text, CONFIG.model_copy(update={field: "<|nope|>"}))


def test_a_mask_that_text_can_spell_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"tokenizer\.mask_token: is no special token"):
        Tokenizer(tokenizer.json_text, CONFIG.model_copy(update={"mask_token": "A"}))


def test_the_mask_is_neither_the_end_nor_the_padding_but_those_may_be_one(tokenizer):
    for field in ("eos_token", "pad_token"):
        with pytest.raises(ConfigError, match=r"tokenizer\.mask_token: must differ"):
            TokenizerConfig.checked({field: "<|mask|>"}, "tokenizer")
    shared = Tokenizer(tokenizer.json_text, TokenizerConfig(pad_token="<|eos|>"))
    assert shared.pad_id == shared.eos_id
    assert len(shared.special_ids) == 2


@pytest.mark.parametrize("marker", ["system", "user", "assistant", "end"])
def test_the_mask_marks_no_turn(marker):
    with pytest.raises(ConfigError, match=rf"^tokenizer\.chat\.{marker}: must differ from mask_token"):
        TokenizerConfig.checked({"chat": {marker: "<|mask|>"}}, "tokenizer")


@pytest.mark.parametrize("data", [b"", b"{}", b"[1", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path, CONFIG)
    with pytest.raises(DataError, match="nowhere"):
        Tokenizer.from_file(tmp_path / "nowhere", CONFIG)


def test_what_is_not_unicode_is_refused_in_one_line(tokenizer):
    with pytest.raises(DataError, match="is not Unicode"):
        tokenizer.encode("a\ud800")
