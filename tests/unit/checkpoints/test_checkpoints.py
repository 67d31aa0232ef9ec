"""A checkpoint is there whole or not at all, and a damaged one is passed over by name."""

from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_server

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore, TrainPosition
from dllm_core.errors import CheckpointError, DataError
from dllm_core.storage.s3 import S3Store
from dllm_core.storage.store import LocalStore

NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def content(name: str, step: int) -> bytes:
    return f"{name} after {step} steps".encode() * 40


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(LocalStore(tmp_path / "root"), "small")


@pytest.fixture
def checkpoints(run) -> CheckpointStore:
    return CheckpointStore(run)


def save(checkpoints: CheckpointStore, scratch: Path, *steps: int, heldout: dict[int, float] | None = None) -> None:
    for step in steps:
        files = {name: scratch / name for name in NAMES}
        for name, path in files.items():
            path.write_bytes(content(name, step))
        position = TrainPosition(step=step, samples_seen=8 * step, seconds=step / 3)
        checkpoints.save(position, files, (heldout or {}).get(step))


def newest_step(checkpoints: CheckpointStore) -> int | None:
    newest = checkpoints.newest(lambda error: pytest.fail(str(error)))
    return newest.manifest.position.step if newest else None


def damage(path: Path, kind: str, at: int = 0) -> None:
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: at % len(data)])
    else:
        at %= len(data)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_the_newest_checkpoint_is_what_was_saved_last(checkpoints, tmp_path):
    assert newest_step(checkpoints) is None
    save(checkpoints, tmp_path, 3, 20, 100_000_000, 7, 99_999_999)
    assert checkpoints.committed() == [3, 7, 20, 99_999_999, 100_000_000]
    newest = checkpoints.newest(lambda error: pytest.fail(str(error)))
    assert newest.manifest.position == TrainPosition(
        step=100_000_000, samples_seen=800_000_000, seconds=100_000_000 / 3
    )
    assert {name: path.read_bytes() for name, path in newest.files.items()} == {
        name: content(name, 100_000_000) for name in NAMES
    }


@settings(max_examples=draws(20), deadline=None)
@given(at=st.integers(0, 10**6), name=st.sampled_from(NAMES), kind=st.sampled_from(["flip", "truncate", "delete"]))
def test_a_checkpoint_with_a_damaged_file_is_refused_by_name_and_the_one_before_is_used(
    tmp_path_factory, at, name, kind
):
    scratch = tmp_path_factory.mktemp("damage")
    store = LocalStore(scratch / "root")
    checkpoints = CheckpointStore(RunDir(store, "small"))
    save(checkpoints, scratch, 5, 6)
    damage(store.path(f"{checkpoints.folder(6)}/{name}"), kind, at)
    refused: list[CheckpointError] = []
    newest = checkpoints.newest(refused.append)
    assert newest.manifest.position.step == 5
    assert newest.files[name].read_bytes() == content(name, 5)
    [error] = refused
    assert error.place.endswith(f"step-00000006/{name}")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"position": {}, "files": 3}'])
def test_an_unreadable_manifest_is_refused_by_name_and_the_one_before_is_used(run, checkpoints, tmp_path, data):
    save(checkpoints, tmp_path, 5, 6)
    run.store.put(f"{checkpoints.folder(6)}/manifest.json", data)
    refused: list[CheckpointError] = []
    assert checkpoints.newest(refused.append).manifest.position.step == 5
    [error] = refused
    assert error.place.endswith("step-00000006/manifest.json")
    assert "\n" not in str(error)


def test_a_manifest_that_was_cut_off_is_refused(run, checkpoints, tmp_path):
    save(checkpoints, tmp_path, 5, 6)
    path = run.store.path(f"{checkpoints.folder(6)}/manifest.json")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 19), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused: list[CheckpointError] = []
        assert checkpoints.newest(refused.append).manifest.position.step == 5
        assert len(refused) == 1


def test_a_checkpoint_without_a_manifest_does_not_exist(run, checkpoints, tmp_path):
    save(checkpoints, tmp_path, 5, 6)
    run.store.delete(f"{checkpoints.folder(6)}/manifest.json")
    assert checkpoints.committed() == [5]
    assert newest_step(checkpoints) == 5


def test_what_a_kill_left_of_older_checkpoints_goes_with_the_next_one(run, checkpoints, tmp_path):
    save(checkpoints, tmp_path, 5, 6, 7, 9)
    for step in (6, 9):
        run.store.delete(f"{checkpoints.folder(step)}/manifest.json")
    checkpoints.prune(keep=2)
    folders = sorted(path.name for path in run.store.path(run.key("checkpoints")).iterdir())
    assert folders == ["step-00000005", "step-00000007", "step-00000009"]  # 9 may be one that is being written
    save(checkpoints, tmp_path, 10)
    checkpoints.prune(keep=2)
    assert checkpoints.committed() == [7, 10]
    assert [path.name for path in sorted(run.store.path(run.key("checkpoints")).iterdir())] == [
        "step-00000007",
        "step-00000010",
    ]


class KilledError(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.mark.parametrize("done", range(len(NAMES) + 1))
def test_a_save_that_was_killed_leaves_the_checkpoint_before(tmp_path, done):
    class KilledStore(LocalStore):
        """Dies where it should write object number `done` of step 6."""

        def put_file(self, key: str, path: Path) -> None:
            self._die(key)
            super().put_file(key, path)

        def put(self, key: str, data: bytes) -> None:
            self._die(key)
            super().put(key, data)

        def _die(self, key: str) -> None:
            if "step-00000006" in key and len([item for item in self.list() if "step-00000006" in item.key]) == done:
                raise KilledError

    checkpoints = CheckpointStore(RunDir(KilledStore(tmp_path / "root"), "small"))
    save(checkpoints, tmp_path, 5)
    with pytest.raises(KilledError):
        save(checkpoints, tmp_path, 6)
    again = CheckpointStore(RunDir(LocalStore(tmp_path / "root"), "small"))
    assert newest_step(again) == 5
    save(again, tmp_path, 6)
    assert newest_step(again) == 6


class FailingStore(LocalStore):
    """Its `fails_at`-th write is not made; `before_that` is called, which may be another writer's doing."""

    fails_at, before_that, arrives = 0, staticmethod(lambda: None), False

    def put_file(self, key: str, path: Path) -> None:
        self._count(key)
        super().put_file(key, path)

    def put(self, key: str, data: bytes) -> None:
        if self.arrives and key.endswith("manifest.json"):
            super().put(key, data)
        self._count(key)
        super().put(key, data)

    def _count(self, key: str) -> None:
        type(self).fails_at -= 1
        if self.fails_at == 0:
            self.before_that()
            raise DataError(key, "no room")


def failing(root: Path, at: int, before_that=lambda: None, *, arrives: bool = False) -> CheckpointStore:
    kind = type("Failing", (FailingStore,), {"before_that": staticmethod(before_that), "arrives": arrives})
    kind.fails_at = at
    return CheckpointStore(RunDir(kind(root), "small"))


@pytest.mark.parametrize("at", range(1, len(NAMES) + 2))
@pytest.mark.parametrize("arrives", [False, True])
def test_a_save_that_failed_leaves_nothing(run, checkpoints, tmp_path, at, arrives):
    """Also where all arrived and only the answer did not."""
    save(checkpoints, tmp_path, 5)
    before = list(run.store.list())
    left = run.store.path(f"{checkpoints.folder(6)}/.{NAMES[0]}.tmp-by-a-kill")
    left.parent.mkdir()
    left.touch()
    with pytest.raises(DataError, match="no room"):
        save(failing(run.store.root, at, arrives=arrives), tmp_path, 6)
    assert list(run.store.list()) == before
    assert not left.exists()


@pytest.mark.parametrize("at", range(1, len(NAMES) + 2))
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_save_that_failed_leaves_a_checkpoint_that_another_writer_committed(checkpoints, tmp_path, at, when):
    (tmp_path / "other").mkdir()

    def commit():
        save(checkpoints, tmp_path / "other", 5)

    if when == "before":
        commit()
    own = failing(tmp_path / "root", at, commit if when == "meanwhile" else lambda: None)
    with pytest.raises(DataError, match="no room"):
        save(own, tmp_path, 5, heldout={5: 1.0})
    assert newest_step(checkpoints) == 5
    assert checkpoints.manifest(5).heldout is None


def test_no_intact_checkpoint_is_none_and_each_damaged_one_is_told(run, checkpoints, tmp_path):
    save(checkpoints, tmp_path, 5, 6)
    for step in (5, 6):
        damage(run.store.path(f"{checkpoints.folder(step)}/{NAMES[0]}"), "flip")
    refused: list[CheckpointError] = []
    assert checkpoints.newest(refused.append) is None
    assert ["step-00000006" in error.place for error in refused] == [True, False]


@pytest.mark.parametrize("what", ["its manifest", "its files", "all"])
def test_what_s3_or_the_cache_does_not_give_now_is_no_damage_and_is_neither_passed_over_nor_deleted(
    tmp_path, monkeypatch, what
):
    """A cache on a full disk, a server that is away for a minute: training would begin anew at step 0."""
    with s3_server(tmp_path / "server") as server:
        checkpoints = CheckpointStore(RunDir(S3Store(server.new_bucket(), "some/where"), "small"))
        save(checkpoints, tmp_path, 5, 6, 7, heldout={5: 1.0, 6: 2.0, 7: 3.0})
        with monkeypatch.context() as patch:
            away = DataError("here", "get_object failed 10 times (SlowDown)")
            if what == "its files":
                patch.setenv("DLLM_CACHE", "/dev/null/cache")
            else:
                patch.setattr(S3Store, "_get", Mock(side_effect=away))
            if what == "all":
                patch.setattr(S3Store, "_head", Mock(side_effect=away))
            with pytest.raises(DataError, match=r"10 times|cannot be fetched") as told:
                checkpoints.newest(lambda error: pytest.fail(str(error)))
            assert not isinstance(told.value, CheckpointError)
            if what == "its manifest":
                with pytest.raises(DataError, match="10 times"):
                    checkpoints.prune(keep=1, keep_best=1)
        assert checkpoints.committed() == [5, 6, 7]
        assert newest_step(checkpoints) == 7


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_newest_and_nothing_of_the_others(run, checkpoints, tmp_path, keep):
    steps = [1, 2, 10, 30]
    save(checkpoints, tmp_path, *steps)
    checkpoints.prune(keep)
    assert checkpoints.committed() == steps[-keep:]
    assert newest_step(checkpoints) == 30
    folders = sorted(path.name for path in run.store.path(run.key("checkpoints")).iterdir())
    assert folders == [f"step-{step:08d}" for step in steps[-keep:]]


@given(
    scores=st.dictionaries(st.integers(1, 40), st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0])), min_size=1),
    keep=st.integers(1, 4),
    best=st.integers(0, 4),
    every=st.one_of(st.none(), st.integers(1, 5)),
)
@settings(max_examples=draws(25), deadline=None)
def test_pruning_keeps_the_best_the_newest_and_the_multiples_and_nothing_else(
    tmp_path_factory, scores, keep, best, every
):
    scratch = tmp_path_factory.mktemp("best")
    checkpoints = CheckpointStore(RunDir(LocalStore(scratch / "root"), "small"))
    steps = sorted(scores)
    save(checkpoints, scratch, *steps, heldout=scores)
    checkpoints.prune(keep, every, best)
    ranked = sorted(steps, key=lambda step: (scores[step] is None, scores[step] or 0, -step))
    kept = {*steps[-keep:], *ranked[:best], *(step for step in steps if every and step % every == 0)}
    assert checkpoints.committed() == sorted(kept)
    found = checkpoints.best(lambda error: pytest.fail(str(error)))
    assert [checkpoint.manifest.position.step for checkpoint in found] == [step for step in ranked if step in kept]


def test_scores_of_other_rows_are_not_compared(run, checkpoints, tmp_path):
    """Of 64 rows the score was lower all along than of the 8 that a restart asked for."""
    before, now = CheckpointStore(run, scored="of 64"), CheckpointStore(run, scored="of 8")
    save(checkpoints, tmp_path, 1, heldout={1: 4.0})  # of a format that did not say
    save(before, tmp_path, 2, 3, heldout={2: 1.0, 3: 1.1})
    save(now, tmp_path, 4, 5, 6, heldout={4: 3.1, 5: 3.0})
    assert checkpoints.manifest(6).scored is None
    found = checkpoints.best(lambda error: pytest.fail(str(error)))
    assert [checkpoint.manifest.position.step for checkpoint in found] == [5, 4, 1, 6, 3, 2]
    checkpoints.prune(keep=1, keep_best=2)
    assert checkpoints.committed() == [4, 5, 6]
    save(before, tmp_path, 7, heldout={7: 2.0})
    checkpoints.prune(keep=1, keep_best=2, distrusted=[7])  # what is passed over does not say whose scores count
    assert checkpoints.committed() == [4, 5, 6, 7]


def test_checkpoints_of_another_run_are_not_seen_and_not_pruned(run, checkpoints, tmp_path):
    other = CheckpointStore(RunDir(run.store, "small-2"))
    save(other, tmp_path, 1, 2)
    assert newest_step(checkpoints) is None
    save(checkpoints, tmp_path, 7)
    checkpoints.prune(1)
    assert other.committed() == [1, 2]
