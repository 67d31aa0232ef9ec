"""Records: what a unit yields. A document, or a bad record that keeps its bytes, its place and the reason.

A conversation becomes parts: what is only read (system, user), and what is learned (the assistant's turns). A
preference becomes two: the prompt with the answer that was preferred, and with the other one.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dllm_core.data.corpus import AnyRecord, PairRecord, PreferenceRecord, TextRecord

_BYTE_ORDER_MARK = "\ufeff"
_TWICE = object()  # the value of a name that stands twice in one JSON object, of which the second would win
ROLES = ("system", "user", "assistant")
_CALLS = ("tool_calls", "function_call")  # what a message says beside its content


@dataclass(frozen=True)
class Part:
    """A piece of a document. role: None in a prompt/answer pair; is_learned: its tokens count in the loss."""

    role: str | None
    text: str
    is_learned: bool


@dataclass(frozen=True)
class Document:
    """A clean text and where it came from. parts: of a conversation or a pair; empty: all of the text is learned.

    rejected: of a preference, whose parts are the prompt and the chosen answer, the same prompt and the other answer.
    """

    text: str
    key: str
    offset: int
    parts: tuple[Part, ...] = ()
    rejected: tuple[Part, ...] = ()

    @property
    def runs(self) -> tuple[tuple[Part, ...], ...]:
        """Its token runs as parts: one, or the two of a preference."""
        return (self.parts, self.rejected) if self.rejected else (self.parts,)

    @property
    def subject(self) -> str:
        """The text whose hash decides its side: of a preference the prompt, so that one prompt is on one side alone."""
        # Not all that is not learned: an answer of several turns has the user's among its own.
        both = zip(self.parts, self.rejected, strict=False)
        shared = takewhile(lambda pair: pair[0] == pair[1] and not pair[0].is_learned, both)
        prompt = "\n".join(part.text for part, _ in shared)
        return self.text if is_blank(prompt) else prompt

    @property
    def pieces(self) -> list[str]:
        """All of its text in pieces that are encoded by themselves, each once."""
        answer = [part for part in self.rejected if part.is_learned]
        return [part.text for part in (*self.parts, *answer)] or [self.text]


@dataclass(frozen=True)
class BadRecord:
    """Bytes that are no document, kept for the quarantine. offset: of the bad byte, or of the record."""

    key: str
    offset: int
    reason: str
    raw: bytes


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space; `strip` would copy the text to tell."""
    return not text or text.isspace()


def decoded(key: str, offset: int, raw: bytes) -> Document | BadRecord:
    """UTF-8, without the byte order mark that may open a file."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(key, offset + error.start, f"not UTF-8 ({error.reason})", raw)
    return Document(text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text, key, offset)


def from_json(record: Any, key: str, offset: int, raw: bytes) -> Document | BadRecord:
    """One line of JSON. An empty line is an empty document, as it is in plain text."""
    line = decoded(key, offset, raw)
    if isinstance(line, BadRecord) or is_blank(line.text):
        return line
    try:
        values = _parsed(line.text)
    except (ValueError, RecursionError):
        return BadRecord(key, offset, "not JSON", raw)
    return from_fields(record, values, key, offset, raw)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found |= {name: _TWICE for name, number in Counter(name for name, _ in pairs).items() if number > 1}
    return found


_parsed = json.JSONDecoder(object_pairs_hook=_once).decode


def from_fields(record: Any, values: Any, key: str, offset: int, raw: bytes) -> Document | BadRecord:
    """Named fields as a document, by the record section of the source."""
    try:
        if not isinstance(values, Mapping):
            raise _NotADocumentError("no field " + repr(fields_of(record)[0]))
        if isinstance(record, TextRecord):
            return Document(_text_in(values, record.field), key, offset)
        if isinstance(record, PairRecord):
            prompt, answer = _text_in(values, record.prompt_field), _text_in(values, record.answer_field)
            parts: tuple[Part, ...] = (Part(None, prompt, is_learned=False), Part(None, answer, is_learned=True))
        elif isinstance(record, PreferenceRecord):
            return _preference(values, record, key, offset)
        else:
            parts = _conversation(values, record.field)
    except _NotADocumentError as error:
        return BadRecord(key, offset, str(error), raw)
    return Document("\n".join(part.text for part in parts), key, offset, parts)


class _NotADocumentError(Exception):
    """Its message is the reason."""


def fields_of(record: AnyRecord) -> tuple[str, ...]:
    """The fields that a document is made of, in the order in which they are asked for."""
    if isinstance(record, PairRecord):
        return record.prompt_field, record.answer_field
    if isinstance(record, PreferenceRecord):
        return record.prompt_field, record.chosen_field, record.rejected_field
    return (record.field,)


def _value_in(values: Mapping[str, Any], field: str) -> Any:
    if field not in values:
        raise _NotADocumentError(f"no field {field!r}")
    if values[field] is _TWICE:
        raise _NotADocumentError(f"{field!r} is there twice")
    return values[field]


def _text_in(values: Mapping[str, Any], field: str) -> str:
    text = _value_in(values, field)
    if not isinstance(text, str):
        raise _NotADocumentError(f"{field!r} is not a string")
    if not is_unicode(text):  # a lone surrogate is legal JSON and no text
        raise _NotADocumentError(f"{field!r} is not Unicode")
    return text


def _conversation(values: Mapping[str, Any], field: str) -> tuple[Part, ...]:
    """Messages of which the assistant's are learned; one at least."""
    parts = _messages(values, field)
    if not any(part.is_learned for part in parts):
        raise _NotADocumentError(f"{field!r} holds no message of the assistant")
    return parts


def _messages(values: Mapping[str, Any], field: str) -> tuple[Part, ...]:
    messages = _value_in(values, field)
    if not isinstance(messages, list) or not messages:
        raise _NotADocumentError(f"{field!r} is no list of messages")
    parts = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise _NotADocumentError(f"{field!r} holds a message without a role of {', '.join(ROLES)}")
        if any(message.get(name) for name in _CALLS):  # empty ones are a table's: each of its messages has all fields
            raise _NotADocumentError(f"{field!r} holds a call of a tool, for which there is no marker")
        role = message["role"]
        parts.append(Part(role, _text_in(message, "content"), is_learned=role == "assistant"))
    return tuple(parts)


def _preference(values: Mapping[str, Any], record: PreferenceRecord, key: str, offset: int) -> Document:
    if record.conversations:
        read = _messages(values, record.prompt_field)
        prompt = tuple(Part(part.role, part.text, is_learned=False) for part in read)
    else:
        prompt = (Part(None, _text_in(values, record.prompt_field), is_learned=False),)
    chosen, rejected = (_answer(values, record, field) for field in (record.chosen_field, record.rejected_field))
    if chosen == rejected:
        raise _NotADocumentError(f"{record.chosen_field!r} and {record.rejected_field!r} are the same")
    text = "\n".join(part.text for part in (*prompt, *chosen, *rejected))
    return Document(text, key, offset, (*prompt, *chosen), (*prompt, *rejected))


def _answer(values: Mapping[str, Any], record: PreferenceRecord, field: str) -> tuple[Part, ...]:
    if record.conversations and isinstance(values.get(field), list):
        return _conversation(values, field)
    return (Part("assistant" if record.conversations else None, _text_in(values, field), is_learned=True),)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: no lone surrogate is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
