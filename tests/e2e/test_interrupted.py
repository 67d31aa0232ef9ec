"""Ctrl-C and SIGTERM while `dllm train` trains on a cluster of its own: what is saved and said, and nothing runs on."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from conftest import small_recipe, write_small

from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.storage.store import open_store
from workflows.fan_out import serially
from workflows.preprocess.flow import Preprocessing, plan_corpus

DLLM = [sys.executable, "-m", "workflows"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a corpus and `small.yaml`."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_small(folder)
    return folder


def processes_marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DLLM_TEST_MARK") == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def interrupted_while_training(
    words: list[str], root: Path, after: int, number: signal.Signals
) -> tuple[int, str, RunDir]:
    """Start a run, send it a signal once it has a checkpoint beyond `after`; its exit code, stderr and folder."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "DLLM_TEST_MARK": mark}
    driver = subprocess.Popen(
        words,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to Ctrl-C
    )
    run = None
    give_up = time.monotonic() + 240  # on a slow machine Ray Train alone takes more than a minute to start
    while run is None and time.monotonic() < give_up and driver.poll() is None:
        time.sleep(0.2)
        names = [folder.name for folder in (root / "storage" / "runs").glob("small-*")]
        runs = [RunDir(open_store("root", str(root / "storage")), name) for name in names]
        run = next((run for run in runs if max(CheckpointStore(run).committed(), default=0) > after), None)
    if run is None:
        driver.kill()
    assert run is not None
    assert processes_marked(mark)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # a terminal sends it to all that run in the foreground
    else:
        driver.send_signal(number)
    _, told = driver.communicate(timeout=30)
    assert processes_marked(mark) == []
    return driver.returncode, told, run


def test_sigterm_while_training_saves_and_leaves_nothing_running(root):
    """That the next run goes on from there, on other workers too: tests/reliability/test_training_storm.py."""
    corpus = plan_corpus(small_recipe(root), open_store("storage.root", str(root / "storage")))
    Preprocessing(corpus, serially).run()  # here, as no cluster is needed for it
    words = [*DLLM, "train", str(root / "small.yaml"), "train.steps=4000", "train.checkpoint_every=10"]
    code, told, run = interrupted_while_training(words, root, 0, signal.SIGTERM)
    assert code == 4
    stopped_at = CheckpointStore(run).committed()[-1]
    saves = [event["step"] for event in JsonLines(run, "events.jsonl").read() if event["event"] == "checkpoint"]
    assert saves[-1] == stopped_at  # told of after the signal: training had not waited for a multiple of 10
    line = f"dllm: train: was told to stop, the newest checkpoint is that of step {stopped_at}: run it again to go on"
    assert told.strip().splitlines()[-1] == line
    assert "Traceback" not in told
    assert stopped_at > 0
    assert {path.name for path in (root / "storage" / run.prefix).iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "events.jsonl",
    }


@pytest.mark.long
def test_ctrl_c_while_training_leaves_nothing_running(root):
    words = [*DLLM, "train", str(root / "small.yaml"), "train.steps=4000", "train.checkpoint_every=20"]
    code, told, run = interrupted_while_training(words, root, 400, signal.SIGINT)  # no other run is that far
    assert code == 130
    assert told.strip().splitlines()[-1].startswith("dllm: interrupted; what is complete is kept")
    assert "Traceback" not in told
    assert CheckpointStore(run).committed()
