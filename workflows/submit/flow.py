"""The verbs that speak to a cluster's job server: submit, and list, status, logs and stop of what was submitted.

A job's name is its recipe's and a fingerprint of all that it is: verb, recipe, placement, sources. Submitted again, one
that has not ended is followed; one that has ended, well or not, runs anew: its stages skip what is complete by then.
"""

import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from dllm_core.config.fingerprint import fingerprint
from dllm_core.config.overrides import apply_overrides, parse_yaml, read_recipe
from dllm_core.data.corpus import HubSource
from dllm_core.errors import ConfigError, DataError
from dllm_core.storage.store import open_store
from workflows.console import Console
from workflows.placement import PlacementConfig
from workflows.recipe import Recipe, StorageConfig, load_recipe
from workflows.submit.demand import VERBS, Need, busy, check_room, live, needs, startable
from workflows.submit.package import RECIPE, Package, pack
from workflows.submit.server import ENDED, JobServer
from workflows.target import is_run, read_target_recipe

_STOP_WITHIN_S = 30  # a training saves within 25 s of SIGTERM; Ray's own patience is 3 s
_ENDS_WITHIN_S = 10  # after that: it is killed, and the server is told
_RUN, _FINGERPRINT = "dllm-run", "dllm-fingerprint"
_REMEDY_OF_ROOT = "storage.root=s3://bucket/prefix, or the absolute path of a folder that all nodes see"
_FAILED, _STOPPED = 3, 143
_ALONE = re.compile(r"[\w.]+=")  # an override where a recipe might stand


@dataclass(frozen=True)
class Submission:
    """What is to run where. environment: variables that the job gets, `NAME` or `NAME=value`."""

    target: str
    overrides: tuple[str, ...] = ()
    verb: str = "run"
    placement: Path | None = None
    include: tuple[Path, ...] = ()
    environment: tuple[str, ...] = ()
    nodes: Path | None = None

    def check(self) -> None:
        """Refuse a verb that no job is."""
        if self.verb not in VERBS:
            raise ConfigError("--verb", "is nothing that a job does", self.verb, f"one of {', '.join(VERBS)}")


@dataclass(frozen=True)
class Job:
    """A submission with all that it needs; `run`: of two jobs with the same that have not ended, one is refused. paths:
    of the recipe, on a file system that all nodes must see.
    """

    name: str
    entrypoint: str
    package: Package
    run: str
    needs: list[Need]
    environment: dict[str, str]
    paths: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of all that decides what the job does."""
        return fingerprint([self.entrypoint, self.package.digest, self.environment])


def prepare(asked: Submission) -> Job:
    """The job of a submission. Raises ConfigError for whatever can be refused without a cluster."""
    asked.check()
    environment = dict(_variable(text) for text in asked.environment)
    overrides = [*_placement_overrides(asked.placement), *asked.overrides]
    if is_run(asked.target):
        return _of_run(asked, overrides, environment)
    recipe = load_recipe(Path(asked.target), overrides)
    _check_root(apply_overrides(read_recipe(Path(asked.target)), overrides))
    command = ["python", "-m", "workflows", asked.verb, RECIPE]
    package = pack(recipe.to_yaml(), asked.include)
    wanted = needs(asked.verb, recipe.placement)
    entrypoint, run = shlex.join(command), _run_identity(recipe, recipe.name)
    return Job(recipe.name, entrypoint, package, run, wanted, environment, _local_paths(recipe))


def submit(
    asked: Submission, server: JobServer | None, console: Console, *, detach: bool, refuse_busy: bool
) -> dict[str, Any]:
    """Send a job and follow it to its end; its exit code is in the result. Without a server: what would be sent."""
    job, started = prepare(asked), startable(asked.nodes) if asked.nodes else ()
    if server is None:
        return _say_package(job, console)
    waiting = check_room(job.needs, live(server.nodes()), started)
    for need in waiting:
        console.print(f"  nodes must be started first: {escape(need.stage)} needs {escape(str(need))}")
    if lines := busy(job.needs, server.usage()):
        if refuse_busy:
            raise DataError("--address", f"the cluster is full: {'; '.join(lines)}", server.address, "submit it later")
        console.print(f"  [yellow]the cluster is busy, the job waits:[/yellow] {escape('; '.join(lines))}")
    name, known = _named(job, server)
    if known is None:
        _say_left_out(job, console)
        _say_paths(job, console)
        try:
            _send(job, name, server)
        except DataError:  # an answer that was lost, or the same command elsewhere, a moment ago
            name, known = _named(job, server)
            if known is None:
                raise
    if known is None:
        size = f"{len(job.package.files)} files, {len(job.package.data) / 1e3:.0f} kB"
        console.done("submit", f"[bold]{escape(name)}[/bold] to {escape(server.address)}: {size}")
    else:
        console.skipped("submit", f"{escape(name)} runs already")
    say = f"dllm jobs logs {name} --address {server.address}"
    if detach:
        console.print(f"  follow it: [bold]{escape(say)}[/bold]")
        return {"job": name, "status": "RUNNING", "exit_code": 0}
    try:
        return follow(name, server, console)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended who reads
            sys.stderr.write(f"\nthe job goes on: {say}; to end it: {say.replace('logs', 'stop', 1)}\n")
        raise


def follow(name: str, server: JobServer, console: Console) -> dict[str, Any]:
    """Write a job's lines until it has ended."""

    def write(text: str) -> None:
        console.rich.file.write(text)
        console.rich.file.flush()

    ended = server.follow(name, write)
    result = _result(ended)
    if ended.status == "SUCCEEDED":
        console.done("job", f"{escape(name)} is done")
    else:
        console.stopped("job")
        sys.stderr.write(f"dllm: job {name}: {_why(ended)}\n")
    return result


def jobs(action: str, name: str | None, server: JobServer, console: Console) -> dict[str, Any]:
    """One action on what was submitted."""
    if action == "list":
        return _say_jobs(server.jobs(), console)
    if name is None:
        raise ConfigError("job", "missing", remedy=f"dllm jobs {action} NAME; `dllm jobs list` names them")
    if action == "logs":
        return follow(name, server, console)
    if action == "status":
        job = server.job(name)
        _say_jobs([job], console)
        return _result(job)
    was_running = server.stop(name)
    job = server.wait(name, _STOP_WITHIN_S + _ENDS_WITHIN_S)
    if job.status not in ENDED:
        remedy = f"its node may be lost: dllm doctor --address {server.address} says which are there"
        raise DataError("job", f"was told to end, and is {job.status} still", name, remedy)
    console.done("stop", f"{escape(name)} " + ("has ended" if was_running else f"had ended: {job.status}"))
    return {**_result(job), "exit_code": 0}


def root_of(target: str | None, overrides: list[str]) -> tuple[Recipe | None, str]:
    """The recipe and the storage root that a command line means; nothing but `storage.root=...` may stand alone."""
    if target is not None and (Path(target).exists() or not _ALONE.match(target)):
        recipe, _ = read_target_recipe(target, overrides)
        return recipe, recipe.storage.root
    values = apply_overrides({}, overrides if target is None else [target, *overrides])
    for name in values:
        if name != "storage":
            raise ConfigError(name, "is a recipe's, and none is named", remedy="only storage.root=... stands alone")
    return None, StorageConfig.checked(values.get("storage", {}), "storage").root


def _of_run(asked: Submission, overrides: list[str], environment: dict[str, str]) -> Job:
    """A run's folder holds its own recipe, which the job reads where it is."""
    if not asked.target.startswith("s3://") and not Path(asked.target).is_absolute():
        raise ConfigError("run", "is a folder of this machine", asked.target, "an absolute path that all nodes see")
    recipe, run = read_target_recipe(asked.target, overrides)
    own, _ = read_target_recipe(asked.target, ())  # an override may say that the corpus was moved, not what the run is
    assert run is not None
    entrypoint = shlex.join(["python", "-m", "workflows", asked.verb, asked.target, *overrides])
    package, wanted = pack(None, asked.include), needs(asked.verb, recipe.placement)
    identity = _run_identity(own, run.name.rpartition("-")[0])
    return Job(run.name, entrypoint, package, identity, wanted, environment)


def _run_identity(recipe: Recipe, name: str) -> str:
    """Of the run that a recipe makes, as far as that is known where its corpus may not be seen: a corpus that was moved
    makes another identity of the same run, which the run's own lock then guards.
    """
    url = recipe.storage.root
    root = open_store("storage.root", url).url if url.startswith("s3://") else str(Path(url).resolve())
    sections = [recipe.corpus_fingerprint([]), recipe.run_fingerprint("")]
    return fingerprint([root, name, *sections, _corpus_paths(recipe)])


def _placement_overrides(path: Path | None) -> list[str]:
    """A file of the section, as overrides which those of the command line go over."""
    if path is None:
        return []
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--placement", f"cannot be read ({error})", str(path)) from None
    PlacementConfig.checked(values, "placement")
    return [
        f"placement.{stage}.{name}={json.dumps(value)}"
        for stage, section in values.items()
        for name, value in section.items()
    ]


def _check_root(values: dict[str, Any]) -> None:
    """Refuse a storage root that means another folder, or none, on every node; in the recipe it is absolute already."""
    root = StorageConfig.checked(values.get("storage", {}), "storage").root
    if not (root.startswith("s3://") or Path(root).is_absolute()):
        raise ConfigError("storage.root", "is a folder of this machine alone", root, _REMEDY_OF_ROOT)


def _local_paths(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe reads or writes that is neither on S3 nor made by the package."""
    named = [recipe.storage.root, recipe.tokenizer.path, None if recipe.start is None else recipe.start.run]
    named += _corpus_paths(recipe)
    return tuple(path for path in named if path is not None and Path(path).is_absolute())


def _corpus_paths(recipe: Recipe) -> list[str]:
    """Where its text is, but for a hub's, which a section names."""
    return [source.path for source in recipe.corpus.all_sources if not isinstance(source, HubSource)]


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ConfigError("--env", "is NAME, which is set here, or NAME=value", text)
    if not equals and name not in os.environ:
        raise ConfigError("--env", "is not set here", name, f"{name}=value")
    return name, value if equals else os.environ[name]


def _named(job: Job, server: JobServer) -> tuple[str, Any | None]:
    """A name, and the job that runs under it already. DataError where another job is at the same run."""
    submitted = server.jobs()
    same = [known for known in submitted if (known.metadata or {}).get(_FINGERPRINT) == job.fingerprint]
    for known in submitted:
        is_at_it = known.status not in ENDED and (known.metadata or {}).get(_RUN) == job.run
        if is_at_it and known not in same:
            remedy = f"follow it, or end it: dllm jobs stop {known.submission_id} --address {server.address}"
            raise DataError("job", "another job is at this run", known.submission_id, remedy)
    for known in same:
        if known.status not in ENDED:
            return known.submission_id, known
    numbers = [int(number) for known in same if (number := known.submission_id.rpartition("-")[2]).isdecimal()]
    return f"{job.name}-{job.fingerprint}-{max(numbers, default=0) + 1}", None  # some may have been deleted


def _send(job: Job, name: str, server: JobServer) -> None:
    environment = {**job.environment, "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WITHIN_S), "PYTHONUNBUFFERED": "1"}
    metadata = {_FINGERPRINT: job.fingerprint, _RUN: job.run}
    server.submit(name, job.entrypoint, job.package.data, environment, metadata)


def _say_paths(job: Job, console: Console) -> None:
    if job.paths:
        console.print(f"  every node must see {escape(', '.join(job.paths))}")


def _say_left_out(job: Job, console: Console) -> None:
    if job.package.left_out:
        shown = ", ".join(job.package.left_out[:5]) + (", ..." if len(job.package.left_out) > 5 else "")
        console.print(f"  left out as data, secrets or links: {escape(shown)}")


def _say_package(job: Job, console: Console) -> dict[str, Any]:
    """What a dry run shows."""
    console.print(f"would run [bold]{escape(job.entrypoint)}[/bold]")
    console.print(f"  with {len(job.package.files)} files, {len(job.package.data) / 1e3:.0f} kB")
    _say_left_out(job, console)
    for need in job.needs:
        console.print(f"  {need.stage:<11} {escape(str(need))}")
    _say_paths(job, console)
    return {
        "paths": list(job.paths),
        "job": f"{job.name}-{job.fingerprint}",
        "entrypoint": job.entrypoint,
        "files": list(job.package.files),
        "left_out": list(job.package.left_out),
        "bytes": len(job.package.data),
        "needs": [{"stage": need.stage, "at_once": need.at_once, **need.demand.model_dump()} for need in job.needs],
    }


def _say_jobs(found: Sequence[Any], console: Console) -> dict[str, Any]:
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "started", "seconds", "what it runs"):
        table.add_column(column, overflow="fold")
    told = []
    for job in found:
        begun, ended = job.start_time, job.end_time
        seconds = None if begun is None else ((ended or time.time() * 1000) - begun) / 1000
        when = "" if begun is None else f"{datetime.fromtimestamp(begun / 1000, UTC):%Y-%m-%d %H:%M}"
        shown = "" if seconds is None else f"{seconds:.0f}"
        table.add_row(escape(job.submission_id), job.status, when, shown, escape(job.entrypoint))
        told.append({**_result(job), "seconds": seconds, "entrypoint": job.entrypoint})
    if told:
        console.rich.print(table)
    else:
        console.print("no job was submitted")
    return {"jobs": told}


def _result(job: Any) -> dict[str, Any]:
    """exit_code: the job's own, as a shell would have it; 3 where it never ran, 143 where it was stopped."""
    code = job.driver_exit_code
    if job.status == "SUCCEEDED":
        code = 0
    elif job.status == "STOPPED":
        code = _STOPPED if code in (None, 0) else code
    elif job.status == "FAILED":
        code = _FAILED if code in (None, 0) else code
    shell_code = None if code is None else code if code >= 0 else 128 - code
    return {"job": job.submission_id, "status": str(job.status), "exit_code": shell_code}


def _why(job: Any) -> str:
    if job.status == "STOPPED":
        return "was stopped; what is complete is kept, submit it again to go on"
    if job.driver_exit_code:
        return f"ended with exit code {job.driver_exit_code}; its own lines are above"
    text = (job.message or "failed").strip().splitlines()
    return text[0] if text else "failed"
