"""Routing by work: a request goes to the replica that has the least denoiser calls in hand, of those this gateway sent.

Ray Serve's own choice counts requests, and one of 4,096 tokens is a hundred of 40. A gateway knows what it has sent and
what has come back; of other gateways' requests it knows nothing, and all of them spread their own evenly. There is no
cache that requests share, so no replica knows a prompt better than another. One that stands still in a denoiser call is
asked last: until what it has in hand comes back, if ever, it would be sent as much as others have.
"""

import threading
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from dllm_core.decoding.request import Request
from workflows.serve.work import Ledger, predicted_work

STANDS_STILL = "stands_still"  # what a replica tells routers
_num_replicas = 0  # of this process's one router


def num_replicas() -> int:
    """How many there are to send to, as far as this process has been told; 1 where it is none: one will start."""
    return max(1, _num_replicas)


class LeastWorkRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """What a deployment's handle asks for each request."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve once, before the first request."""
        self._ledger, self._lock = Ledger(), threading.Lock()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, the one with the least in hand first, and those that stand still behind all others."""
        with self._lock:
            order = self._ledger.ranked([str(replica.replica_id) for replica in candidate_replicas])
        by_id = {str(replica.replica_id): replica for replica in candidate_replicas}
        ranked = [by_id[name] for name in order]
        return [[one] for one in sorted(ranked, key=lambda replica: bool(replica.routing_stats.get(STANDS_STILL)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve whenever there are others."""
        global _num_replicas
        super().update_replicas(replicas)
        _num_replicas = len(replicas)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count its work until it has come back, whatever ends it."""
        name, number = str(replica_id), pending_request.metadata.internal_request_id
        rows = (row for value in pending_request.args if isinstance(value, tuple) for row in value)
        work = sum(predicted_work(row) for row in rows if isinstance(row, Request))
        with self._lock:
            self._ledger.begin(name, number, work or 1)

        def ended(_: Any) -> None:  # comes from a thread of Ray's
            with self._lock:
                self._ledger.end(number)

        result.add_done_callback(ended)
