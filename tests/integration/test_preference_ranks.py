"""Preference tuning over two ranks of DeepSpeed takes the steps that one process takes, also where weights are cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import preferences, write_lines
from safetensors.torch import load_file
from starts import Prepared, texts, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.manifest import read_manifest
from workflows.train.session import MetricsLog, Silence, open_session

pytestmark = pytest.mark.timeout(600)
SETTINGS: dict[str, dict[str, Any]] = {
    "zero-1": {"zero_stage": 1},
    "zero-2-micro": {"zero_stage": 2, "micro_rows": 2},
    "zero-3": {"zero_stage": 3},
    "zero-3-again": {"zero_stage": 3, "micro_rows": 2, "activation_checkpointing": True},
}


def train_rank(rank: int, prepared: list[Prepared]) -> None:
    from dllm_core.training.deepspeed_backend import DeepSpeedBackend

    for one in prepared:
        open_session(
            one.recipe,
            one.run,
            read_manifest(one.run.store, one.corpus),
            torch.device("cpu"),
            backend=DeepSpeedBackend,
            events_of=lambda step, run=one.run: MetricsLog(run, step) if rank == 0 else Silence(),
            on_damage=lambda error: pytest.fail(str(error)),
        ).run()


def weights(prepared: Prepared) -> dict[str, torch.Tensor]:
    return load_file(CheckpointStore(prepared.run).at(6).files["model.safetensors"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, worlds) -> dict[str, Prepared]:
    """The same tuning in one process and, under each setting, in two."""
    root: Path = tmp_path_factory.mktemp("ranks")
    sizes = {"tokenizer": {"vocab_size": 300}, "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}}
    start = Prepared(values_of(root, texts(root / "text"), **sizes, packing={"seq_len": 48})).trained()
    write_lines(root / "pairs", preferences(100))
    corpus = {"type": "jsonl", "path": str(root / "pairs"), "record": {"type": "preference"}, "heldout_fraction": 0.1}
    train = {"batch_rows": 8, "steps": 6, "checkpoint_every": 3, "heldout_every": 3, "learning_rate": 1e-3}
    values = values_of(root, corpus, start={"run": start.url}, objective={"type": "preference", "draws": 2})
    values |= {"packing": {"type": "pairs", "seq_len": 48}, "train": {**values["train"], **train}}
    settings: dict[str, dict[str, Any]] = {"one": {}, **SETTINGS}
    found = {n: Prepared({**values, "name": n, "train": {**values["train"], **own}}) for n, own in settings.items()}
    two = worlds(2)
    two.begin(train_rank, [found[name] for name in SETTINGS])
    found["one"].session().run()
    two.join()
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_take_the_steps_of_one(trained, name):
    one, two = (weights(trained[which]) for which in ("one", name))
    assert one.keys() == two.keys()
    before = load_file(read_bundle(RunDir.at(trained["one"].recipe.start.run)).folder / "model.safetensors")
    assert all((tensor - before[key]).abs().max() > 1e-3 for key, tensor in one.items())
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-4, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
