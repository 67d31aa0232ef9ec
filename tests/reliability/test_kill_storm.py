"""SIGKILL at random moments, two drivers at once: what is there in the end is, byte for byte, what one alone makes."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import small_recipe
from survival import (
    DLLM,
    SERIAL,
    corpus_folder,
    hashes,
    kill_all,
    marked,
    start,
    temporaries,
    write_corpus,
    write_recipe,
)

from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import load_recipe

STORM_BYTES = 230_000  # 225 units of 1,024 bytes
QUICK_BYTES = 40_000


def recipe(root: Path, storage: str, workers: int = 2, **sections: object) -> Path:
    """A recipe with every kind of task, over `root/corpus` into `root/storage`."""
    values: dict[str, object] = {
        "name": storage,
        "storage": {"root": str(root / storage)},
        "corpus": {"dedup": {}},
        "placement": {"preprocess": {"workers": workers}, "train": {"workers": min(workers, 8)}},
    }
    return write_recipe(root / f"{storage}.yaml", small_recipe(root, **{**values, **sections}))


def ends(words: list[str | Path]) -> str:
    """Run a driver to its end; its stdout."""
    driver, mark = start(words)
    told, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert marked(mark) == []
    return told


def num_receipts(storage: Path) -> int:
    """Tasks that are done; counted without a look at each file, which would take the machine from the tasks."""
    return sum(name.endswith(".json") for _, _, names in os.walk(storage / "corpora") for name in names)


def kill_at(words: list[str | Path], storage: Path, receipts: int, seconds: float) -> None:
    """Start a driver, SIGKILL it `seconds` after it has so many receipts."""
    driver, mark = start(words)
    while driver.poll() is None and num_receipts(storage) < receipts:
        time.sleep(0.002)
    time.sleep(seconds)
    assert driver.poll() is None, driver.communicate()
    kill_all(driver, mark)


def alone(root: Path) -> dict[str, str]:
    """What a run that nothing interrupts leaves."""
    Preprocessing(plan_corpus(load_recipe(recipe(root, "alone")), LocalStore(root / "alone")), serially).run()
    return hashes(corpus_folder(root / "alone"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a corpus, and what a run that nothing interrupts makes of it."""
    root = tmp_path_factory.mktemp("small")
    write_corpus(root, QUICK_BYTES)
    return root, alone(root)


def test_a_driver_that_is_killed_six_times_leaves_what_an_uninterrupted_one_does(small):
    root, expected = small
    rng = random.Random(1)
    words = [*SERIAL, recipe(root, "killed")]
    total = sum(key.startswith("receipts/") for key in expected)
    moments = [1, *sorted(rng.sample(range(2, int(0.9 * total)), 5))]
    for moment in moments:
        kill_at(words, root / "killed", moment, rng.uniform(0, 0.005))
    ends(words)
    assert hashes(corpus_folder(root / "killed")) == expected


def test_two_drivers_at_once_both_end_well_and_leave_what_one_does(small):
    root, expected = small
    words = [*SERIAL, recipe(root, "raced")]
    both = [start(words) for _ in range(2)]
    for driver, _ in both:
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors
    assert hashes(corpus_folder(root / "raced")) == expected
    assert temporaries(root / "raced") == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same for the storm: 225 units."""
    root = tmp_path_factory.mktemp("large")
    write_corpus(root, STORM_BYTES)
    expected = alone(root)
    assert sum(key.startswith("tokens/train-") for key in expected) >= 200
    return root, expected


def ray_workers(driver: psutil.Process) -> list[psutil.Process]:
    """Processes of tasks, those at work if there are any. Ray's own agents, whose death ends a node, are none."""
    titles: dict[psutil.Process, str] = {}
    for process in driver.children(recursive=True):
        try:
            titles[process] = next(iter(process.cmdline()), "")
        except psutil.Error:
            continue
    busy = [process for process, title in titles.items() if title.startswith("ray::_call")]
    return busy or [process for process, title in titles.items() if title.startswith("ray::IDLE")]


def storm(words: list[str | Path], storage: Path, plan: list[tuple[int, str]], rng: random.Random) -> Iterator[str]:
    """Run drivers until one ends. plan: (so many receipts are there, who is killed then). Yields who was killed."""
    waiting = plan[::-1]
    while True:
        driver, mark = start(words)
        process = psutil.Process(driver.pid)
        while driver.poll() is None:
            time.sleep(0.02)
            if not waiting or num_receipts(storage) < waiting[-1][0]:
                continue
            time.sleep(rng.uniform(0, 0.03))
            if waiting[-1][1] == "driver":
                kill_all(driver, mark)
                yield waiting.pop()[1]
                break
            found = ray_workers(process)
            if found:
                rng.choice(found).kill()
                yield waiting.pop()[1]
        else:
            told, errors = driver.communicate()
            assert driver.returncode == 0, errors
            assert json.loads(told.splitlines()[-1])["corpus"]
            assert marked(mark) == []
            return


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_storm_of_kills_over_workers_and_driver_changes_no_byte(large, workers):
    root, expected = large
    rng = random.Random(workers)
    name = f"storm-{workers}"
    words = [*DLLM, "preprocess", "run", recipe(root, name, workers), "--output", "json"]
    total = sum(key.startswith("receipts/") for key in expected)
    moments = sorted(rng.sample(range(int(0.95 * total)), 21))
    whom = ["worker"] * 16 + ["driver"] * 5
    rng.shuffle(whom)
    begun = time.monotonic()
    killed = Counter(storm(words, root / name, list(zip(moments, whom, strict=True)), rng))
    found = hashes(corpus_folder(root / name))
    assert found == expected
    assert killed == Counter(whom)
    shards = sum(key.startswith(("tokens/", "noise/")) for key in found)
    left = len(temporaries(root / name))
    print(
        f"\nkill storm, {workers} workers: {killed['worker']} workers and {killed['driver']} drivers killed, "
        f"{shards} shards and the manifest equal to an uninterrupted run's, {left} temporary files left, "
        f"{time.monotonic() - begun:.0f} s"
    )


@pytest.mark.long
def test_a_private_cluster_ends_with_its_driver_though_that_had_no_time_to_end_it(large):
    root, _ = large
    driver, mark = start([*DLLM, "preprocess", "run", recipe(root, "orphaned")])
    while driver.poll() is None and num_receipts(root / "orphaned") < 10:
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    begun = time.monotonic()
    try:
        while marked(mark) and time.monotonic() < begun + 60:
            time.sleep(0.2)
        assert marked(mark) == []
    finally:
        kill_all(driver, mark)
    print(f"\norphans: none {time.monotonic() - begun:.0f} s after the driver's SIGKILL")


@pytest.mark.long
def test_two_drivers_with_clusters_of_their_own_both_end_well(large):
    root, expected = large
    path = recipe(root, "raced")
    words = [*DLLM, "preprocess", "run", path]
    both = [start([*words, f"name=driver-{i}"]) for i in range(2)]
    for driver, mark in both:
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors
        assert marked(mark) == []
    assert hashes(corpus_folder(root / "raced")) == expected
    print(f"\nrace: 2 drivers with 2 workers each on one folder, both exit 0, {len(expected)} files equal")


@pytest.mark.long
def test_a_task_that_dies_whenever_it_is_tried_ends_in_one_line_and_the_next_run_goes_on(tmp_path):
    write_corpus(tmp_path, 6_000_000)
    path = recipe(tmp_path, "dying", corpus={"unit_bytes": 1 << 23}, noise={"epochs": 1})
    driver, mark = start([*DLLM, "preprocess", "run", path])
    killed: set[psutil.Process] = set()
    while driver.poll() is None:
        time.sleep(0.01)
        for process in ray_workers(psutil.Process(driver.pid)):
            if process not in killed and process.cmdline()[:1] == ["ray::_call"]:
                process.kill()
                killed.add(process)
    _, errors = driver.communicate()
    assert marked(mark) == []
    assert len(killed) >= 4
    assert driver.returncode == 3, errors
    assert errors.startswith("dllm: placement.preprocess.workers: a task was lost 4 times (")
    assert errors.count("\n") == 1
    ends([*DLLM, "preprocess", "run", path])


@pytest.mark.long
def test_a_task_that_needs_more_memory_than_there_is_ends_in_that_line_too(tmp_path):
    write_corpus(tmp_path, 6_000)
    path = recipe(tmp_path, "narrow", workers=1)
    driver, mark = start([*DLLM, "preprocess", "run", path], RAY_memory_usage_threshold="0.01")
    _, errors = driver.communicate(timeout=300)
    assert marked(mark) == []
    assert driver.returncode == 3, errors
    assert "dllm: placement.preprocess.workers: a task was lost 4 times (" in errors
    assert "low on memory" in errors
