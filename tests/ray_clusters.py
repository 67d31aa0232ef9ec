"""Real Ray clusters of several nodes on this machine's loopback; each node has an address and processes of its own.

    with LoopbackCluster(nodes=[NodeKind("preprocess", cpus=2)]) as cluster: ...  # cluster.address, cluster.dashboard

The head offers no CPUs, as in cluster.yaml. Nothing outlives the `with` block. Jobs find Python, `dllm` and the
environment as they are where the cluster was started.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

ROOT = Path(__file__).parents[1]
_RAY = Path(sys.executable).with_name("ray")
_UP_WITHIN_S = 120
_STARTS = 2  # Ray gives a head 30 s, which on a busy machine may not be enough
_STORE_BYTES = 100 << 20
_FAKE_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # "this machine" is 127.0.0.1 then, and not an address of a network's
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
_HEAD = "127.0.0.2"  # of 127.0.0.1 Ray makes an address that other machines reach
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A node that was killed is found dead after seconds rather than half a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class NodeKind:
    """A node that offers what cluster.yaml's kind of this name does, in small."""

    stage: str
    cpus: int = 2

    @property
    def options(self) -> list[str]:
        return [
            f"--num-cpus={self.cpus}",
            f"--labels=dllm-stage={self.stage}",
            "--resources=" + json.dumps({f"dllm-{self.stage}": self.cpus}),
        ]


@dataclass
class Node:
    """`ray start --block` and all that it has started."""

    process: subprocess.Popen[bytes]
    ip: str
    kind: NodeKind | None = None
    is_killed: bool = False

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self) -> None:
        """As a power cut does: nothing of it is told that it ends."""
        self.is_killed = True
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=10)


@dataclass
class LoopbackCluster:
    """autoscaling: a launcher's configuration, by which the head starts nodes itself."""

    nodes: Sequence[NodeKind] = ()
    token: str | None = None
    autoscaling: dict[str, Any] | None = None

    def __enter__(self) -> "LoopbackCluster":
        for attempt in range(_STARTS):
            try:
                self._begin()
            except BaseException as error:
                self.__exit__()
                if attempt == _STARTS - 1 or not isinstance(error, AssertionError):
                    raise
            else:
                break
        return self

    def _begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets' paths have 107 characters
        self.port, self.dashboard_port = _free_ports(2)
        self.head_ip = "127.0.0.1" if self.autoscaling is not None else _HEAD
        self.address = f"{self.head_ip}:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        self.started: list[Node] = []
        self._addresses = 0
        self.head = self._start(
            self.head_ip,
            [
                "--head",
                f"--port={self.port}",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard_port}",
                "--num-cpus=0",
                *(["--labels=dllm-stage=head"] if self.autoscaling is None else [self._autoscaling_option()]),
            ],
        )
        self._wait(lambda: self.alive() is not None, "the head")
        for kind in self.nodes:  # one after another: two that start at once now and then take each other's ports
            self.add(kind)

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.started):
            for process in node.processes()[:1]:
                process.send_signal(signal.SIGTERM)
        psutil.wait_procs([p for node in self.started for p in node.processes()], timeout=4)
        for node in self.started:
            node.kill()
        for process in psutil.process_iter(["cmdline"]):  # what was started by something that is gone itself
            if any(str(self.folder) in part for part in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        """For whoever speaks to the cluster."""
        found = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        if self.autoscaling is not None:
            found |= _FAKE_ENVIRONMENT
        found["PATH"] = f"{_RAY.parent}:{found['PATH']}"
        found.pop("RAY_ADDRESS", None)
        if self.token is None:  # said, since a token that lies in the home folder would turn it on
            found["RAY_AUTH_MODE"] = "disabled"
        else:
            found.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token)
        return found

    def add(self, kind: NodeKind) -> Node:
        """A node more. One that does not come up, as happens on a busy machine, is started anew once."""
        for is_last in (False, True):
            self._addresses += 1
            node = self._start(f"127.0.0.{2 + self._addresses}", [f"--address={self.address}", *kind.options])
            node.kind = kind
            try:
                self._wait(
                    lambda ip=node.ip: ip in {told["node_ip"] for told in self.alive() or ()},
                    f"a node for {kind.stage}",
                )
            except AssertionError:
                node.kill()
                if is_last:
                    raise
            else:
                break
        return node

    def alive(self) -> list[dict[str, Any]] | None:
        """The nodes that the head believes in; None where it does not answer."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes")
        if self.token is not None:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                told = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError):
            return None
        return [node for node in told if node["state"] == "ALIVE"]

    def _start(self, ip: str, options: list[str]) -> Node:
        log = (self.folder / f"{len(self.started)}.log").open("wb")
        command = [
            *(str(_RAY), "start", "--block", f"--node-ip-address={ip}", "--disable-usage-stats"),
            *(f"--object-store-memory={_STORE_BYTES}", "--dashboard-agent-listen-port=0"),
            # A folder of its own, as a machine has: in a shared one each unpacks a job's sources over the others'.
            *(f"--temp-dir={self.folder}/{len(self.started)}", *options),
        ]
        process = subprocess.Popen(
            command, env=self.env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.started.append(Node(process, ip))
        return self.started[-1]

    def _autoscaling_option(self) -> str:
        path = self.folder / "autoscaling.json"
        config = {**self.autoscaling, "provider": {**self.autoscaling["provider"], "gcs_address": self.address}}
        path.write_text(json.dumps(config), encoding="utf-8")
        return f"--autoscaling-config={path}"

    def _wait(self, is_so: Any, what: str) -> None:
        give_up = time.monotonic() + _UP_WITHIN_S
        while not is_so():
            ended = [node for node in self.started if node.process.poll() is not None and not node.is_killed]
            if ended or time.monotonic() > give_up:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
                raise AssertionError(f"{what} did not come up:\n{logs}")
            time.sleep(0.2)


def new_token() -> str:
    return secrets.token_hex(32)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
