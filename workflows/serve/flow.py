"""The serve verb: a run's bundle behind its endpoint until Ctrl-C.

dllm serve RUN serve.port=9000
"""

import json
import time
from typing import Any

import httpx

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
    check_port(recipe.serve)
    read_bundle(run)  # a damaged bundle is refused now, by its file, and not by a replica that will not start
    with ray_cluster(cpus_needed(recipe)):
        url = start(run.url, run.name, recipe.serve, recipe.decode, recipe.placement.serve)
        try:
            request = json.dumps({"model": run.name, "prompt": "GREEK SMALL LETTER ", "max_tokens": 24})
            console.done("serve", f"[bold]{url}[/bold]  (Ctrl-C stops it)")
            console.print(f"  curl {url}/v1/completions -H 'content-type: application/json' -d '{request}'")
            console.result({"url": url, "model": run.name})
            while True:
                time.sleep(1)
        finally:
            stop()


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
