"""A public checkpoint is imported, made diffusion on chats, decoded, exported and imported again: by the verbs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from starts import chats, qwen2_folder, values_of

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # what it joins is tested piece by piece in `make test`


def dllm(*words: str) -> subprocess.CompletedProcess[str]:
    told = [sys.executable, "-m", "workflows", *words]
    return subprocess.run(told, capture_output=True, text=True, check=False, timeout=300)


def done(*words: str) -> str:
    told = dllm(*words)
    assert told.returncode == 0, told.stderr
    return told.stdout


def run_in(storage: Path, name: str) -> RunDir:
    [found] = (storage / "runs").glob(f"{name}-*")
    return RunDir.at(str(found))


def test_an_autoregressive_checkpoint_becomes_one_that_chats_by_diffusion_and_goes_out_again(tmp_path):
    storage, root = tmp_path / "storage", f"storage.root={tmp_path / 'storage'}"
    done("import", str(qwen2_folder(tmp_path / "qwen")), "qwen", "mask_id=new", root)
    imported = run_in(storage, "qwen")
    refused = dllm("train", imported.url, f"corpus.path={tmp_path / 'qwen'}")
    assert refused.returncode == 2
    recipe = tmp_path / "chat.yaml"
    warmup = [{"block_length": 1, "steps": 2}, {"block_length": 4, "steps": 2}]
    sections = {
        "packing": {"type": "padded", "seq_len": 32},
        "tokenizer": {"chat": {}},
        "objective": {"block_warmup": warmup, "normalize": "answer"},
        "start": {"mask_noise": {"std": 0.5, "steps": 3}},
        "placement": {"train": {"workers": 2}},
    }
    values = values_of(
        tmp_path, chats(tmp_path / "chats"), name="chat", **sections, train={"steps": 6, "zero_stage": 3}
    )
    recipe.write_text(yaml.safe_dump(values))
    nowhere = dllm("train", str(recipe), f"start.run={storage}/runs/gone-0123456789ab")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert nowhere.stderr.startswith("dllm: start.run: no run to start from: there is no bundle, got ")
    done("train", str(recipe), f"start.run={imported.url}")
    run = run_in(storage, "chat")
    bundle = read_bundle(run)
    assert bundle.config.model.shifted
    assert bundle.manifest.lineage.step == 6
    assert bundle.config.vocab_size == read_bundle(imported).config.vocab_size + 4
    assert "calls" in done("generate", run.url, "--prompt", "NAME 3", "decode.max_tokens=8")
    done("export", run.url, str(tmp_path / "out"))
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as now,
        safe_open(tmp_path / "qwen" / "model.safetensors", "pt") as before,
    ):
        assert set(now.keys()) == set(before.keys())
    done("import", str(tmp_path / "out"), "again", root)
    again = read_bundle(run_in(storage, "again"))
    assert again.config.model == bundle.config.model
    assert again.manifest.objective.type == "diffusion"
    assert "calls" in done("generate", run_in(storage, "again").url, "--prompt", "NAME 3", "decode.max_tokens=8")
