"""A Ray cluster for the length of a block: the one in RAY_ADDRESS, or a private one on this machine's loopback.

A private cluster is gone when the block ends, whatever ended it. A cluster that was there stays as it was.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psutil

from dllm_core.errors import ConfigError, DataError
from workflows.interrupts import Interrupted, end_on_sigterm
from workflows.placement import MEMORY, Demand

_OBJECT_STORE_BYTES = 256 << 20  # references and small results only: shards never pass through it
# How Ray Serve 2.60 carries requests: from proxy to gateway to replica by gRPC and not as tasks and objects, and in one
# event loop a process instead of three; and its controller looks four times a second instead of ten, which is half of
# what an endpoint takes that nobody asks. Measured, dllm_core/DECISIONS.md; the images set the same.
SERVING = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}
TASK_RETRIES = 3  # of a task whose worker is lost
_SETTINGS = {
    **SERVING,
    # What Ray's memory monitor ends it tries again for ever by default.
    "RAY_task_oom_retries": str(TASK_RETRIES),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train polls its workers every 2 s by default, and a report waits for the poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A proxy that is not ready after Ray's 5 s is killed and started anew: on a busy machine again and again, in vain.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# A cluster on loopback, also where several interfaces are up: workers would else meet on another one. Of a cluster of
# several nodes a driver with this setting would not find its own.
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

_TOKEN, _TOKEN_PATH, _TOKEN_FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"
_ANSWERS_WITHIN_S = 4
_NO_GPU = "set gpus_per_worker and gpus_per_replica to 0, or RAY_ADDRESS to a cluster that has them"


@contextlib.contextmanager
def ray_cluster(cpus: float, gpus: float = 0) -> Iterator[None]:
    """Connect, or start a cluster with at least `cpus` logical CPUs, so that no placement waits for ever.

    A private cluster never grows, so GPUs that this machine does not have are refused; another one may.
    """
    for name, value in {**_SETTINGS, **(_PRIVATE if is_private() else {})}.items():
        os.environ.setdefault(name, value)
    import ray

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        try:
            _connect(cpus)
        except SystemExit:  # SIGTERM meanwhile: ray.init puts its own handler there
            raise Interrupted from None
        if threading.current_thread() is threading.main_thread():
            end_on_sigterm()
        logging.getLogger("ray").setLevel(logging.ERROR)
        found = ray.cluster_resources().get("GPU", 0)
        if is_private() and found < gpus:
            raise ConfigError("placement", f"asks for {gpus:g} GPUs, this machine has {found:g}", remedy=_NO_GPU)
        yield
    finally:
        _shut_down(before)


def is_private() -> bool:
    """Whether the cluster is this machine's alone, which does everything."""
    return not os.environ.get("RAY_ADDRESS")


def on_nodes(demand: Demand) -> Demand:
    """What is asked of the cluster that there is: of a private one CPUs and GPUs alone."""
    return Demand(cpus=demand.cpus, gpus=demand.gpus) if is_private() else demand


def actor_options(demand: Demand) -> dict[str, Any]:
    """As Ray takes it for a task, an actor or a deployment."""
    asked = on_nodes(demand)
    options: dict[str, Any] = {"num_cpus": asked.cpus, "num_gpus": asked.gpus}
    if asked.resources:
        options["resources"] = asked.resources
    if asked.memory_gib:
        options["memory"] = asked.amounts[MEMORY]
    if asked.labels:
        options["label_selector"] = asked.labels
    return options


def _connect(cpus: float) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_answers(address)
            ray.init(**quiet)
        else:
            _have_a_token()
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, round(cpus + 0.5)),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray raises plain ones where a node does not come up in time
        said = " ".join(str(error).split())
        if address:
            problem, remedy = f"no Ray cluster answers ({said})", "check it, or unset it"
            raise DataError("RAY_ADDRESS", problem, address, remedy) from error
        remedy = "run it again: a busy machine may need longer than Ray waits"
        raise DataError("ray", f"no cluster could be started here ({said})", remedy=remedy) from error


def _have_a_token() -> None:
    """A private cluster's processes share a token of this process where none is known.

    Ray would write one to the home folder: that may be read-only, and two first commands would each write theirs.
    """
    known = (os.environ.get(_TOKEN), os.environ.get(_TOKEN_PATH), os.path.exists(os.path.expanduser(_TOKEN_FILE)))
    if not any(known):
        os.environ[_TOKEN] = secrets.token_hex(32)


def _check_answers(address: str) -> None:
    """Somebody listens at host:port. Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN_S).close()


def _shut_down(before: set[int]) -> None:
    """Leave the cluster; of a private one nothing may be left running after 2 s."""
    import ray

    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    closing = threading.Thread(target=ray.shutdown, daemon=True)
    closing.start()
    closing.join(timeout=2)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
