"""The verbs that ask a trained model: here, behind an endpoint, and as a load on one."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dllm_core.config.overrides import parse_json_object
from dllm_core.errors import ConfigError, DataError
from workflows.console import Console
from workflows.verb import OutputOption, OverridesArg, TargetArg, run_verb

Number = TypeVar("Number", int, float)


def generate(
    target: TargetArg,
    overrides: OverridesArg = None,
    prompt: Annotated[str, typer.Option(help="text before the canvas")] = "",
    prompt_ids: Annotated[str | None, typer.Option(help="the same as token ids: 17,3,99")] = None,
    suffix: Annotated[str, typer.Option(help="text behind it: the hole between is filled")] = "",
    infill: Annotated[
        str | None, typer.Option(help="text with holes: [[8]] of 8 tokens, [[2-8]] of 2 to 8, [[]] of any number")
    ] = None,
    edit: Annotated[
        str | None, typer.Option(metavar="BEGIN:STOP", help="characters of the prompt that are made anew")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="how much of them noise takes, in (0, 1]; 0.5 by default")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends the answer; may be given again")] = None,
    regex: Annotated[str | None, typer.Option(help="a regular expression that all of the answer matches")] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE-or-JSON", help="a JSON schema that the answer keeps")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a file with one a line: text, or JSON objects in a .jsonl")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same text")] = 0,
    trace: Annotated[Path | None, typer.Option(help="write what every call did to this file")] = None,
    replay: Annotated[Path | None, typer.Option(help="make again what a trace holds, and compare every call")] = None,
    output: OutputOption = "text",
) -> None:
    """Complete a prompt, fill holes, or edit a span, watching the canvas denoise; or decode a file of prompts."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.generate.asked import Asked, read_asked
        from workflows.target import find_run

        given = {
            "prompt": prompt,
            "prompt_ids": None if prompt_ids is None else _numbers("--prompt-ids", prompt_ids, int),
            "suffix": suffix,
            "infill": infill,
            "edit": edit,
            **({} if strength is None else {"strength": strength}),
            "seed": seed,
            "stop": stop or [],
            "regex": regex,
            "json_schema": None if json_schema is None else _schema(json_schema),
        }
        asked = Asked.checked(given)
        if strength is not None and edit is None and prompts is None:
            raise ConfigError("--strength", "says how --edit makes a span anew, and none is named", strength)
        if replay is not None and (prompts is not None or trace is not None or asked != Asked()):
            raise ConfigError("--replay", "takes all from the trace", str(replay), "leave out the other options")
        several = None if prompts is None else read_asked(prompts, asked)
        recipe, found = find_run(target, overrides or [])
        from workflows.generate.flow import Generator  # torch: a mistake need not wait for it

        generator = Generator(recipe, found, console)
        if replay is not None:
            return generator.replayed(replay)
        return generator.one(asked, trace) if several is None else generator.many(several, trace)

    run_verb(body, output)


def serve(
    target: TargetArg,
    overrides: OverridesArg = None,
    port: Annotated[int | None, typer.Option(help="as serve.port=...", show_default=False)] = None,
    output: OutputOption = "text",
) -> None:
    """Host a run's bundle behind an OpenAI-shaped endpoint until Ctrl-C."""

    def body(console: Console) -> None:
        from workflows.serve.flow import serve_forever
        from workflows.target import find_run

        ported = [] if port is None else [f"serve.port={port}"]
        recipe, found = find_run(target, [*(overrides or []), *ported])
        serve_forever(recipe, found, console, lambda other: find_run(other, []))

    run_verb(body, output)


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="of the endpoint, e.g. http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="by default the first that it serves")] = None,
    prompt: Annotated[str, typer.Option(help="what is asked")] = "Once upon a time",
    prompts: Annotated[Path | None, typer.Option(help="a file with one a line, drawn from at random")] = None,
    lengths: Annotated[str, typer.Option(help="max_tokens, drawn from at random")] = "8,16,32",
    concurrency: Annotated[str, typer.Option(help="closed loops: requests at once")] = "1,8,32",
    rate: Annotated[str, typer.Option(help="open loops: requests a second, Poisson arrivals")] = "",
    seconds: Annotated[float, typer.Option(help="of each load")] = 10.0,
    slo_ms: Annotated[float, typer.Option(help="an answer within so many milliseconds is a good one")] = 1000.0,
    seed: Annotated[int, typer.Option(min=0, help="of prompts, lengths and arrivals")] = 0,
    body: Annotated[str, typer.Option(metavar="JSON", help="more parameters of every request")] = "{}",
    out: Annotated[Path, typer.Option(help="a folder for bench.json and bench.html")] = Path("bench"),
    output: OutputOption = "text",
) -> None:
    """Put a load on an OpenAI-shaped endpoint: latencies, tokens a second, goodput. DLLM_API_KEY is its key."""

    def run(console: Console) -> dict[str, Any]:
        from workflows.bench.flow import BenchOptions
        from workflows.bench.flow import bench as run_bench

        options = BenchOptions.checked(
            {
                "url": url,
                "model": model,
                "prompt": prompt,
                "prompts": None if prompts is None else str(prompts),
                "lengths": _numbers("--lengths", lengths, int),
                "concurrency": _numbers("--concurrency", concurrency, int),
                "rate": _numbers("--rate", rate, float),
                "seconds": seconds,
                "slo_ms": slo_ms,
                "seed": seed,
                "body": parse_json_object(body, "--body"),
            }
        )
        return run_bench(options, out, console)

    run_verb(run, output)


def _numbers(place: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(place, "must be numbers with commas between them", text) from None


def _schema(given: str) -> str:
    """The JSON itself, or what a file of that name holds."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except (OSError, ValueError) as error:
        raise DataError("--json-schema", f"cannot be read ({error})", given) from None
