"""What every rank of a training run is given. No torch and no DeepSpeed: the driver imports it too."""

from dataclasses import dataclass
from typing import Any

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointManifest
from dllm_core.data.manifest import CorpusManifest
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.errors import DataError
from dllm_core.model.config import DenoiserConfig
from dllm_core.objective.config import PreferenceConfig
from dllm_core.training.start import StartConfig
from workflows.recipe import Recipe

RUN_FACTS = "run.json"


@dataclass(frozen=True)
class WorkerJob:
    """It pickles: `mailbox` is a Ray actor's handle, `corpus` a fingerprint."""

    recipe: Recipe
    run: RunDir
    corpus: str
    mailbox: Any


def needed_start(recipe: Recipe, *, is_resumed: bool) -> StartConfig | None:
    """The start, where its weights are needed: at step 0, and after a resume for what adapters stand beside and what a
    preference is measured against: a checkpoint's weights were tuned.
    """
    start = recipe.start
    is_read_again = start is not None and (start.lora is not None or isinstance(recipe.objective, PreferenceConfig))
    return start if not is_resumed or is_read_again else None


def denoiser_config(recipe: Recipe, manifest: CorpusManifest, tokenizer: Tokenizer) -> DenoiserConfig:
    """The model that a recipe, a corpus and its tokenizer make together.

    One that starts from another has that one's rows, of which some may be no tokens.
    """
    rows = manifest.vocab_size if recipe.start is None else recipe.tokenizer.vocab_size
    return DenoiserConfig(
        model=recipe.model,
        vocab_size=rows,
        context_length=manifest.seq_len,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def check_rows(checkpoint: CheckpointManifest, manifest: CorpusManifest, accepted: str | None) -> None:
    """Refuse to go on with other rows than a checkpoint was trained on, unless these were named."""
    before, now = checkpoint.corpus, manifest.rows_digest
    if before not in (None, now) and accepted != now:
        where = f"step {checkpoint.position.step:,} was trained on {before}"
        problem = f"its rows are {now} and the checkpoint of {where}: the corpus was made anew"
        remedy = f"train.accept_corpus={now} goes on with them"
        raise DataError(f"corpus {manifest.fingerprint}", problem, remedy=remedy)
