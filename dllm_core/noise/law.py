"""What a bound asks of a denoiser's law p(x0) over V ids, so that it may be asked of logits in a single pass.

`objective/vocabulary.py` answers for raw logits, `LogProbs` for log-probabilities of numpy or torch.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dllm_core.noise.arrays import Array, cast, picked, softplus


class Reading(NamedTuple):
    """of_x0, of_xt: log p of those ids [...]. others [...]: the sum over all but x0 of log(1 + exp(shift) p)."""

    of_x0: Array
    of_xt: Array
    others: Array


class Law(Protocol):
    """A law [... V] that gives the mask nothing."""

    @property
    def num_text(self) -> int:
        """V - 1, the ids that are not the mask."""

    def of(self, ids: Array) -> Array:
        """Log p [...] of ids [...]."""

    def read(self, x0: Array, xt: Array, shift: Array) -> Reading:
        """x0, xt: ids [...]; shift broadcasts to them."""


@dataclass(frozen=True)
class LogProbs:
    """A law given by its log-probabilities [... V], as `x0_log_probs` gives them; the sum is taken in their type."""

    values: Array

    @property
    def num_text(self) -> int:
        """V - 1."""
        return int(self.values.shape[-1]) - 1

    def of(self, ids: Array) -> Array:
        """The entries [...] at ids [...]."""
        return picked(self.values, ids)

    def read(self, x0: Array, xt: Array, shift: Array) -> Reading:
        """The gradient keeps one tensor [... V]."""
        gain = self.values + cast(shift, self.values)[..., None]
        others = softplus(gain).sum(-1) - softplus(picked(gain, x0))  # the mask's is 0; `gather` keeps what it reads
        return Reading(self.of(x0), self.of(xt), others)


def law_of(given: Array | Law) -> Law:
    """Log-probabilities as a law; a law as it is."""
    return given if hasattr(given, "read") else LogProbs(given)
