"""While ranks read what they begin with, each shows that it lives as long as its own reading goes on."""

import re
import threading
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
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.errors import DataError
from dllm_core.storage.progress import progressed
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore
from dllm_core.training import reading
from dllm_core.training.backend import LocalBackend
from dllm_core.training.reading import is_alike, read_together
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


class Blind(LocalStore):
    """Does not see the newest checkpoint: another machine's view of a folder, seconds after it was written."""

    def list(self, prefix: str = ""):
        return (item for item in super().list(prefix) if "step-00000004" not in item.key)


class Torn(LocalStore):
    """Cannot read it."""

    def fetch(self, key: str) -> Path:
        if "step-00000004" in key:
            raise DataError(key, "cannot be read (Input/output error)")
        return super().fetch(key)


@pytest.mark.parametrize(
    ("store", "kept", "told"),
    [(Blind, (2, 4), "is step-0000000"), (Blind, (4,), "is none|is step-00000004"), (Torn, (2, 4), "Input/output")],
)
def test_ranks_that_would_go_on_from_different_checkpoints_end_with_the_reason(
    small_corpus: SmallCorpus, tmp_path, store, kept, told
):
    """Each would take batches and moments of its own: the next checkpoint was wrong, and at the end they hung."""
    pair, corpus, run = Pair(), small_corpus, f"{tmp_path.name}-unalike"
    root, part = corpus.store.root, tmp_path / "part"
    part.write_bytes(b"never looked into")
    for step in kept:
        CheckpointStore(RunDir(LocalStore(root), run)).save(TrainPosition(step=step), {"part": part})

    def begin(rank: int) -> DataError:
        class Ranked(LocalBackend):
            @staticmethod
            def summed(values: list[float], device: torch.device) -> list[float]:
                return pair.summed(rank, values)

        with pytest.raises(DataError) as raised:
            open_session(
                corpus.recipe,
                RunDir((LocalStore, store)[rank](root), run),
                corpus.manifest,
                torch.device("cpu"),
                backend=Ranked,
                events_of=lambda step: Silence(),
                on_damage=lambda error: None,
            )
        return raised.value

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(begin, [0, 1]))
    assert re.search(told, str(flow._of_ranks(dict(enumerate(errors)))))


@pytest.mark.parametrize("numbers", [(-1, -1, -1), (7, 7, 7), (0, 7, 14), (7, 7, 8), (-1, 0, 0), (1 << 40, 1 << 40, 1)])
def test_every_rank_is_told_the_same_of_whether_they_are_alike(numbers):
    together, told = threading.Barrier(3, timeout=20), [[0.0], [0.0], [0.0]]

    def summed(rank: int, values: list[float]) -> list[float]:
        told[rank] = values
        together.wait()
        totals = [sum(of_all) for of_all in zip(*told, strict=True)]
        together.wait()
        return totals

    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda rank: is_alike(numbers[rank], lambda values: summed(rank, values)), range(3))
        assert list(found) == [len(set(numbers)) == 1] * 3


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
