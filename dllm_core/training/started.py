"""The weights of a start: another run's bundle in fp32, with rows for tokens that its tokenizer did not have."""

import torch
from torch import Tensor

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.errors import CheckpointError
from dllm_core.model.config import WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.pretrained import BY_TOKEN
from dllm_core.model.tensor_file import LazyTensors, TensorFile
from dllm_core.training.start import StartConfig


def open_start(start: StartConfig) -> ModelBundle:
    """The bundle that training starts from, every byte checked. Raises CheckpointError where it is another now."""
    bundle = read_bundle(RunDir.at(start.run))
    found = bundle.manifest.weights_sha256
    if found != start.weights_sha256:
        problem = f"its weights are {found[:12]}..., this run starts from {str(start.weights_sha256)[:12]}..."
        raise CheckpointError(start.run, problem, remedy="the bundle was changed since: start another run from it")
    return bundle


class StartedWeights(LazyTensors):
    """What a denoiser of a config starts with, fp32 by parameter name, whatever types the bundle's file has.

    Tokens beyond the bundle's rows begin as the mean of the others: their logit is the mean of all, and stands out
    nowhere. Raises CheckpointError where the ids of mask, end or padding are others than the bundle's.
    """

    def __init__(self, bundle: ModelBundle, config: DenoiserConfig) -> None:
        for name in ("mask_id", "eos_id", "pad_id"):
            if getattr(config, name) != getattr(bundle.config, name):
                problem = f"{name} is {getattr(bundle.config, name)}, the corpus's is {getattr(config, name)}"
                raise CheckpointError(str(bundle.folder), problem)
        self._file = TensorFile(bundle.folder / WEIGHTS_NAME)
        self._missing = {
            name: config.vocab_size - self._file.shapes[name][0] for name in BY_TOKEN if name in self._file.shapes
        }

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of all tensors, new tokens' rows included."""
        found = self._file.shapes
        more = {name: number for name, number in self._missing.items() if number > 0}
        return {**found, **{name: torch.Size([found[name][0] + n, *found[name][1:]]) for name, n in more.items()}}

    def __getitem__(self, name: str) -> Tensor:
        """Read from the file."""
        found, missing = self._file[name].float(), self._missing.get(name, 0)
        if missing <= 0:
            return found
        return torch.cat([found, found.double().mean(0).float().expand(missing, -1)])
