"""Room: how many rows a gateway sends to a model's replicas. A request too many is refused from one number alone.

So a refusal costs no message and no tokens. Of several gateways each knows what it has sent itself; what replicas have
of all of them, they refuse themselves.
"""

from collections import Counter
from collections.abc import Callable

from workflows.serve.dialect.errors import busy


class Room:
    """per_replica: rows of one model that a replica decodes together and lets wait; replicas: how many there are."""

    def __init__(self, per_replica: int, replicas: Callable[[], int]) -> None:
        self._per_replica, self._replicas = per_replica, replicas
        self._taken: Counter[str] = Counter()

    def take(self, model: str, rows: int) -> "Places":
        """Places for all rows of a request; ApiError 429 where there are not so many. An idle model takes any."""
        taken = self._taken[model]
        if taken and taken + rows > self._per_replica * self._replicas():
            raise busy()
        self._taken[model] += rows
        return Places(self._taken, model, rows)


class Places:
    """What a request has taken. Each is given back when its row has ended, and what is left with the request."""

    def __init__(self, taken: Counter[str], model: str, rows: int) -> None:
        self._taken, self._model, self._left = taken, model, rows

    def give_back(self, rows: int = 1) -> None:
        """So many rows have ended."""
        self._taken[self._model] -= rows
        self._left -= rows

    def end(self) -> None:
        """The request has ended, whatever ended it; saying so twice changes nothing."""
        self.give_back(self._left)
