"""Masked diffusion: a token survives with probability alpha(t), otherwise it becomes the mask, for good."""

from typing import ClassVar

from dllm_core.noise.arrays import Array, array_namespace, cast
from dllm_core.noise.interpolating import InterpolatingProcess, Mixture
from dllm_core.noise.law import Law, law_of


class AbsorbingProcess(InterpolatingProcess):
    """q(xt | x0) = alpha_t [xt = x0] + (1 - alpha_t) [xt = mask]. Source: MDLM, arXiv:2406.07524, eq. 1."""

    replaces: ClassVar[bool] = False

    def mix(self, alpha: Array) -> Mixture:
        """All noise is masks."""
        return Mixture(alpha, 1 - alpha, array_namespace(alpha).zeros_like(alpha))

    def corrupt(self, x0: Array, t: Array, u: Array, v: Array | None = None) -> Array:
        """Noised ids [B L] from x0 [B L], t broadcastable to it and u [B L] uniform in [0, 1); v is not read."""
        xp = array_namespace(x0)
        return xp.where(u < self.survival(t), x0, xp.full_like(x0, self.mask_id))

    def survival(self, t: Array) -> Array:
        """The probability that a token is not masked, in the shape and type of t; no token decides it."""
        return cast(self.mixture(t).keep, t)

    def prior(self, like: Array, v: Array | None = None) -> Array:
        """All masks, in the shape and type of `like`; v is not read."""
        return array_namespace(like).full_like(like, self.mask_id)

    def ce_weight(self, t: Array) -> Array:
        """w(t) = -alpha'(t) / (1 - alpha(t)), the cross-entropy's weight at a mask; 1/t if linear. MDLM, eq. 11."""
        alpha, fall = self._inside(t)
        return cast(fall / (1 - alpha), t)

    def nelbo_rate(self, law: Array | Law, x0: Array, xt: Array, t: Array) -> Array:
        """w(t) (-log p(x0)) at masks, 0 elsewhere: the general rate, without its sum over V."""
        xp = array_namespace(x0)
        is_open = xt == self.mask_id
        nats = xp.where(is_open, -law_of(law).of(x0), 0.0)
        return nats * self.ce_weight(xp.where(is_open, t, 1.0))
