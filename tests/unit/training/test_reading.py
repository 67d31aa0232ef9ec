"""While ranks read what they begin with, each shows that it lives as long as its own reading goes on."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train.torch
import torch
from conftest import SmallCorpus
from trainers import Pair

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.storage.progress import progressed
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore
from dllm_core.training import reading
from dllm_core.training.backend import LocalBackend
from dllm_core.training.reading import read_together
from workflows.train import flow
from workflows.train.session import Silence, open_session

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(reading, "SLICE_S", 0.02)


def until(is_so, tick=lambda: None) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        tick()
        time.sleep(0.01)


def read_by_both(pair: Pair, first, second) -> list[object]:
    def rank(number: int, read) -> object:
        return read_together(read, lambda values: pair.summed(number, values), lambda: pair.beat(number))

    with ThreadPoolExecutor(2) as pool:
        return [one.result() for one in [pool.submit(rank, 0, first), pool.submit(rank, 1, second)]]


def test_ranks_live_while_one_reads_for_long_and_each_gets_its_own():
    pair = Pair()

    def slow() -> str:
        until(lambda: min(pair.beats) >= 5, progressed)
        return "slow"

    assert read_by_both(pair, slow, lambda: "fast") == ["slow", "fast"]


def test_a_rank_whose_reading_stands_still_shows_no_life_and_the_others_do():
    pair, alone = Pair(), []

    def stuck() -> None:
        until(lambda: pair.beats[1] >= 5)
        alone.append(pair.beats[0])

    read_by_both(pair, stuck, lambda: None)
    assert alone == [0]


def test_what_reading_fails_with_is_raised_at_once():
    def broken() -> None:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        read_together(broken, lambda values: pytest.fail("it waits for the others"), lambda: None)


def test_a_session_that_fetches_and_hashes_its_checkpoint_shows_that_it_lives(
    small_corpus: SmallCorpus, tmp_path, monkeypatch
):
    corpus, beats = small_corpus, list[float]()
    run = RunDir(LocalStore(corpus.store.root), f"{tmp_path.name}-reading")
    at = CheckpointStore.at

    def patient(self: CheckpointStore, step: int):
        begun = len(beats)
        until(lambda: len(beats) >= begun + 5, progressed)
        return at(self, step)

    monkeypatch.setattr(CheckpointStore, "at", patient)
    recipe = corpus.recipe.model_copy(update={"train": corpus.recipe.train.model_copy(update={"steps": 1})})
    for resumed_at in (0, 1):
        trainer = open_session(
            recipe,
            run,
            corpus.manifest,
            torch.device("cpu"),
            backend=LocalBackend,
            events_of=lambda step: Silence(),
            on_damage=lambda error: pytest.fail(str(error)),
            beat=lambda: beats.append(time.monotonic()),
        )
        assert trainer.position.step == resumed_at
        trainer.run()


@pytest.mark.parametrize(("stall_seconds", "least"), [(20.0, 1800), (1800.0, 1801), (7200.5, 7201)])
def test_a_collective_may_take_longer_than_a_rank_may_stand_still(
    small_corpus: SmallCorpus, tmp_path, monkeypatch, stall_seconds, least
):
    told = {}
    fake = lambda *_, **options: told.update(options) or SimpleNamespace(fit=lambda: None)  # noqa: E731
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", fake)
    recipe = small_corpus.recipe
    train = recipe.placement.train.model_copy(update={"stall_seconds": stall_seconds})
    placement = recipe.placement.model_copy(update={"train": train})
    run = RunDir(LocalStore(tmp_path), "run")
    flow._fit(recipe.model_copy(update={"placement": placement}), run, small_corpus.manifest.fingerprint, None)
    assert least <= told["torch_config"].timeout_s <= max(1800, stall_seconds + 300)


def test_what_ray_keeps_is_on_this_machine_and_gone_at_the_end(small_corpus: SmallCorpus, monkeypatch):
    """Its own client of S3 would be asked else, which knows no AWS_CA_BUNDLE: all but training worked."""
    kept = []

    def trainer(*_, run_config, **__):
        def fit():
            kept.append(Path(run_config.storage_path))
            assert kept[0].is_dir()
            assert run_config.storage_context.storage_filesystem.type_name == "local"

        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    flow._fit(small_corpus.recipe, RunDir(S3Store("bucket", "p"), "run"), small_corpus.manifest.fingerprint, None)
    assert not kept[0].exists()
