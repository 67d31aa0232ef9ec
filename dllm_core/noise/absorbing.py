"""Masked diffusion: a token survives with probability alpha(t), otherwise it becomes the mask, for good."""

import math

from dllm_core.config.base import Frozen
from dllm_core.noise.arrays import Array, array_namespace
from dllm_core.noise.schedule import AnySchedule, LinearSchedule


class AbsorbingProcess(Frozen):
    """q(xt | x0) = alpha_t [xt = x0] + (1 - alpha_t) [xt = mask]. Source: MDLM, arXiv:2406.07524, eq. 1."""

    mask_id: int
    schedule: AnySchedule = LinearSchedule()

    def corrupt(self, x0: Array, t: Array, u: Array) -> Array:
        """Noised ids [B L] from x0 [B L], t broadcastable to it and u [B L] uniform in [0, 1)."""
        xp = array_namespace(x0)
        return xp.where(u < self.schedule.alpha(t), x0, xp.full_like(x0, self.mask_id))

    def prior(self, like: Array) -> Array:
        """All masks, in the shape and type of `like`."""
        return array_namespace(like).full_like(like, self.mask_id)

    def x0_log_probs(self, logits: Array) -> Array:
        """Log-softmax over V without the mask (SUBS, MDLM section 3.2.3). logits [... V] are not changed."""
        xp = array_namespace(logits)
        penalty = xp.zeros_like(logits)
        penalty[..., self.mask_id] = -math.inf
        logits = logits + penalty
        shifted = logits - xp.amax(logits, -1)[..., None]
        return shifted - xp.log(xp.exp(shifted).sum(-1))[..., None]

    def nelbo_rate(self, t: Array) -> Array:
        """w(t) = -alpha'(t) / (1 - alpha(t)); 1/t for the linear schedule. MDLM, eq. 11."""
        return -self.schedule.dalpha_dt(t) / (1 - self.schedule.alpha(t))
