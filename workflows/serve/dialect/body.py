"""From the bytes of a body to a checked request, or one line that names the parameter at fault."""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dllm_core.errors import RequestError
from workflows.serve.config import Limits

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "best_of": (1, None),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None,),
    "functions": (None, []),
    "store": (None, False),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
}
_TYPES = frozenset({"str", "list", "int", "constrained", "tagged", "function", "model", "Hole"})  # names of forms

_STRUCTURE = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[][{}]', re.DOTALL)  # a bracket, or a string, in which it is text

Asked = TypeVar("Asked", bound=BaseModel)


def parse_body(kind: type[Asked], body: bytes, limits: Limits = Limits()) -> Asked:  # noqa: B008 (frozen)
    """A checked request of one route, or RequestError with the parameter at fault.

    null is the default of what has one, as in OpenAI's own API.
    """
    values = _parsed(body, limits)
    for name, neutral in _NEUTRAL.items():
        if name in values and name not in kind.model_fields:
            value = values.pop(name)
            if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in neutral):
                raise RequestError(name, "is not supported", value, "leave it out")
    for name, field in kind.model_fields.items():
        if name in values and values[name] is None and not field.is_required():
            del values[name]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        of_first = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
        first = max(of_first, key=lambda one: len(one["loc"]))  # of several forms, the one that fitted furthest
        location = [str(part) for part in first["loc"] if str(part).isidentifier()]
        known = location[:1] + [part for part in location[1:] if part not in _TYPES]  # `model` is a parameter too
        message = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(".".join(known) or "body", message[0].lower() + message[1:]) from None


def _parsed(body: bytes, limits: Limits) -> dict[str, Any]:
    try:
        text = body.decode("utf-8")
        level = deepest = 0
        for found in _STRUCTURE.finditer(text):
            mark = text[found.start()]
            level += (mark in "[{") - (mark in "]}")
            deepest = max(deepest, level)
        if deepest > limits.json_depth:  # before it is parsed, which recursion might end
            raise RequestError("body", f"nested deeper than {limits.json_depth}")
        values = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8
    except RequestError:
        raise
    except UnicodeError:
        raise RequestError("body", "holds text that is not Unicode (bad UTF-8 or a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise RequestError("body", f"is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise RequestError("body", "must be a JSON object")
    return values


def _refuse_constant(name: str) -> float:
    raise RequestError("body", "holds a number that JSON does not have", name)


def depth(value: Any) -> int:
    """How deep JSON is nested; a plain value is 0 deep."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0
