"""What verbs share: their arguments, and how one ends: a line, with `--output json` an object too, and an exit code."""

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dllm_core.errors import DataError, DllmError, RequestError
from workflows.console import Console, Output
from workflows.interrupts import exit_code_of, say_interrupted

TargetArg = Annotated[str, typer.Argument(metavar="RECIPE-or-RUN", help="a .yaml recipe, or a folder below runs/")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[dotted.path=value]...", help="e.g. train.steps=200 decode.max_tokens=16")
]
OutputOption = Annotated[Output, typer.Option("--output", help="json: one JSON object as the last line of stdout")]


class EndedError(Exception):
    """A verb has failed and has said so."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_verb(body: Callable[[Console], Any], output: Output) -> Any:
    """Run a verb; its result. What ends it becomes a line, with `--output json` an object too, and an exit code."""
    console = Console(output)
    try:
        result = body(console)
        if result is not None:
            console.result(result)
        return result
    except DllmError as error:
        raise EndedError(failed(console, error)) from error
    except OSError as error:  # the machine: stdout closed or full, a disk that fails
        raise EndedError(failed(console, DataError("dllm", f"the system refuses ({error})"))) from error
    except KeyboardInterrupt as signalled:
        # Here and not above: the library that parses the words would take it for its own affair.
        say_interrupted(signalled)
        code = exit_code_of(signalled)
        with contextlib.suppress(OSError):
            console.result({"error": {"place": "dllm", "message": "interrupted"}, "exit_code": code})
        raise EndedError(code) from signalled


def failed(console: Console, error: DllmError) -> int:
    """Say what ended a verb; the exit code."""
    code = 2 if isinstance(error, RequestError) else error.exit_code
    with contextlib.suppress(OSError):  # there may be nobody to tell
        sys.stderr.write(f"dllm: {error}\n")
    with contextlib.suppress(OSError):
        console.result({"error": {"place": error.place, "message": str(error)}, "exit_code": code})
    return code
