"""Document filters: sections of the recipe that say by rule, and without knowing a language, which texts are dropped.

A filter is a pure function of one text. `reason` answers None to keep it, else the short, stable name of the rule that
dropped it, which is what the accounting counts by. Characters are Unicode code points, and every share is in [0, 1]:
a quotient, which at its limit is the limit; 0.55 * 100 is more than 55.
Measured on one core of an AMD EPYC with documents of 3 kB, MB/s of UTF-8 (a tokenizer's core does about 20): length
9,000 in any script; characters 220 to 250, Chinese 480; repetition 45 to 50, Chinese 21 (a word is a character); all
three in turn 40, Chinese 20, lines of 55 bytes 17.
"""

import importlib
import inspect
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from operator import mul
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.errors import DataError

# Scripts that put no space between words: Thai, Lao, Tibetan, Myanmar, Khmer, Han, kana, bopomofo. Each letter of
# them counts as a word, since finding their words would take a dictionary of the language.
UNSPACED_SCRIPTS = (
    (0x0E01, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3041, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_RULE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

CATEGORIES = (
    *("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe"),
    *("Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn"),
)
_OTHER, _LETTER, _SPACE, _CONTROL, _REPLACEMENT = range(5)


class DocumentFilter(Protocol):
    """Decides on a document by its text alone: the same text gets the same answer in every process and on every day."""

    def reason(self, text: str) -> str | None:
        """None to keep the text, else the rule that drops it: 1 to 64 of A-Z a-z 0-9 . _ -, no figures of the text."""


class LengthFilter(Frozen):
    """Drops a text of fewer than `min_chars` or more than `max_chars` characters."""

    type: Literal["length"] = "length"
    min_chars: int = Field(1, ge=0)
    max_chars: int | None = Field(None, ge=1, description="null: no limit")

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise FieldProblem("max_chars", f"must be at least min_chars={self.min_chars}", self.max_chars)
        return self

    def reason(self, text: str) -> str | None:
        """`length.too_short` or `length.too_long`."""
        if len(text) < self.min_chars:
            return "length.too_short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "length.too_long"
        return None


class RepetitionFilter(Frozen):
    """Drops a text that repeats itself. Source of rules and limits: Gopher, arXiv:2112.11446, table A1.

    Lines are stripped and blank ones left out; the share is that of the characters in second and later copies of a
    line. Words are what spaces part, single letters in UNSPACED_SCRIPTS; the share of the most frequent n-gram is that
    of its occurrences (which may overlap, so it can pass 1) in the characters of all words. An n-gram that occurs once
    is no repetition. In a short text one repeated phrase is a large share: n-grams count from `min_words` on, as
    Gopher's do (it has no document below 50 words).
    """

    type: Literal["repetition"] = "repetition"
    max_line_fraction: float = Field(0.2, ge=0, le=1, description="share of characters in repeated lines")
    max_ngram_fraction: float = Field(0.2, ge=0, le=1, description="share of characters in the most frequent n-gram")
    ngram: int = Field(2, ge=1, le=16, description="words; Gopher allows 0.20 for 2, 0.18 for 3, 0.16 for 4")
    min_words: int = Field(50, ge=0, description="shorter texts are judged by their lines alone")

    def reason(self, text: str) -> str | None:
        """`repetition.lines` or `repetition.ngram`."""
        if _repeated_line_share(text) > self.max_line_fraction:
            return "repetition.lines"
        words = _words(text)
        if len(words) >= self.min_words and _is_repetitive(words, self.ngram, self.max_ngram_fraction):
            return "repetition.ngram"
        return None


class CharacterFilter(Frozen):
    """Drops a text by the kinds of its characters (Unicode general categories); shares are of those that are no space.

    Letters are L* and the marks M* without which many scripts cannot be written. Control characters are Cc but tab and
    line ends, private use (Co) and surrogates (Cs); format characters (Cf) such as the joiners are text. U+FFFD is what
    a decoder leaves where bytes were damaged. A text of nothing but spaces is kept: it has no shares.
    """

    type: Literal["characters"] = "characters"
    min_letter_fraction: float = Field(0.5, ge=0, le=1, description="prose 0.95, source code 0.6 to 0.8")
    max_control_fraction: float = Field(0.01, ge=0, le=1)
    max_replacement_fraction: float = Field(0.01, ge=0, le=1, description="share of U+FFFD")

    def reason(self, text: str) -> str | None:
        """`characters.replacement`, `characters.control` or `characters.few_letters`."""
        kinds = _kinds_of(text)
        solid = len(text) - kinds.count(_SPACE)
        if not solid:
            return None
        if kinds.count(_REPLACEMENT) / solid > self.max_replacement_fraction:
            return "characters.replacement"
        if kinds.count(_CONTROL) / solid > self.max_control_fraction:
            return "characters.control"
        if kinds.count(_LETTER) / solid < self.min_letter_fraction:
            return "characters.few_letters"
        return None


class ImportedFilter(Frozen):
    """A filter of your own, named by `package.module:Class` and made with `options`; it is a DocumentFilter.

    Checking the section imports the class and compares `options` with its constructor. It is constructed in the worker
    that first asks it, once a process, so it may load what it needs there.
    """

    type: Literal["imported"] = "imported"
    path: str = Field(description="package.module:Class, importable by the workers too")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="keyword arguments of the class")

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if not _IMPORT_PATH.fullmatch(self.path):
            raise FieldProblem("path", "is not an import path", self.path, "write package.module:Class")
        try:
            found = _named(self.path)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            remedy = "install its package here and on the workers, or name its folder in PYTHONPATH"
            raise FieldProblem("path", f"cannot be imported ({reason})", self.path, remedy) from error
        if not isinstance(found, type) or not callable(getattr(found, "reason", None)):
            remedy = "a filter is a class with `def reason(self, text: str) -> str | None`"
            raise FieldProblem("path", "is no filter", self.path, remedy)
        try:
            inspect.signature(found).bind(**self.options)
        except TypeError as error:
            remedy = f"it takes {inspect.signature(found)}"
            raise FieldProblem("options", f"do not fit {found.__name__} ({error})", self.options, remedy) from error
        return self

    def reason(self, text: str) -> str | None:
        """What the class answers; see `first_reason` for how its mistakes are reported."""
        return _made(self.path, json.dumps(self.options, sort_keys=True)).reason(text)


AnyFilter = Annotated[LengthFilter | RepetitionFilter | CharacterFilter | ImportedFilter, Field(discriminator="type")]


def first_reason(filters: Sequence[DocumentFilter], text: str) -> str | None:
    """The rule of the first filter that drops the text, None if all keep it.

    A filter that raises, or answers anything but None or a rule name, is a DataError that names the filter: a record
    is never dropped, nor kept, by mistake.
    """
    for position, chosen in enumerate(filters):
        try:
            rule = chosen.reason(text)
        except Exception as error:
            problem = f"failed on a text of {len(text)} characters ({type(error).__name__}: {error})"
            raise DataError(_place(position, chosen), problem, remedy="make it answer for every text") from error
        if rule is None:
            continue
        if not isinstance(rule, str) or not _RULE.fullmatch(rule):
            raise DataError(
                _place(position, chosen), "gave no rule name", rule, "return None or 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        return rule
    return None


@cache
def category_table() -> NDArray[np.uint8]:
    """Index into CATEGORIES of each code point, [0x110000]. 0.13 s at the first call of a process."""
    index = {name: position for position, name in enumerate(CATEGORIES)}
    return np.fromiter((index[unicodedata.category(chr(code))] for code in range(0x110000)), np.uint8, 0x110000)


def _place(position: int, chosen: DocumentFilter) -> str:
    name = getattr(chosen, "path", None) or getattr(chosen, "type", None) or type(chosen).__qualname__
    return f"filters.{position} ({name})"


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@lru_cache(maxsize=64)  # one object a process for each section: a model it holds is loaded once
def _made(path: str, options: str) -> DocumentFilter:
    made: DocumentFilter = _named(path)(**json.loads(options))
    return made


def _repeated_line_share(text: str) -> float:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def _words(text: str) -> list[str]:
    """What spaces part; a letter of UNSPACED_SCRIPTS stands alone."""
    if text.isascii():
        return text.split()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_alone = unspaced_letters()[codes]
    if not is_alone.any():
        return text.split()
    # Putting a space on each side and splitting takes a third of the time of a regular expression.
    spread = np.repeat(codes, 1 + 2 * is_alone)
    after = (np.cumsum(1 + 2 * is_alone) - 1)[is_alone.view(bool)]
    spread[after] = spread[after - 2] = ord(" ")
    return spread.tobytes().decode("utf-32-le", "surrogatepass").split()


@cache
def unspaced_letters() -> NDArray[np.uint8]:
    """[0x110000]: 1 for the code points of UNSPACED_SCRIPTS, each of which counts as a word."""
    table = np.zeros(0x110000, np.uint8)
    for first, last in UNSPACED_SCRIPTS:
        table[first : last + 1] = 1
    return table


def _is_repetitive(words: list[str], ngram: int, limit: float) -> bool:
    """Whether some n-gram that occurs twice or more has more than `limit` of the characters in words."""
    total = len("".join(words))
    # An n-gram occurs at most as often as its rarest word, so n times the largest share of one word bounds every
    # n-gram's. Nearly every text ends here, at a third of the cost of counting its n-grams.
    counts = Counter(words)
    if not total or ngram * max(map(mul, counts.values(), map(len, counts))) / total <= limit:
        return False
    grams = Counter(zip(*(words[shift:] for shift in range(ngram)), strict=False))
    return any(count > 1 and count * sum(map(len, gram)) / total > limit for gram, count in grams.items())


def _kinds_of(text: str) -> bytes:
    """One byte a character, its kind; counting a byte in bytes runs at memory speed."""
    if text.isascii():
        return text.encode("ascii").translate(_ascii_kinds())
    return _kind_table()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].tobytes()


@cache
def _ascii_kinds() -> bytes:
    return _kind_table()[:256].tobytes()


@cache
def _kind_table() -> NDArray[np.uint8]:
    of_category = {"L": _LETTER, "M": _LETTER, "Z": _SPACE, "Cc": _CONTROL, "Co": _CONTROL, "Cs": _CONTROL}
    kinds = [of_category.get(name, of_category.get(name[0], _OTHER)) for name in CATEGORIES]
    table = np.array(kinds, np.uint8)[category_table()]
    table[[ord(space) for space in "\t\n\v\f\r"]] = _SPACE
    table[0xFFFD] = _REPLACEMENT
    return table
