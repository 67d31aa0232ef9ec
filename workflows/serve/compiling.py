"""Compiler: automata of regular expressions made in a process of their own, which is ended when it takes too long.

What a client sends may be small and its automaton huge: `(a{300}){300}` has 90,000 states and takes minutes, in native
code that no thread can stop.
"""

import asyncio
import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dllm_core.decoding.automaton import TokenAutomaton, compile_regex
from dllm_core.errors import RequestError

_MAX_BYTES = 4 << 30
_spelled: Sequence[bytes | None] = ()


def _begin(spelled: Sequence[bytes | None]) -> None:
    global _spelled
    _spelled = spelled
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _compile(regex: str) -> TokenAutomaton:
    return compile_regex(regex, _spelled)


class Compiler:
    """One at a time, which its owner sees to. The process starts with the first."""

    def __init__(self, spelled: Sequence[bytes | None], seconds: float) -> None:
        self._spelled, self._seconds = spelled, seconds
        self._pool: ProcessPoolExecutor | None = None

    async def compile(self, regex: str) -> TokenAutomaton:
        """As `compile_regex`; RequestError too where that takes more time or memory than it may."""
        if self._pool is not None and _is_gone(self._pool):  # ended by others: the next expression is not why
            self.close()
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, _begin, (self._spelled,))
            await asyncio.wrap_future(self._pool.submit(_ready))  # its start is not the expression's fault
        try:
            return await asyncio.wait_for(
                asyncio.wrap_future(self._pool.submit(_compile, regex)), timeout=self._seconds
            )
        except TimeoutError:
            self.close()
            problem = f"takes more than {self._seconds:g} s to compile"
            raise RequestError("constraint", problem, remedy="make it simpler: fewer and smaller counts") from None
        except (BrokenProcessPool, MemoryError):
            self.close()
            raise RequestError("constraint", "takes too much memory to compile", remedy="make it simpler") from None
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """End the process, whatever it does."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def _ready() -> None:
    return None


def _is_gone(pool: ProcessPoolExecutor) -> bool:
    return bool(pool._broken) or not all(process.is_alive() for process in (pool._processes or {}).values())
