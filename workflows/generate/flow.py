"""The generate verb: complete, infill or edit in this process, one canvas denoising live, or a file of prompts at once.

dllm generate RUN --prompt "GREEK SMALL LETTER " decode.policy.threshold=0.7
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.lengths import Filled, infill
from dllm_core.decoding.request import Request, holes_of, runs
from dllm_core.errors import DataError, DllmError
from workflows.console import Console
from workflows.generate.asked import Asked
from workflows.generate.trace import Commit, Decoded, check_writable, decode, replay, write_traces
from workflows.generate.unfold import Frame, unfold
from workflows.recipe import Recipe

_FRAME_S = 0.08  # slow enough to see; only on a terminal


class Generator:
    """A run's bundle, ready to decode."""

    def __init__(self, recipe: Recipe, run: RunDir, console: Console) -> None:
        recipe.check_decodable()
        import torch

        torch.set_num_threads(1)
        self._recipe, self._run, self._console = recipe, run, console
        self._bundle = read_bundle(run)
        self._tokenizer = self._bundle.tokenizer()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._engine = Engine(self._bundle, device, recipe.serve.max_batch_tokens, dtype=recipe.serve.dtype)

    def one(self, asked: Asked, trace: Path | None) -> dict[str, Any]:
        """Decode one thing, watched on a terminal; its text and ids, cost, finish reason and what each call did."""
        begun = time.monotonic()
        if trace is not None:
            check_writable(trace)
        request, found = self._request(asked)
        decoded = self._watched(request)
        self._check(decoded)
        self._write(trace, [decoded])
        if self._console.output == "text":
            self._show(decoded)
            if found is not None:
                lengths = ", ".join(map(str, found.lengths))
                self._console.print(f"[dim]{found.num_rows} canvases tried; holes of {lengths} suit best[/dim]")
        return {"run": self._run.name, **self._told(asked, decoded, found, time.monotonic() - begun)}

    def many(self, asked: Mapping[str, Asked], trace: Path | None) -> dict[str, Any]:
        """Decode all as one batch, in which rows come and go; a line for each in order, then the sums.

        asked: by the places that an error names. Of rows that fail the first is told of, behind what the others gave.
        """
        begun = time.monotonic()
        if trace is not None:
            check_writable(trace)
        requests = {place: self._request(one, place) for place, one in asked.items()}
        decoded: list[Decoded] = []
        rows = decode(self._engine, {place: request for place, (request, _) in requests.items()})
        for one, (_, found), made in zip(asked.values(), requests.values(), rows, strict=True):
            decoded.append(made)
            if self._console.output == "text":
                self._console.rich.print(self._shown(made))
            else:
                self._console.result(self._told(one, made, found, None))
        seconds = time.monotonic() - begun
        self._write(trace, [made for made in decoded if made.answer.finish_reason != "error"])
        for place, made in zip(asked, decoded, strict=True):
            self._check(made, place)
        tokens, calls = (sum(getattr(d.answer, name) for d in decoded) for name in ("num_committed", "num_calls"))
        self._console.print(
            f"[dim]{len(decoded)} answers, {tokens} tokens in {calls} denoiser calls: {tokens / calls:.2f} tokens per "
            f"call, {tokens / seconds:.0f} tokens/s[/dim]"
        )
        return {
            "run": self._run.name,
            "num_answers": len(decoded),
            "num_tokens": tokens,
            "num_calls": calls,
            "num_positions": sum(made.answer.num_positions for made in decoded),
            "tokens_per_call": round(tokens / calls, 4),
            "seconds": round(seconds, 3),
        }

    def replayed(self, path: Path) -> dict[str, Any]:
        """Make again what a trace file holds; DataError where a call commits anything else."""
        told = replay(path, self._engine, self._bundle)
        self._console.print(
            f"{told['traces']} requests made again, every token in the same one of {told['calls']} denoiser calls"
        )
        return {"run": self._run.name, **told}

    def _request(self, asked: Asked, place: str = "") -> tuple[Request, Filled | None]:
        """As ids; where the length of a hole is unknown, with the one that was found. place: of what was asked."""
        try:
            request, pieces = asked.given(self._tokenizer, self._recipe.decode, self._engine.context_length)
            if not pieces:
                return request, None
            found = infill(self._engine, request, pieces)
        except DllmError as error:
            raise error.below(place) from None
        return found.request, found

    def _watched(self, request: Request) -> Decoded:
        last: Frame | None = None
        calls: list[list[Commit]] = []
        if self._console.output == "text" and self._console.rich.is_terminal:
            with Live(console=RichConsole(), refresh_per_second=30, transient=True) as live:  # one that wraps
                for last in unfold(self._engine, self._tokenizer, request):
                    live.update(canvas_text(last))
                    calls.append(last.commits)
                    time.sleep(_FRAME_S)
            assert last is not None
            assert last.answer is not None
            return Decoded(request, last.answer, calls[1:])
        [decoded] = decode(self._engine, {"": request})
        return decoded

    def _check(self, decoded: Decoded, place: str = "") -> None:
        if decoded.answer.finish_reason == "error":
            of = f" for {place}" if place else ""
            remedy = "see whether its weights are"
            raise DataError(self._run.url, f"the denoiser's output is no number{of}", remedy=remedy)

    def _write(self, trace: Path | None, decoded: Sequence[Decoded]) -> None:
        if trace is not None:
            write_traces(trace, decoded, self._bundle, self._engine)

    def _show(self, decoded: Decoded) -> None:
        answer = decoded.answer
        self._console.rich.print(self._shown(decoded))
        self._console.print(
            f"[dim]{answer.num_committed} tokens in {answer.num_calls} denoiser calls: "
            f"{answer.tokens_per_call:.2f} tokens per call ({answer.finish_reason})[/dim]"
        )

    def _shown(self, decoded: Decoded) -> Text:
        """The row as text: what was given dim, what was made bold."""
        request, answer = decoded.request, decoded.answer
        text = Text(self._tokenizer.decode(request.prompt), style="dim")
        if request.middle is None or request.strength is not None:
            text.append(_text_of(decoded, self._tokenizer), style="bold")
        else:
            for tokens, is_made in runs(request.middle, answer.tokens):
                decode = self._tokenizer.decode_behind if text.plain else self._tokenizer.decode
                text.append(decode(tokens), style="bold" if is_made else "dim")
        return text.append(self._tokenizer.decode_behind(request.suffix), style="dim")

    def _told(self, asked: Asked, decoded: Decoded, found: Filled | None, seconds: float | None) -> dict[str, Any]:
        """As plain data. `search`: what finding the lengths of holes took beside the decode itself."""
        request, answer = decoded.request, decoded.answer
        told: dict[str, Any] = {
            "prompt": self._tokenizer.decode(request.prompt) if asked.prompt_ids is not None else asked.prompt,
            "suffix": asked.suffix or None,
            "text": _text_of(decoded, self._tokenizer),
            "prompt_ids": list(request.prompt),
            "token_ids": answer.tokens,
            "finish_reason": answer.finish_reason,
            "seed": request.seed,
            "num_tokens": answer.num_committed,
            "num_calls": answer.num_calls,
            "num_positions": answer.num_positions,
            "tokens_per_call": round(answer.tokens_per_call, 4),
            "policy": self._recipe.decode_told["policy"],
            "calls": [
                [{"position": at, "token": token, "confidence": round(sure, 6)} for at, token, sure in commits]
                for commits in decoded.calls
            ],
        }
        if seconds is not None:
            told["seconds"] = round(seconds, 3)
        if asked.infill is not None:
            lengths = asked.lengths if found is None else found.lengths
            first, *others = holes_of(request, answer.tokens, lengths)
            holes = [self._tokenizer.decode(first), *map(self._tokenizer.decode_behind, others)]
            told = {**told, "infill": asked.infill, "holes": holes}
        if asked.edit is not None:
            told = {**told, "edit": asked.edit, "strength": asked.strength}
        if found is not None:
            told["search"] = {
                "lengths": list(found.lengths),
                "log_confidence": round(found.log_confidence, 6),
                "num_rows": found.num_rows,
                "num_calls": found.num_calls,
                "num_positions": found.num_positions,
            }
        return told


def _text_of(decoded: Decoded, tokenizer: Tokenizer) -> str:
    text = decoded.answer.text
    return tokenizer.decode(decoded.answer.tokens) if text is None else text


def canvas_text(frame: Frame) -> Text:
    """One frame: given text dim, what this call filled bright, open positions as dots."""
    text = Text(f"call {frame.num_calls:>3}  ", style="cyan")
    for i, token in enumerate(frame.texts):
        if frame.is_open[i]:
            text.append("░", style="dim")
        elif not frame.committed_at[i]:
            text.append(token, style="dim")
        elif frame.committed_at[i] == frame.num_calls:
            text.append(token, style="bold green")
        else:
            text.append(token)
    return text
