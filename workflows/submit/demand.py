"""Does a cluster have what a verb's stages ask for: now, or when its autoscaler has started what it may?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_core.config.overrides import parse_yaml
from dllm_core.errors import ConfigError, DataError
from workflows.placement import GIB, MEMORY, Demand, PlacementConfig

VERBS = {
    "run": ("preprocess", "train", "evaluate", "serve"),
    "preprocess": ("preprocess",),
    "train": ("preprocess", "train"),
    "evaluate": ("evaluate",),
    "serve": ("serve",),
}
_EPSILON = 1e-9
_MOST_WORKERS = 2  # of a cluster whose file does not say: the launcher's own for AWS, Azure and Google Cloud


@dataclass(frozen=True)
class Need:
    """`at_once` of a demand must find room together, or the stage waits for ever."""

    stage: str
    at_once: int
    demand: Demand

    def __str__(self) -> str:
        amounts = " ".join(f"{name}={_said(name, amount)}" for name, amount in self.demand.amounts.items())
        labels = "".join(f" {name}={value}" for name, value in self.demand.labels.items())
        return f"{self.at_once} × {amounts}" + (f" on nodes with{labels}" if labels else "")


@dataclass(frozen=True)
class NodeGroup:
    """`count` nodes alike. together: how many there may be of all groups, whatever each says."""

    resources: dict[str, float]
    labels: dict[str, str]
    count: int = 1
    together: int | None = None

    def room(self, demand: Demand) -> int:
        """How many such workers all of them take at once."""
        return self.count * self.room_of_one(demand)

    def room_of_one(self, demand: Demand) -> int:
        """How many one of them takes."""
        if not all(matches(self.labels.get(name), wanted) for name, wanted in demand.labels.items()):
            return 0
        return min((self._times(name, amount) for name, amount in demand.amounts.items()), default=1)

    def _times(self, name: str, amount: float) -> int:
        """How often a node has so much of it. A part of a GPU is one of a single GPU, whose rest is of no use."""
        there = self.resources.get(name, 0)
        if name == "GPU" and amount < 1:
            return int(there) * int(1 / amount + _EPSILON)
        return int(there / amount + _EPSILON)


def needs(verb: str, placement: PlacementConfig) -> list[Need]:
    """What the verb's stages ask for. Tasks queue, so one must fit; workers of a training start together."""
    every = {
        "preprocess": [Need("preprocess", 1, placement.preprocess.demand)],
        "train": [Need("train", placement.train.workers, placement.train.demand)],
        "evaluate": [Need("evaluate", 1, placement.evaluate.demand)],
        "serve": [
            Need("serve", max(1, placement.serve.min_replicas), placement.serve.demand),
            Need("serve", placement.serve.gateways, placement.serve.gateway_demand),
        ],
    }
    return [need for stage in VERBS[verb] for need in every[stage]]


def check_room(wanted: Sequence[Need], now: Sequence[NodeGroup], later: Sequence[NodeGroup] = ()) -> list[Need]:
    """Those needs that only nodes which are to be started fulfil. DataError for one that nothing fulfils."""
    waiting = []
    for need in wanted:
        if room_of(now, need.demand) >= need.at_once:
            continue
        room = max(room_of(groups, need.demand) for groups in (now, later))
        if room < need.at_once:
            remedy = "less of it, or a larger cluster"
            if not later:
                remedy += "; --nodes cluster.yaml says what an autoscaler may start"
            raise DataError(f"placement.{need.stage}", f"needs {need}; there is room for {room}", remedy=remedy)
        waiting.append(need)
    return waiting


def room_of(groups: Sequence[NodeGroup], demand: Demand) -> int:
    """How many such workers they take at once, where of nodes that are bounded together the roomiest are there."""
    left, room = min((group.together for group in groups if group.together is not None), default=None), 0
    for group in sorted(groups, key=lambda group: -group.room_of_one(demand)):
        count = group.count if left is None else min(group.count, left)
        room += count * group.room_of_one(demand)
        left = None if left is None else left - count
    return room


def busy(wanted: Sequence[Need], usage: dict[str, tuple[float, float]]) -> list[str]:
    """What others use now and the job needs first: a line each."""
    lines = []
    for need in wanted:
        for name, amount in need.demand.amounts.items():
            used, total = usage.get(name, (0.0, 0.0))
            if used and total - used < amount * need.at_once - _EPSILON:
                needed, there, taken = (_said(name, value) for value in (amount * need.at_once, total, used))
                lines.append(f"{need.stage} needs {needed} {name}, of {there} {taken} are in use")
    return lines


def _said(resource: str, amount: float) -> str:
    """As people read it."""
    return f"{amount / GIB:.3g}GiB" if resource == MEMORY else f"{amount:g}"


def live(nodes: Sequence[dict[str, Any]]) -> list[NodeGroup]:
    """As the job server tells of them."""
    return [NodeGroup(node["resources_total"] or {}, node["labels"] or {}) for node in nodes]


def startable(path: Path) -> list[NodeGroup]:
    """What the launcher's file lets an autoscaler start, the head left out.

    A kind that says no memory has none to give: most of Ray's autoscalers would never start it for a task that asks.
    """
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        head, kinds = config["head_node_type"], config["available_node_types"]
        most = int(config.get("max_workers", _MOST_WORKERS))  # of all kinds together, whatever a kind says
        return [
            NodeGroup(
                {name: float(amount) for name, amount in kind["resources"].items()},
                dict(kind.get("labels") or {}),
                min(most, int(kind.get("max_workers", most))),
                most,
            )
            for name, kind in kinds.items()
            if name != head
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--nodes", f"cannot be read ({error})", str(path)) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"is no launcher's file with node types ({type(error).__name__}: {error})"
        raise ConfigError("--nodes", problem, str(path), "cluster.yaml is one") from None


def matches(value: str | None, wanted: str) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a, b)`, `!in(a, b)`."""
    is_not, body = wanted.startswith("!"), wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", body)
    allowed = {part.strip() for part in listed.group(1).split(",")} if listed else {body}
    return (value in allowed) != is_not
