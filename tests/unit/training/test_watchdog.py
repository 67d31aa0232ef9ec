"""A rank that is stuck ends itself and leaves its stacks, whatever it is stuck in."""

import os
import subprocess
import sys
import tempfile
import textwrap
from types import SimpleNamespace

import pytest

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.storage.s3 import S3Store
from workflows.train import worker

RANK = """
    import ctypes, sys, threading, time
    from pathlib import Path
    from dllm_core.training.watchdog import Watchdog

    def stuck_here():
        {stuck}

    watchdog = Watchdog(Path(sys.argv[1]), 0.5)
    for _ in range(3):
        watchdog.beat()
    {before}
    stuck_here()
    watchdog.close()
"""


def run_rank(path, stuck: str, before: str = "pass") -> int:
    code = textwrap.dedent(RANK).format(stuck=stuck, before=before)
    return subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False).returncode


@pytest.mark.parametrize(
    "stuck",
    ["time.sleep(50)", "ctypes.PyDLL(None).sleep(50)"],
    ids=["waiting", "with the interpreter's lock held"],
)
def test_a_stuck_rank_ends_with_its_stacks(tmp_path, stuck):
    path = tmp_path / "stalls" / "rank-0.txt"
    assert run_rank(path, stuck) == 1
    assert "stuck_here" in path.read_text()


def test_all_threads_are_shown(tmp_path):
    path = tmp_path / "rank-0.txt"
    run_rank(path, "time.sleep(50)", "threading.Thread(target=lambda: time.sleep(60), daemon=True).start()")
    assert path.read_text().count("most recent call first") >= 2


def test_who_beats_lives_and_leaves_nothing(tmp_path):
    path = tmp_path / "stalls" / "rank-0.txt"
    assert run_rank(path, "[(time.sleep(0.01), watchdog.beat()) for _ in range(250)]") == 0
    assert not path.parent.exists()


def test_runs_of_one_name_in_two_buckets_and_of_two_users_do_not_meet_on_one_machine(tmp_path, monkeypatch):
    """Who ended first took the other's file, which then failed at its own end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    placement = SimpleNamespace(train=SimpleNamespace(stall_seconds=60.0))
    jobs = [
        SimpleNamespace(run=RunDir(S3Store(bucket, "prefix"), "small-01"), recipe=SimpleNamespace(placement=placement))
        for bucket in ("one", "two")
    ]
    with worker._watched(jobs[0], 0, None):
        with worker._watched(jobs[1], 0, None):
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
            with worker._watched(jobs[0], 0, None):
                assert len(list(tmp_path.glob("*/rank-0.txt"))) == 3
            monkeypatch.undo()
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert len(list(tmp_path.glob("*/rank-0.txt"))) == 1
    assert list(tmp_path.iterdir()) == []
