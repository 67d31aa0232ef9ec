"""The whole river on a small corpus, through its nine files, with a worker killed on the way.

preprocess/flow -> data/shard -> data/loader -> training/loop -> objective/diffusion -> noise/absorbing ->
checkpoints/bundle -> serve/replica -> decoding/engine.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port, make_small_corpus, small_recipe

from dllm_core.checkpoints.bundle import BundleManifest
from dllm_core.checkpoints.run_dir import JsonLines
from dllm_core.config.fingerprint import unseal
from dllm_core.data.manifest import read_manifest
from dllm_core.model import load_denoiser
from dllm_core.storage.store import file_sha256, sha256
from workflows.console import Console
from workflows.pipeline.flow import Pipeline
from workflows.target import open_target

STEPS = 240


def kill_rank_0_after_its_first_checkpoint(events: JsonLines, killed: list[int]) -> None:
    give_up = time.monotonic() + 200
    while time.monotonic() < give_up and not killed:
        seen = events.read()
        pids = [event["pid"] for event in seen if event["event"] == "started" and "pid" in event]
        if pids and any(event["event"] == "checkpoint" for event in seen):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
        time.sleep(0.02)


@pytest.fixture(scope="module")
def river(tmp_path_factory):
    """The target after one whole run; `killed` holds the worker's process id."""
    root = tmp_path_factory.mktemp("river")
    make_small_corpus(root / "unused")  # only for its text
    (root / "unused" / "corpus").rename(root / "corpus")
    recipe = small_recipe(
        root,
        train={"steps": STEPS, "checkpoint_every": 40, "zero_stage": 2, "log_every": 10},
        serve={
            "port": free_port(),
            "examples": [{"prompt": "RED "}, {"prompt": "RED", "suffix": " 1", "max_tokens": 4}],
        },
        placement={"preprocess": {"workers": 2}, "train": {"workers": 2}},
    )
    path = root / "small.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    target = open_target(str(path), [])
    killed: list[int] = []
    with Pipeline(target, Console("json")) as pipeline:
        events = JsonLines(target.run, "events.jsonl")
        killer = threading.Thread(target=kill_rank_0_after_its_first_checkpoint, args=(events, killed), daemon=True)
        killer.start()
        result = pipeline.run()
    return target, result, killed, path


def test_every_promised_file_is_there(river):
    target, _, _, _ = river
    run = Path(target.run.url)
    for name in ("recipe.yaml", "metrics.jsonl", "events.jsonl", "report.html", "bundle/bundle.json", "tensorboard"):
        assert (run / name).exists(), name
    corpus = Path(target.plan.url)
    assert {path.name for path in corpus.iterdir()} >= {"manifest.json", "tokens", "noise", "quarantine"}
    manifest = read_manifest(target.run.store, target.corpus)
    assert sorted(path.name for path in (corpus / "noise").iterdir()) == ["epoch-000", "epoch-001"]
    for shard in [
        *manifest.train.shards,
        *manifest.heldout.shards,
        *itertools.chain(*manifest.noise_epochs),
    ]:
        assert file_sha256(corpus / shard.key) == shard.sha256


def test_a_killed_worker_is_restarted_and_goes_on_from_the_last_checkpoint(river):
    target, _, killed, _ = river
    assert killed
    events = JsonLines(target.run, "events.jsonl").read()
    started = [event["step"] for event in events if event["event"] == "started" and "pid" in event]
    assert started[0] == 0
    assert len(started) >= 2
    assert started[1] >= 40
    assert started[1] % 40 == 0
    steps = [record["step"] for record in JsonLines(target.run, "metrics.jsonl").read()]
    assert steps == list(range(10, STEPS + 1, 10))


def test_training_learned_something_and_the_figures_are_whole(river):
    _, result, _, _ = river
    evaluation = result["evaluate"]
    assert evaluation["nelbo"] < evaluation["unigram_entropy"]
    assert 0 < evaluation["standard_error"] < 1
    assert evaluation["decoding"]["tokens_per_call"] >= 1
    assert result["train"]["step"] == STEPS


def test_the_lineage_names_what_is_on_disk(river):
    target, _, _, _ = river
    run = Path(target.run.url)
    manifest = BundleManifest.checked(unseal((run / "bundle" / "bundle.json").read_bytes()))
    lineage = manifest.lineage
    assert lineage.recipe_sha256 == sha256((run / "recipe.yaml").read_bytes())
    assert lineage.manifest_sha256 == file_sha256(Path(target.plan.url) / "manifest.json")
    ema = run / "checkpoints" / lineage.checkpoint / "ema.safetensors"
    assert lineage.checkpoint_sha256 == file_sha256(ema) == file_sha256(run / "bundle" / "model.safetensors")
    denoiser = load_denoiser(run / "bundle")
    assert denoiser(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 300)


def test_the_endpoint_answered_a_completion_and_an_infill(river):
    _, result, _, _ = river
    completion, infill = result["serve"]
    assert completion["num_tokens"] >= 1
    assert infill["num_tokens"] == 4
    for answer in (completion, infill):
        assert answer["tokens_per_call"] == pytest.approx(answer["num_tokens"] / answer["num_calls"], abs=1e-3)


def test_a_second_run_skips_every_stage_and_starts_no_cluster(river):
    import ray

    target, result, _, path = river
    assert not ray.is_initialized()
    before = len(JsonLines(target.run, "events.jsonl").read())
    with Pipeline(open_target(str(path), []), Console("json")) as pipeline:
        again = pipeline.run()
    assert not ray.is_initialized()
    assert again["evaluate"] == result["evaluate"]
    assert again["preprocess"]["tasks_run"] == 0
    assert len(JsonLines(target.run, "events.jsonl").read()) == before


def test_dllm_evaluate_has_its_figures_and_draws_their_report(river):
    target, result, _, _ = river
    report = Path(target.run.url) / "report.html"
    report.unlink()
    words = [sys.executable, "-m", "workflows", "evaluate", target.run.url, "--output", "json"]
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(told.stdout.splitlines()[-1]) == {"run": target.run.url, **result["evaluate"]}
    assert json.loads((report.parent / "evaluation.json").read_text(encoding="utf-8")) == result["evaluate"]
    for measure in ("infill", "calibration"):
        assert f"    {measure}" in told.stderr
    assert "Infilling: holes in held-out rows" in report.read_text(encoding="utf-8")
    learned = {(one["length"], one["side"]): one["token"] for one in result["evaluate"]["infill"]["holes"]}
    assert learned[1, "both"]["low"] > 0.1, "a colour or a shape, of 300 tokens"


def test_nothing_is_left_running(river):
    import psutil

    names = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [name for name in names if re.search("ray::|raylet|gcs_server|/ray/", name)]
