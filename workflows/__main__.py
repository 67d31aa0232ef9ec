"""The `dllm` script: signals are taken over first, then the command line is imported and run.

python -m workflows show workflows/recipes/quickstart.yaml
"""

import os
import sys

from workflows.interrupts import end_on_sigterm, exit_code_of, leave, say_interrupted


def main() -> None:
    """Run the command line and leave with its exit code, whatever ends it."""
    try:
        end_on_sigterm()
        _open_streams()
        from workflows.cli import run_command_line

        code = run_command_line(sys.argv[1:])
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
