"""Uniform-state diffusion: a token that does not survive becomes any text token, and may change again."""

from typing import ClassVar

from dllm_core.noise.arrays import Array, array_namespace, cast
from dllm_core.noise.interpolating import InterpolatingProcess, Mixture, text_ids


class UniformProcess(InterpolatingProcess):
    """q(xt | x0) = alpha_t [xt = x0] + (1 - alpha_t) / N over the N text ids, x0 among them.

    D3PM, arXiv:2107.03006; UDLM, arXiv:2412.10193; Duo, arXiv:2506.10892. The mask is no text and never appears.
    """

    replaces: ClassVar[bool] = True
    vocab_size: int

    def mix(self, alpha: Array) -> Mixture:
        """All noise is text."""
        return Mixture(alpha, array_namespace(alpha).zeros_like(alpha), 1 - alpha)

    def corrupt(self, x0: Array, t: Array, u: Array, v: Array | None = None) -> Array:
        """Noised ids [B L]: u [B L] decides whether a token survives, v [B L] what replaces it."""
        kept = u < cast(self.mixture(t).keep, t)
        return array_namespace(x0).where(kept, x0, self.prior(x0, v))

    def prior(self, like: Array, v: Array | None = None) -> Array:
        """Random text in the type of `like`, drawn with v in its shape."""
        assert v is not None, "a process that replaces needs a second uniform"
        return text_ids(v, self.mask_id, self.vocab_size, like)
