"""What is told of an answer's tokens and holes, however they come in."""

from collections.abc import Sequence

import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_pieces import sentence_pieces

from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import OpenHole, Request, with_holes
from workflows.serve.choice import Choice
from workflows.serve.dialect.rows import Row
from workflows.serve.progress import OPEN, Commit, Progress

TOKENIZER = Tokenizer.train(["hello world " * 5], TokenizerConfig(vocab_size=275))  # some tokens of several letters


def told(
    text: str, *, stop: tuple[str, ...] = (), head: str = "", pieces: Sequence[int] = ()
) -> tuple[str, list, list]:
    """Text, entries and offsets of an answer that comes in after so many tokens each time, and then whole."""
    ids = TOKENIZER.encode(text)
    request = Request(tuple(TOKENIZER.encode(head)), DecodeConfig(), stop=stop)
    choice = Choice(0, Row(request, head, is_echoed=bool(head)), TOKENIZER, 0.0, 1)
    entries, offsets, made = [], [], ""
    for count in [*sorted({min(piece, len(ids)) for piece in pieces}), len(ids)]:
        commits = tuple(Commit(i, token, -0.1, ((token, -0.1),)) for i, token in enumerate(ids[:count]))
        made += choice.take(Progress(ids[:count], 1, count, "length" if count == len(ids) else None, commits))
        new = choice.new_entries()
        assert all(offset < len(head) + len(made) for offset in new[1])  # of what was told with it, or before
        entries, offsets = entries + new[0], offsets + new[1]
        if choice.finish_reason is not None:
            break
    assert head + made == choice.whole_text
    return choice.whole_text, entries, offsets


texts = st.text(st.sampled_from("helo wrd é日😀"), max_size=12)
some = st.lists(st.integers(0, 30), max_size=4)


@settings(max_examples=draws(200), deadline=None)
@given(text=texts, head=texts, pieces=some)
def test_bytes_are_a_tokens_own_and_offsets_are_where_its_character_begins(text, head, pieces):
    whole, entries, offsets = told(text, head=head, pieces=pieces)
    assert whole == head + text
    spelled = [bytes(entry["bytes"]) for entry in entries]
    assert b"".join(spelled) == whole.encode()
    for i, offset in enumerate(offsets):
        before = b"".join(spelled[:i])
        assert offset == len(before.decode("utf-8", "ignore"))
    of_head = len(TOKENIZER.encode(head))
    assert [entry["logprob"] for entry in entries] == [None] * of_head + [-0.1] * (len(entries) - of_head)
    assert all((entry["top_logprobs"] is None) == (entry["logprob"] is None) for entry in entries)


@settings(max_examples=draws(200), deadline=None)
@given(text=texts, stop=st.text(st.sampled_from("helo é"), min_size=1, max_size=3), pieces=some)
def test_no_token_behind_a_stop_string_is_told_whenever_it_is_seen(text, stop, pieces):
    whole, entries, offsets = told(text, stop=(stop,), pieces=pieces)
    assert whole == text.partition(stop)[0]
    assert offsets == [offset for offset in told(text)[2] if offset < len(whole)]
    assert len(entries) == len(offsets)


def test_a_special_token_has_no_bytes():
    choice = Choice(0, Row(Request((), DecodeConfig())), TOKENIZER, 0.0, 1)
    ids = [*TOKENIZER.encode("a"), TOKENIZER.pad_id, *TOKENIZER.encode("b")]
    choice.take(Progress(ids, 1, 3, "stop", tuple(Commit(i, token, -0.1) for i, token in enumerate(ids))))
    entries, offsets = choice.new_entries()
    assert [entry["bytes"] for entry in entries] == [[97], None, [98]]
    assert offsets == [0, 1, 1]


@pytest.mark.parametrize("end", [0, 1, 2])
def test_as_many_holes_are_told_as_were_asked_for_neighbours_too(end):
    """The last has an open end and may be shorter."""
    pieces = [OpenHole(2, 2), OpenHole(3, 3), tuple(TOKENIZER.encode("-")), OpenHole(1, 1), OpenHole(1, 1)]
    request = with_holes(Request((), DecodeConfig()), pieces)
    choice = Choice(0, Row(request, holes=(2, 3, 1, 1)), TOKENIZER, 0.0, None)
    ids = [token for letter in "abxyz-12" for token in TOKENIZER.encode(letter)]
    choice.take(Progress(ids[: len(ids) - end], 1, 7 - end, "stop"))
    assert choice.holes == ["ab", "xyz", "1" if end < 2 else "", "2" if end < 1 else ""]


@settings(max_examples=draws(100), deadline=None)
@given(text=texts, order=st.randoms(use_true_random=False))
def test_frames_of_changes_end_in_the_text_though_tokens_are_parts_of_characters(text, order):
    ids = TOKENIZER.encode(text)
    choice = Choice(0, Row(Request((), DecodeConfig())), TOKENIZER, 0.0, None)
    canvas, shown = [OPEN] * len(ids), {}
    for at in order.sample(range(len(ids)), len(ids)):
        canvas[at] = ids[at]
        choice.take(Progress([], 1, 1, None, (Commit(at, ids[at], -0.1),), canvas=list(canvas)))
        changed = choice.changes()
        shown |= {position: spelled for position, spelled, _ in changed}
        assert all(sure is not None for _, spelled, sure in changed if spelled is not None)
    assert "".join(shown[at] for at in range(len(ids))) == text


PIECES = sentence_pieces("the cat sat on the mat and ran ")


@pytest.mark.parametrize("begin", ["", "the cat"])
@pytest.mark.parametrize("text", ["the cat sat on the mat", "the cat \u00e9\u2603 sat"])
def test_words_keep_the_spaces_before_them(begin, text):
    """Of a tokenizer that writes them into its tokens, and one before each text."""
    ids = PIECES.encode(text)
    prompt, made = ids[: len(PIECES.encode(begin))], ids[len(PIECES.encode(begin)) :]
    choice = Choice(0, Row(Request(tuple(prompt), DecodeConfig()), begin, is_echoed=True), PIECES, 0.0, 1)
    commits = tuple(Commit(i, token, -0.1) for i, token in enumerate(made))
    choice.take(Progress([], 1, 1, None, canvas=[*made[:-2], OPEN, made[-1]]))
    shown = choice.provisional_text()
    assert shown.startswith("the cat ")
    assert shown.endswith(f"\u2591{text[text.rindex(' ') :]}")
    choice.take(Progress(made, 2, len(made), "length", commits, canvas=made))
    assert choice.whole_text == text
    assert f"{begin}{''.join(spelled for _, spelled, _ in choice.changes())}".strip() == text
    entries, offsets = choice.new_entries()
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == f" {text}"
    assert [entry["token"] for entry in entries][:2] == [" the", " cat"]
    for entry, offset in zip(entries[1:], offsets[1:], strict=True):
        assert text[offset:].startswith(entry["token"]) or entry["token"] == "\ufffd"
    assert (offsets[0], len({*offsets})) == (0, text.count(" ") + 1 + len(set("\u00e9\u2603") & set(text)))


def test_holes_keep_the_spaces_before_them_and_so_does_what_stands_between():
    kept = PIECES.encode_kept(" on", "segments")
    made = [*PIECES.encode("cat"), *kept, *PIECES.encode("mat")]
    request = with_holes(
        Request(tuple(PIECES.encode("the")), DecodeConfig()), [OpenHole(1, 1), tuple(kept), OpenHole(1, 1)]
    )
    choice = Choice(0, Row(request, "the", holes=(1, 1)), PIECES, 0.0, None)
    choice.take(Progress(made, 1, 2, "stop"))
    assert (choice.whole_text, choice.holes) == ("the cat on mat", [" cat", " mat"])
    assert PIECES.decode_behind(PIECES.encode_kept("b\u00e9 ", "segments")) == "b\u00e9 "
