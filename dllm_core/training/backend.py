"""Backend: who holds the weights, the gradients and the optimizer. The loop sees nothing else of the machine.

Optimizer state crosses this border as whole fp32 tensors by parameter name, so a checkpoint fits every backend.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.loss import DenoiserLike
from dllm_core.training.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Backend(Protocol):
    """One rank's side of a data-parallel optimizer."""

    rank: int
    world_size: int
    device: torch.device
    module: Denoiser
    denoiser: DenoiserLike

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that a forward runs in."""

    def backward(self, loss: Tensor) -> None:
        """Add this rank's gradients; over ranks they are averaged."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; the global gradient norm before clipping.

        A norm that is not finite leaves weights and optimizer as they are, on every rank alike.
        """

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum in fp64, the same on every rank. Collective."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<moment>.<parameter>` for Adam's two moments, whole, fp32, on the CPU. Collective."""

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take such a state, as after `step` updates. Collective."""


def new_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms' weights do not."""
    decaying = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` means bf16 where it is fast: a GPU that has it, a CPU with avx512_bf16 or amx; else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class LocalBackend:
    """One process, plain PyTorch: the reference that the DeepSpeed backend is tested and measured against."""

    rank, world_size = 0, 1

    def __init__(self, module: Denoiser, config: TrainConfig) -> None:
        self.module, self.device = module, module.device
        self.denoiser: DenoiserLike = module
        self._config, self._optimizer = config, new_optimizer(module, config)
        self._precision = resolve_precision(config.precision, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Torch's own autocast."""
        enabled = self._precision is not torch.float32
        return torch.autocast(self.device.type, dtype=self._precision, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """loss.backward()."""
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clip by global norm, AdamW."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if norm.isfinite():
            self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """One rank: the values themselves."""
        return values

    def optimizer_state(self) -> dict[str, Tensor]:
        """From torch's own state; zeros before the first step."""
        return moments_of(self.module, self._optimizer)

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Into torch's own state."""
        set_moments(self.module, self._optimizer, state, step)


def moments_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments of an unpartitioned optimizer, by parameter name."""
    return {
        f"{moment}.{name}": optimizer.state[p].get(moment, torch.zeros_like(p)).detach().float().cpu().clone()
        for name, p in module.named_parameters()
        for moment in MOMENTS
    }


def set_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], step: int) -> None:
    """Set Adam's moments of an unpartitioned optimizer."""
    for name, p in module.named_parameters():
        moments = {moment: state[f"{moment}.{name}"].to(p.device, torch.float32).clone() for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
