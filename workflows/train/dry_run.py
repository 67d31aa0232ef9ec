"""`dllm train --dry-run`: four real steps and a checkpoint on made-up rows, in this process. Writes nothing that stays.

The trainer, its backend, objective and checkpoint writer are those of a training; rows are random ids, and there is one
worker, which takes its share of the batch. Memory is the process's largest over the first two steps, above what it had
before there was a model, or on a GPU what was allocated; time is that of the last.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.batch import Batch
from dllm_core.errors import DataError, DivergedError
from dllm_core.noise.discrete import snapped
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.objective.config import DiffusionOptions
from dllm_core.seeding import Floats
from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.malloc import give_back_above
from workflows.recipe import Recipe
from workflows.train.plan import check_planned, denoiser_of, forward_of, objective_of

if TYPE_CHECKING:
    import torch

_STEPS, _MEASURED_STEPS = 4, 2
_AT_ONCE, _KEPT = 1 << 16, 1 << 25  # bytes above which glibc gives freed memory back; it goes up to 32 MiB by itself


class FakeRows:
    """Rows of random ids, noised at even times, in discrete time those of a chain of so many steps."""

    def __init__(
        self,
        process: InterpolatingProcess,
        vocab_size: int,
        seq_len: int,
        block_length: int | None,
        steps: int | None = None,
    ) -> None:
        self._process, self._size, self._length, self._block = process, vocab_size, seq_len, block_length
        self._steps = steps

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The same for the same counter."""
        rng = np.random.default_rng(counter)
        x0 = rng.integers(3, self._size, (rows, self._length))
        blocks = -(-self._length // (self._block or self._length))
        even = (np.arange(rows * blocks) + 0.5).reshape(rows, blocks) / (rows * blocks)
        t: Floats = even.repeat(self._block or self._length, axis=1)[:, : self._length].astype(np.float32)
        t = t if self._steps is None else snapped(t, self._steps)
        u, v = rng.random(x0.shape, np.float32), rng.random(x0.shape)
        xt = self._process.corrupt(x0, t, u, v)
        return Batch(x0, xt, t, np.ones(x0.shape, dtype=bool), np.arange(counter, counter + rows))


def dry_run(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Take the steps, save, and say what they took beside what `dllm plan` says."""
    check_planned(recipe)
    import torch

    from dllm_core.checkpoints.store import CheckpointStore
    from dllm_core.objective.warmup import widest_pattern
    from dllm_core.training.backend import resolve_precision
    from dllm_core.training.deepspeed_backend import DeepSpeedBackend
    from dllm_core.training.loop import Trainer, measure_peak_flops
    from dllm_core.training.plan import device_memory
    from workflows.train.session import Silence

    is_gpu = torch.cuda.is_available() and recipe.placement.train.gpus_per_worker > 0
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    if not is_gpu:
        torch.set_num_threads(max(1, int(recipe.placement.train.cpus_per_worker)))
    share = recipe.train.batch_rows // recipe.placement.train.workers
    micro_rows = recipe.train.micro_rows if isinstance(recipe.train.micro_rows, int) else None
    config = recipe.train.model_copy(
        update={
            "batch_rows": share,
            "micro_rows": micro_rows,
            "steps": _STEPS,
            "seconds": None,
            "log_every": 1,
            "checkpoint_every": 1 << 40,
            "heldout_every": None,
            "average_from": "newest",
        }
    )
    model = denoiser_of(recipe)
    process = recipe.noise.process.bind(model.mask_id, model.vocab_size)
    precision = resolve_precision(config.precision, device)
    peak_flops = measure_peak_flops(precision, device)

    class Watch(Silence):
        """When a step was done, and the memory by then."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.memory = 0

        def stepped(self, record: Any) -> None:
            self.ends.append(time.perf_counter())
            if record.step <= _MEASURED_STEPS:
                self.memory = torch.cuda.max_memory_allocated(device) if is_gpu else _status("VmHWM")
            if record.step == _MEASURED_STEPS:
                give_back_above(_KEPT)  # its price would be in the time
            self.mfu, self.loss = record.mfu, record.loss

        def saved(self, step: int) -> None:
            self.saved_at = time.perf_counter()

        def skipped(self, step: int, counters: range) -> None:
            problem = f"the loss or its gradient was not a number at step {step} of made-up rows"
            raise DivergedError("train", problem, remedy="lower train.learning_rate")

    rehearsed, watch = _rehearsed(recipe), Watch()
    with _alone("nccl" if is_gpu else "gloo"), tempfile.TemporaryDirectory(prefix="dllm-dry-run-") as scratch:
        before = _reset_peak_allocated(device) if is_gpu else _reset_peak_rss()
        torch.manual_seed(recipe.seed)
        module = DeepSpeedBackend.new_denoiser(model, config, device)
        objective = objective_of(rehearsed, model, device, share)
        backend = DeepSpeedBackend(module, config)
        checkpoints = CheckpointStore(RunDir(LocalStore(Path(scratch)), "dry-run"))
        noise = recipe.noise
        rows = FakeRows(process, model.vocab_size, recipe.packing.seq_len, noise.block_length, noise.steps)
        trainer = Trainer(
            config, backend, objective, rows, checkpoints, watch, samples_per_epoch=1 << 40, peak_flops=peak_flops
        )
        trainer.run()
        written = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    forward = forward_of(recipe, micro_rows or share, precision)
    widest = widest_pattern(objective)
    planned = device_memory(config, model, widest, forward, stage=config.zero_stage, workers=1)
    measured = watch.memory - before
    result = {
        "rows": share,
        "zero_stage": config.zero_stage,
        "precision": str(precision).removeprefix("torch."),
        "loss": round(float(watch.loss), 4),
        "step_seconds": round(watch.ends[-1] - watch.ends[-2], 4),
        "mfu": round(watch.mfu, 4),
        "memory_bytes": measured,
        "planned_bytes": planned.total + (planned.offloaded if not is_gpu else 0),
        "checkpoint_bytes": written,
        "save_seconds": round(watch.saved_at - watch.ends[-1], 4),
    }
    gib = float(1 << 30)
    console.print(
        f"one worker's share, {share} x {recipe.packing.seq_len} tokens, ZeRO {config.zero_stage}, "
        f"{result['precision']}: a step {result['step_seconds']:.3g} s, loss {watch.loss:.3f}"
    )
    console.print(f"memory {measured / gib:.3g} GiB; planned {result['planned_bytes'] / gib:.3g} GiB")
    console.print(f"a checkpoint {written / gib:.3g} GiB, saved in {result['save_seconds']:.3g} s and deleted again")
    return result


def _rehearsed(recipe: Recipe) -> Recipe:
    """The recipe with as much of its warm-up as holds more memory than what comes after, while that is measured."""
    objective, length = recipe.objective, recipe.packing.seq_len
    if not isinstance(objective, DiffusionOptions):
        return recipe
    wider = [stage for stage in objective.block_warmup if stage.block_length < length]
    stages = wider[:1] if recipe.noise.block_length is None else []
    warmup = tuple(stage.model_copy(update={"steps": _MEASURED_STEPS}) for stage in stages)
    return recipe.model_copy(update={"objective": objective.model_copy(update={"block_warmup": warmup})})


@contextlib.contextmanager
def _alone(backend: str) -> Iterator[None]:
    """A process group of one, of the backend that workers have: gloo takes a GPU's tensors to the host and back."""
    import torch

    with tempfile.TemporaryDirectory(prefix="dllm-group-") as folder:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _reset_peak_allocated(device: "torch.device") -> int:
    """Allocated bytes now; the largest counts from here, without what measured the device's rate."""
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _reset_peak_rss() -> int:
    """Resident bytes now; the process's largest counts from here.

    What is freed goes back to the system at once: glibc keeps up to a half more otherwise, at its own discretion.
    """
    give_back_above(_AT_ONCE)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise DataError("/proc/self/clear_refs", f"memory cannot be measured here ({error})") from None
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise DataError("/proc/self/status", f"does not say {name}")
