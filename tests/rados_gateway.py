"""A real S3: Ceph's RADOS Gateway on loopback, over one monitor and one object daemon that keeps its objects in memory.

    with rados_gateway() as gateway: ...  # gateway.endpoint, gateway.access_key, gateway.secret_key

Each instance has ports and a folder of its own, so several run side by side. Its processes end with the `with` block
and with this process, however it ends. Up in about two seconds, since the monitor does not collect its decisions first.
"""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool", "setpriv")
_SECONDS = 30  # for any step; a step takes far less than one

# One copy in one placement group. Nobody proves who he is inside, so messages go in clear: secret modes need a key.
_CONFIG = """[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
mon_data = {folder}/mon
mon_data_avail_crit = 0
mon_cluster_log_file = {folder}/cluster.log
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.02
paxos_min_wait = 0.02
osd_data = {folder}/osd
osd_objectstore = memstore
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
rgw_data = {folder}/rgw
rgw_enable_apis = s3, admin
rgw_run_sync_thread = false
rgw_thread_pool_size = 32
run_dir = {folder}
log_file = {folder}/$name.log
admin_socket =
pid_file =
"""


@dataclass(frozen=True)
class Gateway:
    """A running gateway and the account it knows."""

    endpoint: str
    access_key: str
    secret_key: str


def missing_programs() -> str:
    """Why the gateway cannot run here, in one line; nothing if it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}" if missing else ""


@contextmanager
def rados_gateway(port: int | None = None) -> Iterator[Gateway]:
    """Run a gateway on a port (a free one unless told); RuntimeError says which step failed, with its last lines."""
    if missing_programs():
        raise RuntimeError(missing_programs())
    if port is not None and not _is_free(port):
        raise RuntimeError(f"port {port} is taken")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rados-", ignore_cleanup_errors=True)))
        yield _Cluster(folder, stack).start(port or _free_port())


class _Cluster:
    """What is started goes on the stack, which ends it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf"), "CEPH_ARGS": ""}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, port: int) -> Gateway:
        """The monitor, the object daemon, the account, the gateway: each needs the one before."""
        fsid, mon_port = str(uuid.uuid4()), _free_port(port)
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        (self._folder / "ceph.conf").write_text(_CONFIG.format(fsid=fsid, mon_port=mon_port, folder=self._folder))
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._serve("ceph-mon", "-i", "a")
        self._run("ceph-osd", "--mkfs", "-i", "0")
        self._run("ceph", "--connect-timeout", str(_SECONDS), "osd", "create")
        self._serve("ceph-osd", "-i", "0")
        gateway = Gateway(f"http://127.0.0.1:{port}", "access", "secret")
        keys = (f"--access-key={gateway.access_key}", f"--secret-key={gateway.secret_key}")
        self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
        frontend = f"--rgw_frontends=beast endpoint=127.0.0.1:{port} tcp_nodelay=1"  # or every answer waits 40 ms
        self._serve("radosgw", "-n", "client.rgw", frontend)
        self._wait_for(port)
        return gateway

    def _run(self, *command: str) -> None:
        try:
            subprocess.run(command, env=self._environment, capture_output=True, timeout=_SECONDS, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{' '.join(command[:3])} failed: {_tail(error.stderr)}{self._state()}") from None

    def _serve(self, *command: str) -> None:
        """A daemon in the foreground; the kernel kills it should this thread's process be killed."""
        with (self._folder / f"{command[0]}.out").open("wb") as out:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command, "-f"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._daemons[command[0]] = daemon
        self._stack.callback(daemon.wait)
        self._stack.callback(daemon.kill)  # its objects are in memory: there is nothing to put in order

    def _wait_for(self, port: int) -> None:
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end and self._daemons["radosgw"].poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"radosgw does not listen on port {port}{self._state()}")

    def _state(self) -> str:
        """The last lines of each daemon, and whether it still runs."""
        lines = ""
        for name, daemon in self._daemons.items():
            state = "runs" if daemon.poll() is None else f"ended with {daemon.returncode}"
            lines += f"\n{name} {state}: {_tail((self._folder / f'{name}.out').read_bytes())}"
        return lines


def _tail(output: bytes | None) -> str:
    return (output or b"")[-500:].decode(errors="replace").strip()


def _free_port(*taken: int) -> int:
    """A port nobody listens on, below those that the kernel gives to outgoing connections: it stays free until used."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        if port not in taken and _is_free(port):
            return port
    raise RuntimeError("no free port on loopback")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
