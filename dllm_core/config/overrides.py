"""Read a YAML recipe and apply `dotted.path=value` overrides; values are YAML too (`train.steps=200`)."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dllm_core.errors import ConfigError

_INDICATORS = "*&!|>%@`#"
_QUOTES_AND_BRACKETS = "'\"[{"
_COMMENT = re.compile(r"\s#")
_PADDED = re.compile(r"[-+]?0[0-9_]+")


class _TwiceError(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping; `problem` is the key."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys: the second one would silently win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise _TwiceError(problem=key, problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """`012` is twelve. YAML 1.1, which the library reads, has it octal: seeds from 008 to 010 would be 8, 9 and 8."""
    is_padded = _PADDED.fullmatch(node.value) is not None
    found: int = int(node.value.replace("_", "")) if is_padded else loader.construct_yaml_int(node)
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML; a syntax error names its place and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(place, "is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-31
        mark = getattr(error, "problem_mark", None)
        where = f"{place} line {mark.line + 1}" if mark is not None else place
        if isinstance(error, _TwiceError):
            raise ConfigError(where, "the key is there twice", error.problem, "keep one") from None
        raise ConfigError(where, f"not YAML ({getattr(error, 'problem', None) or error})") from None


def parse_json_object(text: str, place: str) -> dict[str, Any]:
    """A JSON object; what is none is named by its place, and so is a key that stands twice: the second would win."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            numbers = Counter(name for name, _ in pairs)
            raise ConfigError(place, "the key is there twice", next(n for n in found if numbers[n] > 1), "keep one")
        return found

    try:
        values = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ConfigError(place, "is nested too deep") from None
    except ValueError as error:
        raise ConfigError(place, f"is not JSON ({error})", text) from None
    if not isinstance(values, dict):
        raise ConfigError(place, "must be a JSON object", values)
    return values


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), "no such recipe", remedy="name a .yaml file or a run folder") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in its name
        raise ConfigError(str(path), f"cannot be read ({error})") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(str(path), "a recipe is a mapping of sections", type(values).__name__)
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with every `a.b=c` applied; an item of a list is named by its number, from 0 on.

    Changing `x.type` drops the keys of the old kind that `values` had, and none that an override has set before it.
    """
    result: dict[str, Any] = _copy(values)
    said: list[list[str]] = []
    for item in overrides:
        path, equals, text = item.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(item, "not an override", remedy="write dotted.path=value, e.g. train.steps=200")
        value = _override_value(text.strip(), path)
        here: Any = result
        for depth, name in enumerate(names[:-1]):
            key = _key(here, name, names[: depth + 1])
            if not isinstance(here[key] if isinstance(here, list) else here.get(key), dict | list):
                here[key] = {}
            here = here[key]
        key = _key(here, names[-1], names)
        if key == "type" and here.get("type", value) != value:
            for name in [name for name in here if not _is_within([*names[:-1], name], said)]:
                del here[name]
        here[key] = value
        said.append(names)
    return result


def _key(here: Any, name: str, path: list[str]) -> Any:
    """What a name means in a mapping, or the number that it is in a list."""
    if not isinstance(here, list):
        return name
    if not (name.isascii() and name.isdigit() and int(name) < len(here)):
        known = f"items 0 to {len(here) - 1}" if here else "no item"
        raise ConfigError(".".join(path), "no such item of a list", name, f"it has {known}")
    return int(name)


def _is_within(path: list[str], said: list[list[str]]) -> bool:
    """Whether an override has set what is at a path, below it or around it."""
    return any(one[: len(path)] == path or path[: len(one)] == one for one in said)


def _override_value(text: str, path: str) -> Any:
    """YAML, but what only an anchor, a tag or a block could begin with is text: `corpus.glob=*.md` needs no quotes.

    Nor does ` #`, which begins a comment in a file: of `corpus.path=texts/part #2` nothing is left out.
    """
    if not text:
        return None
    is_plain = text[0] not in _QUOTES_AND_BRACKETS
    return text if text[0] in _INDICATORS or (is_plain and _COMMENT.search(text)) else parse_yaml(text, path)


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
