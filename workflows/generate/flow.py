"""The generate verb: complete or infill in this process, the canvas denoising live in the terminal.

dllm generate RUN --prompt "GREEK SMALL LETTER " decode.policy.threshold=0.7
"""

import time
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.engine import Engine
from dllm_core.errors import DataError
from workflows.console import Console
from workflows.generate.unfold import Frame, request_for, unfold
from workflows.recipe import Recipe

_FRAME_S = 0.08  # slow enough to see; only on a terminal


def generate(
    recipe: Recipe,
    run: RunDir,
    prompt: str | list[int],
    suffix: str | None,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Decode one request, its prompt as text or ids; its text and ids, cost, finish reason and what each call did."""
    recipe.check_decodable()
    import torch

    torch.set_num_threads(1)
    bundle = read_bundle(run)
    tokenizer = bundle.tokenizer()
    engine = Engine(bundle, "cuda" if torch.cuda.is_available() else "cpu")
    head = tuple(prompt) if isinstance(prompt, list) else tuple(tokenizer.encode(prompt))
    tail = tuple(tokenizer.encode(suffix or ""))
    request = request_for(head, tail, recipe.decode, engine.context_length, seed)
    last: Frame | None = None
    calls = []
    begun = time.monotonic()
    if console.output == "text" and console.rich.is_terminal:
        with Live(console=RichConsole(), refresh_per_second=30, transient=True) as live:  # one that wraps
            for last in unfold(engine, tokenizer, request):
                live.update(canvas_text(last))
                calls.append(last.commits)
                time.sleep(_FRAME_S)
    else:
        for last in unfold(engine, tokenizer, request):
            calls.append(last.commits)
    assert last is not None
    assert last.answer is not None
    answer = last.answer
    if answer.finish_reason == "error":
        raise DataError(run.url, "the denoiser's output is no number", remedy="see whether its weights are")
    text = tokenizer.decode(answer.tokens)
    if isinstance(prompt, list):
        prompt = tokenizer.decode(prompt)
    if console.output == "text":
        console.rich.print(Text(prompt, style="dim") + Text(text, style="bold") + Text(suffix or "", style="dim"))
        console.print(
            f"[dim]{answer.num_committed} tokens in {answer.num_calls} denoiser calls: "
            f"{answer.tokens_per_call:.2f} tokens per call ({answer.finish_reason})[/dim]"
        )
    return {
        "run": run.name,
        "prompt": prompt,
        "suffix": suffix,
        "text": text,
        "prompt_ids": list(head),
        "token_ids": answer.tokens,
        "finish_reason": answer.finish_reason,
        "seed": seed,
        "num_tokens": answer.num_committed,
        "num_calls": answer.num_calls,
        "tokens_per_call": round(answer.tokens_per_call, 4),
        "seconds": round(time.monotonic() - begun, 3),
        "policy": recipe.decode_told["policy"],
        "calls": [
            [{"position": at, "token": token, "confidence": round(sure, 6)} for at, token, sure in commits]
            for commits in calls[1:]
        ],
    }


def canvas_text(frame: Frame) -> Text:
    """One frame: given text dim, what this call filled bright, open positions as dots."""
    text = Text(f"call {frame.num_calls:>3}  ", style="cyan")
    for i, token in enumerate(frame.texts):
        if frame.is_open[i]:
            text.append("░", style="dim")
        elif not frame.first <= i < frame.stop:
            text.append(token, style="dim")
        elif frame.committed_at[i] == frame.num_calls:
            text.append(token, style="bold green")
        else:
            text.append(token)
    return text
