"""Errors that a user can act on: each names a place, what is wrong there, the value found and the remedy.

Every class pickles (errors cross process borders) and carries the exit code that the command line ends with.
"""

from typing import Any, Self

_NO_VALUE = "\0no value"


class DllmError(Exception):
    """Base of all errors, each explained in one line. `place` is a dotted recipe path, a file or a route."""

    exit_code = 1

    def __init__(self, place: str, problem: str, value: Any = _NO_VALUE, remedy: str = "") -> None:
        super().__init__(place, problem, value, remedy)
        self.place, self.problem, self.value, self.remedy = place, problem, value, remedy

    def __str__(self) -> str:
        line = f"{self.place}: {self.problem}"
        if not (isinstance(self.value, str) and self.value == _NO_VALUE):
            shown = repr(self.value)
            line += f", got {shown if len(shown) <= 120 else shown[:117] + '...'}"
        line = f"{line}: {self.remedy}" if self.remedy else line
        return " ".join(line.splitlines())  # what a library says of its own failure may have several lines

    def below(self, place: str) -> Self:
        """The same, of what stands at a place, such as a line of a file; "" is nowhere."""
        return type(self)(f"{place}.{self.place}" if place else self.place, self.problem, self.value, self.remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.problem, self.value, self.remedy)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ConfigError(DllmError):
    """A recipe or a command line that cannot mean anything."""

    exit_code = 2


class DataError(DllmError):
    """A corpus, a folder or a machine that does not hold what it must: missing, unreadable, full, damaged."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint or a bundle that is damaged, incomplete or of another run."""


class PreemptedError(DllmError):
    """The run was told to stop and has saved; starting it again goes on from there."""

    exit_code = 4


class DivergedError(DllmError):
    """The loss is no longer a number."""

    exit_code = 5


class RequestError(DllmError):
    """A decoding request that cannot be served as asked; `place` is the field of the request."""
