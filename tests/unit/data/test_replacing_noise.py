"""The noise of a corpus where tokens are replaced: as pure a function of (seed, epoch, row) as masks are."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import SmallCorpus, make_small_corpus, small_recipe

from dllm_core.data.build import to_arrow
from dllm_core.data.loader import Loader
from dllm_core.data.manifest import corpus_prefix
from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.data.shard import map_shard, put_shard
from dllm_core.data.verify import Promise, checks_of, verify_shard
from dllm_core.noise.process import AbsorbingNoise, HybridNoise, UniformNoise
from workflows.preprocess.flow import plan_corpus

MASK, VOCAB, ROWS, LENGTH = 5, 300, 200, 40
SECTIONS = {"uniform": UniformNoise(), "hybrid": HybridNoise(p_u=0.3)}


def noise_of(section, block_length=None) -> CorpusNoise:
    return CorpusNoise(section.bind(MASK, VOCAB), SampleOrder(3, ROWS), 1e-3, block_length)


def text() -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, VOCAB - 1, (ROWS, LENGTH))
    return ids + (ids >= MASK)


@pytest.mark.parametrize("block_length", [None, 7])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_rows_noise_depends_on_the_row_alone(section, block_length):
    noise, x0, ids = noise_of(section, block_length), text(), np.arange(ROWS)
    xt, t = noise.corrupt(1, ids, x0)
    chosen = np.random.default_rng(1).permutation(ROWS)[:77]
    part, times = noise.corrupt(1, chosen, x0[chosen])
    assert np.array_equal(part, xt[chosen])
    assert np.array_equal(times, t[chosen])
    as_stored, _ = noise.corrupt(1, ids, x0.astype(np.uint16))
    assert as_stored.dtype == np.uint16
    assert np.array_equal(as_stored, xt)
    assert not np.array_equal(noise.corrupt(2, ids, x0)[0], xt)


def test_uniform_noise_replaces_where_masks_would_stand():
    """u alone decides whether: the two processes differ in what they put there."""
    x0, ids = text(), np.arange(ROWS)
    masked, _ = noise_of(AbsorbingNoise()).corrupt(0, ids, x0)
    replaced, _ = noise_of(UniformNoise()).corrupt(0, ids, x0)
    assert np.array_equal(replaced[masked != MASK], x0[masked != MASK])
    assert (replaced != MASK).all()
    same = (replaced == x0)[masked == MASK].mean()
    assert same < 3 / VOCAB


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_prompt_is_never_replaced(section):
    x0, is_learned = text(), np.arange(LENGTH) >= 15
    xt, _ = noise_of(section).corrupt(0, np.arange(ROWS), x0, np.broadcast_to(is_learned, x0.shape))
    assert np.array_equal(xt[:, :15], x0[:, :15])
    assert (xt[:, 15:] != x0[:, 15:]).mean() > 0.2


def test_what_replaces_is_drawn_apart_from_whether():
    """Among tokens that are only just noised, replacements are as spread as among all."""
    x0, ids = text(), np.arange(ROWS)
    xt, t = noise_of(UniformNoise()).corrupt(0, ids, x0)
    for rows in (t < 0.2, t > 0.8):
        drawn = xt[rows][xt[rows] != x0[rows]]
        counts = np.bincount(drawn * 10 // VOCAB, minlength=10)
        assert abs(counts - drawn.size / 10).max() < 5 * np.sqrt(drawn.size / 10)


KINDS = {
    "uniform": {"process": {"type": "uniform"}},
    "hybrid chain": {"process": {"type": "hybrid", "p_u": 0.3}, "steps": 16},
    "masks in blocks": {"block_length": 3},
    "hybrid in blocks": {"process": {"type": "hybrid", "p_u": 0.3}, "block_length": 3},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def corpus_of(root, kind: str, packing: str = "isolated", epochs: int = 2) -> SmallCorpus:
    objective = {"type": "block_diffusion" if "block_length" in KINDS[kind] else "diffusion"}
    noise = {**KINDS[kind], "epochs": epochs}
    return make_small_corpus(root, noise=noise, objective=objective, packing={"type": packing, "seq_len": 32})


def loader(corpus: SmallCorpus, *, computed: bool = False) -> Loader:
    manifest = corpus.manifest.model_copy(update={"noise_epochs": ()}) if computed else corpus.manifest
    return Loader.open(corpus.store, manifest, corpus.tokenizer.mask_id)


@EVERY_KIND
@pytest.mark.parametrize("packing", ["wrap", "isolated"])
def test_what_is_written_down_is_what_is_computed_for_any_number_of_workers(tmp_path, kind, packing):
    corpus = corpus_of(tmp_path, kind, packing)
    rows = corpus.manifest.train.rows
    written, computed = (loader(corpus, computed=c).batch(rows - 8, 16) for c in (False, True))  # over two epochs
    for name in ("x0", "xt", "t", "counters"):
        assert np.array_equal(getattr(written, name), getattr(computed, name)), name
    assert (written.xt != written.x0)[written.loss_mask].mean() > 0.2
    for world in (2, 3, 5):
        parts = [loader(corpus).batch(rows - 8, 16, rank, world) for rank in range(world)]
        for name in ("xt", "t", "counters"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(written, name))


@pytest.mark.parametrize("kind", ["masks in blocks", "hybrid in blocks"])
def test_blocks_of_an_isolated_document_begin_with_it(tmp_path, kind):
    """Each block of three of each document has one time; neighbours, also over a document's end, have others."""
    batch = loader(corpus_of(tmp_path, kind, epochs=1)).batch(0, 16)
    assert batch.segment_ids is not None
    assert max(batch.segment_ids.max(1)) > 1
    for t, segments in zip(batch.t, batch.segment_ids, strict=True):
        found = []
        for segment in np.unique(segments):
            own = t[segments == segment]
            for first in range(0, len(own), 3):
                assert len(set(own[first : first + 3].tolist())) == 1
                found.append(float(own[first]))
        assert len(set(found)) == len(found)


def test_times_of_a_chain_are_the_ends_of_its_steps(tmp_path):
    t = loader(corpus_of(tmp_path, "hybrid chain", "wrap", epochs=1)).batch(0, 64).t[:, 0].astype(np.float64)
    assert np.array_equal(np.round(t * 16) / 16, t)
    assert set(np.round(t * 16)) == set(range(1, 17))


@EVERY_KIND
def test_verify_finds_a_token_or_a_time_that_is_not_the_noise_of_its_row_whatever_its_sha256_says(tmp_path, kind):
    """The files are written again with their manifest, as a faulty worker would: only what is computed tells."""
    corpus = corpus_of(tmp_path, kind, epochs=1)
    job = plan_corpus(corpus.recipe, corpus.store).job()
    manifest, promise = corpus.manifest, Promise.of(corpus.manifest, corpus.tokenizer.mask_id)
    [check] = [c for c in checks_of(job, manifest) if c.epoch == 0][:1]
    assert all(verify_shard(job, promise, c) is None for c in checks_of(job, manifest))
    views = {name: np.array(view) for name, view in map_shard(job.output, job.prefix, check.shard).items()}
    assert ("xt" in views) == ("process" in KINDS[kind])
    for name, view in views.items():
        damaged = {**views, name: view.copy()}
        damaged[name].reshape(len(view), -1)[0, 0] += 1
        kept = {"unit": check.shard.unit, "rows": check.shard.rows, "tokens": check.shard.tokens}
        info = put_shard(job.output, job.prefix, "noise/forged.arrow", to_arrow(damaged, {}), **kept)
        problem = verify_shard(job, promise, replace(check, shard=info))
        assert problem is not None, name
        assert problem.what == "is not the noise that is computed for these rows"


@EVERY_KIND
def test_a_plan_knows_the_bytes_of_a_row_of_noise(tmp_path, kind):
    for packing in ("wrap", "isolated"):
        corpus = corpus_of(tmp_path / packing, kind, packing, epochs=1)
        [shards] = corpus.manifest.noise_epochs
        views = map_shard(corpus.store, corpus_prefix(corpus.manifest.fingerprint), shards[0])
        a_row = sum(view[:1].nbytes for view in views.values())
        plan = plan_corpus(corpus.recipe, corpus.store)
        without = plan_corpus(small_recipe(tmp_path / packing, packing=corpus.recipe.packing.model_dump(),
                                           noise={"epochs": 0}), corpus.store)  # fmt: skip
        assert plan.disk_bytes(100) - without.disk_bytes(100) == 100 * a_row
