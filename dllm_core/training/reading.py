"""What a session begins with is read by every rank for itself, for minutes, and by some much longer than by others."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from dllm_core.storage.progress import progress_to
from dllm_core.training.saving import SLICE_S

Result = TypeVar("Result")


def read_together(
    read: Callable[[], Result], summed: Callable[[list[float]], list[float]], beat: Callable[[], None]
) -> Result:
    """What `read` gives, by a thread, once all ranks have read theirs. Collective, in slices: a node that was replaced
    fetches for longer than a collective may take, while others have their copies.

    A rank beats while its own reading makes progress and when it is over, so one that stands still is found, and where.
    """
    has_progressed = threading.Event()

    def reading() -> Result:
        with progress_to(has_progressed.set):
            return read()

    with ThreadPoolExecutor(1, thread_name_prefix="reading") as pool:
        result, is_over = pool.submit(reading), False
        while not is_over:
            is_read = bool(wait([result], SLICE_S).done)
            if is_read:
                result.result()  # who has failed need not wait for the others
            if is_read or has_progressed.is_set():
                has_progressed.clear()
                beat()
            is_over = not any(summed([float(not is_read)]))
    return result.result()


def is_alike(number: int, summed: Callable[[list[float]], list[float]]) -> bool:
    """Whether all ranks have this same whole number; every rank is told the same. Collective."""
    total, ranks = summed([float(number), 1.0])
    return not any(summed([float(number * ranks != total)]))
