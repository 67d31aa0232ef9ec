"""The training loop: batch -> loss -> backward -> step -> announce -> checkpoint, the same for every backend.

Every rank takes the same decisions from one small all-reduce a step, so no rank stops, skips or saves alone.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dllm_core.checkpoints.store import Checkpoint, CheckpointStore, TrainPosition
from dllm_core.data.loader import Batches
from dllm_core.errors import DivergedError
from dllm_core.model.pretrained import WEIGHTS_NAME, weights_of
from dllm_core.objective.loss import Objective
from dllm_core.training.backend import Backend
from dllm_core.training.config import TrainConfig
from dllm_core.training.ema import WeightAverage
from dllm_core.training.events import StepRecord, TrainEvents

EMA_NAME = "ema.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_MAX_SKIPPED = 10


class Trainer:
    """One rank's training run over a backend. `peak_flops`: of all workers together, for the MFU."""

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        objective: Objective,
        loader: Batches,
        checkpoints: CheckpointStore,
        events: TrainEvents,
        *,
        samples_per_epoch: int,
        peak_flops: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._backend, self._objective, self._loader = config, backend, objective, loader
        self._checkpoints, self._events, self._clock = checkpoints, events, clock
        self._samples_per_epoch, self._peak_flops = samples_per_epoch, peak_flops
        self._position = TrainPosition()
        self._skipped_in_a_row = 0
        self._average: WeightAverage | None = None
        model = backend.module.config
        self._flops_per_token = model.model.flops_per_token(model.vocab_size, model.context_length, objective.pattern)

    @property
    def position(self) -> TrainPosition:
        """Where training stands."""
        return self._position

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose weights are already in the backend's module. Collective."""
        self._position = checkpoint.manifest.position
        updates = self._position.step - self._position.skipped_steps
        self._backend.load_optimizer_state(load_file(checkpoint.files[OPTIMIZER_NAME]), updates)
        if self._backend.rank == 0:
            averaged = {name: t.to(self._backend.device) for name, t in load_file(checkpoint.files[EMA_NAME]).items()}
            self._average = WeightAverage(averaged, self._config.ema_decay)

    def run(self) -> TrainPosition:
        """Train to the end of the step or time budget; the last checkpoint is committed when this returns."""
        leader = self._backend.rank == 0
        if leader:
            self._average = self._average or WeightAverage(weights_of(self._backend.module), self._config.ema_decay)
            self._events.started(self._position.step, self._position.seconds)
        begun = self._clock() - self._position.seconds
        window = _Window(self._position)
        saved_at = self._position.step if self._position.step else -1
        while True:
            progress = self._step(window, begun)
            if leader and (self._position.step % self._config.log_every == 0 or progress >= 1) and window.steps:
                self._events.stepped(self._record(window))
            if self._position.step % self._config.log_every == 0:
                window = _Window(self._position)
            if progress >= 1 or self._position.step % self._config.checkpoint_every == 0:
                if saved_at != self._position.step:
                    self._save()
                saved_at = self._position.step
            if progress >= 1:
                # No rank leaves, and takes its connections down, while another still writes.
                self._backend.sum_over_ranks([0.0])
                return self._position

    def _progress(self, seconds: float) -> float:
        by_time = 0.0 if self._config.seconds is None else seconds / self._config.seconds
        return max(by_time, self._position.step / self._config.steps)

    def _step(self, window: "_Window", begun: float) -> float:
        """One step, or nothing if the budget is used up; the progress that rank 0's clock tells, 1 at the end."""
        config, backend = self._config, self._backend
        position = self._position
        batch = self._loader.batch(position.samples_seen, config.batch_rows, backend.rank, backend.world_size)
        with backend.autocast():
            loss = self._objective.loss(backend.denoiser, batch)
        nats, bound = float(loss.nats.detach()), float(loss.bound_nats)
        bad = not math.isfinite(nats)
        mine = [0.0, 0.0, 1.0] if bad else [nats, bound, 0.0]
        mine += [float(loss.num_tokens), loss.divisor]
        clock = self._progress(self._clock() - begun) if backend.rank == 0 else 0.0
        nats, bound, num_bad, tokens, divisor, progress = backend.sum_over_ranks([*mine, clock])
        if progress >= 1:
            return progress
        learning_rate = config.learning_rate_at(position.step, progress)
        norm = math.nan
        if not num_bad:
            # The backend averages gradients over ranks; nats must be summed over ranks and divided once.
            # The divisor is 0 where chance noised nothing: then nats is 0 too.
            backend.backward(loss.nats * (backend.world_size / max(divisor, 1.0)))
            norm = backend.step(learning_rate)
        is_taken = math.isfinite(norm)  # a finite loss may still have a gradient that is not
        if is_taken:
            window.add(norm, nats, divisor, bound, tokens, learning_rate)
            self._skipped_in_a_row = 0
            if self._average is not None:
                self._average.update(weights_of(backend.module), position.step)
        else:
            self._skip()
        self._position = TrainPosition(
            step=position.step + 1,
            samples_seen=position.samples_seen + config.batch_rows,
            tokens_seen=position.tokens_seen + int(tokens),
            seconds=self._clock() - begun,
            skipped_steps=position.skipped_steps + int(not is_taken),
        )
        return max(progress, self._position.step / config.steps)

    def _skip(self) -> None:
        self._skipped_in_a_row += 1
        if self._backend.rank == 0:
            self._events.skipped(self._position.step)
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            times = f"{_MAX_SKIPPED} times in a row, at step {self._position.step}"
            problem = f"the loss or its gradient was not a number {times}"
            raise DivergedError("train", problem, remedy="lower train.learning_rate")

    def _record(self, window: "_Window") -> StepRecord:
        span = max(self._position.seconds - window.begun, 1e-9)
        rate = window.tokens / span
        return StepRecord(
            step=self._position.step,
            loss=window.nats / max(window.divisor, 1.0),
            bound=window.bound / max(window.tokens, 1.0) if math.isfinite(window.bound) else None,
            grad_norm=window.grad_norm / window.steps,
            learning_rate=window.learning_rate,
            tokens=self._position.tokens_seen,
            tokens_per_s=rate,
            mfu=rate * self._flops_per_token / self._peak_flops,
            seconds=self._position.seconds,
            epoch=self._position.samples_seen / self._samples_per_epoch,
        )

    def _save(self) -> None:
        """Commit a checkpoint. The gathering is collective, the writing is rank 0's."""
        moments = self._backend.optimizer_state()
        if self._average is None:
            return
        parts = {
            WEIGHTS_NAME: weights_of(self._backend.module),
            EMA_NAME: self._average.weights,
            OPTIMIZER_NAME: moments,
        }
        with tempfile.TemporaryDirectory(prefix="dllm-checkpoint-") as scratch:
            files = {name: Path(scratch, name) for name in parts}
            for name, tensors in parts.items():
                save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, files[name])
            self._checkpoints.save(self._position, files)
        self._checkpoints.prune(self._config.keep_checkpoints)
        self._events.saved(self._position.step)


class _Window:
    """Sums since the last record."""

    def __init__(self, position: TrainPosition) -> None:
        self.begun = position.seconds
        self.steps = 0
        self.nats = self.divisor = self.bound = self.tokens = self.grad_norm = self.learning_rate = 0.0

    def add(
        self, grad_norm: float, nats: float, divisor: float, bound: float, tokens: float, learning_rate: float
    ) -> None:
        self.steps += 1
        self.grad_norm += grad_norm
        self.nats += nats
        self.divisor += divisor
        self.bound += bound
        self.tokens += tokens
        self.learning_rate = learning_rate


def measure_peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.15) -> float:
    """FLOP/s of a large matrix product on this worker's device and threads: the denominator of the MFU."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(2):
        a @ a
    done, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        a @ a
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return done * 2 * size**3 / elapsed
