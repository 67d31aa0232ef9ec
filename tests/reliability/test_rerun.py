"""A finished job that is run again runs no task and writes no byte."""

import json
import resource
import subprocess
import time
from pathlib import Path

import pytest
from conftest import make_small_corpus, small_recipe
from survival import DLLM, SERIAL, corpus_folder, write_recipe

from dllm_core.storage.store import LocalStore
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus
from workflows.recipe import load_recipe


def state(root: Path) -> dict[str, tuple[int, int, int, int]]:
    """(inode, size, time of the content, time of the inode) of every file and folder below a folder."""
    found = {}
    for path in root.rglob("*"):
        stat = path.stat()
        found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def run_again(path: Path) -> tuple[dict, float, float]:
    """What the verb says of itself, its seconds with the start of Python, and those of a processor."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [*DLLM, "preprocess", "run", str(path), "--output", "json"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(told.stdout.splitlines()[-1]), time.monotonic() - begun, busy


def test_a_finished_job_runs_no_task_and_writes_no_byte_and_what_it_lost_costs_no_task_that_is_done(tmp_path):
    corpus = make_small_corpus(tmp_path, corpus={"dedup": {}})
    folder = corpus_folder(tmp_path / "storage")
    before = state(folder)
    result, *_ = run_again(write_recipe(tmp_path / "small.yaml", corpus.recipe))
    assert result["tasks_run"] == 0
    assert state(folder) == before
    for lost in ("manifest.json", "quarantine/summary.json", "tokenizer.json"):
        whole = (folder / lost).read_bytes()
        (folder / lost).unlink()
        (folder / "manifest.json").unlink(missing_ok=True)
        work = Preprocessing(plan_corpus(corpus.recipe, corpus.store), serially)
        work.run()
        assert work.ran == 0
        assert (folder / lost).read_bytes() == whole
        after = state(folder)
        for kind in ("tokens", "noise", "dedup", "receipts"):
            parts = [path for path in before if path.startswith(f"{folder}/{kind}")]
            assert len(parts) > 3
            assert [path for path in parts if after[path] != before[path]] == [], lost


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_finished_job_of_ten_thousand_shards_is_run_again_in_five_seconds(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(5_000):
        (tmp_path / "corpus" / f"{i:05d}.txt").write_text(f"file {i} " + f"{i * i:09d} and more " * 64)
    path = write_recipe(
        tmp_path / "small.yaml", small_recipe(tmp_path, corpus={"document": "file"}, noise={"epochs": 1})
    )
    subprocess.run([*SERIAL, str(path)], check=True, capture_output=True)
    folder = corpus_folder(tmp_path / "storage")
    shards = sum(1 for kind in ("tokens", "noise") for _ in (folder / kind).rglob("*.arrow"))
    assert shards >= 10_000
    run_again(path)  # the first one makes the run's folder
    before = state(tmp_path)
    result, seconds, busy = run_again(path)
    assert result["tasks_run"] == 0
    assert state(tmp_path) == before
    (folder / "manifest.json").unlink()
    begun = time.monotonic()
    recipe = load_recipe(path)
    work = Preprocessing(plan_corpus(recipe, LocalStore(Path(recipe.storage.root))), serially)
    work.run()
    receipts = time.monotonic() - begun
    assert work.ran == 0
    print(
        f"\nrerun of {shards} shards: 0 tasks, 0 bytes written, {seconds:.1f} s with the start of Python, of which "
        f"{busy:.1f} s of work; without its manifest, from receipts: 0 tasks, {receipts:.1f} s"
    )
    assert busy < 5  # on a machine that has nothing else to do, the seconds are these
