"""LoRA: adapters beside a denoiser's frozen matrices, and the model that both make. The only file that imports peft.

peft is asked to put adapters into the denoiser, which stays one. Training, averages and checkpoints then know the
adapters alone; the bundle holds the merged weights, W + alpha/rank B A, and whoever reads it needs no peft.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.denoiser import Denoiser
from dllm_core.training.backend import trained_weights
from dllm_core.training.start import LoraConfig

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(module: Denoiser, config: LoraConfig) -> None:
    """Freeze the denoiser and put adapters beside its matrices, in place: B = 0, so its logits stay as they are.

    A is drawn from torch's global generator. Raises ConfigError where there is no peft or nothing to adapt.
    """
    if importlib.util.find_spec("peft") is None:
        raise missing_library()
    import peft

    names = [name for name, part in module.blocks.named_modules(prefix="blocks") if _is_target(name, part, config)]
    if not names:
        raise ConfigError("start.lora.targets", "the model has no such matrices", list(config.targets))
    told: Any = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(told, module)
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith((_A, _B)))


def missing_library() -> ConfigError:
    """What a machine without peft is told."""
    return ConfigError("start.lora", "needs peft, which is not installed", remedy="pip install 'dllm[lora]'")


def _is_target(name: str, part: nn.Module, config: LoraConfig) -> bool:
    return isinstance(part, nn.Linear) and name.rpartition(".")[2] in config.targets


def assign_adapters(module: Denoiser, adapters: Mapping[str, Tensor], place: str) -> None:
    """Give an adapted denoiser these adapters; others than its own are refused by name."""
    own = trained_weights(module)
    expected = {name: tensor.shape for name, tensor in own.items()}
    if expected != {name: tensor.shape for name, tensor in adapters.items()}:
        other = sorted(expected.keys() ^ adapters.keys()) or sorted(expected)
        raise CheckpointError(place, f"holds other adapters than the recipe's: {'; '.join(other[:4])}")
    for name, tensor in own.items():  # copied: what is read is on the host, the module may be elsewhere
        tensor.copy_(adapters[name])


def merged(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Weights by the denoiser's names with the adapters added, fp32. Raises CheckpointError for another model's."""
    result = dict(weights)
    for name, a in adapters.items():
        if not name.endswith(_A):
            continue
        target = name.removesuffix(_A)
        if f"{target}.weight" not in weights or f"{target}{_B}" not in adapters:
            raise CheckpointError(f"adapters of {target}", "belong to another model")
        product = adapters[f"{target}{_B}"].double() @ a.double()
        result[f"{target}.weight"] = (weights[f"{target}.weight"] + config.alpha / config.rank * product).float()
    return result
