"""DeepSpeed ZeRO behind the Backend protocol. The only file that imports DeepSpeed.

It joins the process group that exists (Ray Train's, torchrun's), builds no compiled op and asks for no CUDA.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import check_weights, copy_weights, weights_of
from dllm_core.model.tensor_file import shapes_of
from dllm_core.objective.loss import DenoiserLike
from dllm_core.training.backend import (
    BUCKET_ELEMENTS,
    MOMENTS,
    LocalBackend,
    copied,
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
# On CPUs DeepSpeed asks how many there are by running `numactl`, at stage 3 for every bucket of gradients, which takes
# a sixth of a small step or more. What it makes of the answer is for quantized gradients, which are not used.
os.environ.setdefault("LOCAL_SIZE", "1")


class DeepSpeedBackend:
    """ZeRO stage 0 to 3 over the default process group; below 3 each rank holds whole fp32 weights.

    At stage 3 no rank ever holds more than a part of the module whole. The module is cut part by part while it is made,
    each once it is filled: DeepSpeed's `zero.Init` around a constructor cuts weights before a parent's constructor
    fills them, to no effect and without a word.
    """

    @staticmethod
    def new_denoiser(model: DenoiserConfig, config: TrainConfig, device: torch.device) -> Denoiser:
        """Whole below stage 3; there each part is cut when it is made."""
        if config.zero_stage < 3:
            return LocalBackend.new_denoiser(model, config, device)
        settings = _settings(model, config, device)

        def cut(part: nn.Module) -> None:
            deepspeed.zero.Init(module=part, config_dict_or_path=settings)

        with device:
            return Denoiser(model, cut)

    @staticmethod
    def assign(module: Denoiser, weights: Mapping[str, Tensor], place: str) -> None:
        """Copied; of what is cut, a rank's own part."""
        if not _is_cut(module):
            copy_weights(module, weights, place)
            return
        own = weights_of(module)
        parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if name in own}
        check_weights({name: _shape(parameters.get(name, t)) for name, t in own.items()}, shapes_of(weights), place)
        for name, tensor in own.items():
            if name in parameters:
                parameters[name].ds_tensor.copy_(_part(parameters[name], weights[name]))
            else:
                tensor.copy_(weights[name])

    @staticmethod
    def frozen(module: Denoiser, config: TrainConfig) -> DenoiserLike:
        """Behind an engine of its own, which gathers what is cut and knows the precision."""
        settings = _settings(module.config, config, module.device)
        module.eval().requires_grad_(False)
        if not _is_cut(module):
            settings["zero_optimization"] = {"stage": 0}
        engine: DenoiserLike
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        return engine

    @staticmethod
    def alone(module: Denoiser, device: torch.device) -> Denoiser:
        """At stage 3 a new one with two blocks at most, of the weights' own sizes."""
        if not _is_cut(module):
            return module
        model = module.config.model
        shallow = model.model_copy(update={"layers": min(2, model.layers)})
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            return Denoiser(module.config.model_copy(update={"model": shallow}))

    @staticmethod
    def summed(values: list[float], device: torch.device) -> list[float]:
        """One small all-reduce over the default group."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def __init__(self, module: Denoiser, config: TrainConfig) -> None:
        self.device = module.device
        prepare(module, config)
        settings = _settings(module.config, config, self.device)
        self._engine: Any
        optimizer = new_optimizer(module, config, _shape)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._stage = config.zero_stage
        self.module = module
        self.denoiser: DenoiserLike = self._engine
        self.rank: int = torch.distributed.get_rank()
        self.world_size: int = torch.distributed.get_world_size()
        if self._stage > 0:
            self._make_partitions()

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
        return self.summed(values, self.device)

    def shard(self) -> dict[str, Tensor]:
        """Below stage 3 rank 0 has all weights and the others none; there, each its flat part of every parameter.

        What is no parameter is whole everywhere, and rank 0's.
        """
        whole = self._on_rank_0(trained_weights(self.module))
        return whole if self._stage < 3 else {**whole, **{name: p.ds_tensor for name, p in self._parameters()}}

    def gather(self, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter by parameter, so that no rank but the first ever holds more than one whole."""
        cut = dict(self._parameters()) if self._stage == 3 else {}
        joined = {name: self._joined(p, shard[name]) for name, p in cut.items()}
        rest = copied({name: tensor for name, tensor in shard.items() if name not in cut})
        return self._on_rank_0({**rest, **joined})

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the parts that are this rank's."""
        cut = dict(self._parameters()) if self._stage == 3 else {}
        rest = [name for name in whole if name not in cut] if self.rank == 0 else []
        shares = {name: whole[name].to(self.device) for name in rest}
        return {**shares, **{name: _part(p, whole[name]) for name, p in cut.items()}}

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

    def load_optimizer_state(self, state: Mapping[str, Tensor], step: int) -> None:
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
                    safe_set_local_optimizer_state(p, _part(p, whole), moment)
                else:
                    safe_set_full_optimizer_state(p, whole.to(self.device), moment)

    def _on_rank_0(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.rank == 0 else {}

    def _parameters(self) -> list[tuple[str, Any]]:
        """Those that train by name, each once; DeepSpeed hangs attributes on them that no type knows."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

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


def _settings(model: DenoiserConfig, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is told. The first thing that is done with it, so its surroundings are set here."""
    if device.type == "cpu":
        # Built for inference only, never used in training; it would cost a compiler and 30 s at every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Its import has taken a GPU where there is one, also where the model is on the CPU and was given none.
        if get_accelerator().device_name() != "cpu":
            set_accelerator(CPU_Accelerator())
    in_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    offloaded = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[config.offload]
    return {
        "train_batch_size": config.batch_rows,
        "train_micro_batch_size_per_gpu": config.batch_rows // torch.distributed.get_world_size(),
        "zero_optimization": {
            "stage": config.zero_stage,
            # DeepSpeed takes the whole bucket on a GPU even for a small model.
            "reduce_bucket_size": min(BUCKET_ELEMENTS, model.model.num_parameters(model.vocab_size)),
            # Norms' weights stay whole, matrices are cut; below DeepSpeed's 100,000 elements small models stay whole.
            "stage3_param_persistence_threshold": 10 * model.model.dim,
            **{f"offload_{what}": in_memory for what in offloaded},
        },
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: DeepSpeed's would be compiled
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.clip_norm,
        "torch_autocast": {
            "enabled": resolve_precision(config.precision, device) is not torch.float32,
            "dtype": "bfloat16",
        },
        "steps_per_print": 1 << 40,
    }


def _is_cut(module: Denoiser) -> bool:
    return hasattr(module.embed.weight, "ds_tensor")


def _shape(p: Any) -> torch.Size:
    """A parameter's, whether it was cut or not; DeepSpeed hangs attributes on them that no type knows."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _part(p: Any, whole: Tensor) -> Tensor:
    """What is this rank's of a parameter that stage 3 cut: flat and equal, the last filled up with 0."""
    own: Tensor = p.ds_tensor
    size, first = own.numel(), torch.distributed.get_rank() * own.numel()
    flat = whole.flatten()[first : first + size]
    return functional.pad(flat, (0, size - len(flat))).to(own.device, torch.float32, copy=True)
