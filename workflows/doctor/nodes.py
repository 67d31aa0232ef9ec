"""What every node of a cluster has, asked of all at once: versions alike, clocks together, one storage between them.

It runs where Ray is at hand; from outside it is sent as a job.
"""

import contextlib
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dllm_core.errors import DllmError
from dllm_core.storage.store import open_store
from workflows.doctor.here import TOLD_PACKAGES, Finding, Verdict, version_of

_MAX_SKEW_S = 2.0
_ANSWER_WITHIN_S = 120.0


def probe(root: str, key: str) -> dict[str, Any]:
    """Of the node that runs it. `won`: whether its put was the one that found nothing there."""
    won, reason = False, ""
    try:
        won = open_store("storage.root", root).put_if_absent(key, platform.node().encode())
    except DllmError as error:
        reason = str(error)
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in TOLD_PACKAGES}}
    return {"versions": versions, "won": won, "reason": reason}


def now() -> float:
    """A node's clock."""
    return time.time()


def nodes(root: str) -> Iterator[Finding]:
    """Findings of all nodes of the connected cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    key, options = f"doctor/{uuid.uuid4().hex}", {}
    for node in alive:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options[_name(node)] = {"num_cpus": 0, "scheduling_strategy": strategy, "max_retries": 0}
    asked = {name: ray.remote(**how)(probe).remote(root, key) for name, how in options.items()}
    told: dict[str, dict[str, Any]] = {}
    for name, ref in asked.items():
        try:
            told[name] = ray.get(ref, timeout=_ANSWER_WITHIN_S)
        except ray.exceptions.RayError as error:
            yield Finding(
                "node",
                "bad",
                f"{name} runs no task ({_last_line(error)})",
                "its image lacks what ours has, or it is gone",
            )
    if not told:
        yield Finding("nodes", "bad", "none of them answers", "see what each says")
        return
    yield Finding("nodes", "good", ", ".join(told))
    yield from _alike(told)
    yield from _together(root, key, told)
    yield from _clocks({name: how for name, how in options.items() if name in told})


def _last_line(error: BaseException) -> str:
    """Of what Ray tells with a traceback; its kind where it tells nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _name(node: dict[str, Any]) -> str:
    stage = node.get("Labels", {}).get("dllm-stage")
    return f"{node['NodeManagerAddress']}" + (f" ({stage})" if stage else "")


def _alike(told: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    for package in ("python", *TOLD_PACKAGES):
        found = {name: answer["versions"].get(package) for name, answer in told.items()}
        kinds = Counter(found.values())
        if len(kinds) > 1:
            usual = kinds.most_common(1)[0][0]
            others = ", ".join(f"{name} has {version}" for name, version in found.items() if version != usual)
            yield Finding("versions", "bad", f"{package} is {usual}, but {others}", "one image for all nodes")
            return
    yield Finding("versions", "good", f"alike on {len(told)} nodes")


def _together(root: str, key: str, told: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """All nodes put the same key; one storage lets exactly one of them."""
    winners = [name for name, answer in told.items() if answer["won"]]
    lost = [f"{name}: {answer['reason']}" for name, answer in told.items() if answer["reason"]]
    if lost:
        yield Finding("one storage", "bad", "; ".join(lost), "credentials and AWS_ENDPOINT_URL on every node")
    elif len(winners) == 1:
        yield Finding("one storage", "good", f"{root} is the same for all nodes")
    else:
        remedy = "s3://, or a folder that is mounted on all of them"
        yield Finding("one storage", "bad", f"{root} is another on each of {', '.join(winners)}", remedy)
    with contextlib.suppress(DllmError):
        open_store("storage.root", root).delete(key)


def _clocks(options: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Each node's clock against ours at the middle of the question; half the time that it took is the error. Told is
    how far two of them are apart at least.
    """
    import ray

    spans = {}
    for name, how in options.items():
        task = ray.remote(**how)(now)
        try:
            ray.get(task.remote(), timeout=_ANSWER_WITHIN_S)  # the first waits for a worker
            before = time.time()
            theirs = ray.get(task.remote(), timeout=_ANSWER_WITHIN_S)
            after = time.time()
        except ray.exceptions.RayError as error:  # it answered a moment ago
            remedy = "it is gone since, or another's work leaves it no worker"
            yield Finding("clocks", "bad", f"{name} does not tell its time ({_last_line(error)})", remedy)
            continue
        spans[name] = (theirs - after, theirs - before)
    if not spans:
        return
    first, last = max(spans, key=lambda name: spans[name][0]), min(spans, key=lambda name: spans[name][1])
    apart = max(0.0, spans[first][0] - spans[last][1])
    verdict: Verdict = "good" if apart <= _MAX_SKEW_S else "bad"
    told = f"{apart:.2f} s apart" + (f" ({first} and {last})" if verdict == "bad" else "")
    yield Finding("clocks", verdict, told, "let chrony or systemd-timesyncd run on it: S3 refuses late signatures")
