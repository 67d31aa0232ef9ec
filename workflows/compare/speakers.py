"""How each kind of model writes on and fills holes, so that the same questions can be put to all of them."""

from collections.abc import Sequence

import numpy as np
import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.config import DecodeConfig, no_decoder
from dllm_core.decoding.engine import Engine
from dllm_core.evaluation.infill import SIDES, CausalFiller, EngineFiller, Filled, Filler, Hole, Side
from dllm_core.evaluation.writers import EngineWriter, Writer
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig, MaskedLMConfig
from dllm_core.seeding import Ints

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
            return _LeftFiller(EngineWriter(self.engine, served), self._seed)
        return EngineFiller(self.engine, config, self.mask_id, seed=self._seed)


class _LeftFiller:
    """Writes on from the left as far as the hole goes; an answer that ends inside it is wrong from there on."""

    sides: tuple[Side, ...] = ("left",)

    def __init__(self, writer: Writer, seed: int) -> None:
        self._writer, self._seed = writer, seed

    def fill(self, holes: Sequence[Hole], side: Side) -> list[Filled]:
        """Holes of one length, in order. Raises ValueError for a side that it cannot see."""
        if side != "left":
            raise ValueError(f"blocks are written from the left, got {side!r}")
        if not holes:
            return []
        length = len(holes[0].truth)
        written = self._writer.write([hole.before.tolist() for hole in holes], length, seed=self._seed)
        return [Filled(_padded(answer.tokens, length), answer.num_calls) for answer in written]


def _padded(tokens: Sequence[int], length: int) -> Ints:
    """Tokens up to a length, -1 (no token) behind their end."""
    return np.array([*tokens, *[-1] * (length - len(tokens))], np.int64)
