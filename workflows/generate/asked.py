"""What `dllm generate` was asked for, as text or ids: a prompt, an infill template, a span to edit, a file of them.

| asked | is |
|---|---|
| `prompt`, `suffix` | text around one canvas of `decode.max_tokens`, or around nothing behind it |
| `infill` | text with holes: `[[8]]` of 8 tokens, `[[2-8]]` of 2 to 8, `[[]]` of 1 to `decode.max_tokens` |
| `edit` | characters BEGIN:STOP of the prompt, noised at `strength` and denoised |

A file has one a line: text is a prompt; a JSON object has the fields of `Asked`.
"""

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.config.overrides import parse_json_object
from dllm_core.data.records import is_unicode
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import OpenHole, Piece, Request, with_holes
from dllm_core.decoding.schema import schema_regex
from dllm_core.errors import ConfigError, DataError, RequestError

_HOLE = re.compile(r"\[\[(?:(\d+)(?:-(\d+))?)?\]\]")
_SPAN = re.compile(r"(\d+):(\d+)")


class Asked(Frozen):
    """One thing to decode. prompt_ids: the prompt as token ids; stop: strings of which the first ends the answer to a
    prompt: text with holes stands whole.

    regex, json_schema: what all of the answer matches.
    """

    prompt: str = ""
    prompt_ids: tuple[int, ...] | None = None
    suffix: str = ""
    infill: str | None = None
    edit: str | None = None
    strength: float = Field(0.5, gt=0, le=1)
    seed: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    regex: str | None = None
    json_schema: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        for name in ("prompt", "suffix", "infill", "regex", "json_schema"):
            if not is_unicode(getattr(self, name) or ""):  # bytes of a command line, a lone surrogate of JSON
                raise FieldProblem(name, "is not Unicode", getattr(self, name), "write it as UTF-8")
        if self.prompt_ids is not None and self.prompt:
            raise FieldProblem("prompt_ids", "is another form of prompt", list(self.prompt_ids), "give one of them")
        if self.infill is not None:
            if self.prompt or self.prompt_ids is not None or self.suffix or self.edit is not None:
                raise FieldProblem("infill", "holds all of the text", self.infill, "leave out prompt, suffix and edit")
            if not _HOLE.search(self.infill):
                raise FieldProblem("infill", "has no hole", self.infill, "write one as [[8]], [[2-8]] or [[]]")
        if self.edit is not None:
            if self.prompt_ids is not None or self.suffix:
                raise FieldProblem("edit", "is a span of the prompt's text", self.edit, "give that alone")
            begin, stop = self.span
            if not 0 <= begin < stop <= len(self.prompt):
                problem = f"must be characters BEGIN:STOP within the prompt's {len(self.prompt)}"
                raise FieldProblem("edit", problem, self.edit)
        if self.regex is not None and self.json_schema is not None:
            raise FieldProblem("json_schema", "is another form of regex", self.json_schema, "give one of them")
        if any(not stop for stop in self.stop):
            raise FieldProblem("stop", "must not be empty", list(self.stop))
        if self.stop and (self.infill is not None or self.edit is not None):
            problem = "is for text that goes on from a prompt, not for infill and edit"
            raise FieldProblem("stop", problem, list(self.stop), "leave it out")
        return self

    @property
    def span(self) -> tuple[int, int]:
        """First and last-but-one character of what is edited; (0, 0) where that is no span."""
        found = _SPAN.fullmatch(self.edit or "")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of an infill's holes in turn, where it says all of them."""
        return tuple(int(found[1]) for found in _HOLE.finditer(self.infill or ""))

    @property
    def constraint(self) -> str | None:
        """The regular expression of what is allowed; RequestError for a schema that none could keep."""
        return self.regex if self.json_schema is None else schema_regex(self.json_schema)

    def given(self, tokenizer: Tokenizer, config: DecodeConfig, context: int) -> tuple[Request, tuple[Piece, ...]]:
        """As token ids. The pieces are of an infill with a hole of unknown length, else there are none.

        A canvas that does not fit beside prompt and suffix is shortened to what does.
        """
        if self.infill is not None:
            head, pieces, tail = self._template(tokenizer, config, context)
            least = sum(piece.least for piece in pieces if isinstance(piece, OpenHole))
            if least > context:
                raise RequestError("infill", f"its holes ({least}) exceed the context of {context} tokens")
            request = Request(head, config, tail, self.seed, stop=self.stop, constraint=self.constraint)
            if any(isinstance(piece, OpenHole) and piece.least < piece.most for piece in pieces):
                return request, pieces
            return with_holes(request, pieces), ()
        if self.edit is not None:
            begin, stop = self.span
            parts = (self.prompt[:begin], self.prompt[begin:stop], self.prompt[stop:])
            encoded = (
                tokenizer.encode,
                tokenizer.encode_behind if begin else tokenizer.encode,
                tokenizer.encode_behind,
            )
            head, middle, tail = (tuple(encode(part)) for encode, part in zip(encoded, parts, strict=True))
            return Request(head, config, tail, self.seed, middle, self.strength, self.stop, self.constraint), ()
        head = tuple(tokenizer.encode(self.prompt)) if self.prompt_ids is None else self.prompt_ids
        tail = tuple(tokenizer.encode_behind(self.suffix))
        room = context - len(head) - len(tail)
        if room < 1:
            problem = f"{len(head) + len(tail)} tokens leave no room in the context of {context}"
            raise RequestError("prompt", problem, remedy="shorten it")
        request = Request(head, config, tail, self.seed, stop=self.stop, constraint=self.constraint)
        return request.shortened(room), ()

    def _template(
        self, tokenizer: Tokenizer, config: DecodeConfig, context: int
    ) -> tuple[tuple[int, ...], tuple[Piece, ...], tuple[int, ...]]:
        parts: list[Piece] = []
        at = 0
        assert self.infill is not None
        for found in _HOLE.finditer(self.infill):
            text = self.infill[at : found.start()]
            parts.append(tuple(tokenizer.encode_kept(text, "infill") if parts else tokenizer.encode(text)))
            least = int(found[1] or 1)
            most = int(found[2] or found[1] or min(config.max_tokens, context))
            if not 1 <= least <= most:
                problem = "a hole is [[LENGTH]] or [[LEAST-MOST]], of at least 1 token"
                raise RequestError("infill", problem, found[0])
            parts.append(OpenHole(least, most))
            at = found.end()
        parts.append(tuple(tokenizer.encode_behind(self.infill[at:])))
        head, *pieces, tail = parts
        assert isinstance(head, tuple)
        assert isinstance(tail, tuple)
        return head, tuple(piece for piece in pieces if piece != ()), tail


def read_asked(path: Path, defaults: Asked) -> dict[str, Asked]:
    """A file's lines by their places: JSON objects in a `.jsonl`, else prompts. defaults: what a line leaves out."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
        lines = text.removesuffix("\n").split("\n")  # and at nothing else: U+2028 is a character of a prompt
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(str(path), f"cannot be read ({error})") from None
    if not any(line.strip() for line in lines):
        raise DataError(str(path), "holds no prompt")
    left_out = defaults.model_dump(exclude_defaults=True)
    if path.suffix != ".jsonl":
        if defaults.prompt:
            problem = "is what each line says of a file that is no .jsonl"
            raise ConfigError("--prompt", problem, defaults.prompt, "leave it out")
        given = {f"{path}:{i + 1}": {"prompt": line} for i, line in enumerate(lines) if line}
    else:
        places = {f"{path}:{i + 1}": line for i, line in enumerate(lines) if line.strip()}
        given = {place: parse_json_object(line, place) for place, line in places.items()}
    return {place: Asked.checked({**left_out, **said}, place) for place, said in given.items()}
