"""CorpusManifest: what exists, from what, by which tokenizer, with which noise. Written last: where it is, all is."""

from typing import Any, Literal

from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import unseal
from dllm_core.data.shard import ShardInfo
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import ConfigError, DataError
from dllm_core.noise.process import AbsorbingNoise
from dllm_core.storage.store import Store, sha256

FORMAT: Literal[1] = 1


class Accounting(Frozen):
    """Where every record went: documents_in = train + heldout + empty + quarantined, per unit and in all."""

    bytes_in: int = 0
    documents_in: int = 0
    train: int = 0
    heldout: int = 0
    empty: int = 0
    quarantined: int = 0

    def __add__(self, other: "Accounting") -> "Accounting":
        return Accounting(**{name: getattr(self, name) + getattr(other, name) for name in Accounting.model_fields})

    def check(self, place: str) -> None:
        """Refuse a sum that does not add up: a record was lost or counted twice."""
        out = self.train + self.heldout + self.empty + self.quarantined
        if out != self.documents_in:
            raise DataError(place, f"{self.documents_in} records in but {out} accounted for")


class Split(Frozen):
    """Shards of one split, in the order of their units; row ids count through them."""

    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Counted tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


class CorpusManifest(Frozen):
    """The table of contents of `corpora/<fingerprint>/`."""

    format: Literal[1] = FORMAT
    fingerprint: str
    source: dict[str, Any]
    tokenizer: TokenizerConfig
    tokenizer_sha256: str
    vocab_size: int
    seq_len: int
    seed: int
    process: AbsorbingNoise
    t_min: float
    accounting: Accounting
    train: Split
    heldout: Split
    noise_epochs: tuple[tuple[ShardInfo, ...], ...]

    @property
    def digest_fields(self) -> dict[str, Any]:
        """What a trained run depends on; not the written noise epochs, since computed ones are equal."""
        return self.model_dump(mode="json", exclude={"noise_epochs"})


def corpus_prefix(fingerprint: str) -> str:
    """The folder of a corpus below the storage root."""
    return f"corpora/{fingerprint}"


def read_manifest(store: Store, fingerprint: str) -> CorpusManifest:
    """The manifest of a finished corpus."""
    key = f"{corpus_prefix(fingerprint)}/manifest.json"
    if not store.exists(key):
        raise DataError(f"{store.url}/{key}", "no such corpus", remedy="run `dllm preprocess` first")
    try:
        return CorpusManifest.checked(unseal(store.read(key)), key)
    except (ValueError, ConfigError) as error:
        raise DataError(
            f"{store.url}/{key}", f"not a manifest ({error})", remedy="run `dllm preprocess` again"
        ) from error


def read_tokenizer(store: Store, manifest: CorpusManifest) -> Tokenizer:
    """The tokenizer that made the shards, proven by its digest."""
    key = f"{corpus_prefix(manifest.fingerprint)}/tokenizer.json"
    data = store.read(key)
    if sha256(data) != manifest.tokenizer_sha256:
        raise DataError(
            f"{store.url}/{key}", "is not the tokenizer of the manifest", remedy="run `dllm preprocess` again"
        )
    return Tokenizer(data.decode("utf-8"), manifest.tokenizer, key)
