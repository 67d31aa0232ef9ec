"""The weights of a start: another run's bundle in fp32, with rows for tokens that its tokenizer did not have."""

import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.errors import CheckpointError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import WEIGHTS_NAME, assign_weights
from dllm_core.training.start import StartConfig

_BY_TOKEN = ("embed.weight", "head.weight")


def open_start(start: StartConfig) -> ModelBundle:
    """The bundle that training starts from, every byte checked. Raises CheckpointError where it is another now."""
    bundle = read_bundle(RunDir.at(start.run))
    found = bundle.manifest.weights_sha256
    if found != start.weights_sha256:
        problem = f"its weights are {found[:12]}..., this run starts from {str(start.weights_sha256)[:12]}..."
        raise CheckpointError(start.run, problem, remedy="the bundle was changed since: start another run from it")
    return bundle


def started_weights(bundle: ModelBundle, config: DenoiserConfig, device: torch.device) -> dict[str, Tensor]:
    """What a denoiser of this config starts with, fp32 by parameter name, whatever types the bundle's file has.

    Tokens beyond the bundle's rows begin as the mean of the others: their logit is the mean of all, and stands out
    nowhere. Raises CheckpointError where the ids of mask, end or padding are others than the bundle's.
    """
    for name in ("mask_id", "eos_id", "pad_id"):
        if getattr(config, name) != getattr(bundle.config, name):
            problem = f"{name} is {getattr(bundle.config, name)}, the corpus's is {getattr(config, name)}"
            raise CheckpointError(str(bundle.folder), problem)
    weights = {name: t.float() for name, t in load_file(bundle.folder / WEIGHTS_NAME, device=str(device)).items()}
    for name in _BY_TOKEN:
        missing = config.vocab_size - len(weights[name]) if name in weights else 0
        if missing > 0:
            new = weights[name].double().mean(0).float().expand(missing, -1)
            weights[name] = torch.cat([weights[name], new])
    return weights


def started_denoiser(bundle: ModelBundle, config: DenoiserConfig, device: torch.device) -> Denoiser:
    """A denoiser that stays what training starts from: whole on every rank, fp32, without gradients."""
    with device:
        denoiser = Denoiser(config)
    assign_weights(denoiser, started_weights(bundle, config, device), str(bundle.folder))
    return denoiser.eval().requires_grad_(False)
