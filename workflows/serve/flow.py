"""The serve verb: a run's bundle behind its endpoint until Ctrl-C.

dllm serve RUN serve.port=9000
"""

import json
import shlex
import time
from typing import Any

import httpx
from rich.markup import escape
from rich.text import Text

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.errors import DataError
from workflows.console import Console
from workflows.env import ray_cluster
from workflows.recipe import Recipe
from workflows.serve.app import check_port, start, stop


def cpus_needed(recipe: Recipe) -> float:
    """Logical CPUs that all replicas and the gateway ask for."""
    return recipe.placement.serve.max_replicas * recipe.placement.serve.cpus_per_replica + 0.5


def serve_forever(recipe: Recipe, run: RunDir, console: Console) -> None:
    """Start the endpoint, say how to use it, wait for Ctrl-C."""
    recipe.check_decodable()
    check_port(recipe.serve)
    read_bundle(run)  # a damaged bundle is refused now, by its file, and not by a replica that will not start
    with ray_cluster(cpus_needed(recipe)):
        url = start(run.url, run.name, recipe.serve, recipe.decode, recipe.placement.serve)
        try:
            say_how_to_use(console, url, run.name, recipe)
            while True:
                time.sleep(1)
        finally:
            stop()


def say_how_to_use(console: Console, url: str, model: str, recipe: Recipe) -> None:
    """Print the address and a command that asks the recipe's first example, character by character as it is."""
    console.done("serve", f"[bold]{escape(url)}[/bold]  (Ctrl-C stops it)")
    console.rich.print(Text(f"  {curl_line(url, model, recipe)}"))
    console.result({"url": url, "model": model})


def curl_line(url: str, model: str, recipe: Recipe) -> str:
    """A shell command that asks the endpoint the recipe's first example."""
    prompt = recipe.serve.examples[0].prompt if recipe.serve.examples else "Once upon a time"
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": min(24, recipe.decode.max_tokens)})
    return f"curl {url}/v1/completions -H 'content-type: application/json' -d {shlex.quote(body)}"


def ask(url: str, model: str, body: dict[str, Any]) -> dict[str, Any]:
    """One completion from the endpoint; an error answer becomes a DataError with its message."""
    try:
        answer = httpx.post(f"{url}/v1/completions", json={"model": model, **body}, timeout=60)
    except httpx.HTTPError as error:
        raise DataError("serve", f"no answer ({type(error).__name__})", url) from error
    values: dict[str, Any] = answer.json()
    if answer.status_code != 200:
        raise DataError("serve", values["error"]["message"], answer.status_code)
    return values
