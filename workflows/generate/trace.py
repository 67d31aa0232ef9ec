"""Traces: what a request was and what every call did to it, one JSON object a line, enough to make it again.

A replay decodes the same request and compares each call's positions and tokens. The bundle must be the one that the
trace names; another device, type or torch may round otherwise, so a difference is told with both.
"""

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.config.fingerprint import fingerprint
from dllm_core.decoding.answer import Answer, answer_of
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import ConfigError, DataError, RequestError

FORMAT = 1
Commit = tuple[int, int, float]  # position in the row, token, confidence
_REQUEST, _CALLS = TypeAdapter(Request), TypeAdapter(list[list[Commit]])


@dataclass(frozen=True)
class Decoded:
    """A request, its answer, and what each call committed."""

    request: Request
    answer: Answer
    calls: list[list[Commit]]


def decode(engine: Engine, requests: Mapping[str, Request]) -> Iterator[Decoded]:
    """Decode as one batch, as the engine has room; in the order given, each as soon as those before it are done.

    requests: by their places, which are told where one is refused; then none is decoded.
    """
    rows: dict[int, int] = {}
    for i, (place, request) in enumerate(requests.items()):
        try:
            rows[engine.add(request)] = i
        except RequestError as error:
            raise error.below(place) from None
    calls: dict[int, list[list[Commit]]] = {row: [] for row in rows}
    done: dict[int, Decoded] = {}
    told = 0
    while updates := engine.step():
        for update in updates:
            calls[update.row].append(update.commits)
            if update.state.finish_reason is not None:
                answer = answer_of(update.state, engine.eos_id)
                done[rows[update.row]] = Decoded(update.state.request, answer, calls.pop(update.row))
        while told in done:
            yield done.pop(told)
            told += 1


def check_writable(path: Path) -> None:
    """Refuse a place for traces where none can be written, which should be known before anything is decoded."""
    if _is_special(path):
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        scratch = _scratch(path)
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise DataError(str(path), f"cannot write the trace ({error})") from None


def write_traces(path: Path, decoded: Iterable[Decoded], bundle: ModelBundle, engine: Engine) -> None:
    """One line for each; the file is whole or not there. A pipe or a device is written to."""
    head = {"format": FORMAT, "bundle_digest": _digest(bundle), "made_by": _maker(engine)}
    lines = [
        json.dumps({**head, "request": _plain(one.request), "tokens": one.answer.tokens, "calls": one.calls})
        for one in decoded
    ]
    scratch = path if _is_special(path) else _scratch(path)
    try:
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if scratch != path:
            scratch.replace(path)
    except OSError as error:
        raise DataError(str(path), f"cannot write the trace ({error})") from None


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_special(path: Path) -> bool:
    """Whether a file would take the place of what is none: root may put one where /dev/null was."""
    return path.exists() and not path.is_file() and not path.is_dir()


def replay(path: Path, engine: Engine, bundle: ModelBundle) -> dict[str, Any]:
    """Decode what a trace file holds and compare. Raises DataError at the first difference.

    What went through: traces, calls, and the largest difference of a confidence.
    """
    records = [_record(path, i, line) for i, line in enumerate(_lines(path)) if line.strip()]
    if not records:
        raise DataError(str(path), "holds no trace")
    for i, record in enumerate(records):
        if record["bundle_digest"] != _digest(bundle):
            problem = f"was made with another bundle, {record['bundle_digest']}"
            raise DataError(f"{path}:{i + 1}", problem, _digest(bundle), "replay it on the run that made it")
    largest = 0.0
    made_again = list(decode(engine, {f"{path}:{i + 1}": _request(path, i, one) for i, one in enumerate(records)}))
    for i, (record, decoded) in enumerate(zip(records, made_again, strict=True)):
        largest = max(largest, _compared(f"{path}:{i + 1}", record, decoded, engine))
    calls = sum(len(decoded.calls) for decoded in made_again)
    return {"traces": len(records), "calls": calls, "identical": True, "max_confidence_difference": largest}


def _compared(place: str, record: dict[str, Any], decoded: Decoded, engine: Engine) -> float:
    """The largest difference of a confidence; DataError where a call committed something else."""
    largest, none = 0.0, list[Commit]()
    for number, (old, new) in enumerate(itertools.zip_longest(record["calls"], decoded.calls, fillvalue=none), 1):
        if [commit[:2] for commit in old] != [commit[:2] for commit in new]:
            was_by, is_by = (", ".join(map(str, by.values())) for by in (record["made_by"], _maker(engine)))
            remedy = f"it was made by {was_by}; this is {is_by}"
            raise DataError(place, f"call {number} commits other tokens than the trace says", remedy=remedy)
        largest = max([largest, *(abs(a[2] - b[2]) for a, b in zip(old, new, strict=True))])
    if record["tokens"] != decoded.answer.tokens:
        raise DataError(place, "the answer is another than the trace says")
    return largest


def _maker(engine: Engine) -> dict[str, str]:
    """What may round otherwise elsewhere."""
    weight = engine.denoiser.embed.weight
    return {"torch": f"torch {torch.__version__}", "device": weight.device.type, "dtype": str(weight.dtype)}


def _plain(request: Request) -> dict[str, Any]:
    return {**asdict(request), "config": request.config.model_dump(mode="json")}


def _request(path: Path, i: int, record: dict[str, Any]) -> Request:
    place, given = f"{path}:{i + 1}", record["request"]
    if not isinstance(given, dict) or not given.keys() <= {one.name for one in fields(Request)}:
        raise ConfigError(place, "is no request of this version", given)
    config = DecodeConfig.checked(given.get("config"), f"{place}: request.config")
    try:
        return _REQUEST.validate_python({**given, "config": config})
    except ValidationError as error:
        raise ConfigError(place, f"is no request of this version ({_first(error)})") from None


def _record(path: Path, i: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{i + 1}", f"is not JSON ({error})") from None
    wanted = {"format", "bundle_digest", "made_by", "request", "tokens", "calls"}
    if not isinstance(record, dict) or not wanted <= record.keys():
        raise DataError(f"{path}:{i + 1}", "is no trace", remedy="`dllm generate RUN --trace FILE` writes one")
    if record["format"] != FORMAT:
        raise DataError(f"{path}:{i + 1}", "is a trace of another format", record["format"], f"{FORMAT} is known")
    try:
        return {**record, "calls": _CALLS.validate_python(record["calls"])}
    except ValidationError as error:
        raise DataError(f"{path}:{i + 1}", f"is no trace (calls: {_first(error)})") from None


def _first(error: ValidationError) -> str:
    """Where, and what, of what is wrong first."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read ({error})") from None


def _digest(bundle: ModelBundle) -> str:
    """Of all that decides a token, and so not of decoding defaults and lineage."""
    said = bundle.manifest
    digests = {name: entry.sha256 for name, entry in said.files.items()}
    return fingerprint(
        {"files": digests, "process": said.process, "objective": said.objective, "block": said.block_length}
    )
