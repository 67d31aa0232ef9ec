"""The law of the cache: whatever a row's steps and neighbours, what a forward gives is what a whole forward gives."""

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, closely, ids_of, mixed_denoiser, new_denoiser, timed_denoiser, times_of

from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser, Part
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 44
patterns = st.one_of(st.just(CAUSAL), st.integers(1, 7).map(lambda length: AttentionPattern("block_causal", length)))


@pytest.fixture(scope="module", params=["plain", "timed", "untied", "mixed"])
def denoiser(request) -> Denoiser:
    if request.param == "timed":
        return timed_denoiser()
    if request.param == "mixed":
        return mixed_denoiser()
    return new_denoiser(tie_embeddings=request.param == "plain", qk_norm=request.param == "plain")


def store_for(denoiser: Denoiser, rows: int = 0, capacity: int = 0) -> KeyValueStore:
    return KeyValueStore(denoiser.config.model, rows, capacity)


def settled(pattern: AttentionPattern, stop: int) -> int:
    """How many of the first `stop` positions no later one changes."""
    return stop if pattern.kind == "causal" else stop // pattern.block_length * pattern.block_length


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """For each row where its steps end, ascending; the last end is its length."""
    ends = st.lists(st.integers(1, LONGEST), min_size=1, max_size=6, unique=True).map(sorted)
    return draw(st.lists(ends, min_size=1, max_size=4))


class Rows:
    """Rows that grow in steps, some of them in each; every forward is held against whole forwards of single rows."""

    def __init__(self, denoiser: Denoiser, pattern: AttentionPattern, number: int, seed: int) -> None:
        self.denoiser, self.pattern = denoiser, pattern
        self.ids, self.t = ids_of(number, LONGEST, seed=seed), times_of(number, LONGEST, seed=seed)
        self.rng = np.random.default_rng(seed)
        self.store = store_for(denoiser)
        self.slots = [self.store.take(LONGEST) for _ in range(number)]

    def given(self, rows, begin, end, width) -> dict[str, torch.Tensor]:
        """New positions behind padding that holds anything."""
        ids, t = ids_of(len(rows), width, seed=9), times_of(len(rows), width, seed=9)
        is_real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            count = end[i] - begin[i]
            ids[i, :count], t[i, :count] = self.ids[row, begin[i] : end[i]], self.t[row, begin[i] : end[i]]
            is_real[i, :count] = True
        return {"input_ids": ids, "is_real": is_real, **({"t": t} if self.denoiser.time else {})}

    def whole(self, row: int, end: int) -> torch.Tensor:
        t = {"t": self.t[row : row + 1, :end]} if self.denoiser.time else {}
        return self.denoiser(self.ids[row : row + 1, :end], pattern=self.pattern, **t)[0]

    def step(self, rows: list[int], end: list[int], *, commits: bool, padding: int = 0) -> None:
        cache = self.store.rows([self.slots[row] for row in rows])
        begin = cache.lengths.tolist()
        width = max(e - b for b, e in zip(begin, end, strict=True)) + padding
        logits = self.denoiser(**self.given(rows, begin, end, width), pattern=self.pattern, cache=cache)
        for i, row in enumerate(rows):
            closely(logits[i, : end[i] - begin[i]], self.whole(row, end[i])[begin[i] :])
        if commits:
            cache.commit([settled(self.pattern, e) - b for b, e in zip(begin, end, strict=True)])


@settings(max_examples=draws(40), deadline=None)
@given(ends=splits(), pattern=patterns, padding=st.integers(0, 3), seed=st.integers(0, 999))
@torch.inference_mode()
def test_a_row_in_any_steps_beside_any_rows_is_the_whole_row(denoiser, ends, pattern, padding, seed):
    rows = Rows(denoiser, pattern, len(ends), seed)
    for number in range(max(map(len, ends))):
        now = [row for row in rows.rng.permutation(len(ends)).tolist() if number < len(ends[row])]
        stops = [ends[row][number] for row in now]
        behind = [settled(pattern, ends[row][number - 1]) if number else 0 for row in now]
        # Tokens that are still being decided are shown first: what a forward reads it does not keep.
        kept = rows.ids.clone()
        for row, begin, end in zip(now, behind, stops, strict=True):
            rows.ids[row, begin:end] = (kept[row, begin:end] + rows.rng.integers(VOCABULARY)) % VOCABULARY
        rows.step(now, stops, commits=False, padding=padding)
        rows.ids = kept
        rows.step(now, stops, commits=True, padding=padding)


@settings(max_examples=draws(30), deadline=None)
@given(
    ends=st.lists(st.integers(1, 255), max_size=8, unique=True).map(sorted),
    pattern=patterns,
    others=st.lists(st.integers(1, 300), max_size=4),
    seed=st.integers(0, 999),
)
@torch.inference_mode()
@pytest.mark.parametrize("make", [new_denoiser, mixed_denoiser])
def test_any_steps_beside_any_rows_give_the_bits_of_the_whole_row(make, ends, pattern, others, seed):
    """Up to 256 positions, where a whole forward takes the plain products too."""
    denoiser = make(dim=64)  # heads of 8 would not tell how a sum over keys was split
    ids = ids_of(1 + len(others), 256, seed=seed)
    whole = denoiser(ids[:1], pattern=pattern)[0]
    store = store_for(denoiser)
    slots = [store.take(600) for _ in ids]
    for slot, kept in zip(slots[1:], others, strict=True):  # rows that have come some way
        cache = store.rows([slot])
        denoiser(ids_of(1, kept), pattern=CAUSAL, cache=cache)
        cache.commit([kept])
    begin = 0
    for end in [*ends, 256]:
        cache = store.rows(slots)
        logits = denoiser(ids[:, begin:end], pattern=pattern, cache=cache)[0]
        stop = settled(pattern, end) if end < 256 else end
        assert torch.equal(logits[: stop - begin], whole[begin:stop])
        cache.commit([stop - begin] + [0] * len(others))
        begin = stop


@torch.inference_mode()
def test_a_slot_knows_nothing_of_the_row_before_and_room_grows_without_a_loss():
    denoiser, ids = new_denoiser(), ids_of(3, 40)
    store = store_for(denoiser)
    for row, length in enumerate((5, 30, 40)):
        slot = store.take(length)
        cache = store.rows([slot])
        denoiser(ids[row : row + 1, : length - 1], pattern=CAUSAL, cache=cache)
        cache.commit([length - 1])
        store.release(slot)
        assert store.take(length) == slot
        assert cache.lengths.tolist() == [0]
        closely(
            denoiser(ids[row : row + 1, :2], pattern=CAUSAL, cache=cache),
            denoiser(ids[row : row + 1, :2], pattern=CAUSAL),
        )
        store.release(slot)
    slots = []
    for row, length in enumerate((5, 30, 40)):
        slots.append(store.take(length))
        cache = store.rows(slots[-1:])
        denoiser(ids[row : row + 1, : length - 1], pattern=CAUSAL, cache=cache)
        cache.commit([length - 1])
    assert len(set(slots)) == 3
    assert store.capacity >= 40
    last = denoiser(ids[[0, 1, 2], [4, 29, 39]][:, None], pattern=CAUSAL, cache=store.rows(slots))
    for row, length in enumerate((5, 30, 40)):
        closely(last[row], denoiser(ids[row : row + 1, :length], pattern=CAUSAL)[0, -1:])


@torch.inference_mode()
def test_logits_that_are_read_are_those_of_their_positions_and_positions_may_be_given():
    denoiser, ids = new_denoiser(), ids_of(2, 12)
    store = store_for(denoiser, rows=2, capacity=12)
    cache = store.rows([1, 0])
    denoiser(ids[:, :7], pattern=CAUSAL, cache=cache, positions=torch.arange(100, 107))
    cache.commit([7, 7])
    read = torch.zeros(2, 5, dtype=torch.bool)
    read[0, 4] = read[1, 1] = True
    found = denoiser(ids[:, 7:], read=read, pattern=CAUSAL, cache=cache, positions=torch.arange(107, 112))
    whole = denoiser(ids, pattern=CAUSAL)
    torch.testing.assert_close(found, torch.stack([whole[0, 11], whole[1, 8]]), atol=1e-4, rtol=0)


def test_what_has_no_exact_cache_is_refused():
    denoiser, ids = new_denoiser(), ids_of(2, 4)
    cache = store_for(denoiser, rows=2, capacity=16).rows([0, 1])
    with torch.inference_mode():
        with pytest.raises(ValueError, match="under block_diffusion attention no key is kept"):
            denoiser(ids, pattern=AttentionPattern("block_diffusion", 2), cache=cache)
        with pytest.raises(ValueError, match="rows say where positions begin"):
            denoiser(ids, pattern=FULL, cache=cache)
        beside = store_for(denoiser, rows=2, capacity=16)
        with pytest.raises(ValueError, match="rows say where positions begin"):
            denoiser(ids, pattern=CAUSAL, cache=beside.rows([0, 1], [0, 0]))
        with pytest.raises(ValueError, match=r"\[0, 1\] lie behind the \[0, 0\] kept"):
            denoiser(ids, pattern=FULL, cache=beside.rows([0, 1], [0, 1]))
        with pytest.raises(ValueError, match="rows of one document"):
            denoiser(ids, segment_ids=torch.ones_like(ids), pattern=CAUSAL, cache=cache)
        with pytest.raises(ValueError, match="must stand at the end"):
            denoiser(ids, torch.tensor([[True] * 4, [False] + [True] * 3]), pattern=CAUSAL, cache=cache)
        with pytest.raises(ValueError, match="17 positions exceed the capacity of 16"):
            denoiser(ids_of(2, 17), pattern=CAUSAL, cache=cache)
        denoiser(ids, pattern=CAUSAL, cache=cache)
        for counts in ([5, 0], [-1, 0]):
            with pytest.raises(ValueError, match="new positions"):
                cache.commit(counts)
        cache.commit([4, 1])
        with pytest.raises(ValueError, match="new positions"):
            cache.commit([0, 1])  # what was not kept is gone
    with pytest.raises(ValueError, match="inference"):
        denoiser(ids, pattern=CAUSAL, cache=cache)
    shifted = new_denoiser(shifted=True)
    with torch.inference_mode(), pytest.raises(ValueError, match="told by the position before it"):
        shifted(ids, pattern=AttentionPattern("block_causal", 2), cache=store_for(shifted, 2, 16).rows([0, 1]))


strips = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 16, 24, 32, 48]), st.booleans(), st.integers(0, 40)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=draws(40), deadline=None)
@given(strips=strips, pattern=patterns | st.just(FULL), seed=st.integers(0, 999))
@torch.inference_mode()
@pytest.mark.parametrize("make", [new_denoiser, mixed_denoiser])
def test_parts_of_any_widths_joined_have_the_bits_and_leave_the_keys_of_each_one_s_forward(make, strips, pattern, seed):
    """A strip: rows, width, whether it keeps keys, and how many it has kept; what keeps none has at least 16."""
    denoiser, rng = make(dim=64), np.random.default_rng(seed)
    total = sum(rows for rows, *_ in strips)
    stores = [store_for(denoiser, total, 96) for _ in range(2)]
    joined, apart, first = [], [], 0
    for rows, width, keeps, kept in strips:
        width = width if keeps else -(-width // 16) * 16
        begin = kept if pattern.kind == "causal" else kept // 8 * 8 // (pattern.block_length or 1)
        begin *= pattern.block_length or 1
        begin = min(begin, 40 // (pattern.block_length or 1) * (pattern.block_length or 1))
        ids, slots = ids_of(rows, width, seed=seed), list(range(first, first + rows))
        is_real = torch.arange(width) < torch.from_numpy(rng.integers(1, width + 1, rows))[:, None]
        read = is_real & torch.from_numpy(rng.random((rows, width)) < 0.5)
        for store, parts in zip(stores, (joined, apart), strict=True):
            begins = [begin] * rows if pattern.kind == "full" else None
            if keeps and begin:
                cache = store.rows(slots, [0] * rows if begins else None)
                denoiser(ids_of(rows, begin, seed=seed), pattern=pattern, cache=cache)
                if not begins:
                    cache.commit([begin] * rows)
            parts.append(
                Part(ids, is_real, read.flatten().nonzero()[:, 0], store.rows(slots, begins) if keeps else None)
            )
        first += rows
    found = denoiser.together(joined, pattern)
    each = [denoiser(part.input_ids, part.is_real, part.read, pattern=pattern, cache=part.cache) for part in apart]
    assert torch.equal(found, torch.cat(each))
    assert torch.equal(stores[0].slots, stores[1].slots)
    assert stores[0].lengths.tolist() == stores[1].lengths.tolist()


def test_rows_that_come_together_lie_together_whatever_left_before():
    store = store_for(new_denoiser())
    first = [store.take(8) for _ in range(6)]
    for slot in (first[4], first[0], first[2], first[1]):
        store.release(slot)
    slots = [store.take(8) for _ in range(3)]
    assert isinstance(store.rows(slots).open(CAUSAL, 1).rows, slice)
