"""Claims: of all drivers, on whatever machines, that would work below one folder of a store, one at a time does.

    with claimed(store, "runs/x/.claims", place) as is_lost: ...

A claim is an object, `<folder>/<generation>`. The newest generation counts; the next one is made by a conditional PUT,
which one writer wins. Who has it rewrites it every `HEARTBEAT_S`; one that a watcher has seen unchanged for `LEASE_S`
is taken over: no clock is compared with another. A generation comes once, so what a loser writes late does not count.
"""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dllm_core.errors import DataError
from dllm_core.storage.store import Store

HEARTBEAT_S, LEASE_S = 10.0, 30.0
_LOOKS = 4  # of a watcher in the time of a heartbeat
_GENERATION = re.compile(r"\d{8}")
_LOST_SIGNAL = signal.SIGUSR1  # SIGINT is ignored by what a shell has put in the background
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(store: Store, folder: str, place: str) -> Iterator[Callable[[], bool]]:
    """Hold the claim for a block; yields whether another has taken it since, after which nothing is to be written.

    Raises DataError, named by `place`, if another holds it (known within a heartbeat), and at the end of a block that
    has lost it. The main thread is told at once, by a KeyboardInterrupt; another one finds out at the end.
    Takes 3 requests, 5 where another has been, 3 a heartbeat and one for the release.
    """
    claim = Claim(store, folder, place)
    claim.acquire()
    try:
        with _kept(claim):
            yield lambda: claim.taken_by is not None
    finally:
        claim.release()
        if claim.taken_by is not None:
            problem = f"another dllm has taken this run over ({claim.taken_by}), as this one gave no sign"
            raise DataError(place, problem, remedy="wait for it, or end it")


class Claim:
    """One driver's part. `taken_by`: who has it by now, if that is another."""

    def __init__(self, store: Store, folder: str, place: str) -> None:
        self._store, self._folder, self._place = store, folder, place
        self._holder = {**_here(), "pid": os.getpid(), "started": _started(os.getpid()), "nonce": uuid.uuid4().hex}
        self._generation, self._beats = 0, 0
        self.taken_by: str | None = None

    def acquire(self) -> None:
        """Take it where nobody has it. Of another's it is watched whether it beats; that may last `LEASE_S`.

        Raises DataError if it does.
        """
        seen: tuple[int, bytes] | None = None
        since = 0.0
        while True:
            begun = time.monotonic()
            found = newest, data = self._look()
            holder = _parsed(data)
            is_free = newest == 0 or holder.get("is_released") is True or _is_gone(holder)
            if is_free or found == seen:
                is_free = is_free or begun - since >= LEASE_S
            elif seen is None:
                said = "%s: claimed by another dllm (%s), which is taken over if it is silent for %g s"
                _LOG.warning(said, self._place, _named(holder), LEASE_S)
            else:
                problem = f"another dllm is at work on this run ({_named(holder)})"
                raise DataError(self._place, problem, remedy="wait for it, or end it")
            if is_free and self._win(newest + 1):
                return
            if found != seen:
                seen, since = found, time.monotonic()
            if not is_free:
                time.sleep(HEARTBEAT_S / _LOOKS)

    def beat(self) -> None:
        """Show that this driver lives, or find that another has taken over. DataError: neither could be done."""
        newest, data = self._look()
        holder = _parsed(data)
        if newest > self._generation or (newest == self._generation and holder.get("nonce") != self._holder["nonce"]):
            self.taken_by = _named(holder)
        else:
            self._beats += 1
            self._store.put(self._key(self._generation), self._content(is_released=False))

    def release(self) -> None:
        """Let the next one have it at once. The object stays, so that its generation is not used again."""
        if self.taken_by is None:
            with contextlib.suppress(DataError):  # then it is taken over
                self._store.put(self._key(self._generation), self._content(is_released=True))

    def _win(self, generation: int) -> bool:
        """Make a generation. One that had come and gone since this driver looked is not the newest and not won."""
        self._generation = generation
        if not self._store.put_if_absent(self._key(generation), self._content(is_released=False)):
            return False
        generations = self._generations()
        if max(generations, default=0) != generation:
            return False
        for older in generations[:-1]:
            with contextlib.suppress(DataError):
                self._store.delete(self._key(older))
        return True

    def _look(self) -> tuple[int, bytes]:
        """The newest generation, 0 where there is none, and what stands in it: nothing if it goes just now."""
        generations = self._generations()
        if not generations:
            return 0, b""
        newest, key = generations[-1], self._key(generations[-1])
        try:
            return newest, self._store.read(key)
        except DataError:
            if self._store.exists(key):
                raise
            return newest, b""

    def _generations(self) -> list[int]:
        names = [item.key.removeprefix(f"{self._folder}/") for item in self._store.list(self._folder)]
        return sorted(int(name) for name in names if _GENERATION.fullmatch(name))

    def _key(self, generation: int) -> str:
        return f"{self._folder}/{generation:08d}"

    def _content(self, *, is_released: bool) -> bytes:
        return json.dumps({**self._holder, "beats": self._beats, "is_released": is_released}).encode()


@contextlib.contextmanager
def _kept(claim: Claim) -> Iterator[None]:
    """Beat in a thread; if the claim is lost, interrupt the block."""
    ended = threading.Event()
    with _interruptible() as interrupt:

        def keep() -> None:
            while claim.taken_by is None and not ended.wait(HEARTBEAT_S):
                with contextlib.suppress(DataError):  # it may pass before the next one
                    claim.beat()
            if claim.taken_by is not None:
                interrupt()

        beating = threading.Thread(target=keep, name="claim", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join(timeout=HEARTBEAT_S)  # one that lands after the release costs the next driver its patience


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Yields how another thread raises KeyboardInterrupt in the block: the one exception that Ray lets through.

    Outside the main thread, which alone gets signals, that does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    turn, is_over, block = threading.Lock(), False, threading.get_ident()

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def interrupt() -> None:
        with turn:
            if not is_over:
                signal.pthread_kill(block, _LOST_SIGNAL)

    before = signal.signal(_LOST_SIGNAL, raise_interrupt)
    try:
        yield interrupt
    finally:
        try:
            with turn:
                is_over = True
        finally:
            signal.signal(_LOST_SIGNAL, before)


def _here() -> dict[str, Any]:
    """Whose processes are seen from here: those of a machine since it was started, and of a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = None
    return {"host": socket.gethostname(), "machine": machine}


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was: one that got its id later has another. 0: it has
    ended and nobody has asked how; None: that cannot be seen.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process that holds it is known to have ended. One whose processes are not seen from here is not."""
    here = _here()
    if here["machine"] is None or any(holder.get(name) != value for name, value in here.items()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    started = _started(holder["pid"])
    return started is not None and started != holder["started"]


def _parsed(data: bytes) -> dict[str, Any]:
    """A claim's fields; none of what is no claim."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    return f"{holder.get('host', 'an unknown host')}, pid {holder.get('pid', 'unknown')}"
