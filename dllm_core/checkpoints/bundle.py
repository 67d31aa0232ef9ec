"""ModelBundle: all a replica needs and nothing a trainer needs, in one folder.

`model.safetensors` (EMA weights), `config.json`, `tokenizer.json`, and `bundle.json` with the noise process, decoding
defaults, lineage and the sha256 of the other three; it is written last.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import FileEntry, verified_file
from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import seal, unseal
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import CheckpointError, ConfigError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import CONFIG_NAME, WEIGHTS_NAME, read_denoiser
from dllm_core.noise.interpolating import InterpolatingProcess
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import AnyObjective, DiffusionConfig
from dllm_core.storage.store import LocalStore, file_sha256

FOLDER = "bundle"
MANIFEST_NAME = "bundle.json"
TOKENIZER_NAME = "tokenizer.json"


class Lineage(Frozen):
    """From shard to answer: what the weights were made from."""

    run: str
    recipe_sha256: str
    corpus: str
    manifest_sha256: str
    checkpoint: str
    checkpoint_sha256: str
    step: int


class BundleManifest(Frozen):
    """`bundle.json`. `decode` is the recipe's decode section, as plain data."""

    format: Literal[1] = 1
    process: AnyNoise
    objective: AnyObjective = DiffusionConfig()
    block_length: int | None = None
    steps: int | None = None
    tokenizer: TokenizerConfig
    decode: dict[str, Any]
    lineage: Lineage
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class ModelBundle:
    """A verified bundle in a local folder."""

    folder: Path
    manifest: BundleManifest

    def denoiser(self, device: str = "cpu") -> Denoiser:
        """The denoiser, in evaluation mode."""
        return read_denoiser(self.folder, device)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the weights were trained with."""
        return Tokenizer.from_file(self.folder / TOKENIZER_NAME, self.manifest.tokenizer)

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
) -> None:
    """Write the run's bundle, its manifest last. objective: None for plain diffusion."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = {name: Path(scratch, name) for name in (CONFIG_NAME, TOKENIZER_NAME)}
        parts[CONFIG_NAME].write_text(config.model_dump_json(indent=2), encoding="utf-8")
        parts[TOKENIZER_NAME].write_text(tokenizer.json_text, encoding="utf-8")
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
    key = run.key(f"{FOLDER}/{MANIFEST_NAME}")
    place = f"{run.url}/{FOLDER}"
    if not run.store.exists(key):
        raise CheckpointError(place, "there is no bundle", remedy="finish the run first: `dllm run`")
    raw = run.store.read(key)
    try:
        manifest = BundleManifest.checked(unseal(raw))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{place}/{MANIFEST_NAME}", f"is not a bundle's manifest ({error})") from error
    files = {
        name: verified_file(run.store, run.key(f"{FOLDER}/{name}"), entry, f"{place}/{name}")
        for name, entry in manifest.files.items()
    }
    if isinstance(run.store, LocalStore):
        return ModelBundle(run.store.path(run.key(FOLDER)), manifest)
    return ModelBundle(_gathered(files, manifest, raw), manifest)


def _gathered(files: dict[str, Path], manifest: BundleManifest, raw: bytes) -> Path:
    """One folder with the fetched files, named by the manifest's content; a damaged one is made anew."""
    some = next(iter(files.values()))
    folder = some.parent.parent / "bundles" / hashlib.sha256(raw).hexdigest()
    if not all((folder / name).is_file() and entry.matches(folder / name) for name, entry in manifest.files.items()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        for name, path in files.items():
            shutil.copyfile(path, scratch / name)
        (scratch / MANIFEST_NAME).write_bytes(raw)
        try:
            os.replace(scratch, folder)
        except OSError:  # another process was first; its folder has the same content
            shutil.rmtree(scratch)
    return folder
