"""`run.json`: on what, with which code and from which data a run was trained. Secrets never get into it."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.manifest import CorpusManifest, corpus_prefix
from dllm_core.storage.store import sha256
from dllm_core.training.backend import resolve_precision
from workflows.recipe import Recipe

_PACKAGES = ("dllm", "torch", "deepspeed", "ray", "pyarrow", "numpy", "tokenizers", "safetensors")
_SHOWN = re.compile(r"^(CUDA|NCCL|GLOO|OMP|MKL|TORCH|RAY|DS|DLLM|AWS|S3|HF|WANDB|MLFLOW|SLURM)_")
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL|AUTH|COOKIE|HEADERS", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"(?i)((?:key|secret|token|pass\w*|sig\w*|credential)[^=&\s]*=)[^&\s]+")


def scrubbed(environment: dict[str, str]) -> dict[str, str]:
    """Variables that decide how a training runs; of secrets the name alone, of URLs no user, password or signature."""
    found = {}
    for name in sorted(environment):
        if _SHOWN.match(name):
            value = _IN_QUERY.sub(r"\1***", _IN_URL.sub("***@", environment[name]))
            found[name] = "***" if _SECRET.search(name) else value
    return found


def facts(
    recipe: Recipe, run: RunDir, manifest: CorpusManifest, device: torch.device, world_size: int
) -> dict[str, Any]:
    """What `run.json` says; every start writes it anew."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "run": run.name,
        "seed": recipe.seed,
        "corpus": manifest.fingerprint,
        "manifest_sha256": sha256(run.store.read(f"{corpus_prefix(manifest.fingerprint)}/manifest.json")),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "git": _git(Path(__file__).resolve().parent),
        "packages": {package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": {"type": device.type, "name": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "precision": str(resolve_precision(recipe.train.precision, device)).removeprefix("torch."),
        "workers": world_size,
        "environment": scrubbed(dict(os.environ)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(folder: Path) -> dict[str, Any] | None:
    """Of the checkout that the code runs from; None for an installed package, also in a checkout of something else."""

    def asked(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        asked("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": asked("rev-parse", "HEAD"), "is_dirty": bool(asked("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
