"""When glibc gives freed memory back to the system: its own rule suits neither who measures nor who works in a loop.

A large block that is given back is zeroed page by page by the kernel when it is asked for again. Elsewhere than under
glibc nothing happens.
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """For a process that asks for the same large blocks again and again.

    A training step of 5 million weights on a CPU had 26,000 page faults and has 6,000 (1 % to 27 % more tokens a
    second); two processes that made shards waited for each other in the kernel (1.5-1.7 times the rate of one, and
    1.8-2.0 times now).
    """
    _set(mmap=1 << 30, trim=1 << 27)


def give_back_above(size: int) -> None:
    """What is free at the end of the heap beyond `size` bytes, and every freed block of that size; what is free now."""
    _set(mmap=size, trim=size)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(mmap: int, trim: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap)
        libc.mallopt(_M_TRIM_THRESHOLD, trim)
