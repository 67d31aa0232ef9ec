"""A denoiser in a folder: `config.json` + `model.safetensors`, fp32, names as in `Denoiser.state_dict()`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.config import CONFIG_NAME, WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.tensor_file import shapes_of

BY_TOKEN = ("embed.weight", "head.weight")  # of a row for each token
_TIED = "head.weight"


def read_denoiser(folder: Path, device: str = "cpu") -> Denoiser:
    """Load the denoiser of a folder, in evaluation mode."""
    try:
        config = DenoiserConfig.checked(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")), CONFIG_NAME)
        weights = load_file(folder / WEIGHTS_NAME, device=device)
    except FileNotFoundError as error:
        raise CheckpointError(str(folder), f"incomplete ({error})", remedy="name a bundle's folder") from None
    except (OSError, ValueError, ConfigError, SafetensorError) as error:
        raise CheckpointError(str(folder), f"not a denoiser ({error})") from error
    with torch.device("meta"):
        denoiser = Denoiser(config)
    assign_weights(denoiser, weights, str(folder / WEIGHTS_NAME))
    return denoiser.eval().requires_grad_(False)


def assign_weights(denoiser: Denoiser, weights: dict[str, Tensor], place: str) -> None:
    """Give the denoiser these tensors; missing, unknown and misshapen ones are refused by name."""
    expected = {name: tensor.shape for name, tensor in weights_of(denoiser).items()}
    check_weights(expected, shapes_of(weights), place)
    denoiser.load_state_dict(weights, strict=False, assign=True)
    if denoiser.config.model.tie_embeddings:
        denoiser.head.weight = denoiser.embed.weight


@torch.no_grad()
def copy_weights(denoiser: Denoiser, weights: Mapping[str, Tensor], place: str) -> None:
    """As `assign_weights`, into the tensors that the denoiser has: one is held beside them at a time."""
    own = weights_of(denoiser)
    check_weights({name: tensor.shape for name, tensor in own.items()}, shapes_of(weights), place)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def check_weights(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], place: str) -> None:
    """Raises CheckpointError that lists what is missing, unknown and misshapen."""
    if wrong := differences(expected, found):
        raise CheckpointError(place, "; ".join(sorted(wrong)[:8]))


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which shapes are missing, unknown and other than expected, each in words."""
    wrong = [f"missing {name}" for name in expected if name not in found]
    wrong += [f"unknown {name}" for name in found if name not in expected]
    return wrong + [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def weights_of(denoiser: Denoiser) -> dict[str, Tensor]:
    """The denoiser's tensors, each once: a tied head is its embedding."""
    tied = denoiser.config.model.tie_embeddings
    return {name: tensor for name, tensor in denoiser.state_dict().items() if not (tied and name == _TIED)}


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, contiguous and on the CPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
