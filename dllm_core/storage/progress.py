"""Signs that a long read or write goes on, for who watches over the process: large files take minutes.

They find their listener by context and not as an argument, which a dozen functions would hand on that neither read nor
listen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[], None]] = ContextVar("progress", default=lambda: None)


@contextmanager
def progress_to(listener: Callable[[], None]) -> Iterator[None]:
    """Call it for each piece that this thread reads or writes in the block; often, so it must cost little."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def progressed() -> None:
    """A piece was read or written."""
    _LISTENER.get()()
