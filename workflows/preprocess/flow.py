"""The preprocess stage: what to make, in which order, and what is there already.

    dllm preprocess workflows/recipes/quickstart.yaml noise.epochs=4

Rounds of tasks (signatures where duplicates are removed, tokens, then noise, which needs the number of all rows), then
the manifest. Every task leaves a receipt, so a run that was killed goes on with what is missing.
"""

import contextlib
import json
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dllm_core.data.build import CorpusJob, decide, noise_shard, sample_texts, sign_unit, tokenize_unit, tokenizer_of
from dllm_core.data.loader import corpus_noise
from dllm_core.data.manifest import (
    Accounting,
    CorpusManifest,
    Split,
    corpus_prefix,
    first_rows,
    has_manifest,
    read_manifest,
    tokenizer_digest,
    write_manifest,
)
from dllm_core.data.noising import CorpusNoise
from dllm_core.data.quarantine import SUMMARY
from dllm_core.data.receipts import DECISIONS, SIGNATURES, TOKENS, FileReceipt, UnitReceipt, noise_step, shards_of
from dllm_core.data.shard import ShardInfo, id_type
from dllm_core.data.sources import find_files
from dllm_core.data.tokenizer import Tokenizer, given_json
from dllm_core.data.units import SourceFiles, Unit, plan_units
from dllm_core.errors import DataError
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.storage.store import Store, sha256
from workflows.fan_out import FanOut
from workflows.placement import PreprocessPlacement
from workflows.recipe import Recipe

OnProgress = Callable[[str, int, int], None]  # what is done, how many, of how many


@dataclass(frozen=True)
class CorpusPlan:
    """A corpus as it will be: where it comes from and its identity. listed: () if it can only be read as it stands."""

    recipe: Recipe
    store: Store
    listed: tuple[SourceFiles, ...]
    fingerprint: str

    @property
    def url(self) -> str:
        """The corpus's folder."""
        return f"{self.store.url}/{corpus_prefix(self.fingerprint)}"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, as they are stored; 0 for a hub corpus."""
        return sum(item.size for files in self.listed for item in files.files)

    @property
    def bytes_needed(self) -> int:
        """A low estimate of what tokens and noise will take: one token for every 4 bytes of text."""
        return self.disk_bytes(self.num_bytes // (4 * self.recipe.packing.seq_len))

    def disk_bytes(self, rows: int) -> int:
        """What so many rows take with their written noise."""
        packing, noise = self.recipe.packing, self.recipe.noise
        seq_len = packing.seq_len
        ids = np.dtype(id_type(self.recipe.likely_ids)).itemsize * seq_len
        times = 1
        if noise.block_length is not None:
            times = seq_len if packing.isolates else -(-seq_len // noise.block_length)
        of_noise = 4 * times + (ids if noise.process.replaces else -(-seq_len // 8))
        return rows * (ids + 4 + noise.epochs * of_noise)

    @property
    def is_made(self) -> bool:
        """Whether there is a manifest, of however many noise epochs; reads nothing."""
        return has_manifest(self.store, self.fingerprint)

    def job(self) -> CorpusJob:
        """What a task is given."""
        return CorpusJob(
            corpus=self.recipe.corpus,
            stores=tuple(files.store for files in self.listed),
            output=self.store,
            prefix=corpus_prefix(self.fingerprint),
            packing=self.recipe.packing,
        )

    def units(self) -> list[Unit]:
        """The work, cut. DataError for a corpus that can only be read."""
        if not self.listed:
            problem = "the files that it was made from have changed, so nothing of it can be made"
            raise DataError(self.url, problem, remedy="bring them back with their times, or start from a recipe file")
        return plan_units(self.recipe.corpus, self.listed)

    def existing(self) -> CorpusManifest | None:
        """The finished corpus, if it has all the noise that the recipe asks for.

        DataError if it has more bad records than this recipe allows: another one, that allowed more, has made it.
        """
        if not self.is_made:
            return None
        manifest = read_manifest(self.store, self.fingerprint)
        self.check_bad(manifest.accounting)
        return manifest if len(manifest.noise_epochs) >= self.recipe.noise.epochs else None

    def check_bad(self, total: Accounting) -> None:
        """Refuse more bad records than the recipe allows."""
        allowed = self.recipe.corpus.max_bad_fraction
        if total.num_quarantined / max(1, total.documents_in) > allowed:  # 0.29 * 100 is below 29
            share = f"{total.num_quarantined} of {total.documents_in} records are bad, {100 * allowed:.6g}% are allowed"
            remedy = f"see {self.url}/quarantine; narrow corpus.glob or raise corpus.max_bad_fraction"
            raise DataError("corpus.max_bad_fraction", share, remedy=remedy)


def plan_corpus(recipe: Recipe, store: Store, listed: tuple[SourceFiles, ...] | None = None) -> CorpusPlan:
    """List the sources, unless they are `listed`, and name the corpus. Every mistake about paths is found here."""
    listed = listed or find_files(recipe.corpus, store)
    plan = CorpusPlan(recipe, store, listed, recipe.corpus_fingerprint([files.files for files in listed]))
    if recipe.tokenizer.path is not None:
        _check_given(plan)
    return plan


def _check_given(plan: CorpusPlan) -> None:
    """Refuse a given tokenizer that is bad, or that was replaced since the corpus was made with it."""
    recipe, known = plan.recipe, tokenizer_digest(plan.store, plan.fingerprint)
    if known is None:
        Tokenizer.given(recipe.tokenizer)
        return
    if recipe.start is not None:
        return  # its digest is in the corpus's name
    try:
        given = sha256(given_json(recipe.tokenizer).encode())
    except DataError:
        return  # it went away, or is none any more: the corpus has a copy
    if given != known:
        problem = f"is no longer the tokenizer that made {plan.url}"
        remedy = "bring it back, or give another one another name"
        raise DataError("tokenizer.path", problem, recipe.tokenizer.path, remedy)


@dataclass
class Preprocessing:
    """One run of the stage. `ran` counts the tasks that were not done already."""

    plan: CorpusPlan
    fan_out: FanOut
    on_progress: OnProgress = lambda what, done, total: None
    ran: int = field(default=0, init=False)
    _is_new_tokenizer: bool = field(default=False, init=False)
    _used_all: bool = field(default=False, init=False)  # in this run, for what decides every unit's tokens

    @property
    def _placement(self) -> PreprocessPlacement:
        return self.plan.recipe.placement.preprocess

    def run(self) -> CorpusManifest:
        """Make what is missing; the manifest is written last."""
        recipe, plan, job = self.plan.recipe, self.plan, self.plan.job()
        units = plan.units()
        [tokenized] = job.receipts.all_finished(TOKENS)
        try:
            tokenizer = self._tokenizer(job, units, tokenizer_of(job, tokenized.values()))
            if recipe.corpus.dedup is not None:
                self._duplicates(job, units)
            receipts = self._tokens(job, tokenizer, units, tokenized)
        except DataError:
            if self.ran:  # what changed may be why, and tasks before this one have read it
                self._check_sources(job, units, tokenized)
            raise
        if self.ran:
            self._check_sources(job, units, tokenized)
        accounting = self._accounted(receipts)
        train = Split(shards=tuple(receipt.train for receipt in receipts if receipt.train.rows))
        heldout = Split(shards=tuple(receipt.heldout for receipt in receipts if receipt.heldout.rows))
        self._refuse_empty(train, heldout)
        plan.store.put(job.key(SUMMARY), accounting.model_dump_json(indent=1).encode())
        manifest = CorpusManifest(
            fingerprint=plan.fingerprint,
            source=recipe.corpus.model_dump(mode="json"),
            units=len(units),
            tokenizer=tokenizer.config,
            tokenizer_sha256=tokenizer.digest,
            tokenizer_engine=tokenizer.engine,
            vocab_size=tokenizer.vocab_size,
            packing=recipe.packing,
            seed=recipe.seed,
            process=recipe.noise.process,
            t_min=recipe.noise.t_min,
            block_length=recipe.noise.block_length,
            steps=recipe.noise.steps,
            accounting=accounting,
            train=train,
            heldout=heldout,
            noise_epochs=(),
        )
        noise = self._noise(job, manifest, tokenizer.mask_id)
        manifest = manifest.model_copy(update={"noise_epochs": noise})
        write_manifest(plan.store, manifest)
        return manifest

    def _tokenizer(self, job: CorpusJob, units: list[Unit], made_by: str | None) -> Tokenizer:
        """The recipe's tokenizer, or one trained on the corpus; it is kept beside the shards.

        made_by: sha256 of the one that made those that are there.
        """
        config, url = self.plan.recipe.tokenizer, self.plan.url
        key = job.key(TOKENIZER_NAME)
        if job.output.exists(key):
            data = job.output.read(key)
            problem = None if made_by in (None, sha256(data)) else "is not the tokenizer of the shards"
            with contextlib.suppress(UnicodeDecodeError):
                if problem is None:
                    return Tokenizer(data.decode(), config, key)
            problem, remedy = problem or "is not UTF-8", "run `dllm preprocess repair`"
            raise DataError(f"{url}/{TOKENIZER_NAME}", problem, remedy=remedy)
        if config.path is not None:
            tokenizer = Tokenizer.given(config)
        else:
            self.on_progress("training the tokenizer", 0, 0)
            train = partial(_train_tokenizer, job, units)
            [tokenizer] = self.fan_out(train, [config], workers=1, demand=self._placement.demand)
        if made_by not in (None, tokenizer.digest):
            problem = "was lost, and the one made in its place is not that of the shards"
            raise DataError(f"{url}/{TOKENIZER_NAME}", problem, remedy=f"delete {url} and run again")
        self._is_new_tokenizer = self._used_all = config.path is None and made_by is None
        job.output.put(key, tokenizer.json_text.encode())
        return tokenizer

    def _duplicates(self, job: CorpusJob, units: list[Unit]) -> None:
        """The first pass over all documents, and what follows from it."""
        done, decided = job.receipts.all_finished(SIGNATURES, DECISIONS)
        missing = [unit for unit in units if unit.index not in done]
        for receipt in self._tasks("signatures", partial(sign_unit, job), missing, units):
            done[receipt.shard.unit] = receipt
        if missing or any(unit.index not in decided for unit in units):
            self.on_progress("finding duplicates", 0, 0)
            self._used_all = True
            receipts = [done[unit.index] for unit in units]
            self.fan_out(partial(decide, job), [receipts], workers=1, demand=self._placement.demand)

    def _check_sources(self, job: CorpusJob, units: list[Unit], before: Container[int]) -> None:
        """Refuse files that were written to since they were listed: the corpus has its name from what they were then.
        What was made of them is taken back: of other files too, where a tokenizer or a search for duplicates read all.
        before: units that had their tokens when the run began.
        """
        now = find_files(self.plan.recipe.corpus, self.plan.store)
        listed = zip(self.plan.listed, now, strict=True)
        changed = [{item.key for item in set(then.files) - set(after.files)} for then, after in listed]
        if not any(changed):
            return
        if self._is_new_tokenizer:
            job.output.delete(job.key(TOKENIZER_NAME))
        for unit in units:
            is_changed = any(segment.key in changed[unit.source] for segment in unit.segments)
            if is_changed or (self._used_all and unit.index not in before):
                job.output.delete(job.key(TOKENS.key(unit.index)))
            if is_changed:
                job.output.delete(job.key(SIGNATURES.key(unit.index)))
        first, *others = sorted(key for keys in changed for key in keys)
        problem = "was changed while it was read" + (f", as were {len(others):,} others" if others else "")
        raise DataError("corpus.path", problem, first, "run it again when nobody writes there")

    def _tokens(
        self, job: CorpusJob, tokenizer: Tokenizer, units: list[Unit], tokenized: dict[int, UnitReceipt]
    ) -> list[UnitReceipt]:
        done = dict(tokenized)
        missing = [unit for unit in units if unit.index not in done]
        for receipt in self._tasks("tokens", partial(tokenize_unit, job, tokenizer), missing, units):
            done[receipt.unit] = receipt
        return [done[unit.index] for unit in units]

    def _noise(self, job: CorpusJob, manifest: CorpusManifest, mask_id: int) -> tuple[tuple[ShardInfo, ...], ...]:
        shards, epochs = manifest.train.shards, range(self.plan.recipe.noise.epochs)
        wanted = [
            _NoiseTask(shard, first_row, epoch)
            for epoch in epochs
            for shard, first_row in zip(shards, first_rows(shards), strict=True)
        ]
        done = job.receipts.all_finished(*map(noise_step, epochs))
        missing = [task for task in wanted if task.tokens.unit not in done[task.epoch]]
        draw = partial(_draw_noise, job, corpus_noise(manifest, mask_id))  # the manifest itself is large
        for task, made in zip(missing, self._tasks("noise", draw, missing, wanted), strict=True):
            done[task.epoch][task.tokens.unit] = made
        return tuple(tuple(done[epoch][shard.unit].shard for shard in shards) for epoch in epochs)

    def _tasks(self, what: str, function: Callable[[Any], Any], missing: list[Any], wanted: list[Any]) -> list[Any]:
        before, total = len(wanted) - len(missing), len(wanted)
        self.on_progress(what, before, total)
        if not missing:
            return []
        self.ran += len(missing)
        begun, num_bytes = time.monotonic(), self.plan.num_bytes * len(missing) / total
        tokens = 0

        def tell(done: int, receipt: Any) -> None:
            nonlocal tokens
            seconds = max(time.monotonic() - begun, 1e-3)
            tokens += sum(shard.tokens for shard in shards_of(receipt))
            rates = {"MB": num_bytes * done / len(missing), "Mtokens": tokens}
            told = "".join(f"  {value / seconds / 1e6:.1f} {unit}/s" for unit, value in rates.items() if value)
            left = seconds / done * (len(missing) - done)
            self.on_progress(f"{what}  {before + done:,}/{total:,}{told}  {left:.0f} s left", before + done, total)

        placement = self._placement
        return self.fan_out(function, missing, workers=placement.workers, on_done=tell, demand=placement.demand)

    def _accounted(self, receipts: list[UnitReceipt]) -> Accounting:
        total = Accounting()
        for receipt in receipts:
            receipt.accounting.check(f"unit {receipt.unit}")
            total = total + receipt.accounting
        total.check("corpus")
        self.plan.check_bad(total)
        return total

    def _refuse_empty(self, train: Split, heldout: Split) -> None:
        if not train.rows:
            path = getattr(self.plan.recipe.corpus, "path", "the mixture")
            raise DataError("corpus.path", "no text to train on", path)
        if heldout.rows < 2:
            fraction = self.plan.recipe.corpus.heldout_fraction
            remedy = "raise it, or cut documents finer: corpus.document=paragraph or line"
            raise DataError("corpus.heldout_fraction", "fewer than 2 held-out rows to evaluate on", fraction, remedy)


@dataclass(frozen=True)
class _NoiseTask:
    tokens: ShardInfo
    first_row: int
    epoch: int


def _draw_noise(job: CorpusJob, noise: CorpusNoise, task: _NoiseTask) -> FileReceipt:
    return noise_shard(job, noise, task.tokens, task.first_row, task.epoch)


def _train_tokenizer(job: CorpusJob, units: list[Unit], config: Any) -> Tokenizer:
    return Tokenizer.train(sample_texts(job, units, config.train_bytes), config)


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
        "tokenizer_engine": manifest.tokenizer_engine,
        "noise_epochs": len(manifest.noise_epochs),
    }
