"""An expression whose automaton would take minutes is given up, and the next one is compiled."""

import asyncio
import time

import pytest

from dllm_core.errors import RequestError
from workflows.serve.compiling import Compiler

BYTES = [bytes([value]) for value in range(256)]


def test_a_huge_automaton_is_given_up_and_small_ones_are_made_before_and_after():
    async def scenario():
        compiler = Compiler(BYTES, seconds=1.0)
        try:
            assert (await compiler.compile("(ab)+")).step(0, ord("a")) > 0
            began = time.monotonic()
            with pytest.raises(RequestError, match="takes more than 1 s to compile"):
                await compiler.compile("(a{300}){300}")
            assert time.monotonic() - began < 5
            assert (await compiler.compile("[0-9]")).step(0, ord("7")) > 0
            with pytest.raises(RequestError, match="is no regular expression"):
                await compiler.compile("(")
        finally:
            compiler.close()

    asyncio.run(scenario())


def test_a_process_that_others_ended_is_not_blamed_on_the_next_expression():
    async def scenario():
        compiler = Compiler(BYTES, seconds=10.0)
        try:
            await compiler.compile("(ab)+")
            [process] = compiler._pool._processes.values()
            process.kill()
            process.join()
            assert (await compiler.compile("[0-9]")).step(0, ord("7")) > 0
        finally:
            compiler.close()

    asyncio.run(scenario())
