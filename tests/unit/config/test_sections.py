"""A section that means nothing is refused in one line: dotted path, value, remedy."""

from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.errors import ConfigError


class Flat(Frozen):
    type: Literal["flat"] = "flat"
    rate: float = Field(0.1, gt=0)


class Steep(Frozen):
    type: Literal["steep"] = "steep"
    power: int = Field(2, ge=1)
    steep: int = Field(1, ge=1)


class Stage(Frozen):
    steps: int = Field(10, ge=1)
    warmup_steps: int = 0
    slope: Annotated[Flat | Steep, Field(discriminator="type")] = Flat()

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise FieldProblem("warmup_steps", f"must be <= steps={self.steps}", self.warmup_steps, "lower it")
        return self


class Tree(Frozen):
    name: str
    stage: Stage = Stage()
    stages: tuple[Stage, ...] = ()


REFUSALS = [
    ({"stage": {"stepz": 3}}, "stage.stepz: unknown name: did you mean 'steps'?"),
    ({"stage": {"zzz": 3}}, "stage.zzz: unknown name: known names: slope, steps, warmup_steps"),
    ({"stage": {"steps": 0}}, "stage.steps: must be greater than or equal to 1, got 0"),
    ({"stage": {"steps": "many"}}, "stage.steps: must be a valid integer"),
    ({"stage": {"steps": [1]}}, "stage.steps: must be a valid integer, got [1]"),
    ({"stage": {"warmup_steps": 11}}, "stage.warmup_steps: must be <= steps=10, got 11: lower it"),
    ({"stage": {"slope": {"type": "flatt"}}}, "stage.slope.type: unknown kind, got 'flatt': one of 'flat', 'steep'"),
    ({"stage": {"slope": {"power": 1}}}, "stage.slope.type: missing"),
    ({"stage": {"slope": {"type": "steep", "powr": 1}}}, "stage.slope.powr: unknown name: did you mean 'power'?"),
    ({"stage": {"slope": {"type": "flat", "rate": float("nan")}}}, "stage.slope.rate: must be"),
    ({"stages": [{}, {"steps": -1}]}, "stages.1.steps: must be greater than or equal to 1, got -1"),
    (
        {"stage": {"slope": {"type": "steep", "steep": 0}}},
        "stage.slope.steep: must be greater than or equal",
    ),
    ({"stage": {"slope": {"type": "flat", "foo": 1}}}, "stage.slope.foo: unknown name: known names: rate, type"),
    ({"stage": {"slope": {"type": "flat", "power": 1}}}, "stage.slope.power: unknown name: it belongs to type=steep"),
    ({"stages": [{"foo": 1}]}, "stages.0.foo: unknown name: known names: slope, steps, warmup_steps"),
    ({"stage": {"steps": True}}, "stage.steps: must not be true or false, got True"),
    ({"stage": 3}, "stage: must be a section: names and their values, got 3"),
]


@pytest.mark.parametrize(("values", "line"), REFUSALS, ids=[line.split(":")[0] for _, line in REFUSALS])
def test_a_mistake_is_one_line_with_its_path_and_what_to_do(values, line):
    with pytest.raises(ConfigError) as caught:
        Tree.checked({"name": "x", **values})
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_missing_name_is_said_to_be_missing():
    with pytest.raises(ConfigError, match=r"^name: missing: the recipe must set it$"):
        Tree.checked({})


def test_the_path_starts_at_the_place_that_was_given():
    with pytest.raises(ConfigError, match=r"^config\.json\.stage\.steps: "):
        Tree.checked({"name": "x", "stage": {"steps": 0}}, "config.json")
    with pytest.raises(ConfigError, match=r"^here\.warmup_steps: "):
        Stage.checked({"warmup_steps": 11}, "here")


def test_a_section_cannot_be_changed_after_it_was_checked():
    stage = Stage()
    with pytest.raises(ValueError, match="frozen"):
        stage.steps = 3


def test_what_is_not_a_mapping_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="recipe"):
        Tree.checked(None)
