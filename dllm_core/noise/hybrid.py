"""Hybrid diffusion: noise is masks and some random text, so a denoiser also learns to doubt what it reads."""

from typing import ClassVar

from pydantic import Field

from dllm_core.noise.arrays import Array, array_namespace, cast
from dllm_core.noise.interpolating import InterpolatingProcess, Mixture, text_ids


class HybridProcess(InterpolatingProcess):
    """GIDD's mixture of mask and uniform noise, arXiv:2503.04482, section 4, with its time run by the schedule.

    With a = alpha(t) of the schedule: weights a (clean), 1 - a (mask) and c = B (a (1 - a))^(gamma/2) (text), divided
    by their sum 1 + c, where B = 2^gamma p_u / (1 - p_u). So at a = 1/2, the most it gets, a share p_u of all tokens is
    random text; both ends are free of it. `linear` is the paper's process, p_u = 0 absorbing noise. gamma > 2 would
    need text noise to turn back into clean text: no forward process.
    """

    replaces: ClassVar[bool] = True
    vocab_size: int
    p_u: float = Field(ge=0, lt=1)
    gamma: float = Field(gt=0, le=2)

    def mix(self, alpha: Array) -> Mixture:
        """Masks, and text in the middle."""
        c = 2**self.gamma * self.p_u / (1 - self.p_u) * (alpha * (1 - alpha)) ** (self.gamma / 2)
        return Mixture(alpha / (1 + c), (1 - alpha) / (1 + c), c / (1 + c))

    def text_inflow(self, alpha: Array) -> Array:
        """The text noise's own growth, c'/c, and what makes up for alpha/(1 + c) falling."""
        return self.gamma / 2 / (1 - alpha) + (1 - self.gamma / 2) / alpha

    def corrupt(self, x0: Array, t: Array, u: Array, v: Array | None = None) -> Array:
        """Noised ids [B L]: u [B L] falls on clean, mask or text, in this order; v [B L] says which text."""
        assert v is not None, "a process that replaces needs a second uniform"
        xp = array_namespace(x0)
        mixture = self.mixture(t)
        text = text_ids(v, self.mask_id, self.vocab_size, x0)
        noise = xp.where(u < cast(1 - mixture.text, t), self.prior(x0), text)
        return xp.where(u < cast(mixture.keep, t), x0, noise)

    def prior(self, like: Array, v: Array | None = None) -> Array:
        """All masks, where every schedule leads; v is not read."""
        return array_namespace(like).full_like(like, self.mask_id)
