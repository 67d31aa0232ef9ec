"""What a bundle says of itself: `bundle.json`, and the small files beside its weights. Torch-free, for recipes."""

from dataclasses import dataclass
from typing import Any, Literal

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import FileEntry
from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import fingerprint, unseal
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import CheckpointError, ConfigError, DataError
from dllm_core.model.config import CONFIG_NAME, WEIGHTS_NAME, DenoiserConfig
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import AnyObjective, DiffusionConfig
from dllm_core.storage.store import sha256

FOLDER = "bundle"
MANIFEST_NAME = "bundle.json"


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

    @property
    def digest(self) -> str:
        """Of all that decides an answer, and so of all files: 12 hex digits. Decoding defaults and lineage do not: a
        bundle with other ones is the same to gateways and replicas.
        """
        return fingerprint(self.model_dump(mode="json", exclude={"decode", "lineage"}))

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights' file."""
        return self.files[WEIGHTS_NAME].sha256

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer."""
        return self.files[TOKENIZER_NAME].sha256


@dataclass(frozen=True)
class BundleOutline:
    """A bundle without its weights: each part as the manifest promises it."""

    manifest: BundleManifest
    config: DenoiserConfig
    tokenizer_json: str

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the weights were trained with."""
        return Tokenizer(self.tokenizer_json, self.manifest.tokenizer)


def read_manifest(run: RunDir) -> tuple[BundleManifest, bytes]:
    """The manifest of a run's bundle, and its bytes. Raises CheckpointError where there is none, or it is damaged."""
    key = run.key(f"{FOLDER}/{MANIFEST_NAME}")
    place = f"{run.url}/{FOLDER}"
    if not run.store.exists(key):
        raise CheckpointError(place, "there is no bundle", remedy="finish the run first: `dllm run`")
    raw = run.store.read(key)
    try:
        return BundleManifest.checked(unseal(raw)), raw
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{place}/{MANIFEST_NAME}", f"is not a bundle's manifest ({error})") from error


def is_whole(run: RunDir) -> bool:
    """Whether all files of a run's bundle are there, by their sizes: they are listed and not read."""
    try:
        files = read_manifest(run)[0].files
    except CheckpointError:
        return False
    found = {item.key: item.size for item in run.store.list(run.key(FOLDER))}
    return all(found.get(run.key(f"{FOLDER}/{name}")) == entry.bytes for name, entry in files.items())


def read_outline(run: RunDir) -> BundleOutline:
    """All of a run's bundle that is small. Raises CheckpointError for what is not as its manifest says."""
    manifest, _ = read_manifest(run)
    texts = {}
    for name in (CONFIG_NAME, TOKENIZER_NAME):
        place = f"{run.url}/{FOLDER}/{name}"
        try:
            data = run.store.read(run.key(f"{FOLDER}/{name}"))
        except DataError as error:
            raise CheckpointError(place, f"cannot be read ({error.problem})") from error
        if sha256(data) != manifest.files[name].sha256:
            raise CheckpointError(place, "does not match its sha256", remedy="the file was changed or damaged")
        texts[name] = data.decode("utf-8")
    return BundleOutline(manifest, DenoiserConfig.model_validate_json(texts[CONFIG_NAME]), texts[TOKENIZER_NAME])
