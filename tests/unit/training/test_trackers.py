"""A tracker that fails, hangs or is not there costs a run one line and nothing else."""

import threading

from conftest import small_recipe
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.storage.store import LocalStore
from workflows.train.trackers import Guarded, open_trackers, scalars


class Kept:
    """Keeps what it is told, and fails at one step if it is asked to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.is_closed = fails_at, False

    def log(self, step, values):
        if step == self.fails_at:
            raise ConnectionError("server is down")
        self.told.append((step, dict(values)))

    def close(self):
        self.is_closed = True


def run(open_tracker, steps=range(5)) -> list[tuple[str, str]]:
    lost: list[tuple[str, str]] = []
    guarded = Guarded("curves", open_tracker, lambda *told: lost.append(told))
    for step in steps:
        guarded.log(step, {"train/loss": float(step)})
    guarded.close()
    return lost


def test_a_tracker_gets_every_record_in_order_and_is_closed():
    kept = Kept()
    assert run(lambda: kept) == []
    assert kept.told == [(step, {"train/loss": float(step)}) for step in range(5)]
    assert kept.is_closed


def test_one_that_fails_is_told_of_once_and_left_out():
    kept = Kept(fails_at=2)
    assert run(lambda: kept) == [("curves", "ConnectionError: server is down")]
    assert [step for step, _ in kept.told] == [0, 1]


def test_one_that_cannot_be_opened_or_exits_is_told_of(monkeypatch):
    def refuse():
        raise SystemExit("no account")

    assert run(refuse) == [("curves", "SystemExit: no account")]


def test_one_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("workflows.train.trackers._CLOSE_WITHIN_S", 0.1)
    monkeypatch.setattr("workflows.train.trackers._LONGEST_QUEUE", 3)
    freed = threading.Event()

    class Hanging(Kept):
        def log(self, step, values):
            freed.wait(30)

    try:
        assert run(Hanging, range(1000)) == []
    finally:
        freed.set()


def test_tensorboard_is_there_on_a_disk_and_a_missing_library_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    recipe = small_recipe(tmp_path)
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"wandb": True})})
    lost: list[tuple[str, str]] = []
    trackers = open_trackers(recipe, RunDir(LocalStore(tmp_path), "run"), 0, lambda *told: lost.append(told))
    for tracker in trackers:
        tracker.log(1, {"train/loss": 2.0})
        tracker.close()
    assert [name for name, _ in lost] == ["wandb"]
    [events] = (tmp_path / "runs" / "run" / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


NUMBERS = st.integers(-9, 9) | st.floats(-9, 9)
PARTS = NUMBERS | st.none() | st.text(max_size=2) | st.lists(NUMBERS | st.none(), max_size=3)
RECORDS = PARTS | st.dictionaries(st.sampled_from("ab"), PARTS, max_size=2)


@given(st.dictionaries(st.sampled_from(["loss", "by_level", "heldout"]), RECORDS))
def test_every_number_of_a_record_is_a_scalar_of_its_own_and_nothing_else_is(record):
    def numbers(value) -> list[float]:
        if isinstance(value, dict):
            return [x for part in value.values() for x in numbers(part)]
        if isinstance(value, list):
            return [x for part in value for x in numbers(part)]
        return [float(value)] if isinstance(value, int | float) else []

    found = list(scalars({**record, "step": 7}))
    assert [value for _, value in found] == numbers(record)
    assert len({name for name, _ in found}) == len(found)
