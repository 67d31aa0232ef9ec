"""What a bundle can do beside telling a likelihood: write on, fill holes, say how sure it is. Or why it cannot.

So that every model is asked in the same words: `writer_of` and `filler_of` hide how it decodes, `score_confidence` how
it was trained.
"""

import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.config import DecodeConfig, no_decoder
from dllm_core.decoding.engine import Engine
from dllm_core.errors import ConfigError
from dllm_core.evaluation.calibration import CalibrationScores, score_calibration
from dllm_core.evaluation.config import Side
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.infill import CausalFiller, EngineFiller, Filler, LeftFiller
from dllm_core.evaluation.writers import EngineWriter, Writer
from dllm_core.model.pattern import CAUSAL, training_pattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig
from dllm_core.objective.loss import DenoiserLike


def why_not_written(bundle: ModelBundle) -> ConfigError | None:
    """What says that a bundle cannot write; None where there is a decoder for it."""
    said = bundle.manifest
    return no_decoder(said.objective, said.process, bundle.config.model)


def writer_of(
    bundle: ModelBundle, decode: DecodeConfig, device: str = "cpu", *, max_batch_tokens: int = 4096
) -> Writer:
    """The bundle as it is served. Raises `why_not_written`."""
    return EngineWriter(Engine.of(bundle, device, max_batch_tokens), decode)


def sides_seen(bundle: ModelBundle) -> tuple[Side, ...]:
    """From which sides its filler sees a hole."""
    is_left = isinstance(bundle.manifest.objective, AutoregressiveConfig | BlockDiffusionConfig)
    return LeftFiller.sides if is_left else EngineFiller.sides


def filler_of(
    bundle: ModelBundle, decode: DecodeConfig, device: str = "cpu", *, seed: int, max_batch_tokens: int = 4096
) -> Filler:
    """Masks over whole rows fill a hole; what decodes from the left writes on as far as it goes.

    Autoregression takes the likeliest token each time. Raises `why_not_written`.
    """
    objective, config = bundle.manifest.objective, bundle.config
    if isinstance(objective, AutoregressiveConfig):
        never = {config.eos_id, config.pad_id}
        return CausalFiller(bundle.denoiser(device), config.mask_id, torch.device(device), never=never)
    engine = Engine.of(bundle, device, max_batch_tokens)
    if isinstance(objective, BlockDiffusionConfig):
        return LeftFiller(EngineWriter(engine, decode), seed)
    return EngineFiller(engine, decode, config.mask_id, seed=seed)


def why_no_confidence(bundle: ModelBundle) -> ConfigError | None:
    """What says that a bundle has no masks to be sure about; None if it has.

    With replaced tokens a place may be wrong without being hidden: how sure one is of it is another question.
    """
    process = bundle.manifest.process
    return ConfigError("noise.process.type", "calibration is of masks", process.type) if process.replaces else None


def score_confidence(
    bundle: ModelBundle, denoiser: DenoiserLike, rows: HeldoutRows, rate: float, *, seed: int, device: str = "cpu"
) -> CalibrationScores:
    """`score_calibration` through the pass that the bundle was trained in. Raises `why_no_confidence`.

    denoiser: the bundle's own, opened once for many calls.
    """
    if problem := why_no_confidence(bundle):
        raise problem
    said, process = bundle.manifest, bundle.process
    assert isinstance(process, AbsorbingProcess)
    is_causal = isinstance(said.objective, AutoregressiveConfig)
    return score_calibration(
        denoiser,
        process,
        rows,
        rate=rate,
        seed=seed,
        device=torch.device(device),
        pattern=CAUSAL if is_causal else training_pattern(said.block_length),
        is_timed=bundle.config.model.time_conditioning,
    )
