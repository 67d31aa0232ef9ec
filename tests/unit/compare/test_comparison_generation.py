"""Continuations in a comparison: models and text are judged on the same, and text ends where a document does."""

import numpy as np
import pytest
from conftest import make_small_bundle, make_small_corpus

from dllm_core.data.loader import evenly, split_rows
from dllm_core.errors import ConfigError
from workflows.compare.generation import generate
from workflows.compare.measures import Question
from workflows.compare.recipe import CompareRecipe
from workflows.compare.training import Entrant

PROMPTS, PROMPT_TOKENS, TOKENS = 6, 3, 4


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    """What a comparison over rows of a document and filler asks, of random weights."""
    packing = {"type": "padded", "seq_len": 64}
    corpus = make_small_corpus(tmp_path_factory.mktemp("padded"), packing=packing, corpus={"document": "line"})
    run = make_small_bundle(corpus, corpus.store.root)
    sizes = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "tokens": TOKENS, "thresholds": [0.5]}
    recipe = CompareRecipe.checked({"name": "some", "recipe": {}, "models": {"masks": []}, "generation": sizes})
    entrant = Entrant("masks", "text", corpus.recipe, run, corpus.manifest.fingerprint)
    return corpus, Question("generation", "all", (entrant,), recipe)


def test_the_text_itself_ends_with_its_document_as_answers_do(question):
    corpus, asked = question
    heldout = corpus.manifest.heldout
    tokens = split_rows(corpus.store, corpus.manifest, heldout, evenly(np.arange(heldout.rows), PROMPTS))
    behind = tokens.is_real.sum(1) - 1 - PROMPT_TOKENS  # without the end token
    found = generate(asked)
    assert 0 < behind.min() < TOKENS, "some lines end before an answer would"
    assert found["text"]["tokens"] == np.minimum(behind, TOKENS).sum()
    assert found["text"]["samples"] == PROMPTS
    [point] = found["models"]["masks"]
    assert point["quality"]["samples"] == PROMPTS


def test_prompts_that_no_document_goes_on_behind_are_refused_in_a_line(question):
    _, asked = question
    section = asked.recipe.generation.model_copy(update={"prompt_tokens": 50})
    recipe = asked.recipe.model_copy(update={"generation": section})
    with pytest.raises(ConfigError, match=r"^generation\.prompt_tokens: no held-out document goes on"):
        generate(Question("generation", "all", asked.entrants, recipe))
