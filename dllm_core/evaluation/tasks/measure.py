"""Exact match of a task's answers, as a model writes them behind prompts that training never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_core.data.tokenizer import Tokenizer
from dllm_core.estimate import Estimate, Proportion, proportion, ratio
from dllm_core.evaluation.tasks.problem import Grade, Problem, Task
from dllm_core.evaluation.writers import Writer


@dataclass(frozen=True)
class TaskResult:
    """exact: whole answers; pieces: cells or digits, a problem's share of its own weighed by how many it asks."""

    problems: int
    exact: Proportion
    pieces: Proportion
    tokens_per_call: Estimate


@dataclass(frozen=True)
class Answered:
    """A graded answer, the tokens that it took (its end token included) and the denoiser calls."""

    text: str
    grade: Grade
    tokens: int
    calls: int


def rooms_for(tokenizer: Tokenizer, problems: Sequence[Problem], context: int | None = None) -> list[int]:
    """Tokens of canvas behind each prompt.

    context: of a corpus that learns its padding, whose rows are filled up with end tokens. Its denoiser counts masks,
    so a canvas has to reach as far as those rows did, or an answer ends too early. None: rows end with their answers;
    the longest known one and its end token, for all problems, so that the canvas does not tell an answer's length.
    """
    if context is not None:
        return [context - len(tokenizer.encode(problem.prompt)) for problem in problems]
    return [1 + max(len(tokenizer.encode(problem.answer)) for problem in problems)] * len(problems)


def answer_problems(
    writer: Writer, tokenizer: Tokenizer, task: Task, problems: Sequence[Problem], *, rooms: Sequence[int], seed: int
) -> list[Answered]:
    """Write on from each prompt, in a canvas of `rooms_for`, over all problems that are compared."""
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    answered = []
    for problem, answer in zip(problems, writer.write(prompts, rooms, seed=seed), strict=True):
        # Not `decode`, which leaves special tokens out: an answer with one inside is no answer.
        text = "".join(map(tokenizer.token_text, answer.tokens))
        answered.append(Answered(text, task.grade(problem, text), answer.num_committed, answer.num_calls))
    return answered


def summarize_answers(answered: Sequence[Answered]) -> TaskResult | None:
    """None where nothing was asked."""
    if not answered:
        return None
    ones = np.ones(len(answered))
    return TaskResult(
        problems=len(answered),
        exact=proportion([a.grade.is_correct for a in answered], ones),
        pieces=proportion([a.grade.right for a in answered], [a.grade.asked for a in answered]),
        tokens_per_call=ratio([a.tokens for a in answered], [a.calls for a in answered]),
    )
