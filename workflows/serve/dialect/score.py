"""POST /v1/score: how likely texts are behind a prompt, with the standard error of every number."""

import math
from typing import Any

from pydantic import Field

from dllm_core.errors import RequestError
from dllm_core.evaluation.question import AnswerScore, Question
from workflows.serve.config import Limits
from workflows.serve.dialect.fields import Part
from workflows.serve.dialect.rows import ServedModel


class ScoreRequest(Part):
    """Body of POST /v1/score. draws: Monte-Carlo draws at most; target_error: nats at which they end earlier."""

    model: str
    prompt: str = ""
    completion: str | list[str]
    draws: int = Field(32, ge=2, le=256)
    target_error: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 63)
    user: str | None = None

    @property
    def completions(self) -> list[str]:
        """One or many."""
        return [self.completion] if isinstance(self.completion, str) else self.completion

    def check(self, limits: Limits) -> None:
        """Refuse what is beyond the endpoint's limits."""
        if not 1 <= len(self.completions) <= limits.rows:
            raise RequestError("completion", f"1 to {limits.rows} texts", len(self.completions))

    def questions(self, model: ServedModel) -> list[Question]:
        """One for each completion, refused where it does not fit."""
        context = tuple(model.tokenizer.encode(self.prompt))
        encode = model.tokenizer.encode_behind if context else model.tokenizer.encode
        found = [Question(context, tuple(encode(text))) for text in self.completions]
        for question in found:
            if not question.answer:
                raise RequestError("completion", "is empty")
            if (length := len(context) + len(question.answer)) > model.context:
                problem = f"with the prompt its {length} tokens exceed the context of {model.context} tokens"
                raise RequestError("completion", problem, remedy="shorten it")
        return found

    def answer(
        self, model: ServedModel, questions: list[Question], scores: list[AnswerScore], estimator: str
    ) -> dict[str, Any]:
        """nats: -log p(completion | prompt), a bound in the mean unless `is_exact`; error: its standard error."""
        data = []
        for index, (text, question, score) in enumerate(zip(self.completions, questions, scores, strict=True)):
            tokens, num_bytes = len(question.answer), len(text.encode())
            data.append(
                {
                    "index": index,
                    "nats": score.nats,
                    "error": score.error,
                    "logprob": -score.nats,
                    "tokens": tokens,
                    "bits_per_byte": score.nats / num_bytes / math.log(2),
                    "draws": score.draws,
                }
            )
        read = len(questions[0].context) + sum(len(question.answer) for question in questions)
        usage = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
        is_exact = estimator == "exact"
        return {
            "object": "score", "model": model.name, "estimator": estimator, "is_exact": is_exact, "data": data,
            "usage": usage,
        }  # fmt: skip
