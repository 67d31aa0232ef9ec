"""Time conditioning: t shifts, scales and gates what every block computes (adaLN). DiT, arXiv:2212.09748."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.config import TIME_DIM, ModelConfig
from dllm_core.model.layers import Linear, pad_rows

_STEPS = 1000.0  # t in [0, 1] is embedded as DiT embeds the steps of a discrete process
_LONGEST = 10_000.0


class TimeConditioning(nn.Module):
    """t -> sinusoids -> two layers -> six vectors for each block and two for the last norm.

    The last matrix starts at zero and gates are 1 + what it gives, so a new model is the unconditioned one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.layers
        self.hidden = Linear(TIME_DIM, TIME_DIM)
        self.embed = Linear(TIME_DIM, TIME_DIM)
        self.modulation = Linear(TIME_DIM, (6 * config.layers + 2) * config.dim, scale=0.0)

    def forward(self, t: Tensor) -> list[Tensor]:
        """Times t [B N], N = 1 for one a row -> what each block takes [B N 6D], and the last norm [B N 2D]."""
        x = pad_rows(sinusoids(t.flatten()))
        x = functional.silu(self.embed(functional.silu(self.hidden(x))))
        modulation = self.modulation(x)[: t.numel()].view(*t.shape, -1)
        width = modulation.shape[-1] // (3 * self.layers + 1)
        return list(modulation.split([3 * width] * self.layers + [width], dim=-1))


def sinusoids(t: Tensor) -> Tensor:
    """[n] -> fp32 [n TIME_DIM]: cosines and sines of 1000 t at geometric frequencies."""
    half = TIME_DIM // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = _STEPS * t.float()[:, None] * torch.exp(-math.log(_LONGEST) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The same x [B L D] where shift and scale [B L|1 D] are 0."""
    return x * (1 + scale) + shift
