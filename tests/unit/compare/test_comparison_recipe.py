"""A comparison's recipe: what models share, what sets them apart, and what is refused before anything starts."""

import pytest
import yaml

from dllm_core.errors import ConfigError
from workflows.compare.recipe import CompareRecipe, load_comparison
from workflows.recipe import RECIPES, load_recipe

SHIPPED = sorted((RECIPES / "comparisons").glob("*.yaml"))
SHARED = {"corpus": {"type": "text", "path": "python:unicode-names"}, "train": {"steps": 3}}
MODELS = {"left": ["objective.type=autoregressive"], "both": []}


def written(tmp_path, **changes):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({"recipe": SHARED, "models": MODELS, **changes}))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_loads_and_its_models_differ_in_no_data(path):
    loaded = load_comparison(path)
    recipes = [loaded.recipe_of(model) for model in loaded.models]
    assert len({(r.corpus, r.tokenizer, r.packing, r.seed, r.train) for r in recipes}) == 1
    assert {r.objective.type for r in recipes} == {"autoregressive", "masked_lm", "diffusion", "block_diffusion"}
    assert {r.noise.process.type for r in recipes} == {"absorbing", "uniform", "hybrid"}
    assert CompareRecipe.model_validate_json(loaded.model_dump_json()) == loaded


def test_a_model_is_the_shared_recipe_with_its_own_overrides(tmp_path):
    loaded = load_comparison(written(tmp_path), ["recipe.train.steps=7", "storage.root=runs"])
    left, both = (loaded.recipe_of(model) for model in MODELS)
    assert (left.name, both.name) == ("some-left", "some-both")
    assert left.model_copy(update={"name": both.name, "objective": both.objective}) == both
    assert left.objective.type == "autoregressive"
    assert left.train.steps == 7
    assert loaded.recipe_of("both", ["train.steps=9"]).train.steps == 9


@pytest.mark.parametrize("field", ["storage.root=elsewhere", "placement.workers=9"])
def test_where_it_runs_is_no_part_of_what_it_is(tmp_path, field):
    path = written(tmp_path)
    assert load_comparison(path, [field]).fingerprint == load_comparison(path).fingerprint
    assert load_comparison(path, ["context.rows=9"]).fingerprint != load_comparison(path).fingerprint


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        ({"recipe": {**SHARED, "name": "mine"}}, "recipe.name", "comparison's own"),
        ({"recipe": {**SHARED, "placement": {}}}, "recipe.placement", "comparison's own"),
        ({"models": {"both": ["model.dimm=3"]}}, "models.both: model.dimm", "unknown name"),
        ({"models": {"both": ["model.dim"]}}, "models.both: model.dim", "not an override"),
        ({"models": {"a/b": []}}, "models", "'a/b' must be"),
        ({"models": {}}, "models", "at least 1 item"),
        ({"repetition": {"epochs": [4, 1]}}, "repetition.epochs", "that rise"),
        ({"repetition": {"epochs": []}}, "repetition.epochs", "that rise"),
        ({"generation": {"thresholds": [0.5, 0]}}, "generation.thresholds.1", "greater than 0"),
        ({"generation": {"steps": []}}, "generation.steps", "at least 1 item"),
        ({"generation": {"prompt_tokens": 64}}, "generation.prompt_tokens", "< packing.seq_len=64"),
        ({"flexibility": {"lengths": [0]}}, "flexibility.lengths.0", "to 1"),
        ({"flexibility": {"regex": "[a"}}, "flexibility.regex", "is no regular expression"),
        ({"flexibility": {"regex": "(?=a)b"}}, "flexibility.regex", "is no regular expression"),
        (
            {"models": {"blocks": ["objective.type=block_diffusion", "noise.block_length=8"]}},
            "models.blocks: decode.block_length",
            "must be noise.block_length=8",
        ),
        ({"context": {"lenght": 3}}, "context.lenght", "did you mean 'length'"),
        ({"task": {"problem": {"type": "chess"}}}, "task.problem.type", "unknown kind"),
        (
            {"task": {"problem": {"type": "sudoku"}, "overrides": ["train.steps=0"]}},
            "task.overrides: train.steps",
            "to 1",
        ),
        ({"recipe": {**SHARED, "model": {"dim": 1}}}, "recipe: model.dim", "to 8"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path, changes, place, problem):
    with pytest.raises(ConfigError) as caught:
        load_comparison(written(tmp_path, **changes))
    message = str(caught.value)
    assert place in message
    assert problem in message
    assert "\n" not in message


def test_each_verb_says_whose_file_it_is(tmp_path):
    with pytest.raises(ConfigError, match="dllm compare"):
        load_recipe(written(tmp_path))
    with pytest.raises(ConfigError, match="dllm run"):
        load_comparison(RECIPES / "quickstart.yaml")
