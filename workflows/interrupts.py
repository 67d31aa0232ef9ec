"""Ctrl-C and SIGTERM: both unwind the stack, so that every block cleans up; then one line and an exit code.

Standard library only: it stands before anything slow is imported.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """SIGTERM: ends a verb as Ctrl-C does, with its own exit code. happened: one was raised in this process."""

    happened = False


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack. Ray takes the signal over when it starts: call this again after."""

    def raise_interrupted(number: int, frame: FrameType | None) -> None:
        Interrupted.happened = True
        raise Interrupted

    signal.signal(signal.SIGTERM, raise_interrupted)


@contextlib.contextmanager
def first_sigterm_asks() -> Iterator[threading.Event]:
    """Within the block the first SIGTERM only sets the event; a second one ends it as any other would.

    Outside the main thread, which alone gets signals, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        end_on_sigterm()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code_of(signalled: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as shells count."""
    return 143 if isinstance(signalled, Interrupted) else 130


def say_interrupted(signalled: KeyboardInterrupt) -> None:
    """The one line."""
    what = "terminated" if isinstance(signalled, Interrupted) else "interrupted"
    with contextlib.suppress(OSError):  # who reads, such as `| tee`, was ended by the same Ctrl-C
        sys.stderr.write(f"\ndllm: {what}; what is complete is kept, run it again to go on\n")


def leave(code: int) -> None:
    """Exit without waiting for threads that a library left behind."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a closed pipe or a full disk: there is nobody left to tell
            code = code or 3
    os._exit(code)
