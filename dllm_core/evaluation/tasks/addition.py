"""Addition of two numbers: `12+34=46`. A carry may run through all digits, so they cannot be told independently.

Written from the least significant digit on (`12+34=64`), each digit needs only what stands left of it (Lee et al.,
arXiv:2307.03381); written as usual, the first digit needs all carries.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.data.order import SampleOrder
from dllm_core.estimate import measure_seed
from dllm_core.evaluation.tasks.problem import Grade, Part, Problem, first_of
from dllm_core.seeding import Doubles, Ints, Purpose, uniforms64

_CHUNK = 4096


class AdditionTask(Frozen):
    """Both numbers are uniform over [0, 10^digits). a + b and b + a are in one part.

    first_digit: of the answer; the two numbers are always written as usual. test_share: of the unordered pairs.
    """

    type: Literal["addition"] = "addition"
    digits: int = Field(3, ge=1, le=8)
    first_digit: Literal["most_significant", "least_significant"] = "most_significant"
    test_share: float = Field(0.1, gt=0, lt=1)
    split_seed: int = Field(0, ge=0, lt=1 << 63)

    def problems(self, part: Part, count: int, *, seed: int) -> list[Problem]:
        """As `Task.problems`."""
        return first_of(self._in_order(part, seed), count, part)

    def _in_order(self, part: Part, seed: int) -> Iterator[Problem]:
        top = 10**self.digits
        order = SampleOrder(measure_seed(seed, "addition"), top * top)
        for start in range(0, order.num_samples, _CHUNK):
            a, b = np.divmod(order.sample(0, np.arange(start, min(start + _CHUNK, order.num_samples))), top)
            fits = (self._draws(a, b) < self.test_share) == (part == "test")
            for left, right in zip(a[fits].tolist(), b[fits].tolist(), strict=True):
                yield Problem(f"{left}+{right}=", self._written(left + right))

    def _draws(self, a: Ints, b: Ints) -> Doubles:
        """One uniform for each unordered pair [n]."""
        pair = np.minimum(a, b) * 10**self.digits + np.maximum(a, b)
        return uniforms64(measure_seed(self.split_seed, "addition split"), Purpose.EVALUATE, 0, pair, 1)[:, 0]

    def _written(self, total: int) -> str:
        return str(total)[:: 1 if self.first_digit == "most_significant" else -1]

    def grade(self, problem: Problem, answer: str) -> Grade:
        """The sum is computed anew. right of asked: its digits, by their place from the answer's first on."""
        left, right = problem.prompt.removesuffix("=").split("+")
        wanted = self._written(int(left) + int(right))
        return Grade(answer == wanted, sum(x == y for x, y in zip(answer, wanted, strict=False)), len(wanted))
