"""POST /v1/completions and /v1/fim/completions: text behind a prompt, or between a prompt and a suffix."""

from typing import Any, ClassVar

from pydantic import Field

from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.fields import DecodingFields
from workflows.serve.dialect.rows import Row, ServedModel, of_prompt


class CompletionRequest(DecodingFields):
    """Body of POST /v1/completions."""

    id_prefix: ClassVar[str] = "cmpl"
    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @property
    def wanted_logprobs(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    @property
    def num_rows(self) -> int:
        """Prompts times choices."""
        return len(self.prompts) * self.n

    def check(self, limits: Limits) -> None:
        """Beside what is refused everywhere: no prompt, and more rows than one request may ask for."""
        super().check(limits)
        if not self.prompt and not isinstance(self.prompt, str):
            raise RequestError("prompt", "is an empty list")
        if len(self.prompts) > limits.rows:
            raise RequestError("prompt", f"at most {limits.rows} prompts", len(self.prompts))
        if self.num_rows > limits.rows:
            problem = f"{len(self.prompts)} in prompt times n must be at most {limits.rows}"
            raise RequestError("n", problem, self.n, "ask for fewer choices or split the list in prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many prompts, as text or token ids."""
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    def rows(self, model: ServedModel) -> list[Row]:
        """N rows for each prompt."""
        constraint, tokenizer = self.constraint(model.limits), model.tokenizer
        suffix = tuple(tokenizer.encode_behind(self.suffix)) if self.suffix else ()
        seeds, found = self.seeds(self.num_rows), list[Row]()
        for number, prompt in enumerate(self.prompts):
            ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
            own = seeds[number * self.n : (number + 1) * self.n]
            requests = of_prompt(self, model, ids, suffix, own, constraint)  # first: what it refuses cannot be spelled
            head = (prompt if isinstance(prompt, str) else tokenizer.decode(ids)) if self.echo else ""
            found += [Row(request, head, is_echoed=self.echo) for request in requests]
        return found

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """One choice of an answer."""
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The next of its pieces in a stream."""
        return self.choice(index, text, logprobs, finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its text."""
        return None

    def told(self, entries: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
        """Log-probabilities of tokens, null for those of an echoed prompt, and where in the text each begins.

        Of alternatives that look alike, as parts of characters do, the likeliest is told.
        """
        best = list[dict[str, float] | None]()
        for entry in entries:
            alternatives = dict[str, float]()
            for one in entry["top_logprobs"] or ():  # surest first
                alternatives.setdefault(one["token"], one["logprob"])
            best.append(None if entry["top_logprobs"] is None else alternatives)
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": best if self.wanted_logprobs else None,
            "text_offset": offsets,
        }


class FimRequest(CompletionRequest):
    """Body of POST /v1/fim/completions: the middle between `prompt` and `suffix` is denoised."""

    id_prefix: ClassVar[str] = "fim"
    prompt: str
    suffix: str
