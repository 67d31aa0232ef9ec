"""Receipts and events of a run: `stages/<stage>.json` says what a stage made from which inputs."""

import datetime
from typing import Any

from dllm_core.checkpoints.run_dir import JsonLines, RunDir


class Receipts:
    """What is done. A stage whose receipt names the same inputs is not run again."""

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def read(self, stage: str, inputs: str) -> dict[str, Any] | None:
        """The stage's result if it was made from these inputs."""
        receipt = self._run.read_json(f"stages/{stage}.json")
        if not isinstance(receipt, dict) or receipt.get("inputs") != inputs:
            return None
        result: dict[str, Any] = receipt["result"]
        return result

    def take_back(self, stage: str) -> None:
        """Before what a stage has made is written over: a kill in the middle must not pass for the old result."""
        self._run.store.delete(self._run.key(f"stages/{stage}.json"))

    def write(self, stage: str, inputs: str, result: dict[str, Any]) -> None:
        """Written when the stage is done, never before."""
        self._run.write_json(f"stages/{stage}.json", {"inputs": inputs, "result": result})


class Events:
    """`events.jsonl`: what happened to the run, for people and dashboards. Only the driver writes it."""

    def __init__(self, run: RunDir) -> None:
        self._log = JsonLines(run, "events.jsonl")

    def add(self, stage: str, event: str, **fields: Any) -> None:
        """One line, with the time in UTC."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._log.append({"time": now, "stage": stage, "event": event, **fields})

    def sync(self) -> None:
        """Make it durable."""
        self._log.sync()
