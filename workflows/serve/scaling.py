"""Autoscaling by work: Ray Serve's policy around `work.Scaler`, and what the replicas report for it."""

import time
from typing import Any

from workflows.serve.work import Scaler, ScalingRule


class ByWork:
    """A Ray Serve autoscaling policy: (context) -> (replicas, state). Its parameters are those of ScalingRule.

    With no replica there is none to report work: a request that waits for the first one counts as work of one.
    """

    def __init__(self, target: float, up_after_s: float, down_after_s: float) -> None:
        self._target, self._up_after_s, self._down_after_s = target, up_after_s, down_after_s
        self._scaler: Scaler | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """What Ray Serve asks every time it looks."""
        rule = ScalingRule(
            minimum=context.capacity_adjusted_min_replicas,
            maximum=context.capacity_adjusted_max_replicas,
            target=self._target,
            up_after_s=self._up_after_s,
            down_after_s=self._down_after_s,
        )
        if self._scaler is None or self._scaler.rule != rule:
            self._scaler = Scaler(rule)
        told = context.aggregated_metrics or {}
        work, busy = (float(sum(told.get(name, {}).values())) for name in ("work", "busy"))
        current = context.target_num_replicas
        if not context.current_num_replicas and context.total_num_requests:
            work = max(work, 1.0)
        return self._scaler.decide(context.current_time or time.time(), current, work, busy), {}
