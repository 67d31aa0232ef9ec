"""DeepSpeed ZeRO behind the Backend protocol. The only file that imports DeepSpeed.

It joins the process group that exists (Ray Train's, torchrun's), builds no compiled op and asks for no CUDA.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor

from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.loss import DenoiserLike
from dllm_core.training.backend import (
    MOMENTS,
    moments_of,
    new_optimizer,
    resolve_precision,
    set_moments,
)
from dllm_core.training.config import TrainConfig

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class DeepSpeedBackend:
    """ZeRO stage 0, 1 or 2 over the default process group; each rank holds whole fp32 weights."""

    def __init__(self, module: Denoiser, config: TrainConfig) -> None:
        self.device = module.device
        if self.device.type == "cpu":
            # Built for inference only, never used in training; it would cost a compiler and 30 s at every start.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        precision = resolve_precision(config.precision, self.device)
        world_size = torch.distributed.get_world_size()
        settings: dict[str, Any] = {
            "train_batch_size": config.batch_rows,
            "train_micro_batch_size_per_gpu": config.batch_rows // world_size,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,  # torch's own AdamW: fused ones would be compiled
            "gradient_clipping": config.clip_norm,
            "torch_autocast": {"enabled": precision is not torch.float32, "dtype": "bfloat16"},
            "steps_per_print": 1 << 40,
        }
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=new_optimizer(module, config), config=settings)
        self._config = config
        self.module = module
        self.denoiser: DenoiserLike = self._engine
        self.rank: int = torch.distributed.get_rank()
        self.world_size = world_size
        if config.zero_stage > 0:
            self._make_partitions()

    def autocast(self) -> AbstractContextManager[object]:
        """Nothing: the engine's own forward runs under autocast."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Reduces and, from stage 2, partitions gradients as they are made."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Partitioned AdamW, then the updated weights are gathered."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._config.zero_stage == 0:  # DeepSpeed tells no norm there; gradients are whole and averaged already
            norm = torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
            if not norm.isfinite():
                self._engine.zero_grad()
                return float(norm)
        self._engine.step()  # ZeRO 1 and 2 leave all as it is where the norm is not finite, and tell infinity
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """One small all-reduce."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def optimizer_state(self) -> dict[str, Tensor]:
        """Each parameter's moments, gathered from the ranks that own their parts."""
        if self._config.zero_stage == 0:
            return moments_of(self.module, self._base_optimizer())
        return {
            f"{moment}.{name}": safe_get_full_optimizer_state(p, moment).float().cpu()
            for name, p in self.module.named_parameters()
            for moment in MOMENTS
        }

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Each rank copies the parts that it owns."""
        if self._config.zero_stage == 0:
            set_moments(self.module, self._base_optimizer(), state, step)
            return
        for flat in self._engine.optimizer.single_partition_of_fp32_groups:
            self._base_optimizer().state[flat]["step"].fill_(float(step))
        for name, p in self.module.named_parameters():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(p, state[f"{moment}.{name}"].to(self.device), moment)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside, whatever DeepSpeed wrapped around it."""
        optimizer = self._engine.optimizer
        while not isinstance(optimizer, torch.optim.AdamW):
            optimizer = optimizer.optimizer
        return optimizer

    def _make_partitions(self) -> None:
        """Adam state of this rank's flat partitions, linked to the parameters, before any update.

        DeepSpeed 0.19 links at the first step, after the first parameter group only has its state: the moments of
        every other group could then not be read. So they are made here, equal to what the first step would make.
        """
        zero, base = self._engine.optimizer, self._base_optimizer()
        for flat in zero.single_partition_of_fp32_groups:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            base.state[flat] = {"step": torch.tensor(0.0), **moments}
        zero._lazy_init_hp_params_optimizer_state()
