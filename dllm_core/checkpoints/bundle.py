"""ModelBundle: all a replica needs and nothing a trainer needs, in one folder.

`model.safetensors` (EMA weights), `config.json`, `tokenizer.json`, and `bundle.json` with the noise process, decoding
defaults, lineage and the sha256 of the others; it is written last. An imported one has `foreign.json` too: how to write
it as it came.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.checkpoints.bundle_manifest import (
    FOLDER,
    MANIFEST_NAME,
    BundleManifest,
    Lineage,
    read_manifest,
)
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import FileEntry, verified_file
from dllm_core.config.fingerprint import seal
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.model.config import CONFIG_NAME, LAYOUT_NAME, WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import AnyObjective, DiffusionConfig
from dllm_core.storage.cache import gather
from dllm_core.storage.store import LocalStore, file_sha256

if TYPE_CHECKING:
    from dllm_core.model.denoiser import Denoiser
    from dllm_core.model.foreign import ForeignLayout


@dataclass(frozen=True)
class ModelBundle:
    """A verified bundle in a local folder."""

    folder: Path
    manifest: BundleManifest

    def denoiser(self, device: str = "cpu", dtype: str | None = None) -> "Denoiser":
        """The denoiser, in evaluation mode. dtype: float32 or bfloat16 to compute in, by default the weights' own."""
        import torch  # what a gateway, which reads bundles too, has no use for: 250 MB and seconds

        from dllm_core.model.pretrained import read_denoiser

        denoiser = read_denoiser(self.folder, device)
        return denoiser if dtype is None else denoiser.to(getattr(torch, dtype))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the weights were trained with."""
        return Tokenizer.from_file(self.folder / TOKENIZER_NAME, self.manifest.tokenizer)

    def layout(self) -> "ForeignLayout | None":
        """How the folder was laid out that the weights were imported from; None if they never were."""
        if LAYOUT_NAME not in self.manifest.files:
            return None
        from dllm_core.model.foreign import ForeignLayout

        return ForeignLayout.model_validate_json((self.folder / LAYOUT_NAME).read_bytes())

    @cached_property
    def digest(self) -> str:
        """Of its manifest: 12 hex digits."""
        return self.manifest.digest

    @property
    def config(self) -> DenoiserConfig:
        """Sizes, vocabulary and special ids of the denoiser."""
        return DenoiserConfig.model_validate_json((self.folder / CONFIG_NAME).read_bytes())

    @property
    def process(self) -> InterpolatingProcess:
        """The forward process, bound to the vocabulary."""
        config = self.config
        return self.manifest.process.bind(config.mask_id, config.vocab_size)


def write_bundle(
    run: RunDir,
    *,
    weights: Path,
    config: DenoiserConfig,
    tokenizer: Tokenizer,
    process: AnyNoise,
    decode: dict[str, Any],
    lineage: Lineage,
    objective: AnyObjective | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    layout: "ForeignLayout | None" = None,
) -> None:
    """Write the run's bundle, its manifest last. objective: None for plain diffusion; layout: of imported weights."""
    texts = {CONFIG_NAME: config.model_dump_json(indent=2), TOKENIZER_NAME: tokenizer.json_text}
    if layout is not None:
        texts[LAYOUT_NAME] = layout.model_dump_json()
    with tempfile.TemporaryDirectory() as scratch:
        parts = {name: Path(scratch, name) for name in texts}
        for name, text in texts.items():
            parts[name].write_bytes(text.encode("utf-8"))
        parts[WEIGHTS_NAME] = weights
        entries = {}
        for name, path in parts.items():
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
            run.store.put_file(run.key(f"{FOLDER}/{name}"), path)
    manifest = BundleManifest(
        process=process,
        objective=objective or DiffusionConfig(),
        block_length=block_length,
        steps=steps,
        tokenizer=tokenizer.config,
        decode=decode,
        lineage=lineage,
        files=entries,
    )
    run.store.put(run.key(f"{FOLDER}/{MANIFEST_NAME}"), seal(manifest))


def read_bundle(run: RunDir) -> ModelBundle:
    """The run's bundle after every sha256 was checked; from S3 it is copied into the local cache first."""
    manifest, raw = read_manifest(run)
    place = f"{run.url}/{FOLDER}"
    files = {
        name: verified_file(run.store, run.key(f"{FOLDER}/{name}"), entry, f"{place}/{name}")
        for name, entry in manifest.files.items()
    }
    if isinstance(run.store, LocalStore):
        return ModelBundle(run.store.path(run.key(FOLDER)), manifest)
    folder = gather(hashlib.sha256(raw).hexdigest(), files, lambda name, path: manifest.files[name].matches(path))
    return ModelBundle(folder, manifest)
