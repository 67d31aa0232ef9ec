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
from dllm_core.data.corpus import AnyCorpus, ChatRecord, HubSource, MixtureCorpus, PreferenceRecord, SourceBase
from dllm_core.data.packing import AnyPacking, PairsPacking, WrapPacking
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.decoding.config import DecodeConfig, decoding_pattern, is_ancestral, no_decoder
from dllm_core.errors import ConfigError, DataError
from dllm_core.evaluation.config import AutoregressiveScorerConfig, EvaluateConfig
from dllm_core.model.config import ModelConfig
from dllm_core.model.pattern import AttentionPattern
from dllm_core.noise.process import NoiseConfig
from dllm_core.objective.config import (
    AnyObjective,
    BlockDiffusionConfig,
    DiffusionConfig,
    DiffusionOptions,
    MaskedLMConfig,
    PreferenceConfig,
    model_kind,
)
from dllm_core.storage.store import StoredObject, check_name, local_path
from dllm_core.training.config import TrainConfig
from dllm_core.training.start import StartConfig
from workflows.placement import PlacementConfig
from workflows.serve.config import ServeConfig
from workflows.start import started_of

RECIPES = Path(__file__).parent / "recipes"
AnySource = TypeVar("AnySource", bound=SourceBase)


class StorageConfig(Frozen):
    """A folder, or `s3://bucket/prefix` with endpoint and credentials in the environment."""

    root: str = Field("dllm-runs", min_length=1)


class TrackingConfig(Frozen):
    """Who else is told of a training's figures, beside metrics.jsonl and TensorBoard. A tracker cannot harm a run."""

    project: str = Field("dllm", min_length=1, description="W&B project, MLflow experiment")
    wandb: bool = False
    mlflow: bool = False


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
    start: StartConfig | None = None
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decode: DecodeConfig = DecodeConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()
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
        rows, micro_rows = self.train.batch_rows // self.placement.train.workers, self.train.micro_rows
        if self.train.average_from == "best" and isinstance(self.objective, MaskedLMConfig):
            problem = "objective.type=masked_lm has no likelihood, so no checkpoint is better than another"
            raise FieldProblem("train.average_from", problem, "best", "leave it out")
        if isinstance(micro_rows, int) and rows % micro_rows:
            raise FieldProblem("train.micro_rows", f"must divide the {rows} rows of a worker's batch", micro_rows)
        if self.decode.max_tokens > self.packing.seq_len:
            problem = f"must be <= packing.seq_len={self.packing.seq_len}, the model's context"
            raise FieldProblem("decode.max_tokens", problem, self.decode.max_tokens)
        if self.tokenizer.chat is None and any(_has_turns(record) for record in self.corpus.records):
            raise FieldProblem("tokenizer.chat", "missing", None, "conversations need turn markers: tokenizer.chat={}")
        if self.serve.max_batch_tokens < self.packing.seq_len:
            problem = f"must be >= packing.seq_len={self.packing.seq_len}, or no full row could be decoded"
            raise FieldProblem("serve.max_batch_tokens", problem, self.serve.max_batch_tokens)
        return self

    @model_validator(mode="after")
    def _preferences_go_together(self) -> Self:
        """Records, rows and objective: two answers of which one is rejected are no text to be learned otherwise."""
        are_preferences = [isinstance(record, PreferenceRecord) for record in self.corpus.records]
        is_tuned, remedy = isinstance(self.objective, PreferenceConfig), "preferences need all three, other text none"
        if isinstance(self.packing, PairsPacking) != is_tuned:
            problem = f"does not go with objective.type={self.objective.type}"
            raise FieldProblem("packing.type", problem, self.packing.type, remedy)
        for source, is_one in zip(self.corpus.all_sources, are_preferences, strict=True):
            if is_one != is_tuned:
                kind = getattr(getattr(source, "record", None), "type", "text")
                problem = f"does not go with objective.type={self.objective.type} and packing.type={self.packing.type}"
                raise FieldProblem("corpus.record.type", problem, kind, remedy)
        if is_tuned and self.start is None:
            problem, remedy = "objective.type=preference tunes the weights of a run", "start.run=<a run with a bundle>"
            raise FieldProblem("start", problem, None, remedy)
        if is_tuned and self.noise.process.replaces:
            problem = "objective.type=preference draws masks"
            raise FieldProblem("noise.process.type", problem, self.noise.process.type, "absorbing")
        if is_tuned and self.noise.steps is not None:
            raise FieldProblem(
                "noise.steps", "objective.type=preference is in continuous time", self.noise.steps, "null"
            )
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
        self._check_warmup(objective)
        name = objective.only_for_masks
        if name is not None and (noise.process.replaces or noise.steps is not None):
            problem = "says how masks weigh in continuous time; it needs noise.process.type=absorbing, noise.steps=null"
            raise FieldProblem(f"objective.{name}", problem, getattr(objective, name), "leave it out")
        return self

    def _check_warmup(self, objective: DiffusionOptions) -> None:
        for number, stage in enumerate(objective.block_warmup):
            if stage.block_length > self.packing.seq_len:
                problem = f"must be <= packing.seq_len={self.packing.seq_len}, where a block is a whole row"
                raise FieldProblem(f"objective.block_warmup.{number}.block_length", problem, stage.block_length)
        steps = sum(stage.steps for stage in objective.block_warmup)
        if objective.block_warmup and steps >= self.train.steps:
            problem = f"takes all train.steps={self.train.steps} and leaves none for the objective itself"
            raise FieldProblem("objective.block_warmup", problem, steps)

    @model_validator(mode="after")
    def _masks_can_be_told_apart(self) -> Self:
        if self.start is None or self.start.mask_noise is None:
            return self
        has_masks = self.noise.process.type in ("absorbing", "hybrid")
        if not isinstance(self.objective, DiffusionOptions):
            problem = f"is for objective.type=diffusion and block_diffusion, this is {self.objective.type}"
            raise FieldProblem("start.mask_noise", problem, self.start.mask_noise, "leave it out")
        if not has_masks:
            problem = f"noise.process.type={self.noise.process.type} shows no masks"
            raise FieldProblem("start.mask_noise", problem, self.start.mask_noise, "leave it out")
        return self

    @property
    def num_ids(self) -> int:
        """Rows of the embedding: a started model's, a given tokenizer's, which is read, or as many as a trained one is
        to have. Raises DataError for a given one that cannot be read.
        """
        is_given = self.tokenizer.path is not None and self.start is None
        return Tokenizer.given(self.tokenizer).vocab_size if is_given else self.tokenizer.vocab_size

    @property
    def likely_ids(self) -> int:
        """The same for an estimate: a given tokenizer may be gone, of which the corpus has a copy."""
        try:
            return self.num_ids
        except DataError:
            return self.tokenizer.vocab_size

    @property
    def model_kind(self) -> AnyObjective:
        """The objective by which the model is scored, decoded and served."""
        return model_kind(self.objective, self.noise.block_length)

    @property
    def can_be_decoded(self) -> bool:
        """Whether there is a decoder for this model."""
        return no_decoder(self.model_kind, self.noise.process, self.model) is None

    @property
    def decoding_pattern(self) -> AttentionPattern:
        """Whom a position sees in decoding, where there is a decoder."""
        return decoding_pattern(self.model_kind, self.noise.block_length)

    @property
    def decode_told(self) -> dict[str, Any]:
        """What decides when tokens are committed, where there is a decoder."""
        return self.decode.told(self.decoding_pattern, is_ancestral(self.model_kind, self.noise.process))

    def check_decodable(self) -> None:
        """Refuse to decode what there is no decoder for, or in other blocks than the model's."""
        problem = no_decoder(self.model_kind, self.noise.process, self.model)
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

    def corpus_fingerprint(self, files: Sequence[Sequence[StoredObject]]) -> str:
        """Identity of the shards. files: of each source; none tells what the sections alone say.

        Written noise epochs are left out: computed ones have the same bits.
        """
        listed = [[[item.key, item.size, item.stamp] for item in source] for source in files]
        unsaid = {"epochs"} if self.noise.steps else {"epochs", "steps"}  # null is what a corpus had before `steps`
        return fingerprint(
            {
                "seed": self.seed,
                "corpus": self._corpus_identity(),
                "tokenizer": self._tokenizer_identity(),
                "packing": self.packing,
                "noise": self.noise.model_dump(mode="json", exclude=unsaid),
                "sources": listed if len(listed) > 1 else [file for source in listed for file in source],
            }
        )

    def _tokenizer_identity(self) -> dict[str, Any]:
        """The section; of a started run's tokenizer its digest in the place of the path, so that it may be moved."""
        values = self.tokenizer.model_dump(mode="json")
        return values if self.start is None else {**values, "path": self.start.tokenizer_sha256}

    def _corpus_identity(self) -> dict[str, Any]:
        """A folder that was moved is the same corpus: its files tell. What a hub serves, only its name tells."""
        values = self.corpus.model_dump(mode="json", exclude={"max_bad_fraction"})
        for source, section in zip(self.corpus.all_sources, values.get("sources", [values]), strict=True):
            if not isinstance(source, HubSource):
                del section["path"]
        return values

    def run_fingerprint(self, corpus_fingerprint: str) -> str:
        """Identity of the weights: everything but evaluation, decoding, serving, placement and storage."""
        objective = self.objective
        identity = {
            "corpus": corpus_fingerprint,
            "seed": self.seed,
            "model": self.model.identity,
            "objective": objective.identity if isinstance(objective, DiffusionOptions) else objective,
            "train": self.train.identity,
        }
        if self.start is not None:
            identity["start"] = self.start.identity
        return fingerprint(identity)

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides. The name of a recipe that has none is its file's."""
    values: dict[str, Any] = {"name": path.stem, **read_recipe(path)}
    if "models" in values:
        raise ConfigError(str(path), "is a comparison of several models", remedy="`dllm compare` takes it")
    return resolved(apply_overrides(values, list(overrides)))


def resolved(values: dict[str, Any]) -> Recipe:
    """The recipe of these sections, its paths written out and what a `start` decides filled in."""
    started = started_of(values)
    if started is None:
        return anchored(Recipe.checked(values))
    recipe = anchored(Recipe.checked(started.completed(values)))
    replaces = recipe.noise.process.replaces
    started.check(recipe.packing.seq_len, replaces, recipe.tokenizer.vocab_size)
    if isinstance(recipe.objective, PreferenceConfig):
        started.check_tuned(recipe.noise.block_length)
    return recipe


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


def _has_turns(record: Any) -> bool:
    return isinstance(record, ChatRecord) or (isinstance(record, PreferenceRecord) and record.conversations)


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
