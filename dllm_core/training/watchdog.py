"""Watchdog: a rank that makes no step for too long ends itself, and leaves behind where every thread of it stood."""

import contextlib
import faulthandler
import time
from pathlib import Path

_EVERY_S = 0.2


class Watchdog:
    """`beat` at every step; after `seconds` without one, the stacks are in the file and the process exits with 1.

    All ranks of a group wait for one that is stuck, so all end, each with its stacks: the one that stands elsewhere
    than in a collective is the culprit. The clock is a thread in C, which runs even if the interpreter is blocked.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._seconds, self._beaten = path, seconds, -_EVERY_S
        self._file = path.open("w", encoding="utf-8")

    def beat(self) -> None:
        """It is alive. Costs next to nothing: a thread is started at most five times a second."""
        now = time.monotonic()
        if now - self._beaten >= _EVERY_S:
            self._beaten = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def close(self) -> None:
        """No longer watch; without a stack to keep there is no file."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with contextlib.suppress(OSError):  # another rank's are still there
                self._path.parent.rmdir()
