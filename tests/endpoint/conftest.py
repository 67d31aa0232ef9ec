"""One Ray cluster and one port for all tests of the served endpoint; each file deploys an application of its own."""

import contextlib
import time

import httpx
import psutil
import pytest
from conftest import free_port

from workflows.env import ray_cluster
from workflows.serve.app import start, stop


@pytest.fixture(scope="package")
def port():
    """Ray Serve keeps the port that it was started with, whatever is deployed next."""
    return free_port()


@pytest.fixture(scope="package")
def cluster(port):
    with ray_cluster(4):
        yield


@pytest.fixture(scope="module")
def deployed(cluster):
    """A function: the application's arguments -> its URL. It is taken down after the file."""
    yield start
    stop()


def replicas(name: str = "DecodeReplica") -> list[psutil.Process]:
    """The processes of a deployment's replicas; those that end just now are none."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"ServeReplica:dllm:{name}" in " ".join(child.cmdline()):
                found.append(child)
    return found


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_for(condition, seconds: float = 60) -> None:
    """Until it holds, or fail."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.2)


def all_rows_are_freed(url: str) -> bool:
    """Whether nothing is decoded any more, soon."""
    wait_for(lambda: metric(url, "dllm_num_requests_running") + metric(url, "dllm_num_requests_waiting") == 0, 20)
    return True
