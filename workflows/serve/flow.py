"""The serve verb: bundles of runs behind one endpoint until Ctrl-C.

dllm serve RUN serve.port=9000
dllm serve RUN serve.models.other=runs/other     a second model, asked for by its name
dllm serve RUN serve.models_file=models.yaml     more of them, and others when the file changes
"""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from rich.markup import escape
from rich.text import Text

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.config.overrides import parse_yaml
from dllm_core.errors import ConfigError, DataError, DllmError
from workflows.console import Console
from workflows.env import ray_cluster
from workflows.placement import CPUS_OF_GATEWAY
from workflows.recipe import Recipe
from workflows.serve.app import AppArgs, check_loaded, check_port, deploy, start, stop
from workflows.serve.config import ServedRun
from workflows.serve.keys import file_stamp, read_keys

_LOOK_EVERY_S = 1.0

FindRun = Callable[[str], tuple[Recipe, RunDir]]


def cpus_needed(recipe: Recipe) -> float:
    """Logical CPUs that all replicas and gateways ask for."""
    placement = recipe.placement.serve
    return placement.max_replicas * placement.cpus_per_replica + CPUS_OF_GATEWAY * placement.gateways + 0.4


def gpus_needed(recipe: Recipe) -> float:
    """GPUs of the replicas that start with the endpoint, without which it would never answer."""
    placement = recipe.placement.serve
    return max(1, placement.min_replicas) * placement.gpus_per_replica


def args_of(recipe: Recipe, run: RunDir, find: FindRun | None = None) -> AppArgs:
    """The application that serves a run, and beside it what the recipe's section names; each bundle is verified now."""
    served = {run.name: _served(recipe, run)}
    for name, target in _others(recipe).items():
        assert find is not None
        if name in served:
            raise ConfigError("serve.models", "is the first run's own name", name, "give it another")
        served[name] = _served(*find(target))
    return AppArgs(models=served, serve=recipe.serve, placement=recipe.placement.serve)


def _served(recipe: Recipe, run: RunDir) -> ServedRun:
    recipe.check_decodable()
    bundle = read_bundle(run)  # a damaged one is refused now, by its file, and not by a replica that will not start
    return ServedRun(run=run.url, decode=recipe.decode, digest=bundle.digest)


def _others(recipe: Recipe) -> dict[str, str]:
    """Name -> run of the section and of its file."""
    path = recipe.serve.models_file
    if path is None:
        return recipe.serve.models
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("serve.models_file", f"cannot be read ({error})", path) from None
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(run, str) for name, run in values.items()
    ):
        raise ConfigError("serve.models_file", "a line is NAME: RUN", path)
    return {**recipe.serve.models, **values}


def serve_forever(recipe: Recipe, run: RunDir, console: Console, find: FindRun) -> None:
    """Start the endpoint, say how to use it, wait for Ctrl-C; load and drop models as their file changes."""
    check_port(recipe.serve)
    if recipe.serve.keys_file is not None:
        read_keys(Path(recipe.serve.keys_file))
    followed = recipe.serve.models_file
    seen = file_stamp(Path(followed)) if followed is not None else None  # first: what changes while it is read is seen
    args = args_of(recipe, run, find)
    with ray_cluster(cpus_needed(recipe), gpus_needed(recipe)):
        url = start(args)
        try:
            say_how_to_use(console, url, run.name, recipe)
            while True:
                time.sleep(_LOOK_EVERY_S)
                if followed is not None and (now := file_stamp(Path(followed))) != seen:
                    seen, args = now, _deployed_again(recipe, run, console, find, args, url)
        finally:
            stop()


def _deployed_again(recipe: Recipe, run: RunDir, console: Console, find: FindRun, before: AppArgs, url: str) -> AppArgs:
    """What is served from now on; a file that cannot be followed, or models that cannot be loaded, change nothing."""
    try:
        args = args_of(recipe, run, find)
        try:
            deploy(args)
            check_loaded(url)
        except DllmError:
            deploy(before)  # or a replica that starts later would be asked for them too, and end
            raise
    except DllmError as error:
        console.print(f"[yellow]models stay as they were:[/yellow] {escape(str(error))}")
        return before
    console.done("models", ", ".join(escape(name) for name in args.models))
    return args


def say_how_to_use(console: Console, url: str, model: str, recipe: Recipe) -> None:
    """Print the address and a command that asks the recipe's first example, character by character as it is."""
    console.done("serve", f"[bold]{escape(url)}[/bold]  a page to try it on, and the API below /v1  (Ctrl-C stops it)")
    console.rich.print(Text(f"  {curl_line(url, model, recipe)}"))
    console.result({"url": url, "model": model})


def curl_line(url: str, model: str, recipe: Recipe) -> str:
    """A shell command that asks the endpoint the recipe's first example."""
    prompt = recipe.serve.examples[0].prompt if recipe.serve.examples else "Once upon a time"
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": min(24, recipe.decode.max_tokens)})
    key = ' -H "authorization: Bearer $KEY"' if recipe.serve.keys_file is not None else ""
    return f"curl {url}/v1/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}"


def ask(url: str, model: str, body: dict[str, Any]) -> dict[str, Any]:
    """One completion from the endpoint; an error answer becomes a DataError with its message."""
    try:
        answer = httpx.post(f"{url}/v1/completions", json={"model": model, **body}, timeout=60)
    except httpx.HTTPError as error:
        raise DataError("serve", f"no answer ({type(error).__name__})", url) from error
    try:
        values: dict[str, Any] = answer.json()
        problem = None if answer.status_code == 200 else str(values["error"]["message"])
    except (ValueError, LookupError, TypeError):  # of Ray's proxy, where no gateway lives
        problem = f"is no answer of ours: {answer.text[:200]!r}"
    if problem is not None:
        raise DataError("serve", problem, answer.status_code)
    return values
