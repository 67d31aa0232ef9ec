"""The train stage, seen from the driver: start Ray Train, show what rank 0 tells, keep the events.

    dllm train workflows/recipes/quickstart.yaml placement.train.workers=4

A worker that dies is restarted by Ray Train; a driver that dies is run again. Both go on from the newest checkpoint.
"""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.errors import DataError, DllmError
from workflows.recipe import Recipe

OnMessage = Callable[[dict[str, Any]], None]
_POLL_S = 0.25
_RAY_FOLDER = ".ray-train"


def final_step(run: RunDir) -> int | None:
    """The step of the run's newest checkpoint, if there is one."""
    committed = CheckpointStore(run).committed()
    return committed[-1] if committed else None


def checkpoint_bytes(recipe: Recipe) -> int:
    """What the kept checkpoints and the one in the making take: weights, EMA and two moments, fp32."""
    parameters = recipe.model.num_parameters(recipe.tokenizer.vocab_size)
    return 16 * parameters * (recipe.train.keep_checkpoints + 1)


def train(recipe: Recipe, run: RunDir, corpus: str, on_message: OnMessage) -> None:
    """Train to the end of the budget on the connected cluster. `on_message` runs in this thread."""
    import ray

    from workflows.train.announcements import open_mailbox

    mailbox = open_mailbox()
    outcome: list[BaseException | None] = []
    # In a thread of its own, because Ray Train takes SIGINT over in the main one and then needs > 5 s to end.
    fitting = threading.Thread(target=lambda: outcome.append(_outcome_of(recipe, run, corpus, mailbox)), daemon=True)
    fitting.start()
    while fitting.is_alive():
        fitting.join(timeout=_POLL_S)
        with contextlib.suppress(ray.exceptions.RayError):  # a mailbox that died costs a screen, not a run
            for message in ray.get(mailbox.take.remote()):
                on_message(message)
    error = outcome[0]
    if error is not None:
        raise _explained(error)


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

    from workflows.train.job import WorkerJob

    placement = recipe.placement.train
    resources: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    # Our checkpoints are ours; Ray needs a place for its own small state, which a name used once keeps apart.
    name = f"{run.name}-{time.time_ns()}"
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"job": WorkerJob(recipe, run, corpus, mailbox)},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=f"{run.store.url}/{_RAY_FOLDER}",
            failure_config=FailureConfig(max_failures=placement.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(DataError):  # what is left is small and harmless
            for item in list(run.store.list(f"{_RAY_FOLDER}/{name}")):
                run.store.delete(item.key)


def _on_worker(config: dict[str, Any]) -> None:
    from workflows.train.worker import train_worker  # DeepSpeed: 2 s that the driver need not pay

    train_worker(config)


def _explained(error: BaseException) -> BaseException:
    """Our own error, if one is in the chain of causes that Ray wrapped it in; else one line with the last cause."""
    found: BaseException | None = error
    seen = []
    while found is not None and found not in seen:
        seen.append(found)
        if isinstance(found, DllmError):
            return found
        failures = getattr(found, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        found = inner or getattr(found, "cause", None) or found.__cause__
    last = seen[-1]
    return DataError("train", f"{type(last).__name__}: {str(last).strip().splitlines()[-1] if str(last) else ''}")
