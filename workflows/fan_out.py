"""fan_out: run one importable function over many items as Ray tasks, at most `workers` at once, results in order.

The function must be idempotent: a task whose worker dies is run again.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from dllm_core.errors import DataError, DllmError, first_line
from workflows.env import TASK_RETRIES, actor_options
from workflows.malloc import keep_freed_memory
from workflows.placement import Demand

Item = TypeVar("Item")
Result = TypeVar("Result")
ONE_CORE = Demand()


def _say_nothing(done: int, result: Any) -> None:
    pass


class FanOut(Protocol):
    """How a flow runs many items; tests pass `serially`."""

    def __call__(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        workers: int,
        on_done: Callable[[int, Any], None] = ...,
        demand: Demand = ONE_CORE,
    ) -> list[Result]:
        """Results in the order of `items`; `on_done(number finished, result)` after each."""


def fan_out(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    on_done: Callable[[int, Any], None] = _say_nothing,
    demand: Demand = ONE_CORE,
) -> list[Result]:
    """As Ray tasks on the connected cluster. An error of ours, or of the system, ends all and is raised as it is."""
    import ray

    task = ray.remote(**actor_options(demand), max_retries=TASK_RETRIES)(_call)
    shared = ray.put(function)
    results: dict[int, Result] = {}
    running: dict[Any, int] = {}
    waiting = list(range(len(items)))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index = waiting.pop()
                running[task.remote(shared, items[index])] = index
            done, _ = ray.wait(list(running), num_returns=1)
            for ref in done:
                result = ray.get(ref)
                results[running.pop(ref)] = result
                on_done(len(results), result)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DllmError | OSError) else error) from None
    except ray.exceptions.RayError as error:  # a worker or its node died, again and again
        problem = f"a task was lost {TASK_RETRIES + 1} times ({first_line(error)})"
        remedy = "what is complete is kept: run again; fewer workers, or smaller units, need less memory"
        raise DataError("placement.preprocess.workers", problem, workers, remedy) from error
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    return [results[index] for index in range(len(items))]


def serially(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    on_done: Callable[[int, Any], None] = _say_nothing,
    demand: Demand = ONE_CORE,
) -> list[Result]:
    """In this process, one by one: the same results without a cluster."""
    del workers, demand
    results = []
    for index, item in enumerate(items):
        results.append(function(item))
        on_done(index + 1, results[-1])
    return results


@functools.cache
def keep_to_one_core() -> None:
    """Once in a process that has one core and works through large arrays.

    The Rust libraries would start a thread for each core of the machine in every task.
    """
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ.setdefault(name, "1")
    keep_freed_memory()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    keep_to_one_core()
    return function(item)
