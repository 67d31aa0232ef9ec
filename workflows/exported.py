"""What a run shows a cluster's Prometheus while it works, through Ray's agent on the driver's node.

A name here is exported as `ray_<name>`, a counter as `ray_<name>_total`, each with the label `run`. What the endpoint
shows is in serve/metrics.py.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

GAUGES = {
    "dllm_preprocess_tasks": "Tasks of the step in hand (label `step`: signatures, tokens, noise)",
    "dllm_preprocess_tasks_done": "Those that are done (label `step`)",
    "dllm_preprocess_documents": "Documents in, when the corpus is finished",
    "dllm_preprocess_quarantined": "Records in quarantine, when the corpus is finished",
    "dllm_preprocess_tokens": "Tokens to train on, when the corpus is finished",
    "dllm_train_step": "Steps taken",
    "dllm_train_steps": "Steps to take",
    "dllm_train_loss": "Of the last steps: nats a token, of preferences a pair",
    "dllm_train_heldout_nats": "Nats a token, or their bound, on held-out rows",
    "dllm_train_grad_norm": "Before clipping",
    "dllm_train_learning_rate": "Of the last step",
    "dllm_train_tokens_per_second": "Over all workers",
    "dllm_train_mfu_ratio": "Model FLOPs over the devices' peak",
    "dllm_train_data_wait_ratio": "Share of the time that waits for data",
    "dllm_train_save_wait_ratio": "Share of the time that waits for checkpoints",
    "dllm_train_eta_seconds": "To the end of the budget",
    "dllm_train_workers": "Devices that train",
}
COUNTERS = {
    "dllm_train_starts": "Starts of the workers: more than one where some died",
    "dllm_train_checkpoints": "Checkpoints committed",
    "dllm_train_checkpoint_failures": "Checkpoints that could not be written",
    "dllm_train_checkpoints_refused": "Damaged checkpoints that were passed over",
    "dllm_train_steps_skipped": "Steps whose loss or gradient was no number",
    "dllm_train_stalls": "Workers that stood still and left their stacks",
}
_OF_RECORD = {
    "step": "step",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "tokens_per_s": "tokens_per_second",
    "mfu": "mfu_ratio",
    "data_wait": "data_wait_ratio",
    "save_wait": "save_wait_ratio",
    "eta_s": "eta_seconds",
}
_OF_EVENT = {
    "started": "dllm_train_starts",
    "checkpoint": "dllm_train_checkpoints",
    "checkpoint_failed": "dllm_train_checkpoint_failures",
    "checkpoint_refused": "dllm_train_checkpoints_refused",
    "step_skipped": "dllm_train_steps_skipped",
    "stalled": "dllm_train_stalls",
}


class Exported:
    """The figures of one run. They harm nothing: where Ray takes none, none are shown."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}

    def progress(self, step: str, done: float, total: float) -> None:
        """Of preprocessing: `step` may have figures behind two spaces, as the screen has them."""
        named = {"step": step.split("  ")[0]}
        self._set("dllm_preprocess_tasks_done", done, named)
        self._set("dllm_preprocess_tasks", total, named)

    def corpus(self, documents: int, quarantined: int, tokens: int) -> None:
        """A corpus is finished."""
        self._set("dllm_preprocess_documents", documents)
        self._set("dllm_preprocess_quarantined", quarantined)
        self._set("dllm_preprocess_tokens", tokens)

    def step(self, record: Mapping[str, Any], steps: int, workers: int) -> None:
        """A record of metrics.jsonl."""
        for field, name in _OF_RECORD.items():
            self._set(f"dllm_train_{name}", record[field])
        if record["heldout"] is not None:
            self._set("dllm_train_heldout_nats", record["heldout"]["nats"])
        self._set("dllm_train_steps", steps)
        self._set("dllm_train_workers", workers)

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Something that a training has announced; where it starts, it stands at a step before it has taken one."""
        if kind == "started":
            self._set("dllm_train_step", values["step"])
        if kind in _OF_EVENT:
            with contextlib.suppress(Exception):  # whatever a metrics agent may raise, a run goes on
                self._metric(_OF_EVENT[kind], ()).inc(1, {"run": self._run})

    def _set(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        more = labels or {}
        with contextlib.suppress(Exception):
            self._metric(name, tuple(more)).set(float(value), {"run": self._run, **more})

    def _metric(self, name: str, labels: tuple[str, ...]) -> Any:
        if name not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind, told = (Counter, COUNTERS) if name in COUNTERS else (Gauge, GAUGES)
            self._made[name] = kind(name, description=told[name], tag_keys=("run", *labels))
        return self._made[name]
