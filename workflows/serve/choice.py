"""Choice: one row of an answer while it is decoded: its text so far, what it was sure of, what it has cost."""

import math
import time
from typing import Any

from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.request import holes_of
from dllm_core.decoding.text import TextStream
from workflows.serve.dialect.rows import Row
from workflows.serve.progress import OPEN, Commit, Progress

PLACEHOLDER = "\u2591"  # a light shade: an open position in a frame's text


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
        self._text = TextStream(tokenizer, row.request.stop)
        self._commits: dict[int, Commit] = {}
        self._tokens: list[int] = []
        self._entries_told, self._entries_offset = 0, len(row.head)
        self._shown: dict[int, tuple[int, bool]] = {}  # what frames showed: token and whether it was final

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
            self.first = now - self.begun
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
        """What was put into each hole of an infill."""
        return [self._tokenizer.decode(tokens) for tokens in holes_of(self.row.request, self._tokens)]

    def new_entries(self) -> tuple[list[dict[str, Any]], int] | None:
        """Log-probabilities of the answer's tokens that were not told yet, and where in the text the first begins.

        None where nobody asked.
        """
        if not self._wants_logprobs:
            return None
        entries, offset = [], self._entries_offset
        for position in range(self._entries_told, len(self._tokens)):
            commit = self._commits.get(position)
            if commit is None or commit.token != self._tokens[position]:
                break
            best = [self._entry(token, log_prob) for token, log_prob in commit.best]
            entries.append({**self._entry(commit.token, commit.log_prob), "top_logprobs": best})
        self._entries_told += len(entries)
        self._entries_offset += sum(len(entry["token"]) for entry in entries)
        return entries, offset

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

    def progress_made(self, is_ended: bool) -> float:
        """The share of the canvas that no longer changes."""
        if is_ended:
            return 1.0
        return round(min(1.0, len(self._commits) / max(1, self.row.request.num_asked)), 4)

    def provisional_text(self) -> str:
        """All of the text as it stands, a placeholder where nothing does."""
        canvas = (self.progress.canvas if self.progress is not None else None) or []
        parts, run = [self.row.head], list[int]()
        for token in canvas:
            if token != OPEN:
                run.append(token)
                continue
            parts += [self._tokenizer.decode(run), PLACEHOLDER]
            run = []
        return "".join([*parts, self._tokenizer.decode(run), self.row.tail])

    def changes(self) -> list[list[Any]]:
        """[position, text, confidence] of what changed on the canvas since it was last told.

        text null: open again; confidence null: given, or not final yet. Positions count from the first behind the head.
        """
        canvas = (self.progress.canvas if self.progress is not None else None) or []
        changed: list[list[Any]] = []
        for position, token in enumerate(canvas):
            commit = self._commits.get(position)
            now = (token, commit is not None)
            if self._shown.get(position) == now:
                continue
            self._shown[position] = now
            text = None if token == OPEN else self._tokenizer.decode([token])
            sure = None if commit is None else round(math.exp(commit.log_prob), 4)
            changed.append([position, text, sure])
        for position in [at for at in self._shown if at >= len(canvas)]:  # closed behind an end
            del self._shown[position]
            changed.append([position, "", None])
        return changed
