"""Regular expressions of JSON texts: of those that a JSON schema describes, and of any object.

What is written matches no text that breaks the schema; what cannot be kept so is refused by its name. `outlines-core`
has a writer of its own, which passes over much in silence (a required name without a property, lengths beside a
pattern, siblings of enum) and has written 170 million characters of 2 kB before anybody can stop it.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from dllm_core.decoding.automaton import MAX_REGEX
from dllm_core.decoding.pattern import in_json_string
from dllm_core.errors import RequestError

_SPACE = "[ ]?"
_COMMA = f"{_SPACE},{_SPACE}"
_CHARACTER = r'([^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
_STRING = f'"{_CHARACTER}*"'
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_PLAIN = f"({_STRING}|{_NUMBER}|true|false|null)"

_OF_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "integer": frozenset[str](),
    "number": frozenset[str](),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_WHOLE = ("$ref", "anyOf", "enum", "const")  # each says all of a value; the type may stand beside the last two
_NOTES = frozenset(
    {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
)
_KEYWORDS = frozenset({"type", *_WHOLE}).union(_NOTES, *_OF_TYPE.values())
# Each more multiplies what a recursive schema comes to.
_MAX_REFS = 4


def schema_regex(schema: str) -> str:
    """The regular expression of JSON texts that keep a JSON schema, properties in its order and no others.

    All of a string must match its `pattern`; values that a schema says nothing of are those of `json_object_regex`; of
    what is recursive, texts are those that at most 4 `$ref` within each other describe. Raises RequestError for what is
    no schema, what no regular expression could keep, and what would be longer than one may be.
    """
    try:
        parsed = json.loads(schema)
        regex = _Writer(parsed).of(parsed, 0)
        if regex is not None:
            regex.encode()  # a lone surrogate has no UTF-8
            return regex
    except RecursionError:
        raise RequestError("constraint", "is nested too deep", schema) from None
    except ValueError as error:
        raise RequestError("constraint", f"is no JSON ({error})", schema) from None
    problem = f"describes no text with at most {_MAX_REFS} $ref within each other"
    raise RequestError("constraint", problem, schema, "leave out of `required` what is recursive")


def json_object_regex() -> str:
    """Of JSON objects whose values are plain, arrays of plain values, or objects of plain values.

    Deeper ones are no regular language; this has 403 states over bytes.
    """
    return _object_of(_any())


class _Writer:
    """Writes the expressions of one schema, each once: what a reference leads to may be asked for by many.

    An expression is None where there is no text, since references lead on too far.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._written: dict[tuple[str, int], str | None] = {}

    def of(self, schema: Any, depth: int) -> str | None:
        """Of a schema behind `depth` references. None of its parts is longer than all of it, which has a limit."""
        if not isinstance(schema, dict):
            raise _refused("holds what is no schema that can be kept", schema, "write an object")
        if unknown := sorted(set(schema) - _KEYWORDS):
            remedy = "leave them out, and check the answer"
            raise _refused(f"has keywords that are not kept: {', '.join(unknown)}", schema, remedy)
        if "$id" in schema and schema is not self._root:
            raise _refused("has an $id below its root, by which $ref would be read", schema, "leave it out")
        said = set(schema) - _NOTES
        for keyword in _WHOLE:
            if keyword in said:
                others = said - {keyword, "type"} if keyword in ("enum", "const") else said - {keyword}
                if others:
                    problem = f"has {', '.join(sorted(others))} beside {keyword}, which is not kept"
                    raise _refused(problem, schema, "say all in one of them")
        if "$ref" in said:
            return self._behind(schema["$ref"], depth)
        if "anyOf" in said:
            return self._any_of(schema["anyOf"], depth)
        if "enum" in said or "const" in said:
            return _among(schema["enum"] if "enum" in said else [schema["const"]], schema.get("type"))
        if not said:
            return _any()
        kinds = [kind for kind, own in _OF_TYPE.items() if said <= own]
        if "type" in said:
            kinds = _kinds(schema["type"])
        elif not kinds:
            raise _refused("has keywords of several types and no type", schema, "say `type`")
        found = [regex for kind in kinds if (regex := self._of_kind(kind, schema, depth)) is not None]
        return _either(found)

    def _of_kind(self, kind: str, schema: dict[str, Any], depth: int) -> str | None:
        if kind == "string":
            return _string(schema)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "object":
            return self._object(schema, depth)
        return {"integer": "-?(0|[1-9][0-9]*)", "number": _NUMBER, "boolean": "(true|false)", "null": "null"}[kind]

    def _behind(self, ref: Any, depth: int) -> str | None:
        if depth == _MAX_REFS:
            return None
        if not isinstance(ref, str) or not re.fullmatch("#(/.*)?", ref, re.DOTALL):
            raise _refused("has a $ref that does not lead into the schema itself", ref, "begin it with #/")
        if (ref, depth) not in self._written:
            found = self._root
            for name in ref.split("/")[1:]:
                name = name.replace("~1", "/").replace("~0", "~")
                if not isinstance(found, dict) or name not in found:
                    raise _refused("has a $ref that leads nowhere", ref)
                found = found[name]
            self._written[ref, depth] = self.of(found, depth + 1)
        return self._written[ref, depth]

    def _any_of(self, schemas: Any, depth: int) -> str | None:
        if not isinstance(schemas, list) or not schemas:
            raise _refused("anyOf must be a list of schemas", schemas)
        found = [regex for schema in schemas if (regex := self.of(schema, depth)) is not None]
        return _either(found)

    def _array(self, schema: dict[str, Any], depth: int) -> str | None:
        least, most = _counts(schema, "minItems", "maxItems")
        item = self.of(schema["items"], depth) if "items" in schema and most != 0 else _any()
        if item is None and least:
            return None
        if item is None or most == 0:
            return rf"\[{_SPACE}\]"
        _check_length(2 * len(item))
        more = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        return rf"\[{_SPACE}({item}({_COMMA}{item}){more}){'' if least else '?'}{_SPACE}\]"

    def _object(self, schema: dict[str, Any], depth: int) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise _refused("properties must be an object", properties)
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _refused("required must be a list of names", required)
        if absent := [name for name in required if name not in properties]:
            raise _refused(f"required has names that properties lack: {', '.join(absent)}", required, "add them")
        needed_names = frozenset(required)
        additional = schema.get("additionalProperties", True)
        if "properties" not in schema and additional is not False:
            value = _any() if additional is True else self.of(additional, depth)
            if value is not None:
                _check_length(2 * len(value))
                return _object_of(value)
        members, needed = list[str](), list[bool]()
        for name, part in properties.items():
            value = self.of(part, depth)
            if value is not None:
                members.append(f"{re.escape(_spelled(name))}{_SPACE}:{_SPACE}{value}")
                needed.append(name in needed_names)
            elif name in needed_names:
                return None
        return rf"\{{{_SPACE}{_members(members, needed)}{_SPACE}\}}"


def _members(members: list[str], needed: list[bool]) -> str:
    """Members in order with commas between those that stand; where none must, the first that does is listed."""
    if not members:
        return ""
    if True not in needed:
        _check_length(sum(len(member) * (i + 1) for i, member in enumerate(members)))
        behind = [f"({_COMMA}{member})?" for member in members]
        firsts = [f"{member}{''.join(behind[i + 1 :])}" for i, member in enumerate(members)]
        return f"({_joined('|', firsts)})?"
    last = max(i for i, is_needed in enumerate(needed) if is_needed)
    parts = list[str]()
    for i, (member, is_needed) in enumerate(zip(members, needed, strict=True)):
        part = f"{member}{_COMMA}" if i < last else f"{_COMMA}{member}" if i > last else member
        parts.append(part if is_needed else f"({part})?")
    return _joined("", parts)


def _string(schema: dict[str, Any]) -> str:
    least, most = _counts(schema, "minLength", "maxLength")
    if "pattern" not in schema:
        return f'"{_CHARACTER}{{{least},{"" if most is None else most}}}"'
    if least or most is not None:
        raise _refused("has lengths beside a pattern, which are not kept", schema, "say them in the pattern")
    if not isinstance(schema["pattern"], str):
        raise _refused("pattern must be a string", schema["pattern"])
    return f'"(?:{in_json_string(schema["pattern"])})"'


def _among(values: Any, type_: Any) -> str:
    """Of the values of an enum that have its type, if it has one."""
    if not isinstance(values, list):
        raise _refused("enum must be a list", values)
    kinds = _kinds(type_) if type_ is not None else list(_OF_TYPE)
    regex = _either([_of_value(value) for value in values if any(_is_a(kind, value) for kind in kinds)])
    if regex is None:
        raise _refused("enum or const has no value of its type", values)
    return regex


def _is_a(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    return kind == {str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]


def _kinds(type_: Any) -> list[str]:
    kinds = type_ if isinstance(type_, list) else [type_]
    if not kinds or not all(isinstance(kind, str) and kind in _OF_TYPE for kind in kinds):
        raise _refused("is no JSON schema that can be kept: type is none of JSON's", type_)
    return list(dict.fromkeys(kinds))


def _counts(schema: dict[str, Any], low: str, high: str) -> tuple[int, int | None]:
    """The least and the most, None for any."""
    for name in (low, high):
        value = schema.get(name, 0)
        if type(value) is not int or value < 0:
            raise _refused(f"{name} must be a count", value, "give an integer from 0 on")
    least, most = schema.get(low, 0), schema.get(high)
    if most is not None and least > most:
        raise _refused(f"{low} is above {high}", [least, most])
    return least, most


def _of_value(value: Any) -> str:
    """Of one value, with a space where there may be one."""
    if isinstance(value, dict):
        members = [f"{re.escape(_spelled(name))}{_SPACE}:{_SPACE}{_of_value(part)}" for name, part in value.items()]
        return rf"\{{{_SPACE}{_COMMA.join(members)}{_SPACE}\}}"
    if isinstance(value, list):
        return rf"\[{_SPACE}{_COMMA.join(map(_of_value, value))}{_SPACE}\]"
    return re.escape(_spelled(value))


def _spelled(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _any() -> str:
    array = rf"\[{_SPACE}({_PLAIN}({_COMMA}{_PLAIN})*)?{_SPACE}\]"
    return f"({_PLAIN}|{array}|{_object_of(_PLAIN)})"


def _object_of(value: str) -> str:
    member = f"{_STRING}{_SPACE}:{_SPACE}{value}"
    return rf"\{{{_SPACE}({member}({_COMMA}{member})*)?{_SPACE}\}}"


def _either(parts: list[str]) -> str | None:
    """An expression of what any of the parts matches; None if there are none."""
    regex = _joined("|", parts)
    return regex if len(parts) == 1 else f"({regex})" if parts else None


def _joined(between: str, parts: Iterable[str]) -> str:
    """Parts with something between them, refused before what is longer than an expression may be is made."""
    kept, length = list[str](), 0
    for part in parts:
        kept.append(part)
        length += len(part) + len(between)
        _check_length(length)
    return between.join(kept)


def _check_length(length: int) -> None:
    if length > MAX_REGEX:
        problem = f"comes to a regular expression of more than {MAX_REGEX} characters"
        remedy = "write fewer references, optional properties, and arrays in arrays"
        raise RequestError("constraint", problem, remedy=remedy)


def _refused(problem: str, value: Any, remedy: str = "") -> RequestError:
    return RequestError("constraint", problem, value, remedy)
