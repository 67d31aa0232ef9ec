"""Frozen: the base of every recipe section and stored record. An unknown key is refused with the nearest name."""

import difflib
import typing
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dllm_core.errors import ConfigError


class FieldProblem(ValueError):  # noqa: N818 (what a validator found; the error that a user sees is ConfigError)
    """Raised by a section's validator about one of its fields; becomes a ConfigError with the full path."""

    def __init__(self, field: str, problem: str, value: Any, remedy: str = "") -> None:
        super().__init__(field, problem, value, remedy)


class Frozen(BaseModel):
    """An immutable value that refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """`steps: yes` would be 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and bool not in _types_in(field.annotation):
                raise FieldProblem(name, "must not be true or false", value)
        return values

    @classmethod
    def checked(cls, values: Any, place: str = "") -> Self:
        """Validate plain data; the first problem becomes a ConfigError with its dotted path below `place`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, cls, values, place) from None


def explain(error: ValidationError, schema: type[BaseModel], values: Any, place: str = "") -> ConfigError:
    """Turn pydantic's first complaint into one line: dotted path, problem, value, remedy."""
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    cause = context.get("error")
    named = cause.args[:1] if isinstance(cause, FieldProblem) else ()
    location = _written_path((*first["loc"], *named), values)
    path = ".".join([*filter(None, [place]), *location]) or "recipe"
    if kind == "extra_forbidden":
        return ConfigError(path, "unknown name", remedy=_where_it_belongs(schema, location, first["loc"]))
    if kind == "missing":
        return ConfigError(path, "missing", remedy="the recipe must set it")
    if kind == "union_tag_not_found":
        return ConfigError(f"{path}.type", "missing", remedy="the recipe must say of which kind this is")
    if kind == "union_tag_invalid":
        return ConfigError(f"{path}.type", "unknown kind", context["tag"], f"one of {context['expected_tags']}")
    if kind in ("model_type", "model_attributes_type"):
        return ConfigError(path, "must be a section: names and their values", first["input"])
    if isinstance(cause, FieldProblem):
        return ConfigError(path, *cause.args[1:])
    problem = str(cause) if cause is not None else first["msg"].replace("Input should be", "must be")
    return ConfigError(path, problem[:1].lower() + problem[1:], first["input"])


def _written_path(location: tuple[str | int, ...], values: Any) -> list[str]:
    """The path as the user wrote it: pydantic adds the tag of a union's member, which no recipe holds."""
    path: list[str] = []
    tagged: Any = None  # the mapping whose tag was passed over already
    for position, part in enumerate(location):
        here = values
        last = position == len(location) - 1
        is_open = isinstance(here, dict) and not last and here is not tagged
        if is_open and (part not in here or here.get("type") == part):
            tagged = here
            continue
        path.append(str(part))
        if isinstance(here, dict):
            values = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            values = here[part]
    return path


def _types_in(annotation: Any) -> set[Any]:
    """Every plain type in an annotation; {bool} also where anything is allowed."""
    if annotation is Any:
        return {bool}
    parts = typing.get_args(annotation)
    return set().union(*(_types_in(part) for part in parts)) if parts else {annotation}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _where_it_belongs(schema: type[BaseModel], path: list[str], location: tuple[str | int, ...]) -> str:
    """What to do about an unknown name at `path`; pydantic's location says which member of a union was meant."""
    name, models = path[-1], _models_at(schema, path[:-1])
    kinds = {model: model.model_fields["type"].default for model in models if "type" in model.model_fields}
    for model, kind in kinds.items():
        if name in model.model_fields:
            return f"it belongs to type={kind}"
    meant = [model for model in models if kinds.get(model) in location] or models
    names = {field for model in meant for field in model.model_fields}
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(sorted(names))}"


def _models_at(schema: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """Every model that could stand at `path`, over all members of a union."""
    models: list[type[BaseModel]] = [schema]
    for name in path:
        if name.isdigit():
            continue  # an item of a list: its models are those of the list
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = [found for field in fields for found in _models_in(field.annotation)]
    return models
