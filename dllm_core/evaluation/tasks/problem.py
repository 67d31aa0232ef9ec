"""Problem, Grade and the Task protocol."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from dllm_core.errors import ConfigError

Part = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """What is asked, and an answer that is right. Plain ASCII without a newline: `12+34=` and `46`."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Grade:
    """is_correct: the whole answer; right of asked: its pieces (cells, digits) that are."""

    is_correct: bool
    right: int
    asked: int


class Task(Protocol):
    """A family of problems in two parts that share none."""

    def problems(self, part: Part, count: int, *, seed: int) -> list[Problem]:
        """Different problems in random order; the first n are the same for every count >= n.

        seed decides the order; which part a problem belongs to depends on the task alone, so two seeds never mix the
        parts. Raises ConfigError where the part holds fewer than `count`.
        """

    def grade(self, problem: Problem, answer: str) -> Grade:
        """Judge an answer by the rules, not by its likeness to `problem.answer`; any text is an answer."""


def first_of(problems: Iterator[Problem], count: int, part: Part) -> list[Problem]:
    """The first `count`. Raises ConfigError where there are fewer."""
    taken = list(islice(problems, count))
    if len(taken) < count:
        raise ConfigError("count", f"the {part} part holds {len(taken)} problems", count, "ask for fewer")
    return taken
