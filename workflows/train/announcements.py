"""Announcements: what rank 0 tells the driver while it trains, through one small actor that both know by name."""

import threading
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Message = dict[str, Any]
DIVERGED = "diverged"
"""The kind of message by which a rank ends for good, with its `error`: the driver raises it and shows no such event."""


_ASK_EVERY_S = 0.5


class _Mailbox:
    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._must_stop = False

    def stop(self) -> None:
        self._must_stop = True

    def must_stop(self) -> bool:
        return self._must_stop

    def tell(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken


def open_mailbox() -> ActorHandle:
    """A new mailbox on the driver's node; it dies with the driver that holds the handle.

    On another, that node's loss would end a training which it has no part in.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()


class StopWatch:
    """Asks the driver twice a second, in a thread, whether the run shall save and end; a step only reads the answer."""

    def __init__(self, mailbox: ActorHandle) -> None:
        self._mailbox, self._told = mailbox, threading.Event()
        threading.Thread(target=self._ask, name="stop-watch", daemon=True).start()

    def __call__(self) -> bool:
        """Whether the driver said so."""
        return self._told.is_set()

    def _ask(self) -> None:
        while not self._told.wait(_ASK_EVERY_S):
            try:
                if ray.get(self._mailbox.must_stop.remote()):
                    self._told.set()
            except ray.exceptions.RayError:  # the driver is gone, and this process will be
                return


class Announcer:
    """The ranks' end. Telling never waits and never fails a run: a lost announcement costs a line on a screen."""

    def __init__(self, mailbox: ActorHandle) -> None:
        self._mailbox = mailbox

    def tell(self, kind: str, **fields: Any) -> None:
        """Send and forget."""
        self._mailbox.tell.remote({"kind": kind, **fields})

    def tell_surely(self, kind: str, **fields: Any) -> None:
        """Send and wait until it has arrived. Raises Ray's error where the driver is gone."""
        ray.get(self._mailbox.tell.remote({"kind": kind, **fields}))
