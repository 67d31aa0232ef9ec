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
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.infill import CausalFiller, EngineFiller, Filler, LeftFiller, sides_seen
from dllm_core.evaluation.writers import EngineWriter, Writer
from dllm_core.model.pattern import CAUSAL, training_pattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig
from dllm_core.objective.loss import DenoiserLike


def why_not_written(bundle: ModelBundle) -> ConfigError | None:
    """The error that there is no decoder for a bundle; None where there is one."""
    said = bundle.manifest
    return no_decoder(said.objective, said.process, bundle.config.model)


def writer_of(
    bundle: ModelBundle, decode: DecodeConfig, device: str = "cpu", *, max_batch_tokens: int = 4096
) -> Writer:
    """The bundle as it is served. Raises `why_not_written`."""
    return EngineWriter(Engine(bundle, device, max_batch_tokens), decode)


def filler_of(
    bundle: ModelBundle, decode: DecodeConfig, device: str = "cpu", *, seed: int, max_batch_tokens: int = 4096
) -> Filler:
    """Masks over whole rows fill a hole; what decodes from the left writes on as far as it goes.

    Autoregression takes the likeliest token each time. Raises `why_not_written`.
    """
    return filler_over(Engine(bundle, device, max_batch_tokens), bundle, decode, seed=seed)


def filler_over(
    engine: Engine, bundle: ModelBundle, decode: DecodeConfig, *, seed: int, in_one_call: bool = False
) -> Filler:
    """`filler_of` for an engine that is there. in_one_call: every position of a hole at once, where masks allow it."""
    denoiser, objective, config = engine.denoiser, bundle.manifest.objective, bundle.config
    if isinstance(objective, AutoregressiveConfig):
        never = {config.eos_id, config.pad_id}
        return CausalFiller(denoiser, config.mask_id, denoiser.device, never=never)
    if isinstance(objective, BlockDiffusionConfig):
        return LeftFiller(EngineWriter(engine, decode), seed)
    sides = sides_seen(objective, bundle.manifest.process)
    return EngineFiller(engine, None if in_one_call else decode, config.mask_id, seed=seed, sides=sides)


def why_no_confidence(bundle: ModelBundle) -> ConfigError | None:
    """The error that a bundle's noise is no masks, of which alone calibration is; None if it is.

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
