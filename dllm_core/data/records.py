"""Records: what a unit yields. A document, or a bad record that keeps its bytes, its place and the reason.

A conversation becomes parts: what is only read (system, user), and what is learned (the assistant's turns).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllm_core.data.corpus import ChatRecord, PairRecord, TextRecord

_BYTE_ORDER_MARK = "\ufeff"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Part:
    """A piece of a document. role: None in a prompt/answer pair; is_learned: its tokens count in the loss."""

    role: str | None
    text: str
    is_learned: bool


@dataclass(frozen=True)
class Document:
    """A clean text and where it came from. parts: of a conversation or a pair; empty: all of the text is learned."""

    text: str
    key: str
    offset: int
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class BadRecord:
    """Bytes that are no document, kept for the quarantine. offset: of the bad byte, or of the record."""

    key: str
    offset: int
    reason: str
    raw: bytes


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
    if isinstance(line, BadRecord) or not line.text.strip():
        return line
    try:
        values = json.loads(line.text)
    except (ValueError, RecursionError):
        return BadRecord(key, offset, "not JSON", raw)
    return from_fields(record, values, key, offset, raw)


def from_fields(record: Any, values: Any, key: str, offset: int, raw: bytes) -> Document | BadRecord:
    """Named fields as a document, by the record section of the source."""
    try:
        if not isinstance(values, Mapping):
            raise _NotADocumentError("no field " + repr(_first_field(record)))
        if isinstance(record, TextRecord):
            return Document(_text_in(values, record.field), key, offset)
        if isinstance(record, PairRecord):
            prompt, answer = _text_in(values, record.prompt_field), _text_in(values, record.answer_field)
            parts: tuple[Part, ...] = (Part(None, prompt, is_learned=False), Part(None, answer, is_learned=True))
        else:
            parts = _chat(values, record)
    except _NotADocumentError as error:
        return BadRecord(key, offset, str(error), raw)
    return Document("\n".join(part.text for part in parts), key, offset, parts)


class _NotADocumentError(Exception):
    """Its message is the reason."""


def _first_field(record: Any) -> str:
    return record.prompt_field if isinstance(record, PairRecord) else str(record.field)


def _text_in(values: Mapping[str, Any], field: str) -> str:
    if field not in values:
        raise _NotADocumentError(f"no field {field!r}")
    text = values[field]
    if not isinstance(text, str):
        raise _NotADocumentError(f"{field!r} is not a string")
    if not _is_unicode(text):  # a lone surrogate is legal JSON and no text
        raise _NotADocumentError(f"{field!r} is not Unicode")
    return text


def _chat(values: Mapping[str, Any], record: ChatRecord) -> tuple[Part, ...]:
    if record.field not in values:
        raise _NotADocumentError(f"no field {record.field!r}")
    messages = values[record.field]
    if not isinstance(messages, list) or not messages:
        raise _NotADocumentError(f"{record.field!r} is no list of messages")
    parts = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise _NotADocumentError(f"{record.field!r} holds a message without a role of {', '.join(ROLES)}")
        role = message["role"]
        parts.append(Part(role, _text_in(message, "content"), is_learned=role == "assistant"))
    if not any(part.is_learned for part in parts):
        raise _NotADocumentError(f"{record.field!r} holds no message of the assistant")
    return tuple(parts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
