"""Tokenizer: text <-> ids, and the only source of mask, end and pad ids.

Text is encoded with special tokens disallowed: a literal `<|mask|>` in a document or a prompt is text.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from pydantic import Field, model_validator
from tokenizers import decoders, models, pre_tokenizers, trainers

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.errors import ConfigError, DataError


class TokenizerConfig(Frozen):
    """Section `tokenizer`: a `tokenizer.json` by path, or a byte-level BPE trained on the corpus."""

    path: str | None = None
    vocab_size: int = Field(512, ge=260, le=1 << 20, description="of a trained tokenizer, specials included")
    train_bytes: int = Field(32 << 20, ge=1 << 10, description="how much of the corpus trains it")
    mask_token: str = "<|mask|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"

    @model_validator(mode="after")
    def _mask_is_no_text(self) -> Self:
        if self.mask_token in {self.eos_token, self.pad_token}:
            raise FieldProblem("mask_token", "must differ from eos_token and pad_token", self.mask_token)
        return self


class Tokenizer:
    """A byte-level tokenizer with its special ids. Pickles as its JSON."""

    def __init__(self, json_text: str, config: TokenizerConfig, place: str = "tokenizer.path") -> None:
        self.json_text, self.config, self._place = json_text, config, place
        try:
            self._core = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:
            raise DataError(place, f"not a tokenizer.json ({error})") from error
        self._core.encode_special_tokens = True
        self._core.no_padding()
        self._core.no_truncation()
        self.mask_id = self._special("mask_token")
        self.eos_id = self._special("eos_token")
        self.pad_id = self._special("pad_token")
        self.vocab_size: int = max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    def _special(self, field: str) -> int:
        token = getattr(self.config, field)
        found = self._core.token_to_id(token)
        if found is None:
            raise ConfigError(f"tokenizer.{field}", "not in the tokenizer", token, f"see {self._place}")
        if found in self.encode(token):
            raise ConfigError(
                f"tokenizer.{field}", "is no special token: text can spell it", token, f"see {self._place}"
            )
        return int(found)

    @classmethod
    def from_file(cls, path: Path, config: TokenizerConfig) -> "Tokenizer":
        """Read a `tokenizer.json`."""
        try:
            return cls(path.read_text(encoding="utf-8"), config, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("tokenizer.path", f"cannot be read ({error})", str(path)) from error

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """Byte-level BPE: every byte string has a spelling, so no text is out of vocabulary."""
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[config.mask_token, config.eos_token, config.pad_token],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core.to_str(), config)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.json_text, self.config, self._place)

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's JSON: what a manifest and a bundle are bound to."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to."""
        return frozenset((self.mask_id, self.eos_id, self.pad_id))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no specials added or recognised."""
        try:
            return list(self._core.encode(text, add_special_tokens=False).ids)
        except TypeError:  # a lone surrogate
            raise DataError("text", "is not Unicode", text) from None

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """`encode` for many texts at once (all cores, unless TOKENIZERS_PARALLELISM=false)."""
        for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials are left out, an incomplete UTF-8 sequence shows as U+FFFD."""
        return str(self._core.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """How one token looks: its text, or its name if it is special."""
        if token in self.special_ids:
            return str(self._core.id_to_token(token))
        return str(self._core.decode([token], skip_special_tokens=False))
