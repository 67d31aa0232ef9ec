"""Verbs about machines that are not this one: submit, jobs, doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dllm_core.errors import ConfigError
from workflows.console import Console
from workflows.verb import EndedError, OutputOption, OverridesArg, TargetArg, run_verb

_ACTIONS = ("list", "status", "logs", "stop")
AddressOption = Annotated[
    str, typer.Option(envvar="DLLM_ADDRESS", help="of the head's dashboard, e.g. http://127.0.0.1:8265")
]
CaOption = Annotated[str | None, typer.Option("--ca-file", help="certificates that an https:// address is checked by")]


def submit(
    target: TargetArg,
    overrides: OverridesArg = None,
    address: AddressOption = "",
    verb: Annotated[str, typer.Option(help="run, preprocess, train, evaluate or serve")] = "run",
    placement: Annotated[
        Path | None, typer.Option(help="a file of the section `placement`, e.g. deploy/cluster/placement.yaml")
    ] = None,
    nodes: Annotated[
        Path | None, typer.Option(help="the launcher's file, where an autoscaler may start what is not there yet")
    ] = None,
    include: Annotated[list[Path] | None, typer.Option(help="a file or folder of sources that goes along")] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=value for the job; the cluster keeps it readable")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="return when it is submitted")] = False,
    refuse_busy: Annotated[bool, typer.Option("--refuse-busy", help="exit 3 where the job would wait")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be sent")] = False,
    ca_file: CaOption = None,
    output: OutputOption = "text",
) -> None:
    """Run a recipe on a cluster through its job server: checked here first, followed to its end, with its exit code.

    The same recipe, placement and sources are the same job: one that runs is followed, one that has ended runs anew.
    Ctrl-C leaves the job running. A token is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    """

    def body(console: Console) -> dict[str, Any]:
        from workflows.submit.flow import Submission
        from workflows.submit.flow import submit as send
        from workflows.submit.server import JobServer

        asked = Submission(
            target, tuple(overrides or ()), verb, placement, tuple(include or ()), tuple(env or ()), nodes
        )
        asked.check()
        server = None if dry_run else JobServer(_given(address), ca_file)
        return send(asked, server, console, detach=detach, refuse_busy=refuse_busy)

    _end_as_told(run_verb(body, output))


def jobs(
    action: Annotated[str, typer.Argument(metavar="[list|status|logs|stop]")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="[JOB]")] = None,
    address: AddressOption = "",
    ca_file: CaOption = None,
    output: OutputOption = "text",
) -> None:
    """What was submitted to a cluster: list, status, logs (follows, and ends with the job's exit code), stop."""

    def body(console: Console) -> dict[str, Any]:
        if action not in _ACTIONS:
            raise ConfigError("jobs", "knows no such action", action, f"one of {', '.join(_ACTIONS)}")
        from workflows.submit.flow import jobs as run_action
        from workflows.submit.server import JobServer

        return run_action(action, name, JobServer(_given(address), ca_file), console)

    told = run_verb(body, output)
    if action == "logs":
        _end_as_told(told)


def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[RECIPE-or-RUN]", help="whose storage and port it is")
    ] = None,
    overrides: OverridesArg = None,
    address: AddressOption = "",
    only_nodes: Annotated[bool, typer.Option("--only-nodes", hidden=True)] = False,
    ca_file: CaOption = None,
    output: OutputOption = "text",
) -> None:
    """Is all here that a run needs: packages, devices, room, storage; with --address every node of the cluster too."""

    def body(console: Console) -> dict[str, Any]:
        from workflows.doctor.flow import examine
        from workflows.submit.flow import root_of

        recipe, root = root_of(target, list(overrides or []))
        return examine(recipe, root, console, address=address or None, ca_file=ca_file, only_nodes=only_nodes)

    _end_as_told(run_verb(body, output))


def _given(address: str) -> str:
    if not address:
        remedy = "--address http://HEAD:8265, or DLLM_ADDRESS in the environment"
        raise ConfigError("--address", "missing", remedy=remedy)
    return address


def _end_as_told(told: dict[str, Any]) -> None:
    """As a job did, or with what a verb has found."""
    if told.get("exit_code"):
        raise EndedError(int(told["exit_code"]))
