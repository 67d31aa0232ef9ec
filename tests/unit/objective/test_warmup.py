"""Blocks grow at the steps that a recipe says; noise and objective of a step follow from its sample counters alone."""

import numpy as np
import pytest
import torch
from conftest import SmallCorpus, draws, small_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from small import new_denoiser

from dllm_core.data.loader import Loader
from dllm_core.errors import ConfigError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import AttentionPattern
from dllm_core.objective.build import new_objective
from dllm_core.objective.config import BlockDiffusionConfig, DiffusionConfig, WarmupStage
from dllm_core.objective.warmup import StagedBatches

CPU, ROWS, LENGTH = torch.device("cpu"), 4, 32
STAGES = st.lists(st.tuples(st.sampled_from([1, 4, 5, 8, LENGTH]), st.integers(1, 3)), min_size=1, max_size=4)


LOADERS: dict[tuple[object, ...], Loader] = {}


def loader_of(corpus: SmallCorpus, block_length: int | None = None, written: bool = True) -> Loader:
    key = (corpus.manifest.fingerprint, block_length, written)
    if key not in LOADERS:  # to open one costs a sha256 of every shard
        changed = {"block_length": block_length} | ({} if written else {"noise_epochs": ()})
        manifest = corpus.manifest.model_copy(update=changed)
        LOADERS[key] = Loader.open(corpus.store, manifest, corpus.tokenizer.mask_id)
    return LOADERS[key]


def denoiser_of(corpus: SmallCorpus) -> Denoiser:
    ids = {name: getattr(corpus.tokenizer, name) for name in ("mask_id", "eos_id", "pad_id")}
    sizes = {"vocab_size": corpus.manifest.vocab_size, "context_length": LENGTH}
    torch.manual_seed(2)
    return Denoiser(DenoiserConfig(model=corpus.recipe.model, **sizes, **ids))


class Asked:
    """A denoiser, and in which patterns it was asked."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser, self.patterns = denoiser, list[AttentionPattern]()

    def __call__(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        self.patterns.append(options["pattern"])
        return self._denoiser(ids, **options)


@settings(max_examples=draws(10), deadline=None)
@given(
    stages=STAGES,
    in_blocks=st.booleans(),
    parts=st.sampled_from([1, 2, 4]),
    weight=st.sampled_from(["nelbo", "context"]),
)
def test_each_step_has_the_noise_and_the_objective_of_its_stage(small_corpus, stages, in_blocks, parts, weight):
    warmup = tuple(WarmupStage(block_length=length, steps=steps) for length, steps in stages)
    config = (BlockDiffusionConfig if in_blocks else DiffusionConfig)(weight=weight, block_warmup=warmup)
    last = 16 if in_blocks else None
    denoiser = denoiser_of(small_corpus)
    process = small_corpus.manifest.process.bind(small_corpus.tokenizer.mask_id, small_corpus.manifest.vocab_size)
    options = {"seed": 0, "block_length": last, "t_min": small_corpus.manifest.t_min}
    staged = new_objective(config, denoiser.config, process, CPU, **options, batch_rows=ROWS)
    batches = StagedBatches.of(config, loader_of(small_corpus, last, written=not in_blocks), LENGTH)
    expected = [length for length, steps in stages for _ in range(steps)] + [last or LENGTH] * 2
    for step, length in enumerate(expected):
        block = None if length == LENGTH else length
        found = batches.batch(step * ROWS, ROWS)
        wanted = loader_of(small_corpus, block, written=False).batch(step * ROWS, ROWS)
        for name in ("x0", "xt", "t", "loss_mask", "counters"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), (step, name)
        kind = (BlockDiffusionConfig if block is not None else DiffusionConfig)(weight=weight)
        alone = new_objective(kind, denoiser.config, process, CPU, **{**options, "block_length": block})
        asked = Asked(denoiser)
        with torch.no_grad():
            whole = alone.loss(denoiser, wanted)
            losses = [staged.loss(asked, part) for part in found.parts(ROWS // parts)]
        assert {p.block_length for p in asked.patterns} == {block}
        assert {p.has_clean_half for p in asked.patterns} == {block is not None}
        assert sum(float(loss.nats) for loss in losses) == pytest.approx(float(whole.nats), rel=1e-5)
        assert sum(loss.divisor for loss in losses) == whole.divisor == staged.divisor(found)
        for rank in range(2):
            share = batches.batch(step * ROWS, ROWS, rank, 2)
            assert np.array_equal(share.xt, found.xt[rank * 2 : rank * 2 + 2])
    assert staged.pattern == alone.pattern  # what is trained for


def test_a_mask_and_its_complement_go_through_a_warm_up_too(small_corpus):
    config = DiffusionConfig(complementary=True, block_warmup=(WarmupStage(block_length=4, steps=1),))
    denoiser = new_denoiser(vocab_size=small_corpus.manifest.vocab_size)
    process = small_corpus.manifest.process.bind(small_corpus.tokenizer.mask_id, small_corpus.manifest.vocab_size)
    objective = new_objective(config, denoiser_of(small_corpus).config, process, CPU, seed=0, batch_rows=ROWS)
    assert objective.passes == 2
    batch = StagedBatches.of(config, loader_of(small_corpus), LENGTH).batch(0, ROWS)
    assert objective.loss(denoiser, batch).divisor == objective.divisor(batch) == batch.loss_mask.sum()


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        (
            [{"block_length": 64, "steps": 1}],
            r"objective\.block_warmup\.0\.block_length: must be <= .*seq_len=32",
        ),
        ([{"block_length": 4, "steps": 6}], r"objective\.block_warmup: takes all train\.steps=6 .*got 6"),
        ([{"block_length": 0, "steps": 1}], r"objective\.block_warmup\.0\.block_length: must be greater"),
        ([{"block_length": 4}], r"objective\.block_warmup\.0\.steps: missing"),
        ([{"block_length": 4, "steps": 1, "rows": 2}], r"objective\.block_warmup\.0\.rows: unknown name"),
    ],
)
def test_a_warm_up_that_means_nothing_is_refused(tmp_path, stages, problem):
    with pytest.raises(ConfigError, match=problem):
        small_recipe(tmp_path, objective={"block_warmup": stages})


def test_a_recipe_without_a_warm_up_keeps_its_name_and_another_warm_up_is_another_run(tmp_path):
    stages = [[], [{"block_length": 4, "steps": 1}], [{"block_length": 4, "steps": 2}]]
    recipes = [small_recipe(tmp_path, objective={"block_warmup": given}) for given in stages]
    blocks = {"objective": {"type": "block_diffusion", "weight": "none"}, "noise": {"block_length": 4}}
    before = {"4410cccf3bd1": recipes[0], "354eb1b662ae": small_recipe(tmp_path, **blocks)}  # there was no warm-up then
    assert {name: recipe.run_fingerprint("corpus") for name, recipe in before.items()} == {
        name: name for name in before
    }
    assert len({recipe.run_fingerprint("corpus") for recipe in recipes}) == 3
    assert len({recipe.corpus_fingerprint([]) for recipe in recipes}) == 1  # noise that is written stays
