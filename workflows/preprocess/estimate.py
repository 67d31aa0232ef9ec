"""What a corpus will be, told from a little of each of its sources: its tokens, its rows, and how long that takes.

Of a source some units are read, evenly spread: a piece of a unit of lines, else all of it unless it is very long. What
text a byte of input gives there, all of the source's bytes are taken to give.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from dllm_core.data.build import CorpusJob, documents, first_reason_to_drop, spread
from dllm_core.data.corpus import HubSource, ParquetSource, SourceBase, TextSource
from dllm_core.data.packing import PaddedPacking, PairsPacking
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.data.units import COMPRESSED, Unit
from dllm_core.errors import DataError
from dllm_core.storage.store import Store
from workflows.recipe import Recipe

_ENCODED_BYTES = 1 << 20  # of all sources together
_UNITS = 4  # of a source
_PIECE_BYTES = 1 << 17
_LONG = 1 << 24  # bytes of text after which a unit is read no further
_START_S = 3


@dataclass(frozen=True)
class Estimate:
    """tokens, rows, seconds: None where a hub does not tell how much it has.

    unit_bytes: the largest unit's input, or its text where that is more: a compressed file is one unit.
    """

    engine: str
    unit_bytes: int
    tokens: int | None
    rows: int | None
    seconds: float | None


def estimate(recipe: Recipe, job: CorpusJob, units: Sequence[Unit]) -> Estimate:
    """A given tokenizer encodes the sample; for one that is yet to be trained, one of at most 4,096 ids stands."""
    sources = recipe.corpus.all_sources
    samples = [
        _sampled(job, source, [unit for unit in units if unit.source == index], _ENCODED_BYTES // len(sources))
        for index, source in enumerate(sources)
    ]
    begun = time.perf_counter()
    texts = [text for sample in samples for text in sample.texts]
    if not texts:
        why = first_reason_to_drop(job, units[0]) if units else None
        problem = "no text in its first units" + (f": {why}" if why else "")
        raise DataError("corpus.path", problem, getattr(recipe.corpus, "path", "the mixture"))
    tokenizer = _tokenizer(recipe.tokenizer, texts)
    trained = time.perf_counter()
    num_tokens = [len(tokenizer.encode_flat(sample.texts)[0]) for sample in samples]
    encoded = sum(sample.encoded for sample in samples)
    seconds_a_byte = max(time.perf_counter() - trained, 1e-6) / encoded
    if any(isinstance(source, HubSource) for source in sources):
        return Estimate(tokenizer.engine, recipe.corpus.unit_bytes, None, None, None)
    sizes = [unit.num_bytes * max(1.0, samples[unit.source].text_a_byte) for unit in units]
    tokens = count = text = 0.0
    for source, sample, of_texts in zip(sources, samples, num_tokens, strict=True):
        heldout = recipe.corpus.heldout_fraction
        times = (heldout + (1 - heldout) * source.weight) * sample.share
        count += times * sample.documents
        text += times * sample.text
        tokens += times * (sample.text * of_texts / max(1, sample.encoded) + sample.documents)  # and an end token each
    is_row = isinstance(recipe.packing, PaddedPacking | PairsPacking)
    rows = round(count) if is_row else -(-round(tokens) // recipe.packing.seq_len)
    # Reading, packing, hashing and writing cost about as much as encoding (tests/benchmarks/preprocess.py). No unit is
    # shared by two workers, so it ends with the largest.
    at_once = min(recipe.placement.preprocess.workers, sum(sizes) / max(1.0, *sizes))
    seconds = 2 * text * seconds_a_byte / max(1.0, at_once) + trained - begun + _START_S
    return Estimate(tokenizer.engine, round(max(sizes)), round(tokens), rows, round(seconds, 1))


def _tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """The given one, or one trained on the sample: also where it is gone, and the corpus alone has a copy."""
    if config.path is not None:
        with contextlib.suppress(DataError):
            return Tokenizer.given(config)
    smaller = {"vocab_size": min(config.vocab_size, 4096), "path": None}
    return Tokenizer.train(texts, config.model_copy(update=smaller))


@dataclass
class _Sample:
    """What was read of a source. encoded: bytes of `texts`; share: how many times as much input there is.

    text_a_byte: bytes of text that one of input gives.
    """

    texts: list[str] = field(default_factory=list)
    encoded: int = 0
    text: int = 0
    documents: int = 0
    share: float = 1.0
    text_a_byte: float = 1.0


def _sampled(job: CorpusJob, source: SourceBase, units: Sequence[Unit], at_most: int) -> _Sample:
    found, num_bytes = _Sample(), 0
    chosen = spread(len(units))[:_UNITS]
    for turn, number in enumerate(chosen, 1):
        piece = _piece(source, units[number])
        counted = _Counted(job.stores[piece.source])
        stores = [cast(Store, counted) if index == piece.source else store for index, store in enumerate(job.stores)]
        enough = found.text + _LONG
        for document in documents(replace(job, stores=tuple(stores)), piece):
            found.documents += 1
            for text in document.pieces:
                size = len(text.encode())
                found.text += size
                if found.encoded < at_most * turn // len(chosen):
                    found.texts.append(text)
                    found.encoded += size
            if found.text >= enough and not isinstance(source, ParquetSource):
                num_bytes += min(piece.num_bytes, counted.num_read)
                break
        else:
            num_bytes += piece.num_bytes
    found.share = sum(unit.num_bytes for unit in units) / max(1, num_bytes)
    found.text_a_byte = found.text / max(1, num_bytes)
    return found


def _piece(source: SourceBase, unit: Unit) -> Unit:
    """As much of a unit as is read: the records that start in the first bytes of one that can be cut anywhere."""
    first = unit.segments[0]
    is_whole = isinstance(source, TextSource) and source.document == "file"
    if first.first_rows or first.key.endswith(COMPRESSED) or is_whole or isinstance(source, HubSource):
        return unit
    stop = min(first.stop, first.start + _PIECE_BYTES)
    return unit.model_copy(
        update={"segments": (first.model_copy(update={"stop": stop}),), "num_bytes": stop - first.start}
    )


class _Counted:
    """A store that counts what is read of it."""

    def __init__(self, store: Store) -> None:
        self._store, self.num_read = store, 0

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self._store.read(key, start, stop)
        self.num_read += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
