"""Laws of who sees whom: the relation itself, told by its definition, and what logits may depend on."""

import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    VOCABULARY,
    Layout,
    closely,
    ids_of,
    layouts,
    mixed_denoiser,
    new_denoiser,
    same,
    timed_denoiser,
    times_of,
)
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_mask
from torch.utils.flop_counter import FlopCounterMode

from dllm_core.model import flex
from dllm_core.model.config import ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.flex import has_tiles, visible_tiles
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.model.visibility import visible_keys

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")

block_lengths = st.integers(1, 6)
patterns = st.one_of(
    st.sampled_from([FULL, CAUSAL]),
    st.builds(AttentionPattern, st.sampled_from(["block_causal", "block_diffusion"]), block_lengths),
)
seeds = st.integers(0, 99)


def block_causal(block_length: int) -> AttentionPattern:
    return AttentionPattern("block_causal", block_length)


def block_diffusion(block_length: int) -> AttentionPattern:
    return AttentionPattern("block_diffusion", block_length)


@pytest.fixture(scope="module", params=[new_denoiser, timed_denoiser, mixed_denoiser], ids=["plain", "timed", "mixed"])
def denoiser(request) -> Denoiser:
    return request.param()


@pytest.fixture(scope="module", params=["plain", "timed", "mixed", "shifted", "shifted and timed"])
def any_denoiser(request) -> Denoiser:
    makers = {"timed": timed_denoiser, "mixed": mixed_denoiser, "shifted and timed": timed_denoiser}
    return makers.get(request.param, new_denoiser)(shifted=request.param.startswith("shifted"))


def time_of(denoiser: Denoiser, t: torch.Tensor) -> dict[str, torch.Tensor]:
    return {} if denoiser.time is None else {"t": t}


def changed(ids: torch.Tensor, at: torch.Tensor | slice | int) -> torch.Tensor:
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % VOCABULARY
    return other


# The relation


def defined(pattern: AttentionPattern, documents: list[int], block_length: int) -> torch.Tensor:
    """Bool [Q K] by the definition, a pair at a time; documents: which one each token of a row is of."""
    block = [sum(documents[:i].count(d) for d in [documents[i]]) // block_length for i in range(len(documents))]
    clean = [False] * len(block) + [True] * len(block) if pattern.kind == "block_diffusion" else [True] * len(block)
    tokens = [(is_clean, documents[i % len(block)], block[i % len(block)]) for i, is_clean in enumerate(clean)]

    def sees(query: tuple[bool, int, int], key: tuple[bool, int, int]) -> bool:
        if query[1] != key[1]:
            return False
        if pattern.kind == "full":
            return True
        if not query[0]:
            return key[2] < query[2] if key[0] else key[2] == query[2]
        return key[0] and key[2] <= query[2]

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


@settings(max_examples=draws(60), deadline=None)
@given(layout=layouts(), pattern=patterns)
def test_a_pair_sees_each_other_by_the_definition(layout: Layout, pattern):
    visible = visible_keys(pattern, layout.width, CPU, **layout.isolation)
    size = layout.width * (2 if pattern.has_clean_half else 1)
    visible = torch.ones(1, 1, 1, dtype=torch.bool) if visible is None else visible
    visible = visible.expand(layout.num_rows, size, size)
    for row in range(layout.num_rows):
        documents = [-1] * layout.width
        for number, (of_row, begin, end) in enumerate(layout.documents):
            if of_row == row:
                documents[begin:end] = [number] * (end - begin)
        real = torch.tensor(documents * (size // layout.width)) >= 0
        expected = defined(pattern, documents, pattern.block_length or 1)
        assert torch.equal(visible[row][real], expected[real]), "of a real query"
        assert visible[row].any(-1).all(), "no softmax is over nothing"


@settings(max_examples=draws(40), deadline=None)
@given(layout=layouts(), pattern=patterns)
def test_the_rule_by_tiles_is_the_table(layout: Layout, pattern):
    table, tiles = (which(pattern, layout.width, CPU, **layout.isolation) for which in (visible_keys, visible_tiles))
    assert (table is None) == (tiles is None)
    if tiles is not None:
        size = layout.width * (2 if pattern.has_clean_half else 1)
        told = create_mask(tiles.mask_mod, tiles.shape[0], 1, size, size, device="cpu")
        assert torch.equal(told[:, 0].expand(layout.num_rows, -1, -1), table.expand(layout.num_rows, size, size))


@settings(max_examples=draws(15), deadline=None)
@given(layout=layouts(), pattern=patterns, seed=seeds)
def test_attention_by_tiles_gives_the_logits_that_the_table_gives(layout: Layout, pattern, seed):
    """As on a GPU, but for its kernels; heads that share keys too."""
    model = new_denoiser(kv_heads=1)
    ids = ids_of(layout.num_rows, layout.width * (2 if pattern.has_clean_half else 1), seed=seed)
    given_ = {"pattern": pattern, **layout.isolation}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # plain operations
        by_table = model(ids, **given_)
        patch.setattr(model, "_visible", lambda pattern, length, *labels: visible_tiles(pattern, length, CPU, *labels))
        by_tiles = model(ids, **given_)
    real = layout.isolation.get("is_real")
    at = slice(None) if real is None else real
    closely(by_tiles[at], by_table[at])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_gpu_that_agrees_with_the_table_it_is_the_table(kind):
    assert has_tiles(torch.device(kind), 64) == (kind == "cuda" and torch.cuda.is_available())


@pytest.mark.parametrize("is_bf16", [False, True])
def test_what_rounds_otherwise_than_the_table_agrees_and_what_sees_another_key_does_not(monkeypatch, is_bf16):
    segments = torch.arange(256)[None] // 100
    table = visible_keys(block_causal(4), 256, CPU, None, segments)[:, None]
    found = []
    for seen in (table, table.roll(1, -1)):

        def kernel(q, k, v, tiles, seen=seen):
            with torch.autocast("cpu", enabled=False):
                mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return mixed.bfloat16() if is_bf16 else mixed

        monkeypatch.setattr(flex, "attend_by_tiles", kernel)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            found.append(flex._agrees(CPU, 128))
    assert found == [True, False]


@settings(max_examples=draws(60), deadline=None)
@given(length=st.integers(1, 30), pattern=patterns)
def test_pairs_are_counted_as_they_are(length, pattern):
    visible = visible_keys(pattern, length, CPU)
    assert pattern.num_pairs(length) == (length**2 if visible is None else visible.sum())


@settings(max_examples=draws(30), deadline=None)
@given(blocks=st.integers(1, 6), block_length=block_lengths)
def test_a_quarter_and_a_block_of_block_diffusions_square_are_seen(blocks, block_length):
    length = blocks * block_length
    visible = visible_keys(block_diffusion(block_length), length, CPU)
    assert visible.shape == (1, 2 * length, 2 * length)
    assert 4 * blocks * visible.sum() == (blocks + 1) * (2 * length) ** 2


@pytest.mark.parametrize("length", [1, 5, 8])
def test_block_diffusion_of_one_block_is_full_and_of_single_tokens_is_causal(length):
    noised, clean = visible_keys(block_diffusion(length), length, CPU)[0].split(length)
    every, none = torch.ones(length, length, dtype=torch.bool), torch.zeros(length, length, dtype=torch.bool)
    assert torch.equal(noised, torch.cat([every, none], 1))
    assert torch.equal(clean, torch.cat([none, every], 1))
    noised, clean = visible_keys(block_diffusion(1), length, CPU)[0].split(length)
    assert torch.equal(noised, torch.cat([every.tril().triu(), every.tril(-1)], 1))
    assert torch.equal(clean, torch.cat([none, every.tril()], 1))


def test_rows_that_are_alike_share_one_relation():
    segment_ids = torch.ones(5, 6, dtype=torch.int32)
    for pattern in (CAUSAL, block_causal(2), block_diffusion(2)):
        assert len(visible_keys(pattern, 6, CPU)) == 1
        assert len(visible_keys(pattern, 6, CPU, segment_ids=segment_ids)) == 5
    assert visible_keys(FULL, 6, CPU) is None
    assert visible_keys(FULL, 6, CPU, is_real=segment_ids > 0).shape == (5, 1, 6)


@pytest.mark.parametrize("kind", ["full", "causal", "block_causal", "block_diffusion"])
def test_a_pattern_has_a_block_length_where_it_counts_in_blocks(kind):
    for block_length in (-1, 0, None) if "block" in kind else (1,):
        with pytest.raises(ValueError, match=rf"^attention pattern {kind}: .*got {block_length}$"):
            AttentionPattern(kind, block_length)


# What logits depend on


@settings(max_examples=draws(40), deadline=None)
@given(layout=layouts(), block_length=block_lengths, seed=seeds)
@torch.inference_mode()
def test_a_document_gets_the_logits_in_a_row_that_it_gets_alone(any_denoiser, layout: Layout, block_length, seed):
    for pattern in (FULL, CAUSAL, block_causal(block_length), block_diffusion(block_length)):
        halves = 2 if pattern.has_clean_half else 1
        ids = ids_of(layout.num_rows, halves, layout.width, seed=seed)
        t = times_of(layout.num_rows, layout.width, seed=seed)
        together = any_denoiser(ids.flatten(1), pattern=pattern, **layout.isolation, **time_of(any_denoiser, t))
        assert together.shape == (layout.num_rows, layout.width, VOCABULARY)
        for row, begin, end in layout.documents:
            own = ids[row : row + 1, :, begin:end].flatten(1)
            alone = any_denoiser(own, pattern=pattern, **time_of(any_denoiser, t[row : row + 1, begin:end]))
            closely(together[row, begin:end], alone[0])


@settings(max_examples=draws(60), deadline=None)
@given(layout=layouts(), block_length=block_lengths, seed=seeds)
@torch.inference_mode()
def test_one_pass_over_xt_and_x0_is_every_block_decoded_behind_its_clean_past(any_denoiser, layout, block_length, seed):
    xt, x0 = ids_of(2, layout.num_rows, layout.width, seed=seed)
    t = times_of(layout.num_rows, layout.width, seed=seed)
    isolation = layout.isolation
    one_pass = torch.cat([xt, x0], 1)
    logits = any_denoiser(one_pass, pattern=block_diffusion(block_length), **isolation, **time_of(any_denoiser, t))
    for row, document, stop in layout.documents:
        for begin in range(document, stop, block_length):
            end = min(begin + block_length, stop)
            canvas = torch.cat([x0[row, document:begin], xt[row, begin:end]])[None]
            times = torch.cat([torch.zeros(begin - document), t[row, begin:end]])[None]
            decoded = any_denoiser(canvas, pattern=block_causal(block_length), **time_of(any_denoiser, times))
            closely(logits[row, begin:end], decoded[0, begin - document :])


@settings(max_examples=draws(30), deadline=None)
@given(length=st.integers(2, 14), block_length=block_lengths, data=st.data(), seed=seeds)
@torch.inference_mode()
def test_a_noised_block_depends_on_itself_and_its_clean_past_alone(length, block_length, data, seed):
    model = new_denoiser()
    ids, pattern = ids_of(1, 2 * length, seed=seed), block_diffusion(block_length)
    block = torch.arange(length) // block_length
    at = data.draw(st.integers(0, length - 1))
    before = model(ids, pattern=pattern)[0]
    by_clean = (model(changed(ids, length + at), pattern=pattern)[0] != before).any(-1)
    assert torch.equal(by_clean, block > block[at])
    by_noised = (model(changed(ids, at), pattern=pattern)[0] != before).any(-1)
    assert torch.equal(by_noised, block == block[at])


@settings(max_examples=draws(30), deadline=None)
@given(length=st.integers(2, 14), block_length=block_lengths, data=st.data(), seed=seeds)
@torch.inference_mode()
def test_a_causal_position_depends_on_no_later_block(length, block_length, data, seed):
    model, ids = new_denoiser(), ids_of(1, length, seed=seed)
    at = data.draw(st.integers(0, length - 1))
    for pattern in (CAUSAL, block_causal(block_length)):
        block = torch.arange(length) // (pattern.block_length or 1)
        other = model(changed(ids, at), pattern=pattern)
        assert torch.equal((other != model(ids, pattern=pattern))[0].any(-1), block >= block[at])


@settings(max_examples=draws(40), deadline=None)
@given(layout=layouts(), seed=seeds)
@torch.inference_mode()
def test_blocks_of_one_are_causal_and_a_block_of_all_is_full(denoiser, layout: Layout, seed):
    ids = ids_of(layout.num_rows, layout.width, seed=seed)
    told = {**layout.isolation, **time_of(denoiser, times_of(layout.num_rows))}
    real = layout.isolation.get("is_real", torch.ones_like(ids, dtype=torch.bool))
    for kind, block_length in ((CAUSAL, 1), (FULL, layout.width)):
        simple, in_blocks = (denoiser(ids, pattern=p, **told) for p in (kind, block_causal(block_length)))
        closely(simple[real], in_blocks[real])


def test_the_fused_kernels_triangle_of_long_rows_is_the_relation():
    model, ids = new_denoiser(layers=1), ids_of(2, 300)
    by_triangle = model(ids, pattern=CAUSAL)
    by_relation = model(ids, pattern=block_causal(1))
    same(by_triangle, by_relation)
    assert torch.equal(model(changed(ids, slice(200, 300)), pattern=CAUSAL)[:, :200], by_triangle[:, :200])
    one_pass = model(torch.cat([changed(ids, slice(0, 300)), ids], 1), pattern=block_diffusion(300))
    same(one_pass, model(changed(ids, slice(0, 300))))


@torch.inference_mode()
def test_logits_of_a_pattern_that_are_read_are_those_of_their_positions(any_denoiser):
    ids, read = ids_of(3, 22), ids_of(3, 11, seed=2) < 7
    time = time_of(any_denoiser, times_of(3, 11))
    every = any_denoiser(ids, pattern=block_diffusion(4), **time)
    same(any_denoiser(ids, read=read, pattern=block_diffusion(4), **time), every[read])
    assert any_denoiser(ids, read=torch.zeros_like(read), pattern=block_diffusion(4), **time).shape == (0, VOCABULARY)


def test_half_an_input_is_refused():
    with pytest.raises(ValueError, match=r"^input_ids: block diffusion takes \[xt ; x0\], of even length, got 7$"):
        new_denoiser()(ids_of(1, 7), pattern=block_diffusion(2))


@pytest.mark.parametrize("pattern", [FULL, CAUSAL, block_causal(3), block_diffusion(3)])
@pytest.mark.parametrize("make", [new_denoiser, mixed_denoiser])
def test_every_weight_learns_from_every_pattern(make, pattern):
    model = make()
    model(ids_of(2, 8), pattern=pattern).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# Positions


@settings(max_examples=draws(30), deadline=None)
@given(length=st.integers(1, 12), pattern=patterns, shift=st.integers(0, 90), seed=seeds)
@torch.inference_mode()
def test_distances_alone_count(denoiser, length, pattern, shift, seed):
    ids = ids_of(2, length * (2 if pattern.has_clean_half else 1), seed=seed)
    told = {"pattern": pattern, **time_of(denoiser, times_of(2))}
    by_default, index = denoiser(ids, **told), torch.arange(length)
    same(denoiser(ids, positions=index, **told), by_default)
    same(denoiser(ids, positions=index + shift, **told), by_default, 1e-4)
    same(denoiser(ids, positions=torch.stack([index, index + shift]), **told), by_default, 1e-4)
    if length > 1:
        stretched = denoiser(ids, positions=torch.stack([index, 3 * index]), **told)
        same(stretched[0], by_default[0])
        same(
            stretched[1],
            denoiser(ids[1:], positions=3 * index, pattern=pattern, **time_of(denoiser, times_of(2)[1:]))[0],
        )


@torch.inference_mode()
def test_an_order_of_tokens_that_carry_their_positions_is_no_matter(denoiser):
    ids, order = ids_of(1, 9), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    time = time_of(denoiser, times_of(1))
    logits = denoiser(ids, **time)
    same(denoiser(ids[:, order], positions=order, **time), logits[:, order])
    assert (denoiser(ids[:, order], **time) - logits[:, order]).abs().max() > 1e-3


# Costs


@pytest.mark.parametrize("pattern", [FULL, CAUSAL, block_causal(4), block_diffusion(4), block_diffusion(5)])
@pytest.mark.parametrize("make", [new_denoiser, mixed_denoiser])
def test_operations_are_those_that_are_done_but_for_pairs_that_do_not_see_each_other(make, pattern):
    model, length = make(), 12
    sizes: ModelConfig = model.config.model
    width = length * (2 if pattern.has_clean_half else 1)
    with FlopCounterMode(display=False) as counter:  # with gradients, where no row of padding is added
        model(ids_of(1, width), pattern=pattern)
    unseen = width**2 - pattern.num_pairs(length)
    done = 3 * counter.get_total_flops() - 12 * sizes.layers * sizes.heads * sizes.head_dim * unseen
    assert done / length == pytest.approx(sizes.flops_per_token(VOCABULARY, length, pattern), abs=1)
