"""DeepSpeed ZeRO behind the Backend protocol. The only file that imports DeepSpeed.

It joins the process group that exists (Ray Train's, torchrun's), builds no compiled op and asks for no CUDA.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import functional

from dllm_core.model.denoiser import Denoiser
from dllm_core.objective.loss import DenoiserLike
from dllm_core.training.backend import (
    BUCKET_ELEMENTS,
    MOMENTS,
    moments_of,
    new_optimizer,
    new_state,
    prepare,
    resolve_precision,
    set_moments,
    trained_weights,
)
from dllm_core.training.config import TrainConfig

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class DeepSpeedBackend:
    """ZeRO stage 0 to 3 over the default process group; below 3 each rank holds whole fp32 weights.

    At stage 3 the module is given whole, made or loaded alike on every rank, and DeepSpeed cuts it. Its `zero.Init`
    would never hold it whole, but a parent's constructor that fills weights then fills cut ones, to no effect and
    without a word. So of the 16 bytes a parameter that are cut, 4 must fit at the start.
    """

    def __init__(self, module: Denoiser, config: TrainConfig) -> None:
        self.device = module.device
        if self.device.type == "cpu":
            # Built for inference only, never used in training; it would cost a compiler and 30 s at every start.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        prepare(module, config)
        precision = resolve_precision(config.precision, self.device)
        world_size = torch.distributed.get_world_size()
        settings: dict[str, Any] = {
            "train_batch_size": config.batch_rows,
            "train_micro_batch_size_per_gpu": config.batch_rows // world_size,
            "zero_optimization": self._zero_section(module, config),
            "zero_allow_untested_optimizer": True,  # torch's own AdamW: DeepSpeed's would be compiled
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": config.clip_norm,
            "torch_autocast": {"enabled": precision is not torch.float32, "dtype": "bfloat16"},
            "steps_per_print": 1 << 40,
        }
        self._engine: Any
        updated_on = self.device if config.offload == "none" else torch.device("cpu")
        optimizer = new_optimizer(module, config, updated_on)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._stage = config.zero_stage
        self.module = module
        self.denoiser: DenoiserLike = self._engine
        self.rank: int = torch.distributed.get_rank()
        self.world_size = world_size
        if self._stage > 0:
            self._make_partitions()

    def _zero_section(self, module: Denoiser, config: TrainConfig) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        in_memory = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        offloaded = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[config.offload]
        return {
            "stage": config.zero_stage,
            # DeepSpeed takes the whole bucket on a GPU even for a small model.
            "reduce_bucket_size": min(BUCKET_ELEMENTS, sum(p.numel() for p in module.parameters())),
            # Norms' weights stay whole, matrices are cut; below DeepSpeed's 100,000 elements small models stay whole.
            "stage3_param_persistence_threshold": 10 * module.config.model.dim,
            **{f"offload_{what}": in_memory for what in offloaded},
        }

    def autocast(self) -> AbstractContextManager[object]:
        """Nothing: the engine's own forward runs under autocast."""
        return nullcontext()

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Reduces and, from stage 2, partitions gradients as they are made; at stages 0 and 1 once, the last time."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Partitioned AdamW, then the updated weights are gathered."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._stage == 0:  # DeepSpeed tells no norm there; gradients are whole and averaged already
            norm = torch.nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
            if not norm.isfinite():
                self._engine.zero_grad()
                return float(norm)
        self._engine.step()  # ZeRO 1 to 3 leave all as it is where the norm is not finite, and tell infinity
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """One small all-reduce."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def shard(self) -> dict[str, Tensor]:
        """Below stage 3 rank 0 has all weights and the others none; there, each its flat part of every parameter.

        What is no parameter is whole everywhere, and rank 0's.
        """
        whole = self._on_rank_0(trained_weights(self.module))
        return whole if self._stage < 3 else {**whole, **{name: p.ds_tensor for name, p in self._parameters()}}

    def gather(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter by parameter, so that no rank but the first ever holds more than one whole."""
        if self._stage < 3:
            return shard
        return self._on_rank_0({**shard, **{name: self._joined(p, shard[name]) for name, p in self._parameters()}})

    def scatter(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the parts that are this rank's."""
        cut = dict(self._parameters()) if self._stage == 3 else {}
        rest = {name: tensor.to(self.device) for name, tensor in whole.items() if name not in cut}
        return {**self._on_rank_0(rest), **{name: self._part(p, whole[name]) for name, p in cut.items()}}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Each parameter's moments, gathered from the ranks that own their parts."""
        if self._stage == 0:
            return self._on_rank_0(moments_of(self.module, self._base_optimizer()))
        state = {}
        for name, p in self._parameters():
            for moment in MOMENTS:
                if self._stage == 3:
                    found = self._joined(p, safe_get_local_optimizer_state(p, moment))
                else:
                    found = safe_get_full_optimizer_state(p, moment).float()
                state[f"{moment}.{name}"] = found.cpu() if self.rank == 0 else found[:0]
        return self._on_rank_0(state)

    def load_optimizer_state(self, state: dict[str, Tensor], step: int) -> None:
        """Each rank copies the parts that it owns."""
        if self._stage == 0:
            set_moments(self.module, self._base_optimizer(), state, step)
            return
        for flat in self._flat_partitions():
            self._base_optimizer().state[flat]["step"].fill_(float(step))
        for name, p in self._parameters():
            for moment in MOMENTS:
                whole = state[f"{moment}.{name}"]
                if self._stage == 3:
                    safe_set_local_optimizer_state(p, self._part(p, whole), moment)
                else:
                    safe_set_full_optimizer_state(p, whole.to(self.device), moment)

    def _on_rank_0(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.rank == 0 else {}

    def _parameters(self) -> list[tuple[str, Any]]:
        """Those that train by name, each once; DeepSpeed hangs attributes on them that no type knows."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _part(self, p: Any, whole: Tensor) -> Tensor:
        """What is this rank's of a parameter that stage 3 cut: flat and equal, the last filled up with 0."""
        own: Tensor = p.ds_tensor
        size = own.numel()
        flat = functional.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
        return flat[self.rank * size : (self.rank + 1) * size].to(own.device, torch.float32, copy=True)

    def _joined(self, p: Any, part: Tensor) -> Tensor:
        """The whole parameter on rank 0's CPU from every rank's part, an empty tensor elsewhere. Collective."""
        mine = part.to(self.device, torch.float32).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)] if self.rank == 0 else None
        torch.distributed.gather(mine, parts)
        if parts is None:
            return mine[:0]
        return torch.cat(parts)[: p.ds_numel].view(p.ds_shape).cpu()

    def _flat_partitions(self) -> list[Tensor]:
        """What this rank's Adam updates: a flat fp32 tensor for each parameter group."""
        zero = self._engine.optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flat

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
        for flat in self._flat_partitions():
            new_state(
                self._base_optimizer(),
                flat,
                0,
                {moment: torch.zeros_like(flat) for moment in MOMENTS},
            )
        if self._stage < 3:  # stage 3 looks them up
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
