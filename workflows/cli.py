"""The command line: `dllm VERB RECIPE-or-RUN [dotted.path=value ...]`.

Every mistake of a user's is one line and an exit code: 2 recipe, 3 data, 4 preempted, 5 diverged. Ctrl-C ends with 130.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dllm_core.errors import ConfigError, DllmError, RequestError
from workflows.console import Console, Output
from workflows.env import Interrupted, end_on_sigterm

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diffusion language models from corpus to endpoint. A verb takes a recipe file or a run's folder.",
)
TargetArg = Annotated[str, typer.Argument(metavar="RECIPE-or-RUN", help="a .yaml recipe, or a folder below runs/")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[dotted.path=value]...", help="e.g. train.steps=200 decode.max_tokens=16")
]
_PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = Annotated[Output, typer.Option("--output", help="json: one JSON object as the last line of stdout")]


@app.command()
def run(target: TargetArg, overrides: OverridesArg = None, output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text") -> None:
    """The whole river: preprocess, train, bundle, evaluate, serve the examples, report. Skips what is done."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import open_target

        opened = open_target(target, overrides or [])
        from workflows.pipeline.flow import Pipeline  # torch: a mistake about paths need not wait for it

        console.print(f"[bold]{opened.run.name}[/bold] [dim]in {opened.run.store.url}[/dim]")
        with Pipeline(opened, console) as pipeline:
            result = pipeline.run()
        console.print(f"\nServe it again: [bold]dllm serve {_shown(opened.run.url)}[/bold]")
        return result

    _verb(body, output)


@app.command()
def show(target: TargetArg, overrides: OverridesArg = None, output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text") -> None:
    """The resolved recipe, every default written out. Starts nothing."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import read_target_recipe

        recipe, _ = read_target_recipe(target, overrides or [])
        if console.output == "text":
            sys.stdout.write(recipe.to_yaml())
        return recipe.model_dump(mode="json")

    _verb(body, output)


@app.command()
def preprocess(
    target: Annotated[
        str, typer.Argument(metavar="[plan|run|verify|repair|inspect] RECIPE-or-RUN", help="`run` if not said")
    ],
    overrides: OverridesArg = None,
    output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text",
) -> None:
    """Corpus to Arrow shards of tokens and noise, with a manifest. Runs only what is missing.

    plan: what a run would read and make, without running. verify: read every shard again; exit 3 if one is bad.
    repair: run exactly the bad or missing steps again. inspect: rows as text, clean and noised, and report.html.
    """
    action, rest = "run", list(overrides or [])
    if target in _PREPROCESS_ACTIONS:
        action, target, rest = target, rest[0] if rest else "", rest[1:]
    if action == "run":
        _verb(_stage(target, rest, lambda pipeline: pipeline.preprocess()), output)
    else:
        _verb(_on_corpus(action, target, rest), output)


@app.command()
def train(target: TargetArg, overrides: OverridesArg = None, output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text") -> None:
    """Train on the preprocessed corpus (made first if it is missing); goes on from the newest checkpoint."""
    _verb(_stage(target, overrides, lambda p: (p.preprocess(), p.train(), p.bundle())[1]), output)


@app.command()
def evaluate(target: TargetArg, overrides: OverridesArg = None, output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text") -> None:
    """Held-out likelihood of a trained run with its standard error, and tokens per denoiser call."""
    _verb(_stage(target, overrides, lambda pipeline: pipeline.evaluate(), needs_bundle=True), output)


@app.command()
def generate(
    target: TargetArg,
    overrides: OverridesArg = None,
    prompt: Annotated[str, typer.Option(help="text before the canvas")] = "",
    suffix: Annotated[str | None, typer.Option(help="text behind it: the hole between is filled")] = None,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same text")] = 0,
    output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text",
) -> None:
    """Complete a prompt, or fill the hole before a suffix, watching the canvas denoise."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.generate.flow import generate as decode
        from workflows.target import find_run

        recipe, found = find_run(target, overrides or [])
        return decode(recipe, found, prompt, suffix, seed, console)

    _verb(body, output)


@app.command()
def serve(target: TargetArg, overrides: OverridesArg = None, output: _PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")
OutputOption = "text") -> None:
    """Host a run's bundle behind an OpenAI-shaped endpoint until Ctrl-C."""

    def body(console: Console) -> None:
        from workflows.serve.flow import serve_forever
        from workflows.target import find_run

        recipe, found = find_run(target, overrides or [])
        serve_forever(recipe, found, console)

    _verb(body, output)


def main() -> None:
    """Entry point of the `dllm` script."""
    end_on_sigterm()
    app(prog_name="dllm")


def _stage(
    target: str, overrides: list[str] | None, stage: Callable[[Any], Any], *, needs_bundle: bool = False
) -> Callable[[Console], Any]:
    def body(console: Console) -> Any:
        from workflows.target import open_target

        opened = open_target(target, overrides or [])
        from dllm_core.checkpoints.bundle import read_bundle
        from workflows.pipeline.flow import Pipeline

        if needs_bundle:
            read_bundle(opened.run)
        with Pipeline(opened, console) as pipeline:
            result = stage(pipeline)
        return {"run": opened.run.url, **result}

    return body


def _on_corpus(action: str, target: str, overrides: list[str]) -> Callable[[Console], Any]:
    def body(console: Console) -> dict[str, Any]:
        from workflows.target import open_target

        if not target:
            raise ConfigError("preprocess", "no recipe", action, f"dllm preprocess {action} RECIPE")
        plan = open_target(target, overrides).plan
        from workflows.preprocess.show import look_at_corpus

        return look_at_corpus(action, plan, console)

    return body


def _verb(body: Callable[[Console], Any], output: Output) -> None:
    """Run a verb; turn what ends it into a line and an exit code."""
    console = Console(output)
    try:
        result = body(console)
        if result is not None:
            console.result(result)
    except DllmError as error:
        code = 2 if isinstance(error, RequestError) else error.exit_code
        _say(f"dllm: {error}")
        console.result({"error": {"place": error.place, "message": str(error)}, "exit_code": code})
        _leave(code)
    except Interrupted:
        _say("dllm: terminated; what is complete is kept, run it again to go on")
        _leave(143)
    except KeyboardInterrupt:
        _say("\ndllm: interrupted; what is complete is kept, run it again to go on")
        _leave(130)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _leave(code: int) -> None:
    """Exit without waiting for threads that a library left behind; all blocks have cleaned up already."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _shown(path: str) -> str:
    """A path below the working directory in its short form."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
