"""Micro-batches: a batch's gradient from several forwards, each over some of a worker's rows, and over how many.

The law: cut or not, a step is the same but for rounding. Sums are divided by the divisor of the whole global batch,
which noise and counted tokens alone decide, so all ranks know it before any forward.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import torch

from dllm_core.data.batch import Batch
from dllm_core.data.loader import Batches
from dllm_core.errors import DataError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import AttentionPattern
from dllm_core.objective.loss import LossSum, Objective
from dllm_core.training.backend import Backend, prepare, resolve_precision
from dllm_core.training.config import TrainConfig
from dllm_core.training.plan import Forward, device_memory, kept_memory

_TRIALS = 2
_AS_FAST = 1.05
_TRIAL_BYTES = 8  # a trained parameter: fp32 weights and gradients, which are whole while micro-batches are tried


def accumulated(backend: Backend, objective: Objective, batch: Batch, micro_rows: int | None) -> LossSum:
    """Sums over this rank's batch, `micro_rows` rows in a forward; `nats` has the graph of the last of them alone.

    The gradients of all others are in the backend by then, scaled as the loop scales the last one. Collective where
    there is more than one micro-batch: the divisor costs one small all-reduce.
    """
    *early, last = batch.parts(micro_rows)
    sums: list[LossSum] = []
    if early:
        [divisor] = backend.sum_over_ranks([objective.divisor(batch)])
        for part in early:
            with backend.autocast():
                loss = objective.loss(backend.denoiser, part)
            backend.backward(loss.nats * (backend.world_size / max(divisor, 1.0)), is_last=False)
            sums.append(replace(loss, nats=loss.nats.detach()))
    with backend.autocast():
        total = objective.loss(backend.denoiser, last)
    names = [field.name for field in fields(LossSum)]
    for loss in sums:
        both = {name: (getattr(total, name), getattr(loss, name)) for name in names}
        added: dict[str, Any] = {name: None if a is None else a + b for name, (a, b) in both.items()}
        total = replace(total, **added)
    return total


def chosen_micro_rows(
    config: TrainConfig,
    model: DenoiserConfig,
    alone: Callable[[], Denoiser],
    objective: Objective,
    loader: Batches,
    *,
    widest: AttentionPattern | None = None,
    held: int = 1,
    device_bytes: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int | None:
    """What `micro_rows` says, and where it says `auto`, what is fastest on this rank's device with its first batch.

    model: what is trained; alone: a denoiser that a rank runs without the others, so that none waits for one that has
    run out of memory. It may have fewer layers, where the rest of the model is on other ranks; then what fits into
    `device_bytes`, by default all of a GPU's, is told by `device_memory`. widest: the pattern in which the objective's
    forwards hold the most, by default its own; held: rows that they hold for each of a batch (`held_at_once`). Ranks
    may find different numbers.
    """
    if config.micro_rows != "auto":
        return config.micro_rows
    rank, world_size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    module, batch = alone(), loader.batch(0, config.batch_rows, rank, world_size)
    if module.config == model:
        return fastest_micro_rows(config, module, objective, batch, clock, workers=world_size)
    if device_bytes is None and module.device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(module.device).total_memory
    is_bf16 = resolve_precision(config.precision, module.device) is torch.bfloat16

    def fits(rows: int) -> bool:
        forward = Forward(held * rows, model.context_length, is_bf16, read_share=1.0)
        stage = config.zero_stage
        pattern = widest or objective.pattern
        needed = device_memory(config, model, pattern, forward, stage=stage, workers=world_size)
        return device_bytes is None or needed.total <= device_bytes

    return fastest_micro_rows(config, module, objective, batch, clock, fits)


def fastest_micro_rows(
    config: TrainConfig,
    module: Denoiser,
    objective: Objective,
    batch: Batch,
    clock: Callable[[], float] = time.perf_counter,
    fits: Callable[[int], bool] | None = None,
    *,
    workers: int = 1,
) -> int:
    """The largest number of rows whose forward and backward take the least time a row, within 5 %.

    Asked of powers of two that divide the batch, and of the whole batch; larger ones than the first that does not fit
    into memory are not tried. Leaves weights as they are and no gradient. Costs three passes over twice the batch.
    fits: whether so many rows do, where memory cannot be tried out because the module is but a part.
    """
    prepare(module, config)
    rows = len(batch.x0)
    sizes = [1 << k for k in range(rows.bit_length()) if rows % (1 << k) == 0 and 1 << k < rows]
    seconds: dict[int, float] = {}
    with suppress(torch.OutOfMemoryError):
        reserve = _reserved(config, module, workers) if fits is None else None  # noqa: F841 (held, not read)
        for size in [*sizes, rows]:
            if fits is not None and not fits(size):
                break
            seconds[size] = _seconds(config, module, objective, batch.parts(size)[0], clock) / size
    module.zero_grad(set_to_none=True)
    if module.device.type == "cuda":
        torch.cuda.empty_cache()
    if not seconds:
        remedy = "train.activation_checkpointing=true, a shorter packing.seq_len or a smaller model"
        raise DataError("train.micro_rows", "not one row fits into the device's memory", "auto", remedy)
    return max(size for size, taken in seconds.items() if taken <= _AS_FAST * min(seconds.values()))


def _reserved(config: TrainConfig, module: Denoiser, workers: int) -> torch.Tensor | None:
    """On a GPU the room that training takes beside a trial: else a micro-batch would fit now and not then."""
    if module.device.type != "cuda":
        return None
    return torch.empty(room_beside_trials(config, module, workers), dtype=torch.uint8, device=module.device)


def room_beside_trials(config: TrainConfig, module: Denoiser, workers: int) -> int:
    """Bytes of rank 0's optimizer, average and bucket, as far as trials' whole gradients do not take them already."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return max(0, kept_memory(config, trained, stage=config.zero_stage, workers=workers).total - _TRIAL_BYTES * trained)


def _seconds(
    config: TrainConfig, module: Denoiser, objective: Objective, part: Batch, clock: Callable[[], float]
) -> float:
    """The best of some forwards and backwards, after one that warms up."""
    device, precision = module.device, resolve_precision(config.precision, module.device)
    taken = []
    for _ in range(1 + _TRIALS):
        begun = clock()
        with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
            loss = objective.loss(module, part)
        torch.autograd.backward(loss.nats)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - begun)
    return min(taken[1:])
