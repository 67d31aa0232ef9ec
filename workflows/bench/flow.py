"""The bench verb: a sweep of loads on an endpoint, `bench.json` and `bench.html`.

dllm bench http://127.0.0.1:8000 --concurrency 1,8,32 --rate 5,20
"""

import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.errors import ConfigError, DataError
from workflows.bench.load import Load, Mix, drive
from workflows.bench.summary import HEADER, report, row, summarize
from workflows.console import Console

_KEY = "DLLM_API_KEY"


class BenchOptions(Frozen):
    """What is put on an endpoint. prompts: a file of one a line; concurrency and rate: levels, each for `seconds`."""

    url: str
    model: str | None = None
    prompt: str = "Once upon a time"
    prompts: str | None = None
    lengths: tuple[int, ...] = Field((8, 16, 32), min_length=1)
    concurrency: tuple[int, ...] = (1, 8, 32)
    rate: tuple[float, ...] = ()
    seconds: float = Field(10, gt=0)
    slo_ms: float = Field(1000, gt=0)
    seed: int = Field(0, ge=0)
    body: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _levels_are_positive(self) -> "BenchOptions":
        for name in ("lengths", "concurrency", "rate"):
            values = getattr(self, name)
            if any(value <= 0 for value in values):
                raise FieldProblem(name, "must be positive", list(values))
        if not self.concurrency and not self.rate:
            raise FieldProblem("concurrency", "no load", [], "give --concurrency or --rate")
        return self

    @property
    def loads(self) -> list[Load]:
        """The sweep, closed loops first."""
        closed = [Load("closed", level, self.seconds) for level in self.concurrency]
        return [*closed, *(Load("open", level, self.seconds) for level in self.rate)]


def bench(options: BenchOptions, out: Path, console: Console) -> dict[str, Any]:
    """Run the sweep, print its table, write `bench.json` and `bench.html` into `out`. Ctrl-C keeps what is done."""
    url = _checked_url(options.url)
    headers = {"authorization": f"Bearer {os.environ[_KEY]}"} if os.environ.get(_KEY) else {}
    model = options.model or _first_model(url, headers)
    mix = Mix(model, _prompts(options), options.lengths, options.body, options.seed)
    _check(url, mix, headers)
    _make_room(out)
    slo_s, summaries = options.slo_ms / 1000, list[dict[str, Any]]()
    try:
        for load in options.loads:
            what = f"{load.level:g} {'at once' if load.kind == 'closed' else 'a second'}"
            with console.stage("bench") as bar:
                answered = asyncio.run(drive(url, load, mix, headers, lambda done: bar.update(f"{what}: {done} done")))  # noqa: B023 (ends before the next)
            summaries.append(summarize(load, answered, slo_s))
            told = dict(zip(HEADER, row(summaries[-1]), strict=True))
            console.print("  ".join(f"[dim]{name}[/dim] {value}" for name, value in told.items()))
    finally:
        if summaries:
            _write(out, url, model, summaries, options, slo_s)
            console.done("bench", str(out / "bench.html"))
    return {"url": url, "model": model, "out": str(out), "loads": summaries}


def _checked_url(given: str) -> str:
    url = given.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ConfigError("URL", "is no address of an endpoint", given, "e.g. http://127.0.0.1:8000")
    return url


def _make_room(out: Path) -> None:
    """The folder of the results: what cannot be written is said before the load, which may take an hour."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # a folder that was there may not be ours to write
            pass
    except OSError as error:
        raise DataError("--out", f"is no folder to write to ({error.strerror})", str(out)) from None


def _write(
    out: Path, url: str, model: str, summaries: Sequence[dict[str, Any]], options: BenchOptions, slo_s: float
) -> None:
    told = {"url": url, "model": model, "options": options.model_dump(mode="json"), "loads": list(summaries)}
    (out / "bench.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (out / "bench.html").write_bytes(report(url, model, summaries, slo_s))


def _prompts(options: BenchOptions) -> list[str]:
    if options.prompts is None:
        return [options.prompt]
    try:
        text = Path(options.prompts).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line]  # at nothing else: U+2028 is a character of a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("--prompts", f"cannot be read ({error})", options.prompts) from None
    if not lines:
        raise DataError("--prompts", "holds no prompt", options.prompts)
    return lines


def _first_model(url: str, headers: dict[str, str]) -> str:
    models = _asked("GET", f"{url}/v1/models", headers).get("data") or []
    if not models:
        raise DataError("bench", "the endpoint serves no model", url)
    try:
        return str(models[0]["id"])
    except (KeyError, TypeError, IndexError):
        raise DataError("bench", "its list of models is none of OpenAI's shape", models, "--model NAME") from None


def _check(url: str, mix: Mix, headers: dict[str, str]) -> None:
    """One request of each length: what is refused is said before the load, and first calls are not timed."""
    for length in sorted({*mix.lengths}):
        body = {**mix.request(0), "max_tokens": length, "stream": False}
        del body["stream_options"]
        _asked("POST", f"{url}/v1/completions", headers, body)


def _asked(verb: str, url: str, headers: dict[str, str], body: Any = None) -> dict[str, Any]:
    try:
        answer = httpx.request(verb, url, headers=headers, json=body, timeout=120)
        values: Any = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError("bench", f"no answer ({type(error).__name__})", url, "is it up? dllm serve RUN") from None
    except ValueError:
        raise DataError("bench", "its answer is no JSON: this is no OpenAI-shaped endpoint", url) from None
    if answer.status_code == 401:
        raise ConfigError("bench", "the endpoint asks for a key", url, f"export {_KEY}")
    if answer.status_code != 200:
        refusal = values.get("error") if isinstance(values, dict) else None
        told = refusal.get("message", refusal) if isinstance(refusal, dict) else values
        raise DataError("bench", str(told), answer.status_code)
    if not isinstance(values, dict):
        raise DataError("bench", "its answer is no JSON object: this is no OpenAI-shaped endpoint", url)
    return values
