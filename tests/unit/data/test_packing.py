"""Packing loses no token, invents none, and never mixes documents where it promises not to."""

import itertools

import numpy as np
import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.data.packing import (
    IsolatedPacking,
    PaddedPacking,
    PairsPacking,
    TokenRun,
    WrapPacking,
    pack,
    too_long,
    with_end,
)

EOS = 0
documents = st.lists(st.lists(st.integers(1, 99), max_size=40), max_size=12)


def run_of(docs: list[list[int]], learned: bool = False) -> TokenRun:
    ids = np.array([token for doc in docs for token in doc], dtype=np.uint32)
    offsets = np.cumsum([0, *map(len, docs)])
    return with_end(TokenRun(ids, offsets, ids % 2 == 0 if learned else None), EOS)


@given(docs=documents, seq_len=st.integers(8, 24))
def test_wrapped_rows_are_the_documents_end_to_end(docs, seq_len):
    rows = pack(WrapPacking(seq_len=seq_len), run_of(docs), EOS)
    stream = [token for doc in docs for token in (*doc, EOS)]
    assert rows.ids.ravel()[: len(stream)].tolist() == stream
    assert (rows.ids.ravel()[len(stream) :] == EOS).all()
    assert rows.num_tokens.sum() == len(stream)
    assert (rows.num_tokens[:-1] == seq_len).all()
    assert rows.starts is None


def documents_in(rows) -> list[list[int]]:
    """What stands between the starts of every row's real part."""
    found = []
    for ids, count, starts in zip(rows.ids, rows.num_tokens, rows.starts, strict=True):
        bounds = [*np.flatnonzero(starts[:count]).tolist(), int(count)]
        found += [ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return found


@settings(max_examples=draws(200))
@given(docs=documents, seq_len=st.integers(8, 24))
def test_isolated_rows_hold_every_document_whole_or_in_row_long_pieces(docs, seq_len):
    rows = pack(IsolatedPacking(seq_len=seq_len), run_of(docs), EOS)
    closed = [[*doc, EOS] for doc in docs]
    expected = [doc[i : i + seq_len] for doc in closed for i in range(0, len(doc), seq_len)]
    assert sorted(documents_in(rows)) == sorted(expected)
    filler = np.arange(seq_len) >= rows.num_tokens[:, None]
    assert (rows.ids[filler] == EOS).all()
    for starts, count in zip(rows.starts, rows.num_tokens, strict=True):
        assert starts[0]
        assert count == seq_len or starts[count], "filler is a segment of its own"


@given(docs=st.lists(st.lists(st.integers(1, 99), max_size=20), min_size=1, max_size=30))
def test_best_fit_leaves_no_two_rows_that_would_go_into_one(docs):
    rows = pack(IsolatedPacking(seq_len=24), run_of(docs), EOS)
    used = np.sort(rows.num_tokens)
    # First-fit-decreasing property: all rows but one are more than half full.
    assert (used[1:] * 2 > 24).all()


@given(docs=documents, seq_len=st.integers(8, 24), learn=st.booleans())
def test_padded_rows_hold_one_document_each_and_count_what_was_left_out(docs, seq_len, learn):
    config = PaddedPacking(seq_len=seq_len, learn_padding=learn)
    rows = pack(config, run_of(docs), EOS)
    closed = [[*doc, EOS] for doc in docs]
    kept = [doc for doc in closed if len(doc) <= seq_len]
    assert too_long(config, run_of(docs)).tolist() == [i for i, doc in enumerate(closed) if len(doc) > seq_len]
    assert [row[: len(doc)].tolist() for row, doc in zip(rows.ids, kept, strict=True)] == kept
    assert rows.num_tokens.tolist() == [seq_len if learn else len(doc) for doc in kept]


@settings(max_examples=draws(200))
@given(docs=documents, seq_len=st.integers(8, 40))
def test_a_pair_is_in_one_row_behind_one_another_or_left_out(docs, seq_len):
    docs = docs[: len(docs) // 2 * 2]
    config = PairsPacking(seq_len=seq_len)
    rows = pack(config, run_of(docs, learned=True), EOS)
    pairs = [([*a, EOS], [*b, EOS]) for a, b in zip(docs[::2], docs[1::2], strict=True)]
    kept = [(a, b) for a, b in pairs if len(a) + len(b) <= seq_len]
    assert too_long(config, run_of(docs)).tolist() == [i for i, (a, b) in enumerate(pairs) if len(a) + len(b) > seq_len]
    assert len(rows.ids) == len(kept)
    for ids, count, starts, (a, b) in zip(rows.ids, rows.num_tokens, rows.starts, kept, strict=True):
        assert ids.tolist() == [*a, *b] + [EOS] * (seq_len - len(a) - len(b))
        assert count == len(a) + len(b)
        begins = {0, len(a), len(a) + len(b)} - {seq_len}
        assert set(np.flatnonzero(starts).tolist()) == begins


@pytest.mark.parametrize("kind", [WrapPacking, IsolatedPacking, PaddedPacking, PairsPacking])
@given(docs=documents.filter(lambda docs: len(docs) % 2 == 0))
def test_what_is_learned_goes_with_its_token(kind, docs):
    rows = pack(kind(seq_len=16), run_of(docs, learned=True), EOS)
    real = np.arange(16) < rows.num_tokens[:, None]
    # In `run_of` the even ids are learned; end tokens always are.
    assert np.array_equal(rows.is_learned[real], rows.ids[real] % 2 == 0)
    assert not rows.is_learned[~real].any()
