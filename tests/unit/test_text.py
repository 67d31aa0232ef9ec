"""Streamed text is the unary text, cut into whole code points."""

from hypothesis import given
from hypothesis import strategies as st

from dllm_core.decoding.text import TextStream


class Bytes:
    """A tokenizer of single bytes: every way to split a code point comes up."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


texts = st.text(st.sampled_from("abé€😀\n\ufffd"), max_size=20)


@given(texts, st.lists(st.text(st.sampled_from("abé€"), min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_join_to_the_unary_text_and_stop_before_the_first_stop_string(text, stops, data):
    ids = list(text.encode())
    stream, pieces, at = TextStream(Bytes(), stops), [], 0
    while at < len(ids) and not stream.stopped:
        at += data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[:at]))
    pieces.append(stream.push(ids, last=True))
    whole = TextStream(Bytes(), stops)
    assert "".join(pieces) == whole.push(ids, last=True)
    cuts = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(cuts)] if cuts else text)
    assert stream.stopped == bool(cuts)


def test_a_stop_string_that_began_earlier_and_is_not_complete_yet_goes_first():
    stream = TextStream(Bytes(), ["a", "baa"])
    assert stream.push(list(b"ba")) == ""
    assert not stream.stopped
    assert stream.push(list(b"baa")) == ""
    assert stream.stopped
    other = TextStream(Bytes(), ["a", "baa"])
    assert other.push(list(b"ba")) + other.push(list(b"bab")) == "b"


def test_an_unfinished_code_point_waits_and_shows_at_the_end():
    stream = TextStream(Bytes())
    euro = list("€".encode())
    assert stream.push([97, *euro[:2]]) == "a"
    assert stream.push([97, *euro]) == "€"
    broken = TextStream(Bytes())
    assert broken.push([97, 0xE2], last=True) == "a\ufffd"
