"""One run of a comparison as one task: train on a core (or a GPU) to the end of its steps, then bundle.

Plain PyTorch in one process: the models are small, and the cluster is kept busy by their number. A task that is killed
goes on from its newest checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.loader import evenly
from dllm_core.data.manifest import CorpusManifest, read_manifest
from dllm_core.errors import CheckpointError
from dllm_core.training.backend import LocalBackend
from workflows.pipeline.bundle import make_bundle
from workflows.pipeline.receipts import Receipts
from workflows.recipe import Recipe
from workflows.train.session import METRICS, MetricsLog, open_session, train_to_end

_STAGE, _POINTS = "train", 50


@dataclass(frozen=True)
class Entrant:
    """One model on one data set: a recipe, and the run and corpus that follow from it."""

    model: str
    data: str
    recipe: Recipe
    run: RunDir
    corpus: str

    @property
    def manifest(self) -> CorpusManifest:
        """Of its corpus, read anew."""
        return read_manifest(self.run.store, self.corpus)

    @property
    def inputs(self) -> str:
        """What its bundle is made of: the run, and of how many of its checkpoints, which no run's name tells."""
        train = self.recipe.train
        if train.average_checkpoints == 1 and train.average_from == "newest":
            return self.run.name
        return fingerprint([self.run.name, train.average_checkpoints, train.average_from])

    @property
    def num_tokens(self) -> int:
        """Positions that the whole training reads: what long runs are started first by."""
        return self.recipe.train.steps * self.recipe.train.batch_rows * self.recipe.packing.seq_len


def device_of(gpus: float) -> torch.device:
    """A task's device; on the CPU it has one core."""
    if gpus and torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def trained(entrant: Entrant) -> dict[str, Any] | None:
    """What a finished run reported."""
    result = Receipts(entrant.run).read(_STAGE, entrant.inputs)
    return result if result is not None and entrant.run.store.exists(entrant.run.key("bundle/bundle.json")) else None


def losses(entrant: Entrant) -> list[dict[str, float]]:
    """What was minimised, along the training: some 50 points of the run's log, the last among them."""
    records = JsonLines(entrant.run, METRICS).read()
    wanted = evenly(np.arange(len(records)), _POINTS).tolist()
    return [{name: records[at][name] for name in ("tokens", "loss")} for at in wanted]


def train_entrant(gpus: float, entrant: Entrant) -> dict[str, Any]:
    """Train to the end and write the bundle; what the last step reported. A finished run is left as it is, but for a
    bundle of other checkpoints.
    """
    found = trained(entrant)
    if found is not None:
        return found
    run, recipe = entrant.run, entrant.recipe
    with run.locked():
        run.store.put(run.key("recipe.yaml"), recipe.to_yaml().encode())
        device, damaged = device_of(gpus), list[CheckpointError]()
        manifest = entrant.manifest
        trainer = open_session(
            recipe,
            run,
            manifest,
            device,
            backend=LocalBackend,
            events_of=lambda step: MetricsLog(run, step),
            on_damage=damaged.append,
        )
        position = train_to_end(trainer, run, manifest)
        Receipts(run).take_back(_STAGE)
        make_bundle(recipe, run, entrant.corpus, damaged.append)
        records = JsonLines(run, METRICS).read()
        result = {**(records[-1] if records else {}), "step": position.step, "tokens": position.tokens_seen}
        result |= {"seconds": round(position.seconds, 2), "damaged_checkpoints": len(damaged)}
        Receipts(run).write(_STAGE, entrant.inputs, result)
    return result
