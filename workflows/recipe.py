"""The recipe: one frozen tree of sections, read from YAML plus overrides, and what it *is* (its fingerprints).

No Ray, no torch: `dllm show` answers at once, and a mistake is refused before anything starts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.config.fingerprint import fingerprint
from dllm_core.config.overrides import apply_overrides, read_recipe
from dllm_core.data.corpus import AnyCorpus, ChatRecord, HubSource, MixtureCorpus, SourceBase
from dllm_core.data.packing import AnyPacking, WrapPacking
from dllm_core.data.tokenizer import TokenizerConfig
from dllm_core.decoding.config import DecodeConfig, decoding_pattern, is_ancestral, no_decoder
from dllm_core.errors import ConfigError
from dllm_core.evaluation.config import AutoregressiveScorerConfig, EvaluateConfig
from dllm_core.model.config import ModelConfig
from dllm_core.model.pattern import AttentionPattern
from dllm_core.noise.process import NoiseConfig
from dllm_core.objective.config import AnyObjective, BlockDiffusionConfig, DiffusionConfig, DiffusionOptions
from dllm_core.storage.store import StoredObject, check_name, local_path
from dllm_core.training.config import BOOKKEEPING, TrainConfig
from workflows.placement import PlacementConfig
from workflows.serve.config import ServeConfig

RECIPES = Path(__file__).parent / "recipes"
AnySource = TypeVar("AnySource", bound=SourceBase)


class StorageConfig(Frozen):
    """A folder, or `s3://bucket/prefix` with endpoint and credentials in the environment."""

    root: str = Field("dllm-runs", min_length=1)


class Recipe(Frozen):
    """All that decides a run, from text to endpoint."""

    name: str
    seed: int = Field(0, ge=0, lt=1 << 63)
    storage: StorageConfig = StorageConfig()
    corpus: AnyCorpus
    tokenizer: TokenizerConfig = TokenizerConfig()
    packing: AnyPacking = WrapPacking()
    noise: NoiseConfig = NoiseConfig()
    model: ModelConfig = ModelConfig()
    objective: AnyObjective = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decode: DecodeConfig = DecodeConfig()
    serve: ServeConfig = ServeConfig()
    placement: PlacementConfig = PlacementConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        try:
            return check_name("name", name)
        except ConfigError as error:
            raise ValueError(error.problem) from None

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.train.batch_rows % self.placement.train.workers:
            problem = f"must be a multiple of placement.train.workers={self.placement.train.workers}"
            raise FieldProblem("train.batch_rows", problem, self.train.batch_rows)
        if self.decode.max_tokens > self.packing.seq_len:
            problem = f"must be <= packing.seq_len={self.packing.seq_len}, the model's context"
            raise FieldProblem("decode.max_tokens", problem, self.decode.max_tokens)
        records = [getattr(source, "record", None) for source in self.corpus.all_sources]
        if self.tokenizer.chat is None and any(isinstance(record, ChatRecord) for record in records):
            raise FieldProblem("tokenizer.chat", "missing", None, "conversations need turn markers: tokenizer.chat={}")
        if self.serve.max_batch_tokens < self.packing.seq_len:
            problem = f"must be >= packing.seq_len={self.packing.seq_len}, or no full row could be decoded"
            raise FieldProblem("serve.max_batch_tokens", problem, self.serve.max_batch_tokens)
        return self

    @model_validator(mode="after")
    def _objective_and_noise_go_together(self) -> Self:
        objective, noise = self.objective, self.noise
        if not isinstance(objective, DiffusionOptions):
            if self.model.time_conditioning:
                problem = f"objective.type={objective.type} has no diffusion time"
                raise FieldProblem("model.time_conditioning", problem, True, "leave it out")
            return self
        if isinstance(objective, BlockDiffusionConfig) != (noise.block_length is not None):
            problem = f"objective.type={objective.type} needs " + (
                "none" if noise.block_length else "the blocks' length"
            )
            raise FieldProblem("noise.block_length", problem, noise.block_length, "set both or neither")
        name = objective.only_for_masks
        if name is not None and (noise.process.replaces or noise.steps is not None):
            problem = "says how masks weigh in continuous time; it needs noise.process.type=absorbing, noise.steps=null"
            raise FieldProblem(f"objective.{name}", problem, getattr(objective, name), "leave it out")
        return self

    @property
    def can_be_decoded(self) -> bool:
        """Whether there is a decoder for this model."""
        return no_decoder(self.objective, self.noise.process, self.model) is None

    @property
    def decoding_pattern(self) -> AttentionPattern:
        """Whom a position sees in decoding, where there is a decoder."""
        return decoding_pattern(self.objective, self.noise.block_length)

    @property
    def decode_told(self) -> dict[str, Any]:
        """What decides when tokens are committed, where there is a decoder."""
        return self.decode.told(self.decoding_pattern, is_ancestral(self.objective, self.noise.process))

    def check_decodable(self) -> None:
        """Refuse to decode what there is no decoder for, or in other blocks than the model's."""
        problem = no_decoder(self.objective, self.noise.process, self.model)
        if problem is not None:
            raise problem
        trained, decode = self.decoding_pattern.block_length, self.decode
        if trained is not None and decode.block_length != trained:
            remedy = f"decode.block_length={trained}"
            if decode.steps_per_block > trained:
                remedy += f" decode.steps_per_block={trained}"
            raise ConfigError(
                "decode.block_length", f"must be noise.block_length={trained}", decode.block_length, remedy
            )

    def corpus_fingerprint(self, sources: Sequence[StoredObject]) -> str:
        """Identity of the shards. Written noise epochs are left out: computed ones have the same bits."""
        unsaid = {"epochs"} if self.noise.steps else {"epochs", "steps"}  # null is what a corpus had before `steps`
        return fingerprint(
            {
                "seed": self.seed,
                "corpus": self._corpus_identity(),
                "tokenizer": self.tokenizer,
                "packing": self.packing,
                "noise": self.noise.model_dump(mode="json", exclude=unsaid),
                "sources": [[item.key, item.size, item.stamp] for item in sources],
            }
        )

    def _corpus_identity(self) -> dict[str, Any]:
        """A folder that was moved is the same corpus: its files tell. What a hub serves, only its name tells."""
        values = self.corpus.model_dump(mode="json", exclude={"max_bad_fraction"})
        for source, section in zip(self.corpus.all_sources, values.get("sources", [values]), strict=True):
            if not isinstance(source, HubSource):
                del section["path"]
        return values

    def run_fingerprint(self, corpus_fingerprint: str) -> str:
        """Identity of the weights: everything but evaluation, decoding, serving, placement and storage."""
        return fingerprint(
            {
                "corpus": corpus_fingerprint,
                "seed": self.seed,
                "model": self.model,
                "objective": self.objective,
                "train": self.train.model_dump(mode="json", exclude=set(BOOKKEEPING)),
            }
        )

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides. The name of a recipe that has none is its file's."""
    values: dict[str, Any] = {"name": path.stem, **read_recipe(path)}
    if "models" in values:
        raise ConfigError(str(path), "is a comparison of several models", remedy="`dllm compare` takes it")
    return anchored(Recipe.checked(apply_overrides(values, list(overrides))))


def anchored(recipe: Recipe) -> Recipe:
    """Relative paths start at the working directory; written out, so that a run means the same from anywhere."""
    corpus, tokenizer = recipe.corpus, recipe.tokenizer
    if isinstance(corpus, MixtureCorpus):
        sources = tuple(_located(f"corpus.sources.{i}.path", source) for i, source in enumerate(corpus.sources))
        corpus = corpus.model_copy(update={"sources": sources})
    else:
        corpus = _located("corpus.path", corpus)
    if tokenizer.path is not None:
        tokenizer = tokenizer.model_copy(update={"path": _absolute("tokenizer.path", tokenizer.path)})
    storage = StorageConfig(root=_absolute("storage.root", recipe.storage.root))
    return recipe.model_copy(
        update={"corpus": corpus, "tokenizer": tokenizer, "evaluate": _with_scorer(recipe.evaluate), "storage": storage}
    )


def _with_scorer(section: EvaluateConfig) -> EvaluateConfig:
    """The section with the path of its scorer's run written out."""
    scorer = section.samples.scorer
    if not isinstance(scorer, AutoregressiveScorerConfig):
        return section
    located = scorer.model_copy(update={"run": _absolute("evaluate.samples.scorer.run", scorer.run)})
    return section.model_copy(update={"samples": section.samples.model_copy(update={"scorer": located})})


def _located(place: str, source: AnySource) -> AnySource:
    """A source with its path written out; a hub's name is no path."""
    if isinstance(source, HubSource):
        return source
    return source.model_copy(update={"path": _absolute(place, source.path)})


def _absolute(place: str, path: str) -> str:
    return path if "://" in path or path.startswith("python:") else str(local_path(place, path))


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted(RECIPES.glob("*.yaml"))
