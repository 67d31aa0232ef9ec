"""`dllm plan`: what a recipe's training will take, before a device is rented. Starts nothing and reads no corpus."""

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dllm_core.errors import ConfigError
from dllm_core.model.config import DenoiserConfig
from dllm_core.objective.config import PreferenceConfig
from workflows.console import Console
from workflows.recipe import Recipe

if TYPE_CHECKING:  # a mistake need not wait for torch
    import torch

    from dllm_core.objective.loss import Objective
    from dllm_core.training.plan import Forward

_GIB = float(1 << 30)


@dataclass(frozen=True)
class Machine:
    """What is to be rented. device_tflops: dense, in the training's precision, of which training reaches `mfu`;
    tokens_per_second: of a device, instead of both; neither: this machine's matrix products, timed.
    """

    workers: int | None = None
    device_memory_gb: float | None = None
    device_tflops: float | None = None
    mfu: float = 0.4
    mtbf_hours: float = 50_000.0  # of one GPU: Llama 3, arXiv:2407.21783, lost 16,384 of them every 3 hours or so
    storage_gb_per_second: float = 1.0
    tokens_per_second: float | None = None

    @property
    def is_stated(self) -> bool:
        """Whether a rate was given, and so another machine is meant than this one."""
        return self.device_tflops is not None or self.tokens_per_second is not None

    def check(self) -> None:
        """Refuse what no machine is."""
        for name, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"--{name.replace('_', '-')}", "must be above 0", value)
        if self.mfu > 1:
            raise ConfigError("--mfu", "is a share of the device's rate, at most 1", self.mfu)


def denoiser_of(recipe: Recipe) -> DenoiserConfig:
    """The recipe's model; which ids are special decides no size."""
    length = recipe.packing.seq_len
    return DenoiserConfig(
        model=recipe.model, vocab_size=recipe.num_ids, context_length=length, mask_id=0, eos_id=1, pad_id=2
    )


def check_planned(recipe: Recipe) -> None:
    """Refuse what is not planned for: a reference beside the policy, adapters beside frozen weights."""
    if isinstance(recipe.objective, PreferenceConfig):
        raise ConfigError("objective.type", "preference tuning is not planned for", recipe.objective.type)
    if recipe.start is not None and recipe.start.lora is not None:
        raise ConfigError("start.lora", "training of adapters is not planned for", remedy="plan without it")


def objective_of(recipe: Recipe, model: DenoiserConfig, device: "torch.device", batch_rows: int) -> "Objective":
    """The recipe's objective without a corpus. Raises ConfigError as `check_planned` says."""
    from dllm_core.objective.build import new_objective

    check_planned(recipe)
    return new_objective(
        recipe.objective,
        model,
        recipe.noise.process.bind(model.mask_id, model.vocab_size),
        device,
        seed=recipe.seed,
        block_length=recipe.noise.block_length,
        steps=recipe.noise.steps,
        t_min=recipe.noise.t_min,
        batch_rows=batch_rows,
    )


def forward_of(recipe: Recipe, rows: int, precision: "torch.dtype") -> "Forward":
    """What is held for the backward of so many rows."""
    import torch

    from dllm_core.training.plan import Forward, held_at_once, read_share

    asked = read_share(recipe.objective, recipe.noise.process)
    held = rows * held_at_once(recipe.objective)
    return Forward(held, recipe.packing.seq_len, precision is torch.bfloat16, asked)


def plan(recipe: Recipe, machine: Machine, console: Console) -> dict[str, Any]:
    """Memory by ZeRO stage, time and checkpoints; the recipe's own choice is marked."""
    machine.check()
    workers = machine.workers or recipe.placement.train.workers
    if recipe.train.batch_rows % workers:
        problem = f"must divide train.batch_rows={recipe.train.batch_rows}"
        raise ConfigError("--workers", problem, workers)
    import torch

    from dllm_core.objective.warmup import widest_pattern
    from dllm_core.training.backend import resolve_precision
    from dllm_core.training.loop import measure_peak_flops
    from dllm_core.training.plan import STAGES, at_stage, device_memory, pace, saving

    model, device = denoiser_of(recipe), torch.device("cpu")
    objective = objective_of(recipe, model, device, recipe.train.batch_rows)
    precision = resolve_precision(recipe.train.precision, device)
    if recipe.train.precision == "auto" and (machine.is_stated or recipe.placement.train.gpus_per_worker):
        precision = torch.bfloat16  # a GPU's; whether this machine is fast in it does not matter
    share = recipe.train.batch_rows // workers
    rows = min(recipe.train.micro_rows, share) if isinstance(recipe.train.micro_rows, int) else share
    forward = forward_of(recipe, rows, precision)
    widest = widest_pattern(objective)
    memory = {
        stage: device_memory(at_stage(recipe.train, stage), model, widest, forward, stage=stage, workers=workers)
        for stage in STAGES
    }
    tokens = recipe.train.batch_rows * recipe.packing.seq_len
    rate = (machine.device_tflops or 1) * 1e12 if machine.is_stated else measure_peak_flops(precision, device)
    timed = pace(
        recipe.train,
        model,
        objective.pattern,
        passes=objective.passes,
        workers=workers,
        device_flops=rate,
        mfu=machine.mfu,
    )
    saved = saving(
        model,
        workers=workers,
        mtbf_hours=machine.mtbf_hours,
        bytes_per_second=machine.storage_gb_per_second * 1e9,
    )
    if machine.tokens_per_second is not None:
        timed = replace(timed, step_seconds=tokens / (workers * machine.tokens_per_second))
    result = {
        "parameters": model.model.num_parameters(model.vocab_size),
        "workers": workers,
        "rows_of_a_forward": rows,
        "precision": str(precision).removeprefix("torch."),
        "zero_stage": recipe.train.zero_stage,
        "memory": {str(stage): {**asdict(found), "total": found.total} for stage, found in memory.items()},
        "device_tflops": None if machine.tokens_per_second is not None else rate / 1e12,
        "device_rate": "as stated" if machine.is_stated else "this machine's matrix products",
        "mfu": machine.mfu,
        "step_seconds": timed.step_seconds,
        "steps": timed.steps,
        "seconds": timed.seconds,
        "tokens": tokens * timed.steps,
        "tokens_per_s": tokens / timed.step_seconds,
        "checkpoint": {
            **asdict(saved),
            "every_steps": max(1, round(saved.every_seconds / timed.step_seconds)),
        },
    }
    if console.output == "text":
        _show(result, recipe, machine, console)
    return result


def _show(result: dict[str, Any], recipe: Recipe, machine: Machine, console: Console) -> None:
    workers = result["workers"]
    console.print(
        f"[bold]{recipe.name}[/bold]: {result['parameters']:,} parameters, {workers} "
        f"worker{'s' if workers > 1 else ''}, {result['rows_of_a_forward']} x {recipe.packing.seq_len} tokens "
        f"a forward, {result['precision']}"
    )
    table = Table(
        title="GiB on rank 0's device (*: the recipe's stage)", title_justify="left", box=None, pad_edge=False
    )
    names = ("weights", "gradients", "optimizer", "average", "activations", "logits", "total")
    short = ("weights", "grads", "Adam", "EMA", "activ.", "logits", "total")
    for name in ("ZeRO", *short, "on host", ""):
        table.add_column(name, justify="left" if name in ("ZeRO", "") else "right", no_wrap=True)
    for stage, found in result["memory"].items():
        is_own = int(stage) == result["zero_stage"]
        remark = "*" if is_own else ""
        if machine.device_memory_gb is not None:
            fits = found["total"] <= machine.device_memory_gb * 1e9
            remark = f"{remark} {'fits' if fits else 'too much'}".strip()
        values = [_gib(found[name]) for name in names]
        table.add_row(stage, *values, _gib(found["offloaded"]), remark, style="bold" if is_own else "")
    console.rich.print(table)
    saved = result["checkpoint"]
    if machine.tokens_per_second is not None:
        at = f"{machine.tokens_per_second:,.0f} tokens/s a device (as stated)"
    else:
        at = f"{result['device_tflops']:.3g} TFLOP/s a device ({result['device_rate']}), MFU {100 * machine.mfu:.0f} %"
    console.print(f"a step {_duration(result['step_seconds'])} at {at}: {result['tokens_per_s']:,.0f} tokens/s in all")
    ending = " until train.seconds are over" if result["steps"] < recipe.train.steps else ""
    progress = 1 - saved["lost"]  # a share of the time that is taken, not of the time that work takes
    console.print(
        f"{result['steps']:,} steps of {result['tokens']:,} tokens{ending} in {_duration(result['seconds'])}, "
        f"{_duration(result['seconds'] / progress) if progress else 'never'} with failures"
    )
    console.print(
        f"a checkpoint {_gib(saved['bytes'])} GiB, as much of rank 0's host memory, written in "
        f"{_duration(saved['write_seconds'])}; best every "
        f"{_duration(saved['every_seconds'])} ({saved['every_steps']:,} steps): "
        f"{100 * saved['lost']:.2g} % lost to failures"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:,.{0 if size >= 1000 * _GIB else 2}f}" if size else "–"


def _duration(seconds: float) -> str:
    """Two digits or so, in the largest unit."""
    for name, unit in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} s"
