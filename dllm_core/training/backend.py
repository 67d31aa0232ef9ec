"""Backend: who holds the weights, the gradients and the optimizer. The loop sees nothing else of the machine.

Weights and optimizer state cross this border as whole fp32 tensors by parameter name, so a checkpoint fits every
backend; between checkpoints each rank sees its own share alone.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dllm_core.errors import ConfigError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import copy_weights, weights_of
from dllm_core.objective.loss import DenoiserLike
from dllm_core.training.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 500_000_000  # of gradients that ZeRO reduces at once; DeepSpeed's own size: 2 GB


class Backend(Protocol):
    """One rank's side of a data-parallel optimizer."""

    rank: int
    world_size: int
    device: torch.device
    module: Denoiser
    denoiser: DenoiserLike

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that a forward runs in."""

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Add this rank's gradients; over ranks they are averaged. is_last: `step` comes next."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; the global gradient norm before clipping.

        A norm that is not finite leaves weights and optimizer as they are, on every rank alike.
        """

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum in fp64, the same on every rank. Collective."""

    def shard(self) -> dict[str, Tensor]:
        """A rank's share of the trained weights by name, fp32, as they are now: a view, in the backend's form.

        All shares together hold each weight once, so an average of shards costs nothing but its own memory.
        """

    def gather(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of such shares of all ranks whole tensors, on rank 0's CPU and the caller's own; else nothing. Collective."""

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A rank's share of whole tensors that every rank was given: undoes `gather`."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<moment>.<parameter>` for Adam's two moments, whole, fp32, on rank 0's CPU, the caller's own; else nothing.
        Collective.
        """

    def load_optimizer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take such a state, as after `step` updates. Collective."""


class BackendKind(Protocol):
    """How a backend's denoiser comes to be, in the form in which the backend holds it; called, the backend around it.

    Between `new_denoiser` and the call, only what is here is done with a denoiser that may be cut.
    """

    def __call__(self, module: Denoiser, config: TrainConfig) -> Backend:
        """The backend."""

    def new_denoiser(self, model: DenoiserConfig, config: TrainConfig, device: torch.device) -> Denoiser:
        """A denoiser with weights from torch's generator, the same for every backend. Collective."""

    def assign(self, module: Denoiser, weights: Mapping[str, Tensor], place: str) -> None:
        """Give a new denoiser these weights, one tensor at a time. Raises CheckpointError for another model's."""

    def frozen(self, module: Denoiser, config: TrainConfig) -> DenoiserLike:
        """A denoiser that is asked and never trained, in the precision of what is."""

    def alone(self, module: Denoiser, device: torch.device) -> Denoiser:
        """One that a rank runs by itself: the module, or of one that is cut the first of its blocks."""

    def summed(self, values: list[float], device: torch.device) -> list[float]:
        """`Backend.sum_over_ranks` before there is a backend. Collective."""


def new_optimizer(
    module: nn.Module,
    config: TrainConfig,
    shape_of: Callable[[Tensor], torch.Size] = lambda p: p.shape,
) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms' weights do not. Where a tensor lies, there it is updated.

    By torch's own fused kernels, which come with torch; nothing is compiled. On a CPU too: the plain loop makes
    four tensors of a parameter's size, and over ZeRO's flat ones that was 20,000 page faults a step. shape_of: of a
    parameter before it was cut.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    decaying, others = list[Tensor](), list[Tensor]()
    for p in trained:
        (decaying if len(shape_of(p)) >= 2 else others).append(p)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters are matrices alone; DeepSpeed wants no empty one
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def trained_weights(module: Denoiser) -> dict[str, Tensor]:
    """What training changes, by name, and so what a checkpoint holds: all there is, or what is not frozen."""
    parameters = dict(module.named_parameters())
    if all(p.requires_grad for p in parameters.values()):
        return weights_of(module)
    return {name: p.detach() for name, p in parameters.items() if p.requires_grad}


def new_state(optimizer: torch.optim.Optimizer, p: Tensor, step: int, moments: dict[str, Tensor]) -> None:
    """Give a parameter Adam's state; a fused kernel wants the step beside it, the plain one on the CPU."""
    device = p.device if optimizer.defaults["fused"] else torch.device("cpu")
    optimizer.state[p] = {"step": torch.tensor(float(step), device=device), **moments}


def prepare(module: Denoiser, config: TrainConfig) -> None:
    """Set what changes a forward's speed and memory, not its result. Twice is as good as once.

    Blocks are compiled one by one: equal code for all, and rows that `read` cuts to ever new lengths stay outside.
    """
    module.checkpoints_blocks = config.activation_checkpointing
    if not config.compile:
        return
    # Inductor writes C++ for a CPU; for a GPU Triton has its launcher compiled, in C.
    language, variable, usual = ("C++", "CXX", "g++") if module.device.type == "cpu" else ("C", "CC", "gcc clang")
    compilers = os.environ.get(variable, usual).split()
    if not any(map(shutil.which, compilers)):
        problem = f"needs a {language} compiler here, and there is no {' or '.join(compilers)}"
        raise ConfigError("train.compile", problem, True, f"install one and name it in {variable}, or leave it out")
    for block in module.blocks:
        if block._compiled_call_impl is None:
            block.compile()


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` means bf16 where it is fast: a GPU that has it, a CPU with AMX, AMD's with avx512_bf16; else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            # Older GPUs would emulate it, which is slower than fp32.
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cpu_has_bf16() -> bool:
    """On Intel's cores avx512_bf16 alone runs at half of fp32's rate (1,024 rows: 72 against 135 GFLOP/s on a Xeon), on
    AMD's at more than twice. Told by what the processor is: a measurement might say another thing at a restart.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        is_amd = False
    return is_amd and bool(torch.cpu._is_avx512_bf16_supported())


class LocalBackend:
    """One process, plain PyTorch: the reference that the DeepSpeed backend is tested and measured against.

    It holds all there is, so `zero_stage` and `offload` say nothing to it.
    """

    rank, world_size = 0, 1

    @staticmethod
    def new_denoiser(model: DenoiserConfig, config: TrainConfig, device: torch.device) -> Denoiser:
        """A whole one."""
        with device:
            return Denoiser(model)

    @staticmethod
    def assign(module: Denoiser, weights: Mapping[str, Tensor], place: str) -> None:
        """Copied into the module's own tensors."""
        copy_weights(module, weights, place)

    @staticmethod
    def frozen(module: Denoiser, config: TrainConfig) -> DenoiserLike:
        """The module itself: who asks it has set autocast."""
        return module.eval().requires_grad_(False)

    @staticmethod
    def alone(module: Denoiser, device: torch.device) -> Denoiser:
        """The module itself."""
        return module

    @staticmethod
    def summed(values: list[float], device: torch.device) -> list[float]:
        """One rank: the values themselves."""
        return values

    def __init__(self, module: Denoiser, config: TrainConfig) -> None:
        self.module, self.device = module, module.device
        self.denoiser: DenoiserLike = module
        prepare(module, config)
        self._config, self._optimizer = config, new_optimizer(module, config)
        self._precision = resolve_precision(config.precision, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Torch's own autocast."""
        enabled = self._precision is not torch.float32
        return torch.autocast(self.device.type, dtype=self._precision, enabled=enabled)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
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
        return self.summed(values, self.device)

    def shard(self) -> dict[str, Tensor]:
        """All weights that train."""
        return trained_weights(self.module)

    def gather(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """The shard is whole already: a copy of it."""
        return copied(shard)

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors, on the module's device."""
        return {name: tensor.to(self.device) for name, tensor in whole.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """From torch's own state; zeros before the first step."""
        return moments_of(self.module, self._optimizer)

    def load_optimizer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Into torch's own state."""
        set_moments(self.module, self._optimizer, state, step)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def moments_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments of an unpartitioned optimizer, by parameter name."""
    return {
        f"{moment}.{name}": optimizer.state[p].get(moment, torch.zeros_like(p)).detach().float().cpu().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
        for moment in MOMENTS
    }


def set_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], step: int) -> None:
    """Set Adam's moments of an unpartitioned optimizer."""
    for name, p in ((name, p) for name, p in module.named_parameters() if p.requires_grad):
        moments = {moment: state[f"{moment}.{name}"].to(p.device, torch.float32).clone() for moment in MOMENTS}
        new_state(optimizer, p, step, moments)
