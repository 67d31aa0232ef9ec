"""Choice: one row of an answer while it is decoded: its text so far, what it was sure of, what it has cost."""

import codecs
import math
import time
from typing import Any

from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.request import holes_of
from dllm_core.decoding.text import Decodes, TextStream
from workflows.serve.dialect.rows import Row
from workflows.serve.progress import OPEN, Commit, Progress

PLACEHOLDER = "\u2591"  # a light shade: an open position in a frame's text


class _Places:
    """Where in a text its tokens begin, in characters from `begin` on: one place for all that share a character.

    is_behind: whether something stands before the first. If not, that may lose its space.
    """

    def __init__(self, tokenizer: Tokenizer, begin: int, *, is_behind: bool) -> None:
        self._tokenizer, self._begin, self._at = tokenizer, begin, begin
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_behind = is_behind

    def of(self, token: int) -> int:
        """Of the next token."""
        spelled = self._tokenizer.bytes_of(token)
        if spelled and not 0x80 <= spelled[0] < 0xC0:  # ends the character before, finished or not
            self._at += len(self._decoder.decode(b"", True))
        return max(self._begin, self._at)

    def go_on(self, token: int) -> None:
        """The one behind it is next."""
        spelled = self._tokenizer.bytes_of(token)
        if spelled and not self._is_behind:
            self._at -= len(self._tokenizer.token_text(token)) - len(self._tokenizer.decode([token]))
            self._is_behind = True
        self._at += len(self._decoder.decode(spelled or b""))


class _Behind:
    """Decodes what stands behind a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.decode_behind


class Choice:
    """Takes a row's progress; from a second try it takes only what the first did not tell."""

    def __init__(self, index: int, row: Row, tokenizer: Tokenizer, begun: float, wanted_logprobs: int | None) -> None:
        self.index, self.row, self.begun = index, row, begun
        self.first: float | None = None
        self.gap: float | None = None  # seconds between the last two times that there was something new
        self._told_at: float | None = None
        self.progress: Progress | None = None
        self.finish_reason: str | None = None
        self._tokenizer, self._wants_logprobs = tokenizer, wanted_logprobs is not None
        is_behind = bool(row.request.prompt) and row.end_id is None  # a turn is a text of its own
        self._beginning: Decodes = _Behind(tokenizer) if is_behind else tokenizer
        self._text = TextStream(self._beginning, row.request.stop)
        self._commits: dict[int, Commit] = {}
        self._tokens: list[int] = []
        self._entries_told, self._places = 0, _Places(tokenizer, len(row.head), is_behind=is_behind)
        self._is_head_told = False
        self._shown: dict[int, tuple[int, str | None, bool]] = {}  # what frames showed; at the end whether it was final

    def begin(self) -> None:
        """A try begins."""
        self._commits = {}

    def take(self, progress: Progress) -> str:
        """New text of this choice."""
        self.progress, now = progress, time.monotonic()
        self.gap, self._told_at = None if self._told_at is None else now - self._told_at, now
        for commit in progress.commits:
            self._commits[commit.position] = commit
        if progress.num_committed and self.first is None:
            self.first = now - progress.first_ago_s - self.begun  # what is told at its end alone had it long ago
        tokens, is_ended = progress.tokens, progress.finish_reason is not None
        if self.row.end_id is not None and self.row.end_id in tokens:
            tokens, is_ended = tokens[: tokens.index(self.row.end_id)], True
            self.finish_reason = "stop"
        self._tokens = tokens
        new = self._text.push(tokens, last=is_ended)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is None:
            self.finish_reason = progress.finish_reason
        return new

    @property
    def num_calls(self) -> int:
        """Denoiser calls so far."""
        return self.progress.num_calls if self.progress is not None else 0

    @property
    def whole_text(self) -> str:
        """With what stands around the answer."""
        return self.row.head + self._text.text + self.row.tail

    @property
    def holes(self) -> list[str]:
        """What was put into each hole of an infill; neighbours are told apart by their lengths."""
        first, *others = holes_of(self.row.request, self._tokens, self.row.holes)
        return [self._beginning.decode(first), *map(self._tokenizer.decode_behind, others)]

    def new_entries(self) -> tuple[list[dict[str, Any]], list[int]] | None:
        """Log-probabilities of tokens that were not told yet, and where in the text each begins; None if nobody asked.

        Those of an echoed prompt, which have none, come first. Told are tokens that begin within the text that is, so
        that none behind a stop string is; behind all of it there may be some without text.
        """
        if not self._wants_logprobs:
            return None
        entries, offsets = list[dict[str, Any]](), list[int]()
        if self.row.is_echoed and not self._is_head_told:
            places = _Places(self._tokenizer, 0, is_behind=False)
            for token in self.row.request.prompt:
                entries.append({**self._entry(token, None), "top_logprobs": None})
                offsets.append(places.of(token))
                places.go_on(token)
        self._is_head_told = True
        stop = len(self.row.head) + len(self._text.text)
        is_whole = self.finish_reason is not None and not self._text.stopped
        for position in range(self._entries_told, len(self._tokens)):
            token, commit = self._tokens[position], self._commits.get(position)
            place = self._places.of(token)
            if commit is None or commit.token != token or (place >= stop and not is_whole):
                break
            best = [self._entry(token, log_prob) for token, log_prob in commit.best]
            entries.append({**self._entry(token, commit.log_prob), "top_logprobs": best})
            offsets.append(place)
            self._places.go_on(token)
            self._entries_told += 1
        return entries, offsets

    def _entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        spelled = self._tokenizer.bytes_of(token)
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": log_prob, "bytes": None if spelled is None else list(spelled)}

    def progress_made(self, is_ended: bool) -> float:
        """The share of the canvas that no longer changes."""
        if is_ended:
            return 1.0
        return round(min(1.0, len(self._commits) / max(1, self.row.request.num_asked)), 4)

    def provisional_text(self) -> str:
        """All of the text as it stands, a placeholder where nothing does."""
        canvas = (self.progress.canvas if self.progress is not None else None) or []
        parts, run, decodes = [self.row.head], list[int](), self._beginning
        for token in canvas:
            if token != OPEN:
                run.append(token)
                continue
            parts += [decodes.decode(run), PLACEHOLDER]
            run, decodes = [], _Behind(self._tokenizer)
        return "".join([*parts, decodes.decode(run), self.row.tail])

    def changes(self) -> list[list[Any]]:
        """[position, text, confidence] of what changed on the canvas since it was last told.

        text null: open again; confidence null: given, or not final yet. Positions count from the first behind the head.
        A character that several tokens spell is the text of the last of them, once all are there.
        """
        canvas = (self.progress.canvas if self.progress is not None else None) or []
        texts = self._tokenizer.token_texts([None if token == OPEN else token for token in canvas])
        changed: list[list[Any]] = []
        for position, (token, spelled) in enumerate(zip(canvas, texts, strict=True)):
            commit = self._commits.get(position)
            text = None if token == OPEN else "" if token in self._tokenizer.special_ids else spelled
            now = (token, text, commit is not None)
            if self._shown.get(position) == now:
                continue
            self._shown[position] = now
            sure = None if commit is None else round(math.exp(commit.log_prob), 4)
            changed.append([position, text, sure])
        for position in [at for at in self._shown if at >= len(canvas)]:  # closed behind an end
            del self._shown[position]
            changed.append([position, "", None])
        return changed
