"""The recipe of a comparison: what models share, what sets each apart, and what is measured. No Ray, no torch.

    recipe: {seed: 1, corpus: {...}, model: {...}, train: {...}}
    models:
      autoregressive: [objective.type=autoregressive]
      absorbing: []

A model's list are overrides of the shared recipe, as on the command line.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.config.fingerprint import fingerprint
from dllm_core.config.overrides import apply_overrides, read_recipe
from dllm_core.decoding.automaton import checked_regex
from dllm_core.errors import ConfigError, RequestError
from dllm_core.evaluation.tasks.section import AnyTask
from dllm_core.storage.store import check_name
from workflows.placement import EvaluatePlacement
from workflows.recipe import Recipe, StorageConfig, resolved

TEXT, TASK = "text", "task"
_NOT_SHARED = ("name", "storage", "placement")


def small(epochs: int) -> str:
    """Name of the data set that is the small share of the text, gone through so often."""
    return f"small-{epochs:03d}"


class LearningConfig(Frozen):
    """Held-out likelihood along the training on the whole text."""

    points: int = Field(4, ge=1, le=64, description="evenly spaced steps at which the held-out rows are scored")
    rows: int = Field(128, ge=2)
    draws: int = Field(8, ge=1, le=1 << 20)


class RepetitionConfig(Frozen):
    """The same small share of the text, gone through several times: a run of its own for each number of epochs."""

    share: float = Field(0.02, gt=0, le=1, description="of training documents, chosen by their hash")
    epochs: tuple[int, ...] = (1, 4, 16, 64)

    @model_validator(mode="after")
    def _epochs_rise(self) -> Self:
        if not self.epochs or any(b <= a for a, b in zip((0, *self.epochs), self.epochs, strict=False)):
            raise FieldProblem("epochs", "must be whole numbers >= 1 that rise", list(self.epochs))
        return self


class ContextConfig(Frozen):
    """Holes in held-out rows, seen from the left, the right and both sides, each position asked in one call."""

    rows: int = Field(256, ge=2)
    length: int = Field(8, ge=1)


class GenerationConfig(Frozen):
    """Continuations of held-out text, at several thresholds of confidence or numbers of steps."""

    prompts: int = Field(32, ge=2)
    prompt_tokens: int = Field(16, ge=1)
    tokens: int = Field(48, ge=1)
    thresholds: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.3, 0.5, 0.7, 0.9, 1.0), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...] = Field(
        (8, 16, 32, 64), min_length=1, description="of models whose noise is run backwards"
    )
    temperature: float = Field(1.0, gt=0, le=10, description="likeliest tokens alone repeat themselves")


class FlexibilityConfig(Frozen):
    """What a model that sees both sides can be asked: holes, several at once, text to be mended, what must match.

    regex: holes whose text matches it are filled twice, once by a model that is told so.
    """

    rows: int = Field(128, ge=2)
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 12), min_length=1)
    broken: float = Field(0.1, gt=0, lt=1, description="share of tokens that editing has to find and mend")
    regex: str = Field("[a-z_]+", min_length=1)

    @field_validator("regex")
    @classmethod
    def _finds_holes_and_can_be_kept(cls, regex: str) -> str:
        try:
            re.compile(regex)  # finds them
            checked_regex(regex)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        except RequestError as error:
            raise ValueError(error.problem) from None
        return regex


class TaskConfig(Frozen):
    """A task with a known answer, on which each model is trained anew."""

    problem: AnyTask
    rows: int = Field(20_000, ge=100, description="problems to learn from")
    problems: int = Field(200, ge=2, description="problems to answer, none of which training saw")
    overrides: tuple[str, ...] = ()


class CompareRecipe(Frozen):
    """All that decides a comparison. placement: `workers` tasks at once, one model or run each."""

    name: str
    storage: StorageConfig = StorageConfig()
    recipe: dict[str, Any]
    models: dict[str, tuple[str, ...]] = Field(min_length=1)
    learning: LearningConfig = LearningConfig()
    repetition: RepetitionConfig | None = RepetitionConfig()
    context: ContextConfig = ContextConfig()
    generation: GenerationConfig = GenerationConfig()
    flexibility: FlexibilityConfig = FlexibilityConfig()
    task: TaskConfig | None = None
    placement: EvaluatePlacement = EvaluatePlacement()

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name in _NOT_SHARED:
            if name in self.recipe:
                raise FieldProblem(f"recipe.{name}", "is the comparison's own", self.recipe[name], f"set {name}")
        for name in (self.name, *self.models):
            try:
                check_name("name", name)
            except ConfigError as error:
                raise ValueError(f"{name!r} {error.problem}") from None
        return self

    def recipe_of(
        self, model: str, overrides: Sequence[str] = (), sections: Mapping[str, dict[str, Any]] | None = None
    ) -> Recipe:
        """A model's recipe. sections: put over the shared ones; `overrides` come last.

        A ConfigError says whose setting it is about.
        """
        shared = dict(self.recipe)
        for name, section in (sections or {}).items():
            shared[name] = {**shared.get(name, {}), **section} if name == "decode" else section
        values = {"name": f"{self.name}-{model}", "storage": self.storage.model_dump()}
        try:
            values |= apply_overrides(shared, [*self.models[model], *overrides])
            return resolved(values)
        except ConfigError as error:
            owners = (("task.overrides", overrides), (f"models.{model}", self.models[model]))
            owner = next((name for name, own in owners if any(_touches(item, error.place) for item in own)), "recipe")
            raise ConfigError(f"{owner}: {error.place}", error.problem, error.value, error.remedy) from None

    @property
    def fingerprint(self) -> str:
        """Identity of the comparison's figures, but for what lies in the files that it reads."""
        return fingerprint(self.model_dump(mode="json", exclude={"storage", "placement"}))


def _touches(override: str, place: str) -> bool:
    """Whether an override sets a place, or what is above or below it."""
    path = override.partition("=")[0].strip()
    return f"{place}.".startswith(f"{path}.") or f"{path}.".startswith(f"{place}.") or override == place


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Read a comparison and apply overrides. Every model's recipe is checked before anything starts."""
    values: dict[str, Any] = {"name": path.stem, **read_recipe(path)}
    if "models" not in values:
        raise ConfigError(str(path), "is no comparison: it has no `models`", remedy="`dllm run` takes a recipe")
    loaded = CompareRecipe.checked(apply_overrides(values, list(overrides)))
    for model in loaded.models:
        recipe = loaded.recipe_of(model)
        loaded = loaded.model_copy(update={"storage": recipe.storage})
        _check_decoding(loaded, model, recipe)
        if loaded.task is not None:
            loaded.recipe_of(model, loaded.task.overrides)
    return loaded


def _check_decoding(loaded: CompareRecipe, model: str, recipe: Recipe) -> None:
    """Refuse what a model could not be asked once it is trained."""
    asked, context = loaded.generation.prompt_tokens, recipe.packing.seq_len
    if asked >= context:
        problem = f"must be < packing.seq_len={context}, which models write on within"
        raise ConfigError("generation.prompt_tokens", problem, asked)
    try:
        if recipe.can_be_decoded:
            recipe.check_decodable()
    except ConfigError as error:
        raise ConfigError(f"models.{model}: {error.place}", error.problem, error.value, error.remedy) from None
