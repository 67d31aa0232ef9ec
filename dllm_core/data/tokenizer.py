"""Tokenizer: text <-> ids, and the only source of mask, end, pad and turn-marker ids.

Text is encoded with special tokens disallowed: a literal `<|mask|>` in a document or a prompt is text.
Bulk encoding runs on `fastokens` where it proves identical on start, else on `tokenizers`; `engine` says which.
"""

import codecs
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import decoders, models, pre_tokenizers, trainers

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.errors import ConfigError, DataError, RequestError
from dllm_core.model.special_ids import with_token
from dllm_core.storage.store import open_store

_PROBES = (
    *("", " ", "\n", "\r\n\r\n \t\t x", "  leading and trailing  ", "word", "Word's don't WE'LL 're", "a1b22c333 4444"),
    *("caf\u00e9 cafe\u0301 \u00c5 \u212b", "\ufb01 \u2460 \u0130 \u017f \u00df", "\ufeff\u200b\u200d\u202e\u00ad\x00"),
    "\u65e5\u672c\u8a9e \ud55c\uae00 \u0e20\u0e32\u0e29\u0e32 \u0627\u0644\u0639\u0631",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff\ufffd\ufffe",
    *("x" * 3000, " " * 500 + "\n" * 200, "ab" * 700 + "\u00e9" * 300, "def f(x):\n\treturn {'a': [1, 2]}\n\n\n"),
    "<|endoftext|><s></s>[MASK]<mask><pad><|im_start|>user<unk>",
)  # fmt: skip

# A byte-level tokenizer spells each byte as one character: itself where it can be seen, else the next from U+0100 on.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _SEEN} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_SEEN}))
}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class ChatTemplate(Frozen):
    """The tokens that mark the turns of a conversation; `{role token} text {end token}` for every message."""

    system: str = "<|system|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    end: str = "<|end|>"

    @model_validator(mode="after")
    def _markers_differ(self) -> Self:
        if len({self.system, self.user, self.assistant, self.end}) < 4:
            raise FieldProblem("end", "the four markers must differ", self.end)
        return self


class TokenizerConfig(Frozen):
    """Section `tokenizer`: a `tokenizer.json` by path, or a byte-level BPE trained on the corpus."""

    path: str | None = None
    vocab_size: int = Field(512, ge=1, le=1 << 20, description="of a trained tokenizer, specials included")
    train_bytes: int = Field(32 << 20, ge=1 << 10, description="how much of the corpus trains it")
    mask_token: str = "<|mask|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"
    chat: ChatTemplate | None = Field(None, description="needed for conversations; {} takes the default markers")

    @model_validator(mode="after")
    def _mask_is_no_text(self) -> Self:
        if self.mask_token in {self.eos_token, self.pad_token}:
            raise FieldProblem("mask_token", "must differ from eos_token and pad_token", self.mask_token)
        for name, marker in ({} if self.chat is None else self.chat.model_dump()).items():
            if marker == self.mask_token:  # clean rows would hold masks
                raise FieldProblem(f"chat.{name}", "must differ from mask_token", marker)
        return self

    @model_validator(mode="after")
    def _every_byte_fits(self) -> Self:
        if self.path is None and self.vocab_size < self.smallest:
            problem = f"must be >= {self.smallest}: 256 bytes and the special tokens"
            raise FieldProblem("vocab_size", problem, self.vocab_size)
        return self

    @property
    def smallest(self) -> int:
        """The vocabulary of a trained tokenizer that merges nothing: a token a byte."""
        return 256 + len(self.special_tokens)

    @property
    def special_tokens(self) -> list[str]:
        """All tokens that no text may spell, each once."""
        markers = [] if self.chat is None else list(self.chat.model_dump().values())
        return list(dict.fromkeys([self.mask_token, self.eos_token, self.pad_token, *markers]))


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
        if getattr(self._core.model, "dropout", None):  # which leaves out merges at random, anew in every call
            self._core.model.dropout = None
        self.mask_id = self._special("mask_token", config.mask_token)
        self.eos_id = self._special("eos_token", config.eos_token)
        self.pad_id = self._special("pad_token", config.pad_token)
        chat = {} if config.chat is None else config.chat.model_dump()
        self._markers = {name: self._special(f"chat.{name}", token) for name, token in chat.items()}
        self.vocab_size: int = max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    def _special(self, field: str, token: str) -> int:
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
    def given(cls, config: TokenizerConfig) -> "Tokenizer":
        """The tokenizer that `tokenizer.path` names, a file or an object on S3, with the markers that it lacks."""
        return _shared(given_json(config), config, str(config.path))

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """Byte-level BPE: every byte string has a spelling, so no text is out of vocabulary."""
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=config.special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core.to_str(), config)

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, (self.json_text, self.config, self._place)

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's JSON: what a manifest and a bundle are bound to."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text encodes to."""
        return frozenset((self.mask_id, self.eos_id, self.pad_id, *self._markers.values()))

    def role_id(self, role: str) -> int:
        """The marker that opens a turn of `system`, `user` or `assistant`."""
        return self._marker(role)

    @property
    def end_of_turn_id(self) -> int:
        """The marker that closes every turn."""
        return self._marker("end")

    def _marker(self, name: str) -> int:
        if name not in self._markers:
            raise ConfigError("tokenizer.chat", "missing", remedy="conversations need it: tokenizer.chat={}")
        return self._markers[name]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no specials added or recognised."""
        try:
            return list(self._core.encode(text, add_special_tokens=False).ids)
        except TypeError:  # a lone surrogate
            raise DataError("text", "is not Unicode", text) from None

    def encode_behind(self, text: str) -> list[int]:
        """Ids of a text behind another, without the space that some tokenizers write before a text's first word."""
        if self._is_byte_level:
            return self.encode(text)
        ids = self.encode(f"\n{text}")[len(self.encode("\n")) :]
        return ids if self.decode_behind(ids) == text else self.encode(text)  # it may join what it begins with

    def encode_kept(self, text: str, place: str) -> list[int]:
        """Ids of a text between what is made, which an answer spells from them; RequestError where that is another."""
        ids = self.encode_behind(text)
        if self.decode_behind(ids) != text:
            problem = "the text between what is made is one that the model's tokenizer would change"
            raise RequestError(place, problem, text, "compose its characters (NFC)")
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of many texts end to end, uint32 [N], and where each begins and ends, int64 [len(texts) + 1].

        The bulk path: no Python object a token. Threads: FASTOKENS_BPE_THREADS, TOKENIZERS_PARALLELISM.
        """
        if self._fast is not None:
            ids, offsets = self._fast.encode_batch_flat(
                list(texts), add_special_tokens=False, split_special_tokens=True
            )
            return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)
        encoded = [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = [len(part) for part in encoded]
        flat = np.fromiter((token for part in encoded for token in part), np.uint32, sum(lengths))
        return flat, np.cumsum([0, *lengths], dtype=np.int64)

    @property
    def engine(self) -> str:
        """The library that encodes in bulk, with its version."""
        name = "tokenizers" if self._fast is None else "fastokens"
        return f"{name} {importlib.metadata.version(name)}"

    @cached_property
    def _fast(self) -> Any:
        """`fastokens` for this tokenizer, or None: not installed, not able to, or not identical on every probe."""
        try:
            import fastokens

            # Of ours and not of the file: it would cut texts where the file truncates, beyond the longest probe.
            fast = fastokens.Tokenizer.from_json_str(self._core.to_str())
            specials = self.config.special_tokens
            probes = [*_PROBES, *specials, " ".join(specials), "".join(f"a{token}b" for token in specials)]
            ids, offsets = fast.encode_batch_flat(probes, add_special_tokens=False, split_special_tokens=True)
        except Exception:  # noqa: BLE001 (whatever it is, the reference library takes over)
            return None
        flat, bounds = np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).tolist()
        found = [flat[start:stop].tolist() for start, stop in itertools.pairwise(bounds)]
        return fast if found == [self.encode(probe) for probe in probes] else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials are left out, an incomplete UTF-8 sequence shows as U+FFFD."""
        return str(self._core.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False))

    def decode_behind(self, ids: Sequence[int]) -> str:
        """`decode` of ids behind a text. Alone, those of some tokenizers lose the space before their first word."""
        if self._is_byte_level:
            return self.decode(ids)
        before, text = self._before
        return self.decode([*before, *ids])[len(text) :]

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        """A token of text, and how it looks alone."""
        ids = self.encode("a")[-1:]
        return ids, self.decode(ids)

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each id's text [V], 0 of specials. Of a byte-level tokenizer a text's ids add up to its bytes;
        of another kind to one more, where it writes a space before a text's first word.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        alphabet = set(_BYTE_OF) if self._is_byte_level else set()
        added = self._core.get_added_tokens_decoder()  # spelled as they are
        for piece, token in self._core.get_vocab(with_added_tokens=True).items():
            if token not in self.special_ids:
                is_in_bytes = alphabet.issuperset(piece) and token not in added  # one character stands for one byte
                lengths[token] = len(piece) if is_in_bytes else self._bytes_within_a_text(piece, token)
        return lengths

    def _bytes_within_a_text(self, piece: str, token: int) -> int:
        """Of a token that no bytes spell: alone it would lose the space before its word."""
        if self._has_bytes and _BYTE_TOKEN.fullmatch(piece):
            return 1
        return len(self.decode_behind([token]).encode())

    @cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self.json_text).get("decoder"))

    @property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in self._decoder

    @property
    def _has_bytes(self) -> bool:
        """Whether there are tokens of a byte each beside those of text."""
        return '"ByteFallback"' in self._decoder

    def token_bytes(self) -> list[bytes | None] | None:
        """UTF-8 bytes of each id's text [V], None of specials and added tokens; None for what is not byte-level."""
        return self._spelled

    @cached_property
    def _spelled(self) -> list[bytes | None] | None:
        if not self._is_byte_level:
            return None
        spelled: list[bytes | None] = [None] * self.vocab_size
        added = self._core.get_added_tokens_decoder()
        for piece, token in self._core.get_vocab(with_added_tokens=True).items():
            if token not in self.special_ids and token not in added and _BYTE_OF.keys() >= set(piece):
                spelled[token] = bytes(_BYTE_OF[character] for character in piece)
        return spelled

    def token_text(self, token: int) -> str:
        """How one token looks behind others: its text, or its name if it is special."""
        if token in self.special_ids:
            return str(self._core.id_to_token(token))
        return self.decode_behind([token])

    def bytes_of(self, token: int) -> bytes | None:
        """A token's own, which may be a part of a character; None of a special one, which no text has."""
        if token in self.special_ids:
            return None
        spelled = self._spelled or ()
        own = spelled[token] if token < len(spelled) else None  # a model may have ids that its tokenizer has not
        if own is None and self._has_bytes and _BYTE_TOKEN.fullmatch(name := str(self._core.id_to_token(token))):
            own = bytes([int(name[3:5], 16)])
        return self.token_text(token).encode() if own is None else own

    def token_texts(self, tokens: Sequence[int | None]) -> list[str]:
        """How tokens look beside each other, "" where there is none; a character of several stands at the last of them.

        So they add up to the text, where each by itself would show as U+FFFD.
        """
        texts: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in [*tokens, None]:
            spelled = None if token is None else self.bytes_of(token)
            if texts and not (spelled and 0x80 <= spelled[0] < 0xC0):
                texts[-1] += decoder.decode(b"", True)  # of a character that is not finished
            if spelled is None:
                texts.append("" if token is None else self.token_text(token))
            else:
                texts.append(decoder.decode(spelled))
        return texts[:-1]


def given_json(config: TokenizerConfig) -> str:
    """The JSON of the tokenizer that `tokenizer.path` names, with the markers that it lacks; not yet looked at."""
    path = str(config.path)
    try:
        if path.startswith("s3://"):
            root, _, name = path.rpartition("/")
            text = open_store("tokenizer.path", root).read(name).decode("utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
    except (DataError, OSError, UnicodeDecodeError) as error:
        raise DataError("tokenizer.path", f"cannot be read ({error})", path) from error
    return with_markers(text, config, path)


def with_markers(json_text: str, config: TokenizerConfig, place: str) -> str:
    """A tokenizer.json with those markers of turns that it lacks as special tokens, their ids behind its last."""
    if config.chat is None:
        return json_text
    try:
        core = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:
        raise DataError(place, f"not a tokenizer.json ({error})") from error
    last = max(core.get_vocab(with_added_tokens=True).values())
    for marker in config.chat.model_dump().values():
        if core.token_to_id(marker) is None:
            last += 1
            json_text = with_token(json_text, marker, last, place)
    return json_text


@lru_cache(maxsize=4)
def _shared(json_text: str, config: TokenizerConfig, place: str) -> Tokenizer:
    """One tokenizer a process, however many tasks bring it: reading 32k entries and the self-test cost 0.3 s."""
    return Tokenizer(json_text, config, place)
