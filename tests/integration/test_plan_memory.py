"""What `dllm plan` says of memory against what a process of real steps takes: within a tenth, below ZeRO 3."""

import json
import subprocess
import sys

import pytest

MODEL = [
    *("model.dim=512", "model.layers=12", "model.heads=8", "model.ffn_dim=1408", "model.rope_theta=10000"),
    *("tokenizer.vocab_size=8192", "packing.seq_len=256", "serve.max_batch_tokens=8192"),
    *("placement.train.workers=1", "placement.train.cpus_per_worker=2"),
]


def dry_run(*words: str) -> dict:
    command = [sys.executable, "-m", "workflows", "train", "workflows/recipes/quickstart.yaml", *words]
    told = subprocess.run([*command, "--dry-run", "--output", "json"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_a_dry_run_takes_steps_saves_and_leaves_nothing(tmp_path):
    told = dry_run(f"storage.root={tmp_path}/runs", "train.batch_rows=4", "placement.train.workers=2")
    assert list(tmp_path.iterdir()) == []
    assert told["rows"] == 2
    assert 6 < told["loss"] < 8  # log of a vocabulary of 1,024 is 6.9
    assert told["memory_bytes"] > 0
    assert told["checkpoint_bytes"] > 16 * 900_000
    assert told["step_seconds"] > 0


@pytest.mark.long
def test_a_dry_run_that_diverges_says_so_in_a_line(tmp_path):
    words = [f"storage.root={tmp_path}/runs", "train.batch_rows=4", "train.learning_rate=1e30"]
    command = [sys.executable, "-m", "workflows", "train", "workflows/recipes/quickstart.yaml", "--dry-run", *words]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 5, told.stderr
    assert "dllm: train: the loss or its gradient was not a number at step" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stage", "precision", "rows"), [(0, "fp32", 4), (2, "fp32", 4), (1, "bf16", 16), (0, "fp32", 16), (2, "bf16", 8)]
)
def test_planned_memory_is_within_a_tenth_of_the_measured(stage, precision, rows):
    told = dry_run(*MODEL, f"train.zero_stage={stage}", f"train.precision={precision}", f"train.batch_rows={rows}")
    print(f"ZeRO {stage}, {precision}, {rows} rows: planned {told['planned_bytes'] / told['memory_bytes']:.3f}")
    assert told["planned_bytes"] == pytest.approx(told["memory_bytes"], rel=0.1)
