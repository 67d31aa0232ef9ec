"""The doctor verb: the checks of this machine, and of a cluster's nodes where one is named."""

import json
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from dllm_core.errors import DataError, DllmError
from workflows.console import Console
from workflows.doctor import here
from workflows.doctor.here import Finding, version_of
from workflows.env import is_private, ray_cluster
from workflows.recipe import Recipe
from workflows.submit.package import pack
from workflows.submit.server import ENDED, JobServer

_MARKS = {"good": "[green]✓[/green]", "doubtful": "[yellow]![/yellow]", "bad": "[red]✗[/red]"}
_JOB_WITHIN_S = 180.0


def examine(
    recipe: Recipe | None, root: str, console: Console, *, address: str | None, ca_file: str | None, only_nodes: bool
) -> dict[str, Any]:
    """All findings, said as they come; `exit_code` 3 if one is bad."""
    found: list[Finding] = []
    for part in _checks(recipe, root, address, ca_file, only_nodes):
        for finding in part:
            found.append(finding)
            remedy = f": [dim]{escape(finding.remedy)}[/dim]" if finding.verdict != "good" and finding.remedy else ""
            console.print(f"{_MARKS[finding.verdict]} [bold]{finding.what:<13}[/bold] {escape(finding.told)}{remedy}")
    is_bad = any(finding.verdict == "bad" for finding in found)
    return {"findings": [asdict(finding) for finding in found], "exit_code": DataError.exit_code if is_bad else 0}


def _checks(
    recipe: Recipe | None, root: str, address: str | None, ca_file: str | None, only_nodes: bool
) -> Iterator[Iterable[Finding]]:
    if not only_nodes:
        yield here.python()
        yield here.packages()
        yield here.devices()
        yield here.room()
        if recipe is not None:
            yield here.port(recipe.serve.host, recipe.serve.port)
        if address is None:
            yield here.storage(root)
    if address is not None:
        yield _over_http(address, ca_file, root)
    elif only_nodes or not is_private():
        yield _on_cluster(root)


def _on_cluster(root: str) -> Iterator[Finding]:
    """Where RAY_ADDRESS names a cluster, or as a job on one."""
    from workflows.doctor.nodes import nodes

    try:
        with ray_cluster(1):
            yield from nodes(root)
    except DllmError as error:
        yield here.bad("cluster", error, "check RAY_ADDRESS, or unset it")


def _over_http(address: str, ca_file: str | None, root: str) -> Iterator[Finding]:
    """A cluster that only its job server is seen of: the nodes are asked by a job."""
    try:
        server = JobServer(address, ca_file)
        alive = server.nodes()
        labels = [node["labels"].get("dllm-stage", "unlabelled") for node in alive]
        told = f"{server.address} answers: {len(alive)} nodes ({', '.join(sorted(set(labels)))})"
        yield Finding("cluster", "good", told)
        yield _same_ray(server)
        yield from (Finding(**finding) for finding in _asked_by_job(server, root))
    except DllmError as error:
        yield here.bad("cluster", error, "")


def _same_ray(server: JobServer) -> Finding:
    theirs, ours = server.version(), version_of("ray")
    if theirs == ours:
        return Finding("ray", "good", f"{theirs} here and there")
    return Finding("ray", "bad", f"{theirs} there, {ours} here", f"pip install ray=={theirs}, or another image")


def _asked_by_job(server: JobServer, root: str) -> list[dict[str, Any]]:
    name = f"doctor-{time.time_ns()}"
    command = ["python", "-m", "workflows", "doctor", f"storage.root={root}", "--only-nodes", "--output", "json"]
    server.submit(name, shlex.join(command), pack(None).data)
    job = server.wait(name, _JOB_WITHIN_S)
    if job.status not in ENDED:
        server.stop(name)
        raise DataError("doctor", f"its job did not end within {_JOB_WITHIN_S:.0f} s", name)
    for line in reversed(server.logs(name).splitlines()):
        if line.startswith('{"findings"'):
            findings: list[dict[str, Any]] = json.loads(line)["findings"]
            return findings
    raise DataError("doctor", f"its job told nothing ({(job.message or '').splitlines()[:1]})", name)
