"""Laws of checkpoints that are written beside training, and of runs that are told to stop."""

import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import SmallCorpus, draws
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from trainers import BadAt, Pair, Told, Work, make_trainer, newest_of, run_dir

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.data.loader import Loader
from dllm_core.errors import DataError, DivergedError
from dllm_core.storage.progress import progressed
from dllm_core.storage.store import LocalStore
from dllm_core.training import loop, saving
from dllm_core.training.backend import LocalBackend
from dllm_core.training.saving import CheckpointWriter
from workflows.train.session import DIVERGED, Silence, open_session, train_to_end

pytestmark = pytest.mark.usefixtures("one_thread")


class SlowStore(LocalStore):
    """Lets training go on for some steps before a file is looked at."""

    def put_file(self, key: str, path: Path) -> None:
        time.sleep(0.05)
        super().put_file(key, path)


class FullStore(LocalStore):
    """Has no room for some of the files that are put, counted from 0."""

    refused: range = range(0)
    puts = 0

    def put_file(self, key: str, path: Path) -> None:
        FullStore.puts += 1
        if FullStore.puts - 1 in self.refused:
            raise DataError(key, "cannot be written (No space left on device)")
        super().put_file(key, path)


@pytest.fixture
def make(small_corpus, tmp_path):
    """As test_loop's, over any store."""

    def made(name="run", kind=LocalStore, **options):
        return make_trainer(small_corpus, CheckpointStore(RunDir(kind(tmp_path), name)), **options)

    return made


def bits(root, name: str, step: int) -> dict[str, bytes]:
    folder = root / "runs" / name / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_checkpoint_holds_its_own_step_however_long_its_writing_takes(make, tmp_path):
    for name, kind in (("fast", LocalStore), ("slow", SlowStore)):
        make(name, kind, checkpoint_every=1, keep_checkpoints=9)[0].run()
    for step in range(1, 7):
        assert len(bits(tmp_path, "slow", step)) == 3
        assert bits(tmp_path, "fast", step) == bits(tmp_path, "slow", step), step
    assert bits(tmp_path, "fast", 1) != bits(tmp_path, "fast", 2)


def test_a_save_that_fails_is_told_and_training_goes_on(make, tmp_path):
    FullStore.puts, FullStore.refused = 0, range(4, 5)  # of three files a save, the second of the second
    trainer, _, told = make(kind=FullStore, checkpoint_every=1, keep_checkpoints=9)
    trainer.run()
    assert [step for step, _ in told.failed_saves] == [2]
    assert "No space left" in told.failed_saves[0][1]
    assert told.saves == [1, 3, 4, 5, 6]
    assert CheckpointStore(run_dir(tmp_path, "run")).committed() == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("is_seen_before", [True, False])
def test_no_room_to_put_a_checkpoint_together_is_told_by_its_place(make, monkeypatch, is_seen_before):
    """The storage has room: who reads of a full device must not look for it there."""
    scratch, save_file = Path(saving.tempfile.gettempdir()), saving.save_file
    room = shutil.disk_usage(scratch)
    saves = iter(range(99))

    def measured(folder):
        full = is_seen_before and Path(folder) == scratch and next(saves) == 1
        return SimpleNamespace(free=0 if full else room.free)

    def written(tensors, path):
        if not is_seen_before and next(saves) == 4:  # of three files a save, the second of the second
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr("dllm_core.storage.store.shutil.disk_usage", measured)
    monkeypatch.setattr("dllm_core.training.saving.save_file", written)
    trainer, _, told = make(checkpoint_every=1, keep_checkpoints=9)
    trainer.run()
    [(step, reason)] = told.failed_saves
    assert step == 2
    place = "TMPDIR: 0 MiB free, " if is_seen_before else f"{scratch}/dllm-checkpoint-"
    assert reason.startswith(place)
    assert ("set TMPDIR" in reason) is not is_seen_before


def test_who_listens_makes_durable_what_it_was_told_before_a_commit_or_there_is_none(make, tmp_path, monkeypatch):
    stood: dict[int, list[int]] = {}

    def saving(_: Told, step: int) -> None:
        stood[step] = CheckpointStore(run_dir(tmp_path, "run")).committed()
        if step == 3:
            raise DataError("log.jsonl", "cannot be written")

    monkeypatch.setattr(Told, "saving", saving)
    trainer, _, told = make(checkpoint_every=1, keep_checkpoints=9)
    trainer.run()
    assert stood == {1: [], 2: [1], 3: [1, 2], 4: [1, 2], 5: [1, 2, 4], 6: [1, 2, 4, 5]}
    assert told.failed_saves == [(3, "log.jsonl: cannot be written")]
    assert told.saves == [1, 2, 4, 5, 6]


def test_what_is_told_after_the_last_save_is_durable_too(make, monkeypatch):
    """Time is over at the very step of a checkpoint, and the log's last line comes after it."""
    durable, has_saved, clock = list[int](), threading.Event(), Work()

    def saving(told: Told, step: int) -> None:
        durable.append(len(told.records))
        if step == 10:
            has_saved.set()

    def ends_late(objective):
        slow = clock.on(objective)
        calls, loss = iter(range(99)), slow.loss
        slow.loss = lambda *given: (next(calls) < 10 or has_saved.wait(60)) and loss(*given)
        return slow

    monkeypatch.setattr(Told, "saving", saving)
    options = {"clock": clock, "wrap": ends_late, "seconds": 10.5, "steps": 10**6, "log_every": 4}
    trainer, _, told = make(checkpoint_every=10, **options)
    trainer.run()
    assert [record.step for record in told.records] == [4, 8, 10]
    assert durable == [2, 3]


def test_the_last_save_must_succeed_and_the_one_before_it_loads(make, tmp_path):
    FullStore.puts, FullStore.refused = 0, range(6, 99)
    trainer, _, told = make(kind=FullStore, checkpoint_every=3, keep_checkpoints=9, steps=7)
    with pytest.raises(DataError, match="No space left"):
        trainer.run()
    assert told.saves == [3, 6]
    assert newest_of(tmp_path).manifest.position.step == 6
    FullStore.refused = range(0)
    make(kind=FullStore, steps=7)[0].run()
    make("whole", steps=7)[0].run()
    assert bits(tmp_path, "run", 7) == bits(tmp_path, "whole", 7)


class UnreadableStore(LocalStore):
    """Cannot give the files of some steps for a while."""

    unreadable: ClassVar[set[int]] = set()

    def fetch(self, key: str) -> Path:
        if any(f"step-{step:08d}/" in key for step in self.unreadable):
            raise DataError(key, "cannot be read (Input/output error)")
        return super().fetch(key)


def intact_steps(run: RunDir) -> list[int]:
    return [one.manifest.position.step for one in CheckpointStore(run).intact(lambda error: None)]


NEWEST = st.sets(st.integers(0, 2))  # of what is committed, counted from the newest on
EVENTS = st.one_of(st.integers(1, 4), st.tuples(NEWEST, NEWEST))


@settings(max_examples=draws(60), deadline=None)
@given(
    events=st.lists(EVENTS, min_size=4, max_size=12),
    keep=st.integers(1, 3),
    keep_every=st.sampled_from([None, 2, 3]),
    keep_best=st.integers(0, 2),
)
def test_pruning_leaves_the_newest_intact_checkpoint_whatever_was_damaged(
    tmp_path_factory, events, keep, keep_every, keep_best
):
    """A number saves so many steps on; a pair damages some, and restarts where others cannot be read for a while."""
    run = RunDir(UnreadableStore(tmp_path_factory.mktemp("history")), "run")
    checkpoints, step, writer = CheckpointStore(run), 0, None
    for event in [(set(), set()), *events]:
        newest_first = checkpoints.committed()[::-1]
        if isinstance(event, int):
            step += event
            newest = max([step, *intact_steps(run)])
            writer.submit(TrainPosition(step=step), {"part": {"x": torch.full((2,), step)}}, heldout=9.0 - step)
            writer.ended(within=60)
            assert {newest, step} <= set(intact_steps(run))
            continue
        damaged, unreadable = ([newest_first[at] for at in some if at < len(newest_first)] for some in event)
        for one in damaged:
            run.store.put(f"{checkpoints.folder(one)}/part", b"")
        UnreadableStore.unreadable = set(unreadable)
        step = max(intact_steps(run), default=0)
        UnreadableStore.unreadable = set()
        if writer is not None:
            writer.close(lambda: None)
        writer = CheckpointWriter(
            checkpoints, keep=keep, keep_every=keep_every, keep_best=keep_best, before=lambda step: None
        )
        writer.begin(step)
    writer.close(lambda: None)


def test_a_damaged_checkpoint_that_was_passed_over_takes_no_room_of_what_is_saved_after_it(make, tmp_path):
    make(steps=6, checkpoint_every=1, keep_checkpoints=3)[0].run()
    checkpoints = CheckpointStore(run_dir(tmp_path, "run"))
    for step in (5, 6):
        run_dir(tmp_path, "run").store.put(f"{checkpoints.folder(step)}/ema.safetensors", b"")
    make(steps=5, checkpoint_every=1, keep_checkpoints=1, on_damage=lambda error: None)[0].run()
    assert checkpoints.committed() == [5, 6]
    assert intact_steps(run_dir(tmp_path, "run")) == [5]


@pytest.mark.parametrize(("failing", "left"), [(3, [5, 6]), (6, [4, 5, 6])])
def test_a_checkpoint_is_saved_though_what_is_before_it_cannot_be_removed(small_corpus, tmp_path, failing, left):
    class Holding(LocalStore):
        def delete(self, key: str) -> None:
            if self.exists(f"runs/run/checkpoints/step-{failing:08d}/manifest.json") and not asked:
                asked.append(key)
                raise DataError(key, "cannot be deleted")
            super().delete(key)

    asked: list[str] = []
    checkpoints = CheckpointStore(RunDir(Holding(tmp_path), "run"))
    trainer, _, told = make_trainer(small_corpus, checkpoints, checkpoint_every=1, keep_checkpoints=2)
    trainer.run()
    assert (told.saves, told.failed_saves) == ([1, 2, 3, 4, 5, 6], [])
    assert asked == [f"runs/run/checkpoints/step-{failing - 2:08d}/manifest.json"]
    assert checkpoints.committed() == left


def test_checkpoints_at_multiples_stay(make, tmp_path):
    make(checkpoint_every=1, keep_checkpoints=1, keep_every=2)[0].run()
    assert CheckpointStore(run_dir(tmp_path, "run")).committed() == [2, 4, 6]
    make("odd", checkpoint_every=1, keep_checkpoints=2, keep_every=3)[0].run()
    assert CheckpointStore(run_dir(tmp_path, "odd")).committed() == [3, 5, 6]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_is_told_to_stop_saves_after_the_step_and_goes_on_to_the_same_bits(make, tmp_path, stop):
    calls = iter(range(1, 99))
    trainer, _, told = make(options={"should_stop": lambda: next(calls) >= stop}, checkpoint_every=100)
    assert trainer.run().step == stop
    assert trainer.is_stopped
    assert told.saves == [stop]
    again = make(checkpoint_every=100)[0]
    again.run()
    assert not again.is_stopped
    make("whole", checkpoint_every=100)[0].run()
    assert bits(tmp_path, "run", 6) == bits(tmp_path, "whole", 6)


def test_who_is_told_to_stop_at_the_last_step_has_finished(make):
    calls = iter(range(1, 99))
    trainer, _, _ = make(options={"should_stop": lambda: next(calls) >= 6})
    assert trainer.run().step == 6
    assert not trainer.is_stopped


def test_a_beat_comes_with_every_step(make):
    beats: list[int] = []
    trainer, _, _ = make(options={"beat": lambda: beats.append(trainer.position.step)})
    trainer.run()
    assert sorted(set(beats)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ends_badly", [False, True])
def test_while_a_checkpoint_is_written_all_ranks_show_that_they_live_however_long_it_takes(
    small_corpus, tmp_path, monkeypatch, ends_badly
):
    """Each file is stored only after both ranks have beaten three times, where training ends badly after rank 0 has."""
    for module in (loop, saving):
        monkeypatch.setattr(module, "SLICE_S", 0.02)
    pair = Pair()

    class Patient(LocalStore):
        def put_file(self, key: str, path: Path) -> None:
            begun, deadline = list(pair.beats), time.monotonic() + 20
            while any(now < then + 3 for now, then in zip(pair.beats[: 2 - ends_badly], begun, strict=False)):
                if time.monotonic() > deadline:
                    raise DataError(key, f"beats went from {begun} to {pair.beats}")
                progressed()
                time.sleep(0.01)
            super().put_file(key, path)

    def trained(rank: int) -> Told:
        trainer, _, told = make_trainer(
            small_corpus,
            CheckpointStore(RunDir(Patient(tmp_path), "run")),
            wrap=lambda objective: BadAt(objective, lambda call: ends_badly and call >= 2),
            options={"beat": lambda: pair.beat(rank)},
            kind=pair.backend(rank),
            steps=3 if not ends_badly else 99,
            checkpoint_every=1 if not ends_badly else 10,
            keep_checkpoints=9,
        )
        with pytest.raises(DivergedError) if ends_badly else contextlib.nullcontext():
            trainer.run()
        return told

    with ThreadPoolExecutor(2) as pool:
        told = [future.result() for future in [pool.submit(trained, rank) for rank in (0, 1)]]
    assert told[0].failed_saves == []
    assert told[0].saves == ([] if ends_badly else [1, 2, 3])
    assert CheckpointStore(run_dir(tmp_path, "run")).committed() == ([10] if ends_badly else [1, 2, 3])


def test_a_write_that_stands_still_gives_no_sign_of_life(small_corpus, tmp_path, monkeypatch):
    """Rank 1, which waits for it, has many while rank 0 has none."""
    for module in (loop, saving):
        monkeypatch.setattr(module, "SLICE_S", 0.02)
    pair, seen = Pair(), []

    class Still(LocalStore):
        def put_file(self, key: str, path: Path) -> None:
            time.sleep(0.1)  # what was written before is told by now
            before, deadline = list(pair.beats), time.monotonic() + 20
            while pair.beats[1] < before[1] + 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append([now - then for now, then in zip(pair.beats, before, strict=True)])
            super().put_file(key, path)

    def trained(rank: int) -> None:
        checkpoints = CheckpointStore(RunDir(Still(tmp_path), "run"))
        options = {"beat": lambda: pair.beat(rank)}
        trainer, _, _ = make_trainer(small_corpus, checkpoints, options=options, kind=pair.backend(rank), steps=1)
        trainer.run()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(trained, rank) for rank in (0, 1)]:
            future.result()
    assert len(seen) == 3
    assert all(rank_0 == 0 and rank_1 >= 5 for rank_0, rank_1 in seen)


def test_the_rows_of_the_steps_that_diverged_are_written_down(small_corpus: SmallCorpus):
    corpus = small_corpus
    run = RunDir(corpus.store, "diverged")
    trainer, _, told = make_trainer(
        corpus, CheckpointStore(run), wrap=lambda o: BadAt(o, lambda call: call >= 2), steps=99, checkpoint_every=100
    )
    try:
        with pytest.raises(DivergedError, match=r"rows are in .*diverged\.json") as caught:
            train_to_end(trainer, run, corpus.manifest)
        written = json.loads(corpus.store.read(run.key(DIVERGED)))
    finally:
        shutil.rmtree(corpus.store.path(run.prefix), ignore_errors=True)
    assert caught.value.exit_code == 5
    assert told.skips == list(range(2, 12))
    assert [step["counters"] for step in written["steps"]] == [[8 * at, 8 * at + 8] for at in range(2, 12)]
    loader = Loader.open(corpus.store, corpus.manifest, corpus.tokenizer.mask_id)
    for step in written["steps"]:
        batch = loader.batch(step["counters"][0], 8)
        rows = loader._tokens.read(("ids",), np.array(step["rows"]))["ids"]
        assert np.array_equal(rows, batch.x0)


def heldout_scorer(score_of: dict[int, float], position) -> tuple[dict, list[int]]:
    """A scorer that says what it is told to of the step at which it is asked, and when it was asked."""
    asked: list[int] = []

    def scorer(denoiser):
        asked.append(position().step)
        return np.array([score_of[asked[-1]]] * 2), np.ones(2)

    return {"heldout": scorer}, asked


def test_the_best_checkpoints_stay_and_each_has_a_score_of_its_own_weights(make, tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 6.0}
    trainer = None
    options, asked = heldout_scorer(scores, lambda: trainer.position)
    trainer, _, told = make(
        options=options,
        checkpoint_every=1,
        keep_checkpoints=1,
        average_checkpoints=2,
        average_from="best",
        heldout_every=4,
    )
    trainer.run()
    assert asked == [1, 2, 3, 4, 5, 6]  # before every save, and not twice where it was asked anyway
    found = list(CheckpointStore(run_dir(tmp_path, "run")).best(lambda error: pytest.fail(str(error))))
    assert [(one.manifest.position.step, one.manifest.heldout) for one in found] == [(2, 1.0), (4, 2.0), (6, 6.0)]
    assert told.saves == [1, 2, 3, 4, 5, 6]


def test_other_rows_than_before_are_refused_unless_they_are_named(small_corpus: SmallCorpus, tmp_path):
    corpus, run = small_corpus, RunDir(LocalStore(small_corpus.store.root), f"{tmp_path.name}-rows")
    manifest, first = corpus.manifest, corpus.manifest.train.shards[0]
    changed = first.model_copy(update={"sha256": "0" * 64})
    other = manifest.model_copy(
        update={"train": manifest.train.model_copy(update={"shards": (changed, *manifest.train.shards[1:])})}
    )

    def session(given, **fields):
        train = corpus.recipe.train.model_copy(update=fields)
        return open_session(
            corpus.recipe.model_copy(update={"train": train}),
            run,
            given,
            torch.device("cpu"),
            backend=LocalBackend,
            events_of=lambda step: Silence(),
            on_damage=lambda error: pytest.fail(str(error)),
        )

    session(manifest, steps=1, heldout_every=1).run()
    assert CheckpointStore(run).manifest(1).scored == manifest.heldout_digest(64)
    assert manifest.heldout_digest(64) == manifest.heldout_digest(13) != manifest.heldout_digest(12)
    assert session(manifest.model_copy(update={"noise_epochs": ()})).position.step == 1  # more noise is no other corpus
    now = other.rows_digest
    with pytest.raises(DataError, match=f"train.accept_corpus={now} goes on with them") as refused:
        session(other)
    assert manifest.rows_digest in str(refused.value)
    assert refused.value.exit_code == 3
    with pytest.raises(DataError, match="made anew"):
        session(other, accept_corpus="rows-0123456789ab")
    assert session(other, accept_corpus=now).position.step == 1
