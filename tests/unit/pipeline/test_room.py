"""Room for checkpoints is asked for before a training starts: as much as it will take, and not what it has already."""

import pytest
from conftest import SmallCorpus

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.storage.store import LocalStore
from dllm_core.training.config import TrainConfig
from workflows.console import Console
from workflows.pipeline.flow import Pipeline
from workflows.target import Target
from workflows.train.flow import checkpoint_bytes


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 7, "checkpoint_every": 1},
        {"steps": 13, "checkpoint_every": 2, "keep_every": 3},
        {"steps": 8, "checkpoint_every": 1, "keep_every": 1, "keep_checkpoints": 1},
        {"steps": 9, "checkpoint_every": 1, "average_from": "best", "average_checkpoints": 3},
    ],
)
def test_as_much_room_is_asked_for_as_a_training_takes_and_after_a_kill_what_it_still_takes(
    small_corpus: SmallCorpus, tmp_path, fields
):
    recipe = small_corpus.recipe.model_copy(update={"train": TrainConfig.checked(fields)})
    train, run = recipe.train, RunDir(LocalStore(tmp_path / "storage"), "run-0123456789ab")
    one = 16 * recipe.model.num_parameters(recipe.tokenizer.vocab_size)
    checkpoints, pipeline = CheckpointStore(run), Pipeline(Target(recipe, run, None), Console("json"))
    part, asked, held = tmp_path / "part", list[int](), list[int]()
    with part.open("wb") as file:
        file.truncate(one)
    best = train.average_checkpoints if train.average_from == "best" else 0
    for step in sorted({*range(train.checkpoint_every, train.steps + 1, train.checkpoint_every), train.steps}):
        there = len(checkpoints.committed())
        asked.append(
            there + round(pipeline._training_bytes() / one)
        )  # it may be killed, and started again, before each save
        checkpoints.save(TrainPosition(step=step), {"model.safetensors": part}, heldout=float(step))
        held.append(len(checkpoints.committed()))
        checkpoints.prune(train.keep_checkpoints, train.keep_every, best)
    assert checkpoint_bytes(recipe) == one * max(held)
    assert asked == [max(held)] * len(held)  # neither more nor less


def test_a_budget_of_time_tells_no_number_of_steps(small_corpus: SmallCorpus):
    train = TrainConfig(steps=1 << 40, seconds=60, keep_every=1, checkpoint_every=1)
    recipe = small_corpus.recipe.model_copy(update={"train": train})
    assert checkpoint_bytes(recipe) == 3 * 16 * recipe.model.num_parameters(recipe.tokenizer.vocab_size)
