"""Scorers: what a model that did not write a text thinks of it, in nats a token. An n-gram model or autoregression.

A generative perplexity means nothing without its scorer, so each says what it is (`name`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.data.loader import evenly, split_rows
from dllm_core.data.manifest import CorpusManifest
from dllm_core.errors import CheckpointError
from dllm_core.model.pattern import CAUSAL
from dllm_core.model.visibility import offsets
from dllm_core.objective.autoregressive import shifted
from dllm_core.objective.config import AutoregressiveConfig
from dllm_core.objective.loss import DenoiserLike
from dllm_core.objective.vocabulary import nll
from dllm_core.seeding import Bools, Doubles, Ints
from dllm_core.storage.store import Store


class Scorer(Protocol):
    """An exact law over token sequences: the nats of a row's tokens add up to -log of its probability."""

    @property
    def name(self) -> str:
        """Which law this is, and what it learned from."""

    def nats(self, x0: Ints, is_real: Bools) -> Doubles:
        """-log p(token | tokens before it in its row) [N L] of x0 [N L], 0 where not real (behind a row's end)."""


@dataclass(frozen=True)
class _Grams:
    """The grams of one length k, sorted: keys int64 [G] = (id of the first k - 1 tokens) V + last token; counts [G].

    For each gram of k - 1 tokens: how often (total) and by how many different tokens (types) it was followed.
    """

    keys: Ints
    counts: Ints
    total: Ints
    types: Ints

    def ids(self, keys: Ints) -> Ints:
        """The place of each key [n], -1 for one never seen."""
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)


@dataclass(frozen=True)
class NGramModel:
    """Interpolated Witten-Bell: p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)), h' = h without its first token.

    T(h) is how many different tokens followed h; below the unigrams stands the uniform law over `num_text` ids. Bell,
    Cleary and Witten, "Text Compression", 1990; Chen and Goodman, arXiv:cmp-lg/9606011. A context does not
    reach over a row's (or a document's) begin, where it is shorter.
    """

    vocab_size: int
    never: tuple[int, ...]
    levels: tuple[_Grams, ...]
    name: str

    @classmethod
    def fit(
        cls,
        x0: Ints,
        is_real: Bools,
        *,
        order: int,
        vocab_size: int,
        never: Collection[int],
        segment_ids: NDArray[np.int32] | None = None,
    ) -> Self:
        """Count rows [N L] of the training split. never: ids that no text holds (the mask). About 40 bytes a token."""
        tokens, depth = _flat(x0, is_real, segment_ids)
        ids = np.zeros(len(tokens) + 1, np.int64)  # of the gram that ends before a position; of none: 0
        levels: list[_Grams] = []
        num_contexts = 1
        for length in range(1, order + 1):
            fits = depth >= length - 1
            if not fits.any():
                break
            keys, place, counts = np.unique(
                ids[:-1][fits] * vocab_size + tokens[fits], return_inverse=True, return_counts=True
            )
            context = keys // vocab_size
            total = np.bincount(context, counts, num_contexts).astype(np.int64)
            levels.append(_Grams(keys, counts, total, np.bincount(context, minlength=num_contexts)))
            ids = np.full(len(tokens) + 1, -1)
            ids[1:][fits] = place
            num_contexts = len(keys)
        name = f"interpolated Witten-Bell {order}-gram of {int((depth >= 0).sum())} tokens"
        return cls(vocab_size, tuple(sorted(set(never))), tuple(levels), name)

    @classmethod
    def of_corpus(cls, store: Store, corpus: CorpusManifest, *, rows: int, order: int, never: Collection[int]) -> Self:
        """Of at most so many training rows, evenly spaced: the first ones of a mixture are of one source."""
        found = split_rows(store, corpus, corpus.train, evenly(np.arange(corpus.train.rows), rows))
        of, segment_ids = (found.x0, found.is_real), found.segment_ids
        return cls.fit(*of, order=order, vocab_size=corpus.vocab_size, never=never, segment_ids=segment_ids)

    def nats(self, x0: Ints, is_real: Bools) -> Doubles:
        """[N L] -> [N L]; infinite for an id that no text holds."""
        tokens, depth = _flat(x0, is_real, None)
        is_text = ~np.isin(tokens, self.never)
        law = is_text / (self.vocab_size - len(self.never))
        ids = np.zeros(len(tokens) + 1, np.int64)
        for length, grams in enumerate(self.levels, 1):
            known = (depth >= length - 1) & (ids[:-1] >= 0)
            context = ids[:-1][known]
            found = grams.ids(context * self.vocab_size + tokens[known])
            count = np.where(found >= 0, grams.counts[found], 0)
            total, types = grams.total[context], grams.types[context]
            lower = law[known]
            law[known] = np.where(total > 0, (count + types * lower) / np.maximum(total + types, 1), lower)
            ids = np.full(len(tokens) + 1, -1)
            ids[1:][known] = found
        with np.errstate(divide="ignore"):
            return np.where(is_real, -np.log(law).reshape(x0.shape), 0.0)


def _flat(x0: Ints, is_real: Bools, segment_ids: NDArray[np.int32] | None) -> tuple[Ints, Ints]:
    """Tokens [N L] end to end, and how many of its document stand before each in its row; -1: no token."""
    document = np.where(is_real, 0 if segment_ids is None else segment_ids, -1)
    depth = offsets([torch.from_numpy(document)], x0.shape[1], torch.device("cpu")).numpy()
    return x0.ravel(), np.where(is_real, depth, -1).ravel()


def check_scorer(bundle: ModelBundle, tokenizer_digest: str, context: int) -> None:
    """Refuse a bundle that is not autoregressive, has another tokenizer than `tokenizer_digest`, that of the texts, or
    was trained on shorter rows than their `context`: behind its own it would answer, and mean nothing.

    Raises CheckpointError.
    """
    place, objective = str(bundle.folder), bundle.manifest.objective
    if not isinstance(objective, AutoregressiveConfig):
        raise CheckpointError(place, "is no autoregressive model", objective.type, "a scorer needs exact nats")
    if bundle.tokenizer().digest != tokenizer_digest:
        raise CheckpointError(place, "has another tokenizer", remedy="train the scorer on the same corpus")
    if bundle.config.context_length < context:
        problem = f"reads fewer tokens than the {context} of the rows to be scored"
        raise CheckpointError(place, problem, bundle.config.context_length, "train the scorer on rows as long")


class AutoregressiveScorer:
    """The exact likelihood of an autoregressive denoiser, a row's first token included."""

    def __init__(
        self, denoiser: DenoiserLike, mask_id: int, device: torch.device, *, name: str, batch_rows: int = 32
    ) -> None:
        self._denoiser, self._mask_id, self._device = denoiser, mask_id, device
        self._batch_rows, self.name = batch_rows, name

    @classmethod
    def of(cls, bundle: ModelBundle, tokenizer_digest: str, context: int, device: str = "cpu") -> Self:
        """The scorer in a bundle, for texts that `check_scorer` lets pass. Raises as that does."""
        check_scorer(bundle, tokenizer_digest, context)
        denoiser, lineage = bundle.denoiser(device), bundle.manifest.lineage
        name = f"autoregressive {lineage.run}, step {lineage.step}"
        return cls(denoiser, denoiser.config.mask_id, torch.device(device), name=name)

    @torch.inference_mode()
    def nats(self, x0: Ints, is_real: Bools) -> Doubles:
        """[N L] -> [N L]; what is not real stands behind a row's end, where no real token sees it."""
        nats = np.zeros(x0.shape)
        for rows in self._batches(len(x0)):
            clean, read = (torch.from_numpy(part[rows]).to(self._device) for part in (x0, is_real))
            if read.any():
                logits = self._denoiser(shifted(clean, None, self._mask_id), read=read, pattern=CAUSAL)
                nats[rows][is_real[rows]] = nll(logits, clean[read], self._mask_id).double().cpu().numpy()
        return nats

    def _batches(self, rows: int) -> Iterable[slice]:
        return (slice(start, start + self._batch_rows) for start in range(0, rows, self._batch_rows))
