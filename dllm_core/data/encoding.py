"""Documents -> token runs. A plain document is learned whole; of a conversation only what the assistant says.

A conversation is spelled `<|user|>` text `<|end|>` `<|assistant|>` text `<|end|>`: the markers are special tokens, so
no text can spell them. What is learned of a turn is its text and its end, which is what a decoder has to produce.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dllm_core.data.packing import Ids, PackingBase, Rows, TokenRun, joined, pack, repeated, too_long, with_end
from dllm_core.data.quarantine import Removed
from dllm_core.data.records import Document, Part
from dllm_core.data.shard import id_type
from dllm_core.data.tokenizer import Tokenizer

_CHARS_AT_ONCE = 1 << 22  # a call of the tokenizer costs nothing beside so many


class Encoder:
    """Documents as they come -> packed rows. Text is let go once it is encoded, so a unit of any number of documents
    takes the memory of its ids, two bytes each where they fit, and not that of its texts, eight times as much. What is
    taken many times is encoded once.

    kept: documents that made tokens; removed: the others, in order.
    """

    def __init__(self, tokenizer: Tokenizer, packing: PackingBase) -> None:
        self._tokenizer, self._packing = tokenizer, packing
        self._waiting: list[tuple[Document, int]] = []
        self._chars = 0
        self._runs: list[TokenRun] = []
        self.kept = 0
        self.removed: list[Removed] = []

    def add(self, document: Document, times: int = 1) -> None:
        """Take a document so many times."""
        self._waiting.append((document, times))
        self._chars += len(document.text)
        if self._chars >= _CHARS_AT_ONCE:
            self._encode()

    def rows(self) -> Rows:
        """All that was added, packed; the encoder is empty then."""
        self._encode()
        run = joined(self._runs, id_type(self._tokenizer.vocab_size))
        return pack(self._packing, run, self._tokenizer.eos_id)

    def _encode(self) -> None:
        waiting, self._waiting, self._chars = self._waiting, [], 0
        taken = [document for document, times in waiting if times]
        run = with_end(encode_documents(self._tokenizer, taken), self._tokenizer.eos_id)
        left_out = {id(taken[index]) for index in too_long(self._packing, run).tolist()}
        for document, times in waiting:
            if times and id(document) not in left_out:
                self.kept += 1
            else:
                self.removed.append(Removed(document, "filtered", "packing.too_long" if times else "weight"))
        ids = run.ids.astype(id_type(self._tokenizer.vocab_size))
        once = TokenRun(ids, run.offsets, run.is_learned)
        self._runs.append(repeated(once, [times for _, times in waiting if times]))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> TokenRun:
    """Token run of documents, in order; a preference is two of the run. End tokens are added when it is packed."""
    if not any(document.parts for document in documents):
        ids, offsets = tokenizer.encode_flat([document.text for document in documents])
        return TokenRun(ids, offsets)
    spelled = [_spelled(tokenizer, parts, d.text) for d in documents for parts in d.runs]
    texts = [piece for pieces in spelled for piece, _ in pieces if isinstance(piece, str)]
    ids, offsets = tokenizer.encode_flat(texts)
    run_ids: list[Ids] = []
    learned: list[NDArray[np.bool_]] = []
    lengths, text = [], 0
    for pieces in spelled:
        length = 0
        for piece, is_learned in pieces:
            if isinstance(piece, str):
                part = ids[offsets[text] : offsets[text + 1]]
                text += 1
            else:
                part = np.array([piece], dtype=np.uint32)
            run_ids.append(part)
            learned.append(np.full(len(part), is_learned))
            length += len(part)
        lengths.append(length)
    return TokenRun(
        np.concatenate([*run_ids, np.empty(0, np.uint32)]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([*learned, np.empty(0, bool)]),
    )


def _spelled(tokenizer: Tokenizer, parts: Sequence[Part], text: str) -> list[tuple[str | int, bool]]:
    """(text or marker id, whether it is learned); of no parts all of the text."""
    if not parts:
        return [(text, True)]
    pieces: list[tuple[str | int, bool]] = []
    for part in parts:
        if part.role is None:
            pieces.append((part.text, part.is_learned))
        else:
            pieces.append((tokenizer.role_id(part.role), False))
            pieces.append((part.text, part.is_learned))
            pieces.append((tokenizer.end_of_turn_id, part.is_learned))
    return pieces
