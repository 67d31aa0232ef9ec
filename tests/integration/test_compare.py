"""`dllm compare` on a cluster: killed at any moment and run again, it says what it would have said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import small_text

from dllm_core.storage.store import LocalStore
from workflows.compare.flow import Comparison
from workflows.compare.recipe import load_comparison
from workflows.console import Console
from workflows.fan_out import serially

COMPARISON = {
    "name": "pair",
    "recipe": {
        "seed": 3,
        "corpus": {"type": "text", "document": "paragraph", "heldout_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "packing": {"seq_len": 32},
        "noise": "computed",
        "model": {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 16},
        "train": {"steps": 40, "batch_rows": 4, "precision": "fp32"},
        "decode": {"block_length": 8, "steps_per_block": 8, "max_tokens": 8},
    },
    "models": {"left": ["objective.type=autoregressive"], "masks": []},
    "learning": {"points": 4, "rows": 8, "draws": 2},
    "repetition": None,
    "context": {"rows": 4, "length": 3},
    "flexibility": {"rows": 4, "lengths": [1, 3]},
    "generation": {"prompts": 2, "prompt_tokens": 4, "tokens": 8, "thresholds": [0.5]},
}


@pytest.fixture
def recipe(tmp_path):
    """A comparison in a file, over a corpus beside it."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(small_text())
    path = tmp_path / "pair.yaml"
    corpus = {**COMPARISON["recipe"]["corpus"], "path": str(tmp_path / "corpus")}
    path.write_text(yaml.safe_dump({**COMPARISON, "recipe": {**COMPARISON["recipe"], "corpus": corpus}}))
    return path


def started(recipe: Path, root: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "workflows", "compare", str(recipe), f"storage.root={root}", "--output=json"]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to Ctrl-C
    )


def untimed(result: dict) -> dict:
    """Without what a clock says."""
    kept = {name: result[name] for name in ("name", "learning", "context", "flexibility")}
    for model, points in result["generation"]["models"].items():
        kept[model] = [{k: v for k, v in point.items() if k != "tokens_per_s"} for point in points]
    return kept


@pytest.mark.long
def test_a_comparison_that_was_interrupted_goes_on_and_says_what_one_process_says(recipe, tmp_path):
    root = tmp_path / "out"
    driver = started(recipe, root)
    deadline = time.monotonic() + 120
    while not list(root.glob("runs/*/checkpoints/*/manifest.json")):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert not list(root.glob("comparisons/*/comparison.json"))
    finished = started(recipe, root)
    out, told = finished.communicate(timeout=120)
    assert finished.returncode == 0, told
    folder = Path(json.loads(out.splitlines()[-1])["comparison"])
    result = json.loads((folder / "comparison.json").read_text())
    alone = LocalStore(tmp_path / "alone")
    said = Comparison(load_comparison(recipe, [f"storage.root={alone.root}"]), alone, Console("json"), serially).run()
    assert untimed(json.loads((Path(said["comparison"]) / "comparison.json").read_text())) == untimed(result)
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")
