"""Noise schedules: how much signal alpha(t) survives at diffusion time t.

Everywhere in dllm_core t = 0 is clean text and t = 1 pure noise: alpha(0) = 1, alpha(1) = 0. One schedule, log-linear,
stops at alpha(1) = eps by its definition; `discrete.terminal_nats` is what that costs.
A process evaluates a schedule in float64 (`InterpolatingProcess.mixture`), whatever the type of its times.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.noise.arrays import Array, array_namespace


class NoiseSchedule(Frozen):
    """alpha falls from 1 at t = 0 to 0 (or eps) at t = 1."""

    def alpha(self, t: Array) -> Array:
        """Probability that a token has survived until t. t: any shape, in [0, 1]."""
        raise NotImplementedError

    def dalpha_dt(self, t: Array) -> Array:
        """The exact derivative of alpha, never positive."""
        raise NotImplementedError

    def at_noise(self, noise: Array) -> Array:
        """The time in [0, 1] at which a share `noise` has not survived; 1 for more than the schedule takes."""
        raise NotImplementedError

    def inverse(self, alpha: Array) -> Array:
        """`at_noise` of 1 - alpha, which keeps no digit of a small share of noise."""
        return self.at_noise(1 - alpha)


class LinearSchedule(NoiseSchedule):
    """alpha(t) = 1 - t, so the mask rate is t itself. MDLM, arXiv:2406.07524; LLaDA, arXiv:2502.09992."""

    type: Literal["linear"] = "linear"

    def alpha(self, t: Array) -> Array:
        """1 - t."""
        return 1 - t

    def dalpha_dt(self, t: Array) -> Array:
        """-1."""
        return -array_namespace(t).ones_like(t)

    def at_noise(self, noise: Array) -> Array:
        """The share itself."""
        return noise


class CosineSchedule(NoiseSchedule):
    """alpha(t) = 1 - cos(pi/2 (1 - t)): slow at the noisy end. MaskGIT, arXiv:2202.04200.

    Each is written as the sine that is exact where it is 0: cos(pi/2 (1 - t)) loses its digits at small t.
    """

    type: Literal["cosine"] = "cosine"

    def alpha(self, t: Array) -> Array:
        """1 - sin(pi/2 t)."""
        return 1 - array_namespace(t).sin(math.pi / 2 * t)

    def dalpha_dt(self, t: Array) -> Array:
        """-pi/2 sin(pi/2 (1 - t))."""
        return -math.pi / 2 * array_namespace(t).sin(math.pi / 2 * (1 - t))

    def at_noise(self, noise: Array) -> Array:
        """2/pi of its arcsine."""
        return 2 / math.pi * array_namespace(noise).arcsin(noise)


class LogLinearSchedule(NoiseSchedule):
    """alpha(t) = 1 - (1 - eps) t, that is exp(-sigma) with sigma = -log(1 - (1 - eps) t). MDLM, arXiv:2406.07524.

    The linear schedule, stopped when eps of the text is left. So its integral over t is eps short of a bound: a chain
    that starts from pure noise also pays the step from alpha = 0 to eps.
    """

    type: Literal["log_linear"] = "log_linear"
    eps: float = Field(1e-3, gt=0, lt=1)

    def alpha(self, t: Array) -> Array:
        """1 - (1 - eps) t."""
        return 1 - (1 - self.eps) * t

    def dalpha_dt(self, t: Array) -> Array:
        """-(1 - eps)."""
        return (self.eps - 1) * array_namespace(t).ones_like(t)

    def at_noise(self, noise: Array) -> Array:
        """Its share of 1 - eps."""
        return array_namespace(noise).clip(noise / (1 - self.eps), 0, 1)


class PolynomialSchedule(NoiseSchedule):
    """alpha(t) = 1 - t^w: above w = 1 slow at the clean end. MD4, arXiv:2406.04329."""

    type: Literal["polynomial"] = "polynomial"
    exponent: float = Field(2.0, gt=0)

    def alpha(self, t: Array) -> Array:
        """1 - t^w."""
        return 1 - t**self.exponent

    def dalpha_dt(self, t: Array) -> Array:
        """-w t^(w - 1); minus infinity at t = 0 where w < 1."""
        return -self.exponent * t ** (self.exponent - 1)

    def at_noise(self, noise: Array) -> Array:
        """Its w-th root."""
        return noise ** (1 / self.exponent)


AnySchedule = Annotated[
    LinearSchedule | CosineSchedule | LogLinearSchedule | PolynomialSchedule, Field(discriminator="type")
]
