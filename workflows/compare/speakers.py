"""How each kind of model writes on and fills holes, so that the same questions can be put to all of them."""

import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.config import DecodeConfig, no_decoder
from dllm_core.decoding.engine import Engine
from dllm_core.evaluation.config import Side
from dllm_core.evaluation.infill import SIDES, CausalFiller, EngineFiller, Filler, LeftFiller
from dllm_core.evaluation.writers import EngineWriter, Writer
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig, MaskedLMConfig

_BATCH_TOKENS = 4096


class Speaker:
    """A bundle with its ways to write. `engine` is None where there is no decoder for such a model."""

    def __init__(self, bundle: ModelBundle, device: torch.device, seed: int) -> None:
        said = bundle.manifest
        self.bundle, self.device, self._seed = bundle, device, seed
        self.denoiser = bundle.denoiser(str(device))
        self.objective, self.mask_id = said.objective, bundle.config.mask_id
        self.engine: Engine | None = None
        if isinstance(said.objective, MaskedLMConfig):
            # Mask-predict (Ghazvininejad et al., arXiv:1904.09324): the masks of a canvas are filled like any others.
            self.engine = Engine(self.denoiser, AbsorbingProcess(mask_id=self.mask_id), _BATCH_TOKENS)
        elif no_decoder(said.objective, said.process, bundle.config.model) is None:
            self.engine = Engine.of(bundle, str(device), _BATCH_TOKENS)

    @property
    def sides(self) -> tuple[Side, ...]:
        """From which sides a hole can be seen."""
        if self.engine is None:
            return ()
        return ("left",) if isinstance(self.objective, AutoregressiveConfig | BlockDiffusionConfig) else SIDES

    def writer(self, config: DecodeConfig) -> Writer | None:
        """Goes on from prompts."""
        return None if self.engine is None else EngineWriter(self.engine, config)

    def filler(self, config: DecodeConfig | None) -> Filler | None:
        """Fills holes; config None: every position in one call, where the model allows it."""
        if self.engine is None:
            return None
        never = (self.bundle.config.eos_id, self.bundle.config.pad_id)
        if isinstance(self.objective, AutoregressiveConfig):
            return CausalFiller(self.denoiser, self.mask_id, self.device, never=never)
        if isinstance(self.objective, BlockDiffusionConfig):
            served = config or DecodeConfig.model_validate(self.bundle.manifest.decode)
            return LeftFiller(EngineWriter(self.engine, served), self._seed)
        return EngineFiller(self.engine, config, self.mask_id, seed=self._seed)
