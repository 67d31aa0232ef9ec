"""How each kind of model writes on and fills holes, so that the same questions can be put to all of them."""

import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.evaluation.infill import Filler
from dllm_core.evaluation.models import filler_over, why_not_written
from dllm_core.evaluation.writers import EngineWriter, Writer
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import MaskedLMConfig

_BATCH_TOKENS = 4096


class Speaker:
    """A bundle with its ways to write. `engine` is None where there is no decoder for such a model.

    served: how it decodes unless it is told otherwise. A recipe says so: what its run's bundle says is how it was when
    the run was trained, which may be before the recipe changed.
    """

    def __init__(self, bundle: ModelBundle, device: torch.device, seed: int, served: DecodeConfig) -> None:
        said = bundle.manifest
        self.bundle, self.device, self.served, self._seed = bundle, device, served, seed
        self.denoiser = bundle.denoiser(str(device))
        self.objective, self.mask_id = said.objective, bundle.config.mask_id
        self.engine: Engine | None = None
        if isinstance(said.objective, MaskedLMConfig):
            # Mask-predict (Ghazvininejad et al., arXiv:1904.09324): the masks of a canvas are filled like any others.
            noise, tokenizer = AbsorbingProcess(mask_id=self.mask_id), bundle.tokenizer()
            self.engine = Engine.over(self.denoiser, noise, _BATCH_TOKENS, tokenizer=tokenizer)
        elif why_not_written(bundle) is None:
            self.engine = Engine(bundle, max_batch_tokens=_BATCH_TOKENS, denoiser=self.denoiser)

    def writer(self, config: DecodeConfig) -> Writer | None:
        """Goes on from prompts."""
        return None if self.engine is None else EngineWriter(self.engine, config)

    def filler(self, config: DecodeConfig | None) -> Filler | None:
        """Fills holes; config None: every position in one call, where the model allows it."""
        if self.engine is None:
            return None
        how = config or self.served
        return filler_over(self.engine, self.bundle, how, seed=self._seed, in_one_call=config is None)
