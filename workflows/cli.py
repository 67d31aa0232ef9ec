"""The command line: `dllm VERB RECIPE-or-RUN [dotted.path=value ...]`.

Every mistake of a user's is one line and an exit code: 2 recipe, 3 data, 4 preempted, 5 diverged. Ctrl-C ends with 130.
"""

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dllm_core.errors import ConfigError, DllmError
from workflows.cli_asking import bench, generate, serve
from workflows.cli_cluster import doctor, jobs, submit
from workflows.console import Console
from workflows.interrupts import Interrupted
from workflows.verb import EndedError, OutputOption, OverridesArg, TargetArg, failed, run_verb

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diffusion language models from corpus to endpoint. A verb takes a recipe file or a run's folder.",
)
_INTERRUPTED = 130
_USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, which newer typers carry inside and export no more
_PREPROCESS_ACTIONS = ("plan", "run", "verify", "repair", "inspect")


@app.callback(invoke_without_command=True)
def _lead(version: Annotated[bool, typer.Option("--version", help="Say which this is.")] = False) -> None:
    if version:
        sys.stdout.write(f"dllm {importlib.metadata.version('dllm')}\n")
        raise typer.Exit


@app.command()
def run(target: TargetArg, overrides: OverridesArg = None, output: OutputOption = "text") -> None:
    """The whole river: preprocess, train, bundle, evaluate, serve the examples, report. Skips what is done."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import open_target

        opened = open_target(target, overrides or [])
        from workflows.pipeline.flow import Pipeline  # torch: a mistake about paths need not wait for it

        console.print(f"[bold]{opened.run.name}[/bold] [dim]in {escape(opened.run.store.url)}[/dim]")
        with Pipeline(opened, console) as pipeline:
            result = pipeline.run()
        if opened.recipe.can_be_decoded:
            console.print(f"\nServe it again: [bold]dllm serve {escape(_shown(opened.run.url))}[/bold]")
        return result

    run_verb(body, output)


@app.command()
def show(target: TargetArg, overrides: OverridesArg = None, output: OutputOption = "text") -> None:
    """The resolved recipe, every default written out. Starts nothing."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import read_target_recipe

        recipe, _ = read_target_recipe(target, overrides or [])
        if console.output == "text":
            sys.stdout.write(recipe.to_yaml())
        return recipe.model_dump(mode="json")

    run_verb(body, output)


@app.command()
def preprocess(
    target: Annotated[
        str, typer.Argument(metavar="[plan|run|verify|repair|inspect] RECIPE-or-RUN", help="`run` if not said")
    ],
    overrides: OverridesArg = None,
    output: OutputOption = "text",
) -> None:
    """Corpus to Arrow shards of tokens and noise, with a manifest. Runs only what is missing.

    plan: what a run would read and make, without running. verify: read every shard again; exit 3 if one is bad.
    repair: run exactly the bad or missing steps again. inspect: rows as text, clean and noised, and report.html.
    """
    action, rest = "run", list(overrides or [])
    if target in _PREPROCESS_ACTIONS:
        action, target, rest = target, rest[0] if rest else "", rest[1:]
    elif rest and (rest[0] in _PREPROCESS_ACTIONS or (target.isalpha() and "=" not in rest[0])):
        run_verb(lambda _: _refuse_action(target, rest[0]), output)
    if action == "run":
        run_verb(_stage(target, rest, lambda pipeline: pipeline.preprocess()), output)
    else:
        run_verb(_on_corpus(action, target, rest), output)


@app.command()
def plan(
    target: TargetArg,
    overrides: OverridesArg = None,
    workers: Annotated[int | None, typer.Option(help="devices; by default the recipe's workers")] = None,
    device_memory_gb: Annotated[float | None, typer.Option(help="says which ZeRO stages fit")] = None,
    device_tflops: Annotated[float | None, typer.Option(help="dense, as trained; by default this machine's")] = None,
    mfu: Annotated[float, typer.Option(help="share of it that training reaches")] = 0.4,
    tokens_per_second: Annotated[float | None, typer.Option(help="of a device, instead of both")] = None,
    mtbf_hours: Annotated[float, typer.Option(help="between failures of one device")] = 50_000.0,
    storage_gb_per_second: Annotated[float, typer.Option(help="at which a checkpoint is written")] = 1.0,
    output: OutputOption = "text",
) -> None:
    """What training will take, before a device is rented: memory by ZeRO stage, time, checkpoints. Starts nothing."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import read_target_recipe
        from workflows.train import plan as planning

        machine = planning.Machine(
            workers, device_memory_gb, device_tflops, mfu, mtbf_hours, storage_gb_per_second, tokens_per_second
        )
        return planning.plan(read_target_recipe(target, overrides or [])[0], machine, console)

    run_verb(body, output)


@app.command()
def train(
    target: TargetArg,
    overrides: OverridesArg = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="a few steps and a checkpoint on made-up rows, in this process")
    ] = False,
    output: OutputOption = "text",
) -> None:
    """Train on the preprocessed corpus (made first if it is missing); goes on from the newest checkpoint."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.target import read_target_recipe
        from workflows.train.dry_run import dry_run as run_dry

        return run_dry(read_target_recipe(target, overrides or [])[0], console)

    if dry_run:
        run_verb(body, output)
        return
    run_verb(_stage(target, overrides, lambda p: (p.preprocess(), p.train(), p.bundle())[1]), output)


@app.command()
def evaluate(target: TargetArg, overrides: OverridesArg = None, output: OutputOption = "text") -> None:
    """Measure a trained run on held-out rows: evaluation.json, and report.html beside it.

    Likelihood, calibration, infilling and tokens per denoiser call; with evaluate.samples.rows=N generative perplexity,
    with evaluate.tasks=[{type: sudoku}] exact match of a task's answers. Every figure has its standard error.
    """
    run_verb(_stage(target, overrides, lambda p: (p.evaluate(), p.report())[0], needs_bundle=True), output)


for _verb in (generate, serve, bench, submit, jobs, doctor):
    app.command()(_verb)


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a comparison: a .yaml with `recipe` and `models`")],
    overrides: OverridesArg = None,
    output: OutputOption = "text",
) -> None:
    """Train several objectives on the same data with the same budget, and measure where they differ."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.compare.recipe import load_comparison

        loaded = load_comparison(Path(recipe), overrides or [])
        from workflows.compare.flow import compare as run_comparison

        return run_comparison(loaded, console)

    run_verb(body, output)


@app.command()
def task(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="sudoku or addition")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="the folder to write")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[field=value]...", help="of the task, e.g. digits=4 max_clues=8")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="training problems to write")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="which of them, and the recipe's seed")] = 0,
    output: OutputOption = "text",
) -> None:
    """Write problems with known answers to train on, and the recipe of a run that is graded on others."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.task.flow import write_task

        written = write_task(kind, out, rows, seed, overrides or [])
        recipe = _shown(written["recipe"])
        console.print(f"{rows:,} problems; train on them: [bold]dllm run {escape(recipe)}[/bold]")
        return written

    run_verb(body, output)


@app.command("import")
def import_(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="config.json, safetensors and tokenizer.json")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the run")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[name=value]...", help="mask_id=N|new, eos_id=N, dtype=float32, and of the recipe"),
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Make a run of a public checkpoint: LLaDA, LLaDA-MoE, LLaDA2, Dream, Qwen2, Qwen3 or Llama."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.transfer.flow import import_checkpoint

        made = import_checkpoint(folder, name, words or [], console)
        console.print(f"Try it: [bold]dllm generate {escape(_shown(made['run']))} --prompt TEXT[/bold]")
        return made

    run_verb(body, output)


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="RUN", help="a folder below runs/")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a new one, to write to")],
    output: OutputOption = "text",
) -> None:
    """Write a run's bundle as a public checkpoint: as it was imported, else as LLaDA if that can hold it."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.transfer.flow import export_checkpoint

        return export_checkpoint(target, folder, console)

    run_verb(body, output)


def run_command_line(words: list[str]) -> int:
    """Run `dllm WORDS`; the exit code. Mistakes in the words themselves are one line too."""
    try:
        code = app(words or ["--help"], prog_name="dllm", standalone_mode=False)
    except EndedError as ended:
        return ended.code
    except _USAGE_ERROR as error:
        remedy = f"see {error.ctx.command_path} --help" if error.ctx is not None else "see dllm --help"
        as_json = "--output=json" in words or ("--output" in words and "json" in words)
        return failed(
            Console("json" if as_json else "text"), ConfigError("command line", _one_line(error), remedy=remedy)
        )
    except typer.Exit as asked:
        code = asked.exit_code
    except typer.Abort:
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # a signal before a verb had begun, which the library that parses the words has caught
        raise Interrupted if Interrupted.happened else KeyboardInterrupt
    return code if isinstance(code, int) else 0


def run_lm_eval() -> int:
    """Run `lm_eval` on the words of this process, with the model `dllm` registered; the exit code."""
    try:
        from workflows.evaluate.harness import cli_evaluate

        cli_evaluate()
    except DllmError as error:
        return failed(Console("text"), error)
    return 0


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


def _refuse_action(first: str, second: str) -> None:
    """Two words of which the first is no action of `preprocess`."""
    if second in _PREPROCESS_ACTIONS:
        raise ConfigError("preprocess", "the action stands first", second, f"dllm preprocess {second} {first}")
    actions = ", ".join(_PREPROCESS_ACTIONS)
    raise ConfigError("preprocess", "knows no such action", first, f"one of {actions}")


def _one_line(error: Any) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:]


def _shown(path: str) -> str:
    """A path as a shell takes it, below the working directory in its short form."""
    relative = path if "://" in path else os.path.relpath(path)
    return shlex.quote(path if relative.startswith("..") else relative)
