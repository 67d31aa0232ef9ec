"""The scripts `dllm` and `dllm-lm-eval`: signals are taken over first, then a command line is imported and run.

python -m workflows show workflows/recipes/quickstart.yaml
"""

import os
import sys
from collections.abc import Callable

from workflows.interrupts import end_on_sigterm, exit_code_of, leave, say_interrupted


def main() -> None:
    """`dllm`: its verbs."""
    _lead(_verbs)


def lm_eval() -> None:
    """`dllm-lm-eval`: the command line of lm-evaluation-harness, which does not look for models in other packages."""
    _lead(_harness)


def _verbs() -> int:
    from workflows.cli import run_command_line

    return run_command_line(sys.argv[1:])


def _harness() -> int:
    from workflows.cli import run_lm_eval

    return run_lm_eval()


def _lead(command_line: Callable[[], int]) -> None:
    """Run a command line and leave with its exit code, whatever ends it."""
    try:
        end_on_sigterm()
        _open_streams()
        code = command_line()
    except KeyboardInterrupt as signalled:
        say_interrupted(signalled)
        code = exit_code_of(signalled)
    leave(code)


def _open_streams() -> None:
    """Text that a stream cannot spell is shown escaped, and a stream that was closed swallows it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as we run)
        else:
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
