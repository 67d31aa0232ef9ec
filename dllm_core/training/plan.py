"""What a training run will take, told before a device is rented: memory a device, time, checkpoints. Allocates nothing.

Memory is counted by what this code keeps, not by a model of models: a block's activations are those that autograd keeps
of a real block over fake tensors, which have shapes and no storage. The rest is bytes a parameter:

| | weights | gradients | master copy | Adam's moments | average |
|---|---|---|---|---|---|
| fp32 | 4 | 4 | 4 (stages 1 to 3) | 8 | 4 on rank 0, at stage 3 its share on each |
| cut over workers | stage 3 | stages 2, 3 | stages 1 to 3 | stages 1 to 3 | stage 3 |

ZeRO, arXiv:1910.02054, section 5, as DeepSpeed keeps it under autocast: weights stay fp32 and each rank updates a copy
of its part. Gradients pass through a bucket of at most 5e8 elements at stages 2 and 3, where weights are gathered for a
forward by up to 1e9.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dllm_core.model.conditioning import TimeConditioning
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Block
from dllm_core.model.experts import MixtureOfExperts
from dllm_core.model.pattern import AttentionPattern
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import (
    AnyObjective,
    AutoregressiveConfig,
    DiffusionOptions,
    MaskedLMConfig,
    PreferenceConfig,
)
from dllm_core.training.backend import BUCKET_ELEMENTS
from dllm_core.training.config import CHECKPOINT_BYTES, OFFLOAD_NEEDS, TrainConfig

STAGES = (0, 1, 2, 3)
_LIVE_ELEMENTS = 1_000_000_000  # that DeepSpeed gathers at stage 3 before it lets go of any
_FP32, _MOMENTS = 4, 8


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at a step's largest, rank 0's. offloaded: what waits in the host's memory instead.

    activations: of one forward, with the copies of weights that autocast makes; logits: the head's at noised positions.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    logits: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All of it on the device."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.logits


@dataclass(frozen=True)
class Forward:
    """What is held for one backward. rows of seq_len positions; bf16: under autocast; read_share: of positions that the
    head is asked for.
    """

    rows: int
    seq_len: int
    bf16: bool
    read_share: float = 0.5


def device_memory(
    config: TrainConfig, model: DenoiserConfig, pattern: AttentionPattern, forward: Forward, *, stage: int, workers: int
) -> DeviceMemory:
    """Memory of rank 0's device at a ZeRO stage with so many workers."""
    parameters = model.model.num_parameters(model.vocab_size)
    activations, logits = forward_memory(model, pattern, forward, is_checkpointed=config.activation_checkpointing)
    kept = kept_memory(config, parameters, stage=stage, workers=workers)
    return replace(kept, activations=activations, logits=logits)


def kept_memory(config: TrainConfig, parameters: int, *, stage: int, workers: int) -> DeviceMemory:
    """What is there whatever a forward reads, of so many trained parameters."""
    cut = -(-parameters // workers)
    gathered = min(_LIVE_ELEMENTS, parameters) if stage == 3 else 0
    weights = _FP32 * (cut + gathered if stage == 3 else parameters)
    bucket = min(BUCKET_ELEMENTS, parameters) if stage >= 2 else 0
    gradients = _FP32 * ((cut if stage >= 2 else parameters) + bucket)
    optimizer = (_MOMENTS + _FP32) * cut if stage else _MOMENTS * parameters
    offloaded = 0
    if config.offload != "none":
        offloaded, optimizer = offloaded + optimizer, 0
    if config.offload == "parameters":
        offloaded, weights = offloaded + _FP32 * cut, _FP32 * gathered
    return DeviceMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=_FP32 * (cut if stage == 3 else parameters),
        activations=0,
        logits=0,
        offloaded=offloaded,
    )


def forward_memory(
    model: DenoiserConfig, pattern: AttentionPattern, forward: Forward, *, is_checkpointed: bool
) -> tuple[int, int]:
    """Bytes that a forward keeps for the backward: in all blocks, and in the head with its logits."""
    sizes, length = model.model, forward.seq_len * (2 if pattern.has_clean_half else 1)
    kinds = {sizes.has_experts(number): number for number in range(sizes.layers)}
    of_kind = {kind: block_bytes(model, number, forward.rows, length, forward.bf16) for kind, number in kinds.items()}
    blocks = [of_kind[sizes.has_experts(number)] for number in range(sizes.layers)]
    entering = _FP32 * forward.rows * length * sizes.dim
    # With checkpointing the inputs alone are kept, and one block is computed again at a time.
    activations = sizes.layers * entering + max(blocks) if is_checkpointed else sum(blocks)
    activations += conditioning_bytes(model, forward.rows, length, forward.bf16)
    read = math.ceil(forward.read_share * forward.rows * forward.seq_len)
    of_logit = 2 if forward.bf16 else _FP32
    head = read * (2 * _FP32 * sizes.dim + of_logit * model.vocab_size)
    return activations, head + (of_logit * model.vocab_size * sizes.dim if forward.bf16 else 0)


def block_bytes(model: DenoiserConfig, number: int, rows: int, length: int, bf16: bool) -> int:
    """What autograd keeps of a block over [rows length], its input and autocast's copies of weights included.

    Counted on fake tensors of a CPU: shapes and types run through the real code, nothing is computed. On a GPU a fused
    attention keeps no scores.
    """
    sizes = model.model
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        block = Block(sizes, number)
        for part in block.modules():
            if isinstance(part, MixtureOfExperts):
                part.assumes_even = True
        x = torch.randn(rows, length, sizes.dim, requires_grad=True)
        cos, sin = torch.randn(length, sizes.rope_dim), torch.randn(length, sizes.rope_dim)
        attention = torch.ones(rows, 1, 1, length, dtype=torch.bool)
        modulation = torch.randn(rows, length, 6 * sizes.dim, requires_grad=True) if sizes.time_conditioning else None
        shared = [x, cos, sin, attention, *block.parameters()]
        return _bytes(x) + _kept(lambda: block(x, cos, sin, attention, False, modulation), shared, bf16)


def conditioning_bytes(model: DenoiserConfig, rows: int, length: int, bf16: bool) -> int:
    """What autograd keeps of the times' own layers; what they give to blocks is counted with the blocks."""
    sizes = model.model
    if not sizes.time_conditioning:
        return 0
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        layers = TimeConditioning(sizes)
        t = torch.rand(rows, length)
        return _kept(lambda: layers(t), list(layers.parameters()), bf16) + 2 * _FP32 * rows * length * sizes.dim


def _kept(forward: Callable[[], object], shared: Sequence[Tensor], bf16: bool) -> int:
    """Bytes that autograd keeps of a forward, but for those of `shared`."""
    found, apart = dict[int, tuple[int, Tensor]](), {_storage(tensor) for tensor in shared}

    def keep(tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in apart:
            found[key] = _bytes(tensor), tensor  # held, so that no other takes its key
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        forward()
    return sum(size for size, _ in found.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def read_share(objective: AnyObjective, process: AnyNoise) -> float:
    """The share of positions whose logits a training forward makes: all, or those that are masked, over all times."""
    if isinstance(objective, AutoregressiveConfig) or (process.replaces and not isinstance(objective, MaskedLMConfig)):
        return 1.0
    return objective.rate if isinstance(objective, MaskedLMConfig) else 0.5


def held_at_once(objective: AnyObjective) -> int:
    """Rows whose activations wait for a backward, for each row of a batch: a mask and its complement are two."""
    if isinstance(objective, PreferenceConfig):
        return objective.draws
    return 2 if isinstance(objective, DiffusionOptions) and objective.complementary else 1


@dataclass(frozen=True)
class Pace:
    """Seconds a step takes, and all of them; FLOPs of a step over all workers. most_steps, most_seconds: the budget."""

    step_flops: float
    step_seconds: float
    most_steps: int
    most_seconds: float | None

    @property
    def steps(self) -> int:
        """As many as the budget has room for; the one in which time is over is finished."""
        if self.most_seconds is None or self.most_seconds >= self.most_steps * self.step_seconds:
            return self.most_steps
        return math.ceil(self.most_seconds / self.step_seconds)

    @property
    def seconds(self) -> float:
        """Seconds that all steps take."""
        return self.steps * self.step_seconds


def pace(
    config: TrainConfig,
    model: DenoiserConfig,
    pattern: AttentionPattern,
    *,
    passes: int,
    workers: int,
    device_flops: float,
    mfu: float,
) -> Pace:
    """Time from a device's FLOP/s and the share of them that training is to reach: the trainer's own MFU, backwards."""
    tokens = config.batch_rows * model.context_length
    flops = tokens * passes * model.model.flops_per_token(model.vocab_size, model.context_length, pattern)
    return Pace(flops, flops / (workers * device_flops * mfu), config.steps, config.seconds)


@dataclass(frozen=True)
class Saving:
    """bytes of a checkpoint; write_seconds: to store it; every_seconds: the best interval; lost: share of the time that
    saves, work done again and restarts take.
    """

    bytes: int
    write_seconds: float
    every_seconds: float
    lost: float


def saving(
    model: DenoiserConfig, *, workers: int, mtbf_hours: float, bytes_per_second: float, restart_seconds: float = 60.0
) -> Saving:
    """Checkpoints against failures. mtbf_hours: of one device; the job fails as often as any of its devices does.

    The interval is Young's (Commun. ACM 17, 1974), sqrt(2 C M) with C the write and M the job's mean time between
    failures, in the form of Daly (Future Gener. Comput. Syst. 22, 2006). Ours are written beside the training, so that
    C is an upper bound of what a save stops.
    """
    size = CHECKPOINT_BYTES * model.model.num_parameters(model.vocab_size)
    write, between = size / bytes_per_second, mtbf_hours * 3600 / workers
    every = best_interval(write, between)
    return Saving(size, write, every, lost_share(every, write, between, restart_seconds))


def best_interval(write: float, between: float) -> float:
    """Seconds of work between saves of `write` seconds each, where failures come every `between` seconds."""
    if write >= 2 * between:
        return between
    x = math.sqrt(write / (2 * between))
    return math.sqrt(2 * write * between) * (1 + x / 3 + x * x / 9) - write


def lost_share(every: float, write: float, between: float, restart: float) -> float:
    """Share of the time that is no progress where failures are a Poisson process: 1 - work / expected time (Daly)."""
    try:
        expected = between * math.exp(restart / between) * math.expm1((every + write) / between)
    except OverflowError:  # no save is ever done
        return 1.0
    return 1 - every / expected


def at_stage(config: TrainConfig, stage: int) -> TrainConfig:
    """The section at another stage; an offload that needs a higher one is left out."""
    offload = config.offload if stage >= OFFLOAD_NEEDS[config.offload] else "none"
    return config.model_copy(update={"zero_stage": stage, "offload": offload})
