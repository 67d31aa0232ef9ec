"""The bundle stage: the newest checkpoint's averaged weights with all a replica needs, and their lineage.

With `train.average_checkpoints`, the mean of the averaged weights of the newest ones, or of the best.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file

from dllm_core.checkpoints.bundle import write_bundle
from dllm_core.checkpoints.bundle_manifest import Lineage
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import Checkpoint, CheckpointStore
from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.manifest import corpus_prefix, read_manifest, read_tokenizer
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.errors import CheckpointError
from dllm_core.model.config import LAYOUT_NAME, WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.foreign import ForeignLayout, trained_layout
from dllm_core.model.pretrained import write_weights
from dllm_core.storage.store import check_scratch, sha256
from dllm_core.training.average import average_weights
from dllm_core.training.config import TrainConfig
from dllm_core.training.loop import EMA_NAME
from dllm_core.training.lora import merged
from dllm_core.training.started import StartedWeights, open_start
from workflows.recipe import Recipe
from workflows.train.job import check_rows, denoiser_config


def make_bundle(recipe: Recipe, run: RunDir, corpus: str, on_damage: Callable[[CheckpointError], None]) -> Lineage:
    """Write the run's bundle from its newest or best intact checkpoints, as many as are asked for and are there.

    on_damage: told of each that is passed over.
    """
    found = _chosen(run, recipe.train, on_damage)
    digests = [checkpoint.manifest.files[EMA_NAME].sha256 for checkpoint in found]
    store = run.store
    manifest = read_manifest(store, corpus)
    for checkpoint in found:
        check_rows(checkpoint.manifest, manifest, recipe.train.accept_corpus)
    tokenizer = read_tokenizer(store, manifest)
    lineage = Lineage(
        run=run.name,
        recipe_sha256=sha256(store.read(run.key("recipe.yaml"))),
        corpus=corpus,
        manifest_sha256=sha256(store.read(f"{corpus_prefix(corpus)}/manifest.json")),
        checkpoint="+".join(checkpoint.name for checkpoint in found),
        checkpoint_sha256=digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()),
        step=max(checkpoint.manifest.position.step for checkpoint in found),
    )
    config = denoiser_config(recipe, manifest, tokenizer)
    with _weights_of(found) as trained, _merged(recipe, config, trained) as weights:
        write_bundle(
            run,
            weights=weights,
            config=config,
            tokenizer=tokenizer,
            process=manifest.process,
            objective=recipe.model_kind,
            block_length=manifest.block_length,
            steps=manifest.steps,
            decode=recipe.decode.model_dump(mode="json"),
            lineage=lineage,
            layout=_layout_of(recipe, run, config, tokenizer),
        )
    return lineage


def _layout_of(recipe: Recipe, run: RunDir, config: DenoiserConfig, tokenizer: Tokenizer) -> ForeignLayout | None:
    """How weights that were imported once go out again, where the public format holds what they have become."""
    key = run.key(LAYOUT_NAME)
    if recipe.start is None or not run.store.exists(key):
        return None
    layout, kind = ForeignLayout.model_validate_json(run.store.read(key)), recipe.model_kind.type
    found = trained_layout(layout, config, is_causal=kind == "autoregressive", in_blocks=kind == "block_diffusion")
    return None if found is None else found.listing(tokenizer.json_text, tokenizer.config.special_tokens)


def _chosen(run: RunDir, config: TrainConfig, on_damage: Callable[[CheckpointError], None]) -> list[Checkpoint]:
    """Up to `average_checkpoints` intact ones, the newest or best first; there is one, or it is an error."""
    refused, checkpoints = list[CheckpointError](), CheckpointStore(run)
    candidates = checkpoints.best if config.average_from == "best" else checkpoints.intact
    found = list(itertools.islice(candidates(refused.append), config.average_checkpoints))
    if not found:
        raise (refused[0] if refused else CheckpointError(run.url, "has no checkpoint", remedy="`dllm train` first"))
    for error in refused:
        on_damage(error)
    return found


@contextlib.contextmanager
def _weights_of(checkpoints: list[Checkpoint]) -> Iterator[Path]:
    """A file with what they have in the mean; one checkpoint's own is not copied."""
    files = [checkpoint.files[EMA_NAME] for checkpoint in checkpoints]
    if len(files) == 1:
        yield files[0]
        return
    check_scratch(files[0].stat().st_size)
    with tempfile.TemporaryDirectory(prefix="dllm-average-") as scratch:
        target = Path(scratch, EMA_NAME)
        average_weights(files, target)
        yield target


@contextlib.contextmanager
def _merged(recipe: Recipe, config: DenoiserConfig, trained: Path) -> Iterator[Path]:
    """The file itself, or where it holds adapters one with the weights that they and the start make."""
    if recipe.start is None or recipe.start.lora is None:
        yield trained
        return
    base = StartedWeights(open_start(recipe.start), config)
    check_scratch(4 * sum(shape.numel() for shape in base.shapes.values()))  # in fp32
    with tempfile.TemporaryDirectory(prefix="dllm-merge-") as scratch:
        target = Path(scratch, WEIGHTS_NAME)
        write_weights(target, merged(base, load_file(trained), recipe.start.lora))
        yield target


def bundle_inputs(recipe: Recipe, run: RunDir, step: int) -> str:
    """Identity of the bundle stage's inputs."""
    inputs = {"run": run.name, "step": step, "decode": recipe.decode}
    if recipe.train.average_checkpoints > 1:  # left out of older receipts
        inputs["average"] = recipe.train.average_checkpoints
    if recipe.train.average_from == "best":
        inputs["average_from"] = "best"
    return fingerprint(inputs)
