"""Every recipe that is shipped loads, says what it is, and survives being written out."""

import pytest
import yaml

from workflows.recipe import RECIPES as SHIPPED
from workflows.recipe import Recipe, load_recipe

RECIPES = sorted(SHIPPED.glob("*.yaml"))


def test_recipes_are_shipped():
    assert {path.stem for path in RECIPES} >= {"quickstart", "stdlib"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_resolved_form_is_the_same_recipe(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    again = Recipe.checked(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.run_fingerprint("corpus") == recipe.run_fingerprint("corpus")
    assert path.read_text(encoding="utf-8").startswith("# "), "opens with what it is for"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "words",
    [
        ["objective.type=autoregressive"],
        ["objective.type=masked_lm"],
        ["objective.type=block_diffusion", "noise.block_length=16"],
        ["noise.process.type=uniform", "objective.max_weight=null"],
    ],
    ids=lambda words: words[0],
)
def test_a_shipped_recipe_takes_every_objective_of_the_readme_by_an_override(path, words):
    """It says of which kind its objective is: another kind then drops what was for that one."""
    assert load_recipe(path, words).run_fingerprint("") != load_recipe(path).run_fingerprint("")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_model_is_of_the_size_that_a_small_machine_trains(path):
    recipe = load_recipe(path)
    assert 0.9e6 <= recipe.model.num_parameters(recipe.tokenizer.vocab_size) <= 4e6
    assert 512 <= recipe.tokenizer.vocab_size <= 4096


def test_names_that_scripts_outside_rely_on():
    recipe = load_recipe(RECIPES[0]).model_dump()
    assert list(recipe) == [
        *("name", "seed", "storage", "corpus", "tokenizer", "packing", "noise", "model", "objective", "start", "train"),
        *("evaluate", "decode", "serve", "tracking", "placement"),
    ]
    for dotted in (
        *("storage.root", "corpus.path", "noise.process.type", "noise.epochs", "packing.seq_len", "train.steps"),
        *("train.seconds", "train.zero_stage", "decode.policy.type", "decode.block_length", "decode.steps_per_block"),
        *("decode.max_tokens", "decode.cache", "serve.port", "placement.train.workers", "placement.preprocess.workers"),
    ):
        here = recipe
        for name in dotted.split("."):
            here = here[name]
