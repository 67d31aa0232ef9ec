"""The train stage, seen from the driver: start Ray Train, show what rank 0 tells, keep the events.

    dllm train workflows/recipes/quickstart.yaml placement.train.workers=4

A worker that dies is restarted by Ray Train; a driver that dies is run again. Both go on from the newest checkpoint.
"""

import contextlib
import math
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.manifest import read_manifest
from dllm_core.errors import CheckpointError, DataError, DivergedError, DllmError, PreemptedError
from dllm_core.training.config import CHECKPOINT_BYTES
from workflows.env import on_nodes
from workflows.interrupts import first_sigterm_asks
from workflows.recipe import Recipe
from workflows.start import check_start
from workflows.train.job import WorkerJob, check_rows, needed_start

OnMessage = Callable[[dict[str, Any]], None]
_POLL_S = 0.25
_SAVE_WITHIN_S = 24  # clouds take a machine back 30 s after they say so
_STACKS_S = 120  # that a collective may take longer than a rank may stand still: stacks say more than torch's end


def final_step(run: RunDir) -> int | None:
    """The step of the run's newest checkpoint, if there is one."""
    committed = CheckpointStore(run).committed()
    return committed[-1] if committed else None


def checkpoint_bytes(recipe: Recipe, there: int = 0) -> int:
    """What is still to be written of the checkpoints that stay, and the one in the making: trained weights, EMA and two
    moments, fp32. there: bytes of those that the run has, which make room as they go.
    """
    parameters, train = recipe.model.num_parameters(recipe.likely_ids), recipe.train
    if recipe.start is not None and recipe.start.lora is not None:
        parameters = recipe.start.lora.num_parameters(recipe.model)
    kept = train.keep_checkpoints + (train.average_checkpoints if train.average_from == "best" else 0)
    if train.keep_every is not None and train.seconds is None:  # how many steps a time has room for, nobody knows
        every = train.checkpoint_every
        older = max(0, -(-train.steps // every) - 1 - train.keep_checkpoints) * every  # when the last one is written
        kept += older // math.lcm(train.keep_every, every)
    one = CHECKPOINT_BYTES * parameters
    return max(one, one * (kept + 1) - there)


def step_line(record: dict[str, Any]) -> str:
    """One line of a record of `metrics.jsonl` for people."""
    parts = [f"step {record['step']:,}", f"loss {record['loss']:.3f}"]
    heldout = record["heldout"]
    if heldout is not None:
        error = heldout["standard_error"]
        parts.append(f"held-out {heldout['nats']:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    if record.get("preference") is not None:
        parts.append(f"preferred {100 * record['preference']['accuracy']:.0f} %")
    parts += [f"norm {record['grad_norm']:.2f}", f"lr {record['learning_rate']:.1e}"]
    parts += [f"{record['tokens_per_s'] / 1000:.1f}k tok/s", f"MFU {100 * record['mfu']:.0f} %"]
    minutes, seconds = divmod(round(record["eta_s"]), 60)
    left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    return "  ".join([*parts, f"data {100 * record['data_wait']:.1f} %", f"{left} left"])


def train(recipe: Recipe, run: RunDir, corpus: str, on_message: OnMessage) -> None:
    """Train to the end of the budget on the connected cluster. `on_message` runs in this thread.

    SIGTERM makes all ranks save and end. Raises PreemptedError then, also where they did not manage to in time.
    """
    _check_checkpoint(recipe, run, corpus)
    import ray

    from workflows.train.announcements import DIVERGED, open_mailbox

    mailbox = open_mailbox()
    outcome, diverged = list[BaseException | None](), list[BaseException]()
    # In a thread of its own, because Ray Train takes SIGINT over in the main one and then needs > 5 s to end.
    fitting = threading.Thread(target=lambda: outcome.append(_outcome_of(recipe, run, corpus, mailbox)), daemon=True)
    fitting.start()
    deadline, is_finished, is_over = math.inf, False, False
    with first_sigterm_asks() as is_asked:
        while not is_over:
            fitting.join(timeout=_POLL_S)
            is_over = not fitting.is_alive() or time.monotonic() >= deadline  # its last words are still to be heard
            with contextlib.suppress(ray.exceptions.RayError):  # a mailbox that died costs a screen, not a run
                if is_asked.is_set() and deadline == math.inf:
                    deadline = time.monotonic() + _SAVE_WITHIN_S
                    mailbox.stop.remote()
                for message in ray.get(mailbox.take.remote()):
                    if message["kind"] == DIVERGED:
                        diverged.append(message["error"])
                        continue
                    is_finished = is_finished or message["kind"] == "finished"
                    on_message(message)
    if diverged:
        raise diverged[0]
    if is_asked.is_set():
        raise PreemptedError("train", f"was told to stop, {_standing(run)}", remedy="run it again to go on")
    error = outcome[0]
    if error is not None:
        raise _explained(error)
    if not is_finished:  # a group of workers that ends without a word must not pass for a finished training
        raise DataError("train", f"the workers ended early, {_standing(run)}", remedy="run it again to go on")


def _check_checkpoint(recipe: Recipe, run: RunDir, corpus: str) -> None:
    """Refuse now what each worker would refuse, as often as workers are restarted."""
    step = final_step(run)
    start = needed_start(recipe, is_resumed=step is not None)
    if start is not None:
        check_start(start)
    if step is None:
        return
    manifest, accepted = read_manifest(run.store, corpus), recipe.train.accept_corpus
    with contextlib.suppress(CheckpointError):  # a damaged one is passed over by who reads it whole
        check_rows(CheckpointStore(run).manifest(step), manifest, accepted)


def _standing(run: RunDir) -> str:
    step = final_step(run)
    return "before a checkpoint was written" if step is None else f"the newest checkpoint is that of step {step:,}"


def _outcome_of(recipe: Recipe, run: RunDir, corpus: str, mailbox: Any) -> BaseException | None:
    try:
        _fit(recipe, run, corpus, mailbox)
    except BaseException as error:  # noqa: BLE001 (handed to the main thread, which raises it)
        return error
    return None


def _fit(recipe: Recipe, run: RunDir, corpus: str, mailbox: Any) -> None:
    warnings.filterwarnings("ignore", module="ray")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    placement = recipe.placement.train
    asked = on_nodes(placement.demand)
    # Our checkpoints are ours, and what Ray keeps is for its controller alone, which runs beside the driver. On S3 it
    # would ask by a client that knows neither AWS_CA_BUNDLE nor our patience.
    with tempfile.TemporaryDirectory(prefix="dllm-ray-train-", ignore_cleanup_errors=True) as folder:
        TorchTrainer(
            _on_worker,
            train_loop_config={"job": WorkerJob(recipe, run, corpus, mailbox)},
            torch_config=TorchConfig(
                timeout_s=max(TorchConfig.timeout_s, math.ceil(placement.stall_seconds) + _STACKS_S)
            ),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=asked.amounts,
                label_selector=asked.labels or None,
            ),
            run_config=RunConfig(
                name=f"{run.name}-{time.time_ns()}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=placement.max_failures),
            ),
        ).fit()


def _on_worker(config: dict[str, Any]) -> None:
    """Ray Train starts again whoever ends with an error, and what has diverged would only diverge again. All ranks end
    with that one alike, so none waits for another.
    """
    from workflows.train.announcements import DIVERGED, Announcer
    from workflows.train.worker import train_worker  # DeepSpeed: 2 s that the driver need not pay

    try:
        train_worker(config)
    except DivergedError as error:
        Announcer(config["job"].mailbox).tell_surely(DIVERGED, error=error)


def _of_ranks(failures: dict[int, BaseException]) -> BaseException | None:
    """The error that says why: ours, a checkpoint's before others, then that of a process which is gone. What is left
    only misses the one that failed.
    """

    def says_little(error: BaseException) -> tuple[bool, bool, bool]:
        is_vague = not isinstance(error, CheckpointError)
        return not isinstance(error, DllmError), is_vague, not hasattr(error, "health_check_failure")

    return min(failures.values(), key=says_little, default=None)


def _explained(error: BaseException) -> BaseException:
    """Our own error, if one is in the chain of causes that Ray wrapped it in; else one line with the last cause."""
    found: BaseException | None = error
    seen = []
    while found is not None and found not in seen:
        seen.append(found)
        if isinstance(found, DllmError):
            return found
        inner = _of_ranks(getattr(found, "worker_failures", None) or {})
        found = inner or getattr(found, "cause", None) or found.__cause__
    last = seen[-1]
    return DataError("train", f"{type(last).__name__}: {str(last).strip().splitlines()[-1] if str(last) else ''}")
