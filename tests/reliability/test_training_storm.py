"""The verb `train` with two workers under Ray and ZeRO 2: killed, told to stop, stopped dead, on ever other workers."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import small_recipe, small_text
from survival import DLLM, checkpoint_bits, kill_all, marked, start, write_recipe

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import load_recipe

pytestmark = pytest.mark.long
STEPS = 480
POLL_S = 0.002


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, its shards, and a recipe of a model whose save takes a while."""
    folder = tmp_path_factory.mktemp("storm")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "names.txt").write_text(small_text(), encoding="utf-8")
    recipe = small_recipe(
        folder,
        model={"dim": 192, "layers": 4, "heads": 4, "ffn_dim": 512},
        train={"steps": STEPS, "checkpoint_every": 10, "warmup_steps": 20, "heldout_every": 100, "heldout_rows": 16},
        placement={"train": {"workers": 2, "max_failures": 50}},
    )
    loaded = load_recipe(write_recipe(folder / "storm.yaml", recipe))
    Preprocessing(plan_corpus(loaded, LocalStore(folder / "storage")), serially).run()
    return folder


def words(root: Path, name: str, *overrides: str) -> list[str]:
    return [*DLLM, "train", str(root / "storm.yaml"), f"name={name}", *overrides]


def run_named(root: Path, name: str) -> RunDir | None:
    found = list((root / "storage" / "runs").glob(f"{name}-*"))
    return RunDir(LocalStore(root / "storage"), found[0].name) if found else None


def finished(root: Path, name: str, *overrides: str) -> RunDir:
    """The run after a driver that nothing disturbs."""
    driver, mark = start(words(root, name, *overrides))
    _, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert marked(mark) == []
    run = run_named(root, name)
    assert run is not None
    return run


def records(run: RunDir | None) -> list[dict[str, Any]]:
    return [] if run is None else JsonLines(run, "metrics.jsonl").read()


def losses(run: RunDir) -> list[tuple[int, float, float]]:
    return [(one["step"], one["loss"], one["grad_norm"]) for one in records(run)]


def events(run: RunDir | None, kind: str) -> list[dict[str, Any]]:
    return [] if run is None else [one for one in JsonLines(run, "events.jsonl").read() if one["event"] == kind]


def starts(run: RunDir | None) -> list[dict[str, Any]]:
    """What rank 0 told when it began to train, or went on."""
    return [one for one in events(run, "started") if "pid" in one]


@pytest.fixture(scope="module")
def expected(root: Path) -> RunDir:
    """A run that nothing disturbs."""
    return finished(root, "whole")


def half_saved(run: RunDir, since: float) -> set[str]:
    """Checkpoints of which something was written since then, but no manifest."""
    found = set()
    for folder in run.store.path(run.key("checkpoints")).glob("step-*"):
        with contextlib.suppress(FileNotFoundError):  # one that is being removed
            if folder.stat().st_mtime > since and not (folder / "manifest.json").exists():
                found.add(folder.name)
    return found


def ranks(driver: psutil.Process, first: int) -> list[psutil.Process]:
    """The processes of the ranks, rank 0 first."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid != first)


class Storm:
    """Kills by plan: (step from which on, in a save or between, whom)."""

    def __init__(self, root: Path, name: str, plan: list[tuple[int, str, str]]) -> None:
        self.root, self.name, self.waiting = root, name, plan[::-1]
        self.killed: Counter[tuple[str, str]] = Counter()
        self.drivers = 0
        self._killed_at = 0.0

    def to_the_end(self) -> None:
        while True:
            driver, mark = start(words(self.root, self.name))
            self.drivers += 1
            begun = len(starts(run_named(self.root, self.name)))
            while driver.poll() is None:
                time.sleep(POLL_S)
                run = run_named(self.root, self.name)
                told = starts(run) if self.waiting else []
                if len(told) > begun and self._is_time(run) and self._kill(driver, mark, run, told[-1]["pid"]):
                    begun, self._killed_at = len(told), time.time()
            _, errors = driver.communicate()
            if "no cluster could be started here" in errors:  # a busy machine; whoever reads that runs it again
                assert driver.returncode == 3, errors
                continue
            if driver.returncode != -signal.SIGKILL:
                assert driver.returncode == 0, errors
                assert not self.waiting
                assert marked(mark) == []
                return

    def _is_time(self, run: RunDir) -> bool:
        at, where, _ = self.waiting[-1]
        if max(CheckpointStore(run).committed(), default=0) < at:
            return False
        if where == "save":
            return bool(half_saved(run, self._killed_at))
        time.sleep(random.uniform(0, 0.3))
        return True

    def _kill(self, driver: subprocess.Popen[str], mark: str, run: RunDir, first: int) -> bool:
        """Whether somebody was killed where it was meant."""
        _, where, whom = self.waiting[-1]
        if whom == "driver":
            kill_all(driver, mark)
        else:
            found = ranks(psutil.Process(driver.pid), first)
            if len(found) < 2:
                return False
            found[int(whom == "rank 1")].kill()
        is_inside = bool(half_saved(run, self._killed_at))
        if where == "between" or is_inside:
            self.killed["save" if is_inside else "between", whom] += 1
            self.waiting.pop()
        return True


@pytest.mark.timeout(1500)
def test_a_storm_of_kills_over_ranks_and_driver_changes_no_bit(root, expected):
    random.seed(1)
    whom = ["rank 0", "driver", "rank 1", "rank 0", "rank 0", "driver"]
    plan = [(40 + 30 * i, ("save", "between")[i % 2], who) for i, who in enumerate(itertools.chain(whom, whom))]
    begun = time.monotonic()
    storm = Storm(root, "storm", plan)
    storm.to_the_end()
    run = run_named(root, "storm")
    assert losses(run) == losses(expected)
    assert checkpoint_bits(run, STEPS) == checkpoint_bits(expected, STEPS)
    inside = sum(count for (where, _), count in storm.killed.items() if where == "save")
    assert inside >= 4
    assert storm.killed.total() >= 10
    by = Counter({who: sum(n for (_, one), n in storm.killed.items() if one == who) for who in {*whom}})
    print(
        f"\ntraining storm, 2 workers, ZeRO 2: {storm.killed.total()} kills, {inside} inside a save, {dict(by)}; "
        f"{storm.drivers} drivers; losses of {STEPS} steps and the last checkpoint bit for bit, "
        f"{time.monotonic() - begun:.0f} s"
    )


def told_to_stop(root: Path, name: str, at: int, *overrides: str) -> tuple[float, int]:
    """SIGTERM to the driver once there is a record of step `at`: seconds to its end, step of its last checkpoint."""
    driver, mark = start(words(root, name, *overrides))
    while driver.poll() is None and not any(one["step"] >= at for one in records(run_named(root, name))):
        time.sleep(0.05)
    begun = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate()
    seconds = time.monotonic() - begun
    assert driver.returncode == 4, errors
    assert marked(mark) == []
    return seconds, CheckpointStore(run_named(root, name)).committed()[-1]


@pytest.mark.timeout(900)
def test_other_workers_at_every_start_take_the_same_steps(root, expected):
    stops = []
    for workers, at in ((1, 60), (4, 150), (2, 240), (1, 330)):
        fields = (f"placement.train.workers={workers}", "train.checkpoint_every=1000")
        stops.append(told_to_stop(root, "elastic", at, *fields))
    run = finished(root, "elastic", "placement.train.workers=2")
    assert [one["workers"] for one in starts(run)] == [1, 4, 2, 1, 2]
    assert [one["step"] for one in starts(run)] == [0, *(step for _, step in stops)]
    assert all(seconds < 25 for seconds, _ in stops)
    apart = [abs(a[1] - b[1]) for a, b in zip(losses(run), losses(expected), strict=True)]
    assert max(apart) < 1e-3
    print(
        f"\nelastic training: 1, 4, 2, 1 and 2 workers, SIGTERM at {[step for _, step in stops]}: saved and gone in "
        f"{', '.join(f'{seconds:.1f}' for seconds, _ in stops)} s; losses at most {max(apart):.1e} apart"
    )


@pytest.mark.timeout(600)
def test_a_rank_that_stands_still_is_found_with_stacks_and_the_run_goes_on_to_the_same_bits(root, expected):
    stall_seconds = 20
    driver, mark = start(words(root, "stuck", f"placement.train.stall_seconds={stall_seconds}"))
    try:
        while driver.poll() is None and not any(one["step"] >= 100 for one in records(run_named(root, "stuck"))):
            time.sleep(0.05)
        run = run_named(root, "stuck")
        [started] = starts(run)
        stopped = ranks(psutil.Process(driver.pid), started["pid"])[1]
        os.kill(stopped.pid, signal.SIGSTOP)
        begun = time.monotonic()
        while driver.poll() is None and len(starts(run)) < 2:
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors
        assert marked(mark) == []
    finally:
        kill_all(driver, mark)
    [stalled] = events(run, "stalled")
    assert stalled["rank"] == 0
    stacks = Path(stalled["stacks"]).read_text()
    assert "Thread 0x" in stacks
    assert "all_reduce" in stacks  # where it waited for the other
    assert losses(run) == losses(expected)
    assert checkpoint_bits(run, STEPS) == checkpoint_bits(expected, STEPS)
    print(f"\na rank stopped dead: found after {stall_seconds} s, trained on {seconds:.0f} s after it stood, same bits")
