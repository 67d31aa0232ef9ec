"""The preprocess stage: what to make, in which order, and what is there already.

    dllm preprocess workflows/recipes/quickstart.yaml noise.epochs=4

Two rounds of tasks (tokens, then noise, which needs the number of all rows), then the manifest. Every task leaves a
receipt, so a run that was killed goes on with what is missing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from dllm_core.config.fingerprint import seal
from dllm_core.data.build import (
    CorpusJob,
    UnitReceipt,
    finished,
    noise_receipt_key,
    noise_shard,
    sample_texts,
    tokenize_unit,
    unit_receipt_key,
)
from dllm_core.data.corpus import HubCorpus, Unit, hub_units, plan_units
from dllm_core.data.loader import corpus_noise
from dllm_core.data.manifest import Accounting, CorpusManifest, Split, corpus_prefix, read_manifest
from dllm_core.data.shard import ShardInfo
from dllm_core.data.sources import Sources, find_sources
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.errors import DataError
from dllm_core.storage.store import Store
from workflows.fan_out import FanOut
from workflows.recipe import Recipe

OnProgress = Callable[[str, int, int], None]  # what is done, how many, of how many


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus as it will be: where it comes from and its identity."""

    recipe: Recipe
    store: Store
    sources: Sources
    fingerprint: str

    @property
    def url(self) -> str:
        """The corpus's folder."""
        return f"{self.store.url}/{corpus_prefix(self.fingerprint)}"

    @property
    def bytes_needed(self) -> int:
        """A low estimate of what tokens and noise will take: one token for every 4 bytes of text."""
        seq_len = self.recipe.packing.seq_len
        rows = sum(item.size for item in self.sources.files) // (4 * seq_len)
        return rows * (2 * seq_len + self.recipe.noise.epochs * (seq_len // 8 + 4))

    def existing(self) -> CorpusManifest | None:
        """The finished corpus, if it has all the noise that the recipe asks for."""
        if not self.store.exists(f"{corpus_prefix(self.fingerprint)}/manifest.json"):
            return None
        manifest = read_manifest(self.store, self.fingerprint)
        return manifest if len(manifest.noise_epochs) >= self.recipe.noise.epochs else None


def plan_corpus(recipe: Recipe, store: Store) -> CorpusPlan:
    """List the sources and name the corpus. Fast; every mistake about paths is found here."""
    if recipe.tokenizer.path is not None:
        Tokenizer.from_file(Path(recipe.tokenizer.path), recipe.tokenizer)  # a bad one is refused before work starts
    is_hub = isinstance(recipe.corpus, HubCorpus)
    sources = Sources(store, ()) if is_hub else find_sources(recipe.corpus, store)
    return CorpusPlan(recipe, store, sources, recipe.corpus_fingerprint(sources.files))


@dataclass
class Preprocessing:
    """One run of the stage. `ran` counts the tasks that were not done already."""

    plan: CorpusPlan
    fan_out: FanOut
    on_progress: OnProgress = lambda what, done, total: None
    ran: int = field(default=0, init=False)

    def run(self) -> CorpusManifest:
        """Make what is missing; the manifest is written last."""
        recipe, plan = self.plan.recipe, self.plan
        job = CorpusJob(
            corpus=recipe.corpus,
            source=plan.sources.store,
            output=plan.store,
            prefix=corpus_prefix(plan.fingerprint),
            seq_len=recipe.packing.seq_len,
        )
        units = self._units()
        tokenizer = self._tokenizer(job, units)
        receipts = self._tokens(job, tokenizer, units)
        accounting = self._accounted(receipts)
        train = Split(shards=tuple(receipt.train for receipt in receipts if receipt.train.rows))
        heldout = Split(shards=tuple(receipt.heldout for receipt in receipts if receipt.heldout.rows))
        self._refuse_empty(train, heldout)
        manifest = CorpusManifest(
            fingerprint=plan.fingerprint,
            source=recipe.corpus.model_dump(mode="json"),
            tokenizer=tokenizer.config,
            tokenizer_sha256=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            seq_len=recipe.packing.seq_len,
            seed=recipe.seed,
            process=recipe.noise.process,
            t_min=recipe.noise.t_min,
            accounting=accounting,
            train=train,
            heldout=heldout,
            noise_epochs=(),
        )
        noise = self._noise(job, manifest, tokenizer.mask_id)
        manifest = manifest.model_copy(update={"noise_epochs": noise})
        plan.store.put(job.key("manifest.json"), seal(manifest))
        return manifest

    def _units(self) -> list[Unit]:
        corpus = self.plan.recipe.corpus
        return hub_units(corpus) if isinstance(corpus, HubCorpus) else plan_units(corpus, list(self.plan.sources.files))

    def _tokenizer(self, job: CorpusJob, units: list[Unit]) -> Tokenizer:
        """The recipe's tokenizer, or one trained on the corpus; it is kept beside the shards."""
        config = self.plan.recipe.tokenizer
        key = job.key("tokenizer.json")
        if job.output.exists(key):
            return Tokenizer(job.output.read(key).decode(), config, key)
        if config.path is not None:
            text = _read_text("tokenizer.path", config.path)
            tokenizer = Tokenizer(text, config, config.path)
        else:
            self.on_progress("training the tokenizer", 0, 0)
            train = partial(_train_tokenizer, job, units)
            [tokenizer] = self.fan_out(train, [config], workers=1, on_done=lambda done: None)
        job.output.put(key, tokenizer.json_text.encode())
        return tokenizer

    def _tokens(self, job: CorpusJob, tokenizer: Tokenizer, units: list[Unit]) -> list[UnitReceipt]:
        done: dict[int, UnitReceipt] = {}
        for unit in units:
            receipt = finished(job, unit_receipt_key(unit.index), UnitReceipt)
            if receipt is not None:
                done[unit.index] = receipt
        missing = [unit for unit in units if unit.index not in done]
        for receipt in self._tasks("tokens", partial(tokenize_unit, job, tokenizer), missing, len(units)):
            done[receipt.unit] = receipt
        return [done[unit.index] for unit in units]

    def _noise(self, job: CorpusJob, manifest: CorpusManifest, mask_id: int) -> tuple[tuple[ShardInfo, ...], ...]:
        shards = manifest.train.shards
        first_rows = [0, *accumulate(shard.rows for shard in shards)]
        wanted = [
            _NoiseTask(shard, first_row, epoch)
            for epoch in range(self.plan.recipe.noise.epochs)
            for shard, first_row in zip(shards, first_rows, strict=False)
        ]
        done: dict[tuple[int, int], ShardInfo] = {}
        for task in wanted:
            receipt = finished(job, noise_receipt_key(task.epoch, task.tokens.unit), ShardInfo)
            if receipt is not None:
                done[task.epoch, task.tokens.unit] = receipt
        missing = [task for task in wanted if (task.epoch, task.tokens.unit) not in done]
        draw = partial(_draw_noise, job, manifest, mask_id)
        for task, info in zip(missing, self._tasks("noise", draw, missing, len(wanted)), strict=True):
            done[task.epoch, task.tokens.unit] = info
        epochs = range(self.plan.recipe.noise.epochs)
        return tuple(tuple(done[epoch, shard.unit] for shard in shards) for epoch in epochs)

    def _tasks(self, what: str, function: Callable[[Any], Any], missing: list[Any], total: int) -> list[Any]:
        before = total - len(missing)
        self.on_progress(what, before, total)
        if not missing:
            return []
        self.ran += len(missing)
        workers = self.plan.recipe.placement.preprocess.workers
        return self.fan_out(
            function,
            missing,
            workers=workers,
            on_done=lambda done: self.on_progress(what, before + done, total),
        )

    def _accounted(self, receipts: list[UnitReceipt]) -> Accounting:
        total = Accounting()
        for receipt in receipts:
            receipt.accounting.check(f"unit {receipt.unit}")
            total = total + receipt.accounting
        allowed = self.plan.recipe.corpus.max_bad_fraction
        if total.quarantined > allowed * total.documents_in:
            share = f"{total.quarantined} of {total.documents_in} records are bad, {allowed:.0%} are allowed"
            remedy = f"see {self.plan.url}/quarantine; narrow corpus.glob or raise corpus.max_bad_fraction"
            raise DataError("corpus.max_bad_fraction", share, remedy=remedy)
        return total

    def _refuse_empty(self, train: Split, heldout: Split) -> None:
        if not train.rows:
            raise DataError("corpus.path", "no text to train on", self.plan.recipe.corpus.path)
        if heldout.rows < 2:
            fraction = self.plan.recipe.corpus.heldout_fraction
            remedy = "raise it, or cut documents finer: corpus.document=paragraph or line"
            raise DataError("corpus.heldout_fraction", "fewer than 2 held-out rows to evaluate on", fraction, remedy)


@dataclass(frozen=True)
class _NoiseTask:
    tokens: ShardInfo
    first_row: int
    epoch: int


def _draw_noise(job: CorpusJob, manifest: CorpusManifest, mask_id: int, task: _NoiseTask) -> ShardInfo:
    return noise_shard(job, corpus_noise(manifest, mask_id), task.tokens, task.first_row, task.epoch)


def _train_tokenizer(job: CorpusJob, units: list[Unit], config: Any) -> Tokenizer:
    return Tokenizer.train(sample_texts(job, units, config.train_bytes), config)


def _read_text(place: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(place, f"cannot be read ({error})", path) from error


def summary(manifest: CorpusManifest, ran: int) -> dict[str, Any]:
    """What the stage reports."""
    return {
        "corpus": manifest.fingerprint,
        "tasks_run": ran,
        **json.loads(manifest.accounting.model_dump_json()),
        "train_rows": manifest.train.rows,
        "train_tokens": manifest.train.tokens,
        "heldout_rows": manifest.heldout.rows,
        "heldout_tokens": manifest.heldout.tokens,
        "vocab_size": manifest.vocab_size,
        "noise_epochs": len(manifest.noise_epochs),
    }
