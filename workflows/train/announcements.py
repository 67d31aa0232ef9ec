"""Announcements: what rank 0 tells the driver while it trains, through one small actor that both know by name."""

from typing import Any

import ray
from ray.actor import ActorHandle

Message = dict[str, Any]


class _Mailbox:
    def __init__(self) -> None:
        self._messages: list[Message] = []

    def tell(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken


def open_mailbox() -> ActorHandle:
    """A new mailbox; it dies with the driver that holds the handle."""
    return ray.remote(num_cpus=0)(_Mailbox).remote()


class Announcer:
    """The ranks' end. Telling never waits and never fails a run: a lost announcement costs a line on a screen."""

    def __init__(self, mailbox: ActorHandle) -> None:
        self._mailbox = mailbox

    def tell(self, kind: str, **fields: Any) -> None:
        """Send and forget."""
        self._mailbox.tell.remote({"kind": kind, **fields})
