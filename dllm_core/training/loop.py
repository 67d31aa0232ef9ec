"""The training loop: batch -> loss -> backward -> step -> announce -> checkpoint, the same for every backend.

Every rank takes the same decisions from one small all-reduce a step, so no rank stops, skips or saves alone.
"""

import functools
import math
import time
from collections.abc import Callable

import torch

from dllm_core.checkpoints.store import Checkpoint, CheckpointStore, TrainPosition
from dllm_core.data.loader import Batches
from dllm_core.errors import DataError, DivergedError
from dllm_core.model.config import WEIGHTS_NAME
from dllm_core.model.tensor_file import TensorFile
from dllm_core.objective.loss import LEVELS, Objective
from dllm_core.training.backend import Backend
from dllm_core.training.config import TrainConfig
from dllm_core.training.ema import WeightAverage
from dllm_core.training.events import TrainEvents
from dllm_core.training.heldout import HeldoutScorer, score
from dllm_core.training.micro_batch import accumulated
from dllm_core.training.saving import SLICE_S, CheckpointWriter
from dllm_core.training.window import StepSums, Window

EMA_NAME = "ema.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_MAX_SKIPPED = 10
_PEAK_SECONDS = 0.15


class Trainer:
    """One rank's training run over a backend. `peak_flops`: of all workers together, for the MFU.

    should_stop: whether this rank was told to end early; if one was, all save and return after the step.
    heldout: this rank's share of the held-out rows. beat: called when a step is done and while a save is waited for, by
    which it is told apart from a rank that is stuck.
    """

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
        heldout: HeldoutScorer | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        beat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._backend, self._objective, self._loader = config, backend, objective, loader
        self._micro_rows = config.micro_rows if isinstance(config.micro_rows, int) else None
        self._events, self._heldout = events, heldout
        self._should_stop, self._beat, self._clock = should_stop, beat, clock
        self._writer: CheckpointWriter | None = None
        if backend.rank == 0:
            self._writer = CheckpointWriter(
                checkpoints,
                keep=config.keep_checkpoints,
                keep_every=config.keep_every,
                keep_best=config.average_checkpoints if config.average_from == "best" else 0,
                before=events.saving,
            )
        self._position = TrainPosition()
        self._durable: int | None = None  # step of the newest checkpoint that is committed
        self._failure: Exception | None = None  # of the newest save that failed
        self._skipped: list[range] = []
        self._average: WeightAverage | None = None
        self.is_stopped = False
        model = backend.module.config
        of_pass = model.model.flops_per_token(model.vocab_size, model.context_length, objective.pattern)
        self._window = Window(
            config, samples_per_epoch=samples_per_epoch, mfu_per_rate=objective.passes * of_pass / peak_flops
        )

    @property
    def position(self) -> TrainPosition:
        """Where training stands."""
        return self._position

    @property
    def skipped(self) -> list[range]:
        """Sample counters of the steps that were skipped since the last one that was taken."""
        return list(self._skipped)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose weights are already in the backend's module. Collective."""
        self._position = checkpoint.manifest.position
        self._durable = self._position.step
        seen, rows = self._position.samples_seen, self._config.batch_rows
        first = seen - self._position.skipped_in_a_row * rows
        self._skipped = [range(counter, counter + rows) for counter in range(first, seen, rows)]
        updates = self._position.step - self._position.skipped_steps
        self._backend.load_optimizer_state(TensorFile(checkpoint.files[OPTIMIZER_NAME]), updates)
        averaged = self._backend.scatter(TensorFile(checkpoint.files[EMA_NAME]))
        self._average = WeightAverage(averaged, self._config.ema_decay)

    def run(self) -> TrainPosition:
        """Train to the end of the step or time budget; the last checkpoint is committed when this returns.

        It returns early, `is_stopped`, where a rank was told to stop. Raises DivergedError on every rank, and DataError
        if the last checkpoint cannot be written.
        """
        self._average = self._average or WeightAverage(self._backend.shard(), self._config.ema_decay)
        if self._writer is not None:
            self._writer.begin(self._position.step)
            self._events.started(self._position.step, self._position.seconds, self._micro_rows)
        self._window.open(self._position)
        try:
            self._train()
        finally:
            if self._writer is not None:
                self._writer.close(self._beat)
        # No rank leaves, and takes its connections down, while another still writes.
        self._backend.sum_over_ranks([0.0])
        return self._position

    def _train(self) -> None:
        config, begun = self._config, self._clock() - self._position.seconds
        is_over = False
        while not is_over:
            before = self._position.step
            is_over = self._step(begun)
            step = self._position.step
            if step > before and config.heldout_every is not None and step % config.heldout_every == 0:
                self._score_heldout()
            if (step % config.log_every == 0 or is_over) and self._window.num_steps and self._backend.rank == 0:
                self._events.stepped(self._window.record(self._position))
            if step % config.log_every == 0:
                self._window.open(self._position)
            if step > before and step % config.checkpoint_every == 0 and not is_over:
                self._save()
            self._tell_of_save(within=0)
            self._beat()
        self._save_last()

    def _progress(self, seconds: float) -> float:
        by_time = 0.0 if self._config.seconds is None else seconds / self._config.seconds
        return max(by_time, self._position.step / self._config.steps)

    def _step(self, begun: float) -> bool:
        """One step, or nothing if the budget is used up by rank 0's clock; whether training is over."""
        config, backend = self._config, self._backend
        position = self._position
        asked = self._clock()
        batch = self._loader.batch(position.samples_seen, config.batch_rows, backend.rank, backend.world_size)
        self._window.data_wait += self._clock() - asked
        loss = accumulated(backend, self._objective, batch, self._micro_rows)
        nats, bound = float(loss.nats.detach()), float(loss.bound_nats)
        is_bad = not math.isfinite(nats)
        levels = [0.0] * (2 * LEVELS) if loss.levels is None or is_bad else loss.levels.flatten().tolist()
        preferred = [0.0, 0.0] if loss.preferred is None or is_bad else loss.preferred.tolist()
        clock = self._progress(self._clock() - begun) if backend.rank == 0 else 0.0
        mine = [0.0, 0.0, 1.0] if is_bad else [nats, bound, 0.0]
        mine += [float(loss.num_tokens), loss.divisor, clock, float(self._should_stop()), *preferred, *levels]
        nats, bound, num_bad, tokens, divisor, progress, stops, *more = backend.sum_over_ranks(mine)
        if progress >= 1:
            return True
        learning_rate = config.learning_rate_at(position.step, progress)
        # The backend averages gradients over ranks; nats must be summed over ranks and divided once. The divisor is 0
        # where chance noised nothing: then nats is 0 too. A bad loss spoils all gradients: one rule skips a step.
        backend.backward(loss.nats * (math.nan if num_bad else backend.world_size / max(divisor, 1.0)))
        norm = backend.step(learning_rate)
        is_taken = math.isfinite(norm)  # a finite loss may still have a gradient that is not
        if is_taken:
            pairs = None if loss.preferred is None else more[:2]
            self._window.add(StepSums(norm, nats, divisor, bound, tokens, learning_rate, more[2:], pairs))
            self._skipped.clear()
            if self._average is not None:
                self._average.update(backend.shard(), position.step)
        self._position = TrainPosition(
            step=position.step + 1,
            samples_seen=position.samples_seen + config.batch_rows,
            tokens_seen=position.tokens_seen + int(tokens),
            seconds=self._clock() - begun,
            skipped_steps=position.skipped_steps + int(not is_taken),
            skipped_in_a_row=0 if is_taken else position.skipped_in_a_row + 1,
        )
        if not is_taken:
            self._skip(position)
        is_done = max(progress, self._position.step / config.steps) >= 1
        self.is_stopped = stops > 0 and not is_done
        return is_done or stops > 0

    def _skip(self, before: TrainPosition) -> None:
        counters = range(before.samples_seen, self._position.samples_seen)
        self._skipped.append(counters)
        if self._backend.rank == 0:
            self._events.skipped(before.step, counters)
        if len(self._skipped) >= _MAX_SKIPPED:
            times = f"{_MAX_SKIPPED} times in a row, at step {before.step}"
            problem = f"the loss or its gradient was not a number {times}"
            raise DivergedError("train", problem, remedy="lower train.learning_rate")

    def _score_heldout(self) -> None:
        if self._heldout is not None:
            self._window.heldout = score(self._heldout, self._backend, self._position.step)

    def _newest_score(self) -> float | None:
        """Of the weights as they are now, if they were scored; the same on every rank."""
        heldout = self._window.heldout
        return None if heldout is None or heldout.step != self._position.step else heldout.nats

    def _save(self) -> None:
        """Start to write a checkpoint. The gathering is collective, the rest rank 0's.

        The write before is waited for first: two checkpoints would not fit where one does, 16 bytes a parameter.
        """
        if self._config.average_from == "best" and self._newest_score() is None:
            self._score_heldout()
        begun = self._clock()
        self._await_save()
        assert self._average is not None
        parts = {
            WEIGHTS_NAME: self._backend.gather(self._backend.shard()),
            EMA_NAME: self._backend.gather(self._average.weights),
            OPTIMIZER_NAME: self._backend.optimizer_state(),
        }
        if self._writer is not None:
            self._writer.submit(self._position, parts, self._newest_score())
        self._window.save_wait += self._clock() - begun

    def _await_save(self) -> None:
        """Until the save that was started has ended. Collective, in slices: a write may take longer than a collective
        may, and longer than a rank may give no sign of life. Rank 0 gives one for each piece that is written.
        """
        while any(self._backend.sum_over_ranks([float(self._tell_of_save(within=SLICE_S))])):
            if self._writer is None or self._writer.has_moved():
                self._beat()

    def _tell_of_save(self, within: float) -> bool:
        """Announce how the save that was started has ended, if it does in so many seconds; whether it goes on."""
        if self._writer is None or self._writer.step is None:
            return False
        step = self._writer.step
        try:
            has_ended = self._writer.ended(within)
        except (DataError, OSError) as error:  # a full disk may have room again at the next one
            self._failure = error
            self._events.not_saved(step, str(error))
            return False
        if has_ended:
            self._durable = step
            self._events.saved(step)
        return not has_ended

    def _save_last(self) -> None:
        """Nothing is left to do after this one, so it must succeed: what it fails with is raised."""
        self._await_save()
        if any(self._backend.sum_over_ranks([float(self._is_missing())])):
            self._save()
            self._await_save()
            if self._is_missing():
                assert self._failure is not None
                raise self._failure
        elif self._writer is not None:  # a record may have been told since
            self._events.saving(self._position.step)

    def _is_missing(self) -> bool:
        """Whether rank 0, this one, has no checkpoint of where training stands."""
        return self._writer is not None and self._durable != self._position.step


def measure_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product on this worker's device and threads: the denominator of the MFU.

    Measured once in a process, for 0.15 s.
    """
    return _measured_peak(dtype, device, torch.get_num_threads())


@functools.cache
def _measured_peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    size = 1024 if device.type == "cpu" else 8192
    drawn = torch.Generator(device).manual_seed(threads)
    a = torch.randn(size, size, device=device, generator=drawn).to(dtype)
    for _ in range(2):
        a @ a
    if device.type == "cuda":  # what still waits there would count as time, and not as done
        torch.cuda.synchronize(device)
    done, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < _PEAK_SECONDS:
        a @ a
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return done * 2 * size**3 / elapsed
