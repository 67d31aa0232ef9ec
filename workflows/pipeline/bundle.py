"""The bundle stage: the newest checkpoint's averaged weights with all a replica needs, and their lineage."""

from dllm_core.checkpoints.bundle import Lineage, write_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.config.fingerprint import fingerprint
from dllm_core.data.manifest import corpus_prefix, read_manifest, read_tokenizer
from dllm_core.errors import CheckpointError
from dllm_core.storage.store import sha256
from dllm_core.training.loop import EMA_NAME
from workflows.recipe import Recipe
from workflows.train.job import denoiser_config


def make_bundle(recipe: Recipe, run: RunDir, corpus: str) -> Lineage:
    """Write the run's bundle from its newest intact checkpoint."""
    refused: list[CheckpointError] = []
    newest = CheckpointStore(run).newest(refused.append)
    if newest is None:
        raise (refused[0] if refused else CheckpointError(run.url, "has no checkpoint", remedy="`dllm train` first"))
    store = run.store
    manifest = read_manifest(store, corpus)
    tokenizer = read_tokenizer(store, manifest)
    lineage = Lineage(
        run=run.name,
        recipe_sha256=sha256(store.read(run.key("recipe.yaml"))),
        corpus=corpus,
        manifest_sha256=sha256(store.read(f"{corpus_prefix(corpus)}/manifest.json")),
        checkpoint=newest.name,
        checkpoint_sha256=newest.manifest.files[EMA_NAME].sha256,
        step=newest.manifest.position.step,
    )
    write_bundle(
        run,
        weights=newest.files[EMA_NAME],
        config=denoiser_config(recipe, manifest, tokenizer),
        tokenizer=tokenizer,
        process=manifest.process,
        objective=recipe.objective,
        block_length=manifest.block_length,
        steps=manifest.steps,
        decode=recipe.decode.model_dump(mode="json"),
        lineage=lineage,
    )
    return lineage


def bundle_inputs(recipe: Recipe, run: RunDir, step: int) -> str:
    """Identity of the bundle stage's inputs."""
    return fingerprint({"run": run.name, "step": step, "decode": recipe.decode})
