"""What every rank of a training run is given. No torch and no DeepSpeed: the driver imports it too."""

from dataclasses import dataclass
from typing import Any

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.manifest import CorpusManifest
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.model.config import DenoiserConfig
from workflows.recipe import Recipe


@dataclass(frozen=True)
class WorkerJob:
    """It pickles: `mailbox` is a Ray actor's handle, `corpus` a fingerprint."""

    recipe: Recipe
    run: RunDir
    corpus: str
    mailbox: Any


def denoiser_config(recipe: Recipe, manifest: CorpusManifest, tokenizer: Tokenizer) -> DenoiserConfig:
    """The model that a recipe, a corpus and its tokenizer make together."""
    return DenoiserConfig(
        model=recipe.model,
        vocab_size=manifest.vocab_size,
        context_length=manifest.seq_len,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
