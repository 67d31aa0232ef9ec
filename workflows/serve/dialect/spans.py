"""POST /v1/infill and /v1/edit: what only a model does that sees both sides. A choice's text is the whole document."""

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from dllm_core.decoding.request import OpenHole, Piece, Request, with_holes
from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.fields import DecodingFields, Part
from workflows.serve.dialect.rows import Row, ServedModel


class Hole(Part):
    """Positions to fill. Before a given segment all of them are; at the very end the model may end earlier."""

    hole: int = Field(ge=1)


class _WholeText(DecodingFields):
    """What infill and edit share."""

    def check(self, limits: Limits) -> None:
        """Beside what is refused everywhere: what would cut the document off, and lengths that are given already."""
        super().check(limits)
        if self.stops:
            raise RequestError("stop", "is for an answer with an open end", remedy="leave it out")
        if self.max_tokens is not None:
            raise RequestError("max_tokens", "the request says how long it is", self.max_tokens, "leave it out")

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """One choice of an answer."""
        return {"text": text, "index": index, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The next of its pieces in a stream."""
        return self.choice(index, text, logprobs, finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Nothing comes before the text."""
        return None

    def told(self, entries: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
        """Never asked for."""
        raise NotImplementedError

    def _named(self, text: str) -> dict[str, str]:
        """names, of a route whose text is prompt, middle and suffix in one."""
        return {**super().names, **dict.fromkeys(("prompt", "middle", "suffix", "max_tokens"), text)}


class InfillRequest(_WholeText):
    """Body of POST /v1/infill: text and holes in turn, any number, filled together."""

    id_prefix: ClassVar[str] = "infill"
    object: ClassVar[str] = "infill"
    chunk_object: ClassVar[str] = "infill.chunk"

    segments: list[str | Hole] = Field(min_length=1)

    @property
    def names(self) -> dict[str, str]:
        """All that it holds are segments."""
        return self._named("segments")

    def rows(self, model: ServedModel) -> list[Row]:
        """The same document n times."""
        holes = tuple(part.hole for part in self.segments if isinstance(part, Hole))
        if not holes:
            raise RequestError("segments", "has no hole", remedy='put {"hole": LENGTH} where text is to be filled in')
        if sum(holes) > model.context:
            raise RequestError("segments", f"its holes ({sum(holes)}) exceed the context of {model.context} tokens")
        at = [i for i, part in enumerate(self.segments) if isinstance(part, Hole)]
        head = "".join(part for part in self.segments[: at[0]] if isinstance(part, str))
        tail = "".join(part for part in self.segments[at[-1] + 1 :] if isinstance(part, str))
        pieces: list[Piece] = []
        for part in self.segments[at[0] : at[-1] + 1]:
            if isinstance(part, Hole):
                pieces.append(OpenHole(part.hole, part.hole))
            elif part:
                pieces.append(tuple(model.tokenizer.encode_kept(part, "segments")))
        request = Request(
            prompt=tuple(model.tokenizer.encode(head)),
            config=self.decode_config(model.decode, model.context),
            suffix=tuple(model.tokenizer.encode_behind(tail)),
            constraint=self.constraint(model.limits),
        )
        whole = with_holes(request, pieces)
        return [Row(model.check(replace(whole, seed=seed)), head, tail, holes=holes) for seed in self.seeds(self.n)]


class EditRequest(_WholeText):
    """Body of POST /v1/edit: spans of a text, (begin, stop) in characters, are noised at `strength` and denoised."""

    id_prefix: ClassVar[str] = "edit"
    object: ClassVar[str] = "edit"
    chunk_object: ClassVar[str] = "edit.chunk"

    text: str = Field(min_length=1)
    span: list[int] | None = Field(None, min_length=2, max_length=2)
    spans: list[list[int]] | None = Field(None, min_length=1)
    strength: float = Field(0.5, gt=0, le=1)

    @property
    def names(self) -> dict[str, str]:
        """All that it holds is one text."""
        return self._named("text")

    def rows(self, model: ServedModel) -> list[Row]:
        """The same edit n times."""
        spans = self._spans()
        head, tail = self.text[: spans[0][0]], self.text[spans[-1][1] :]
        middle: list[int] = []
        edited: list[tuple[int, int]] = []
        at = spans[0][0]
        for begin, stop in spans:
            middle += model.tokenizer.encode_kept(self.text[at:begin], "spans")
            made = (model.tokenizer.encode_behind if begin else model.tokenizer.encode)(self.text[begin:stop])
            edited.append((len(middle), len(middle) + len(made)))
            middle += made
            at = stop
        request = Request(
            prompt=tuple(model.tokenizer.encode(head)),
            config=self.decode_config(model.decode, model.context),
            suffix=tuple(model.tokenizer.encode_behind(tail)),
            middle=tuple(middle),
            strength=self.strength,
            spans=tuple(edited),
            constraint=self.constraint(model.limits),
        )
        return [Row(model.check(replace(request, seed=seed)), head, tail) for seed in self.seeds(self.n)]

    def _spans(self) -> list[tuple[int, int]]:
        """In order, apart from each other, within the text."""
        if (self.span is None) == (self.spans is None):
            raise RequestError("span", "give one of span and spans", self.span)
        name = "spans" if self.span is None else "span"
        spans = sorted(tuple(span) for span in (self.spans if self.span is None else [self.span]) or [])
        for i, span in enumerate(spans):
            if len(span) != 2 or not 0 <= span[0] < span[1] <= len(self.text):
                problem = f"must be [begin, stop] within the text's {len(self.text)} characters"
                raise RequestError(name, problem, list(span))
            if i and span[0] < spans[i - 1][1]:
                raise RequestError(name, "overlap", [list(spans[i - 1]), list(span)])
        return [(span[0], span[1]) for span in spans]
