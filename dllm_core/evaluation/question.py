"""What is asked of a likelihood and what comes back. Torch-free: who asks over a network need not have one."""

import hashlib
from dataclasses import dataclass

import numpy as np

Tokens = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Question:
    """How likely is `answer` behind `context`? Token ids; either may be empty."""

    context: Tokens
    answer: Tokens

    def digest(self, *others: int) -> int:
        """63 bits of its content and of `others`: a row's id, so that its draws are its own."""
        words = np.array([len(self.context), *self.context, *self.answer, *others], np.int64)
        return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class AnswerScore:
    """nats: -log p(answer | context), or its bound in the mean over draws. error: their Monte-Carlo standard error.

    error is 0 where no draw changes anything, and None after a single draw that another could contradict.
    """

    nats: float
    error: float | None
    draws: int
