"""One run of a comparison as one task: train on a core (or a GPU) to the end of its steps, then bundle.

Plain PyTorch in one process: the models are small, and the cluster is kept busy by their number. A task that is killed
goes on from its newest checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.errors import CheckpointError
from dllm_core.training.backend import LocalBackend
from dllm_core.training.events import StepRecord
from workflows.fan_out import keep_to_one_core
from workflows.pipeline.bundle import make_bundle
from workflows.pipeline.receipts import Receipts
from workflows.recipe import Recipe
from workflows.train.session import METRICS, Silence, open_session

_STAGE = "train"


@dataclass(frozen=True)
class Entrant:
    """One model on one data set: a recipe, and the run and corpus that follow from it."""

    model: str
    data: str
    recipe: Recipe
    run: RunDir
    corpus: str

    @property
    def num_tokens(self) -> int:
        """Positions that the whole training reads: what long runs are started first by."""
        return self.recipe.train.steps * self.recipe.train.batch_rows * self.recipe.packing.seq_len


class _Metrics(Silence):
    """Keeps `metrics.jsonl`, as every training does."""

    def __init__(self, run: RunDir, resumed_at: int) -> None:
        self._log = JsonLines(run, METRICS)
        self._log.keep(lambda record: record["step"] <= resumed_at)

    def stepped(self, record: StepRecord) -> None:
        """A line."""
        self._log.append(record.as_json())

    def saved(self, step: int) -> None:
        """Lines are durable whenever a checkpoint is."""
        self._log.sync()


def device_of(gpus: float) -> torch.device:
    """A task's device; on the CPU it has one core."""
    keep_to_one_core()
    if gpus and torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def trained(entrant: Entrant) -> dict[str, Any] | None:
    """What a finished run reported."""
    result = Receipts(entrant.run).read(_STAGE, entrant.run.name)
    return result if result is not None and entrant.run.store.exists(entrant.run.key("bundle/bundle.json")) else None


def train_entrant(gpus: float, entrant: Entrant) -> dict[str, Any]:
    """Train to the end and write the bundle; what the last step reported. A finished run is left as it is."""
    found = trained(entrant)
    if found is not None:
        return found
    run, recipe = entrant.run, entrant.recipe
    with run.locked():
        run.store.put(run.key("recipe.yaml"), recipe.to_yaml().encode())
        device, damaged = device_of(gpus), list[CheckpointError]()
        position = open_session(
            recipe,
            run,
            entrant.corpus,
            device,
            backend_of=lambda module: LocalBackend(module, recipe.train),
            events_of=lambda step: _Metrics(run, step),
            on_damage=damaged.append,
        ).run()
        make_bundle(recipe, run, entrant.corpus)
        records = JsonLines(run, METRICS).read()
        result = {**(records[-1] if records else {}), "step": position.step, "tokens": position.tokens_seen}
        result |= {"seconds": round(position.seconds, 2), "damaged_checkpoints": len(damaged)}
        Receipts(run).write(_STAGE, run.name, result)
    return result
