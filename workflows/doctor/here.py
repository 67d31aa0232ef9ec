"""What one machine has: Python, packages, devices, room, ports, storage. Each check is a function of its findings."""

import errno
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from dllm_core.errors import DataError, DllmError
from dllm_core.storage.store import Store, open_store

Verdict = Literal["good", "doubtful", "bad"]
_MIN_PYTHON = (3, 11)
_MIN_FILES = 4096  # Ray holds a handful of sockets for each worker and node
_MIN_FREE_BYTES = 2 << 30
_MIN_SHM_BYTES = 512 << 20
_CGROUPS = [  # of the second version and the first
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
]
TOLD_PACKAGES = ("dllm", "ray", "torch", "deepspeed", "pyarrow", "datasets", "boto3")


@dataclass(frozen=True)
class Finding:
    """One line. remedy: what to do where the verdict is not good."""

    what: str
    verdict: Verdict
    told: str
    remedy: str = ""


def bad(what: str, error: DllmError, remedy: str) -> Finding:
    """What an error says: with its own remedy, or with `remedy` where it has none."""
    return Finding(what, "bad", str(type(error)(error.place, error.problem, error.value)), error.remedy or remedy)


def python() -> Iterator[Finding]:
    """The interpreter."""
    told = f"{platform.python_version()} at {sys.executable}"
    is_new = sys.version_info >= _MIN_PYTHON
    yield Finding("python", "good" if is_new else "bad", told, "Python 3.11 or newer")


def packages() -> Iterator[Finding]:
    """What we require, in versions that we take."""
    wrong = []
    for text in importlib.metadata.requires("dllm") or ():
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        found = version_of(asked.name)
        if found is None:
            wrong.append(f"{asked.name} is missing")
        elif not asked.specifier.contains(found, prereleases=True):
            wrong.append(f"{asked.name} {found} is not {asked.specifier}")
    told = ", ".join(f"{name} {version_of(name)}" for name in TOLD_PACKAGES)
    if wrong:
        yield Finding("packages", "bad", "; ".join(wrong), "make install, or pip install -c constraints.txt .")
    else:
        yield Finding("packages", "good", told)


def devices() -> Iterator[Finding]:
    """Cores, memory and GPUs."""
    import torch

    total, free = _memory()
    told = f"{os.cpu_count()} cores, {total / 1e9:.0f} GB of memory, {free / 1e9:.0f} free"
    is_enough = free > _MIN_FREE_BYTES
    yield Finding("machine", "good" if is_enough else "doubtful", told, "end what else runs here")
    count = torch.cuda.device_count()
    if count:
        names = {torch.cuda.get_device_name(index) for index in range(count)}
        yield Finding("gpus", "good", f"{count}: {', '.join(sorted(names))}; torch {torch.__version__}")
    elif shutil.which("nvidia-smi"):
        remedy = "a torch built for CUDA: make install CONSTRAINTS="
        yield Finding("gpus", "bad", f"the driver is there, torch {torch.__version__} sees none", remedy)
    else:
        yield Finding("gpus", "good", "none: all stages run on the CPU")


def _memory() -> tuple[int, int]:
    """Bytes in all and free: of the container that this is in, where it has less than the machine."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for folder, most, used in _CGROUPS:
        try:
            limit, taken = (int((folder / name).read_text(encoding="ascii")) for name in (most, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # there is none, or its limit is `max`
            continue
        if limit < total:  # files that nobody has asked for lately are let go first
            total, free = limit, min(free, limit - taken + int(stat.get("inactive_file", 0)))
    return total, max(0, free)


def room() -> Iterator[Finding]:
    """Open files, shared memory and disk, which Ray wants."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = files >= _MIN_FILES or files == resource.RLIM_INFINITY
    yield Finding("open files", "good" if is_enough else "doubtful", f"{files} at most", f"ulimit -n {most}")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        told = f"{free / 1e9:.1f} GB free in /dev/shm"
        remedy = "docker run --shm-size 2g, or an emptyDir of medium Memory: Ray's objects go to the disk else"
        yield Finding("shared memory", "good" if free >= _MIN_SHM_BYTES else "doubtful", told, remedy)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    verdict: Verdict = "good" if free >= _MIN_FREE_BYTES else "bad"
    yield Finding("disk", verdict, f"{free / 1e9:.0f} GB free in {folder}", "make room: Ray's sessions lie there")


def port(host: str, number: int) -> Iterator[Finding]:
    """Where the endpoint would listen."""
    where = f"{host}:{number}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        told = "is taken" if is_taken else f"cannot be listened on ({error.strerror})"
        remedy = "serve.port=..." if is_taken else "serve.host=... or serve.port=..."
        yield Finding("serve.port", "doubtful", f"{where} {told}", remedy)
    else:
        yield Finding("serve.port", "good", f"{where} is free")


def storage(root: str) -> Iterator[Finding]:
    """Written, read, listed, put only if absent, deleted."""
    try:
        store = open_store("storage.root", root)
        store.check_writable("storage.root")
        key = f"doctor/{uuid.uuid4().hex}"
        try:
            _exercise(store, key)
        finally:
            store.delete(key)
    except DllmError as error:
        yield bad("storage", error, "a folder that is ours to write, or s3:// with AWS_* set")
    else:
        yield Finding("storage", "good", f"{root} is written, read and listed; what is there is never put again")


def _exercise(store: Store, key: str) -> None:
    if not store.put_if_absent(key, b"first") or store.put_if_absent(key, b"second"):
        remedy = "a server that honours If-None-Match, as AWS, Ceph and MinIO do"
        raise DataError("storage.root", "puts over what is there", store.url, remedy)
    if store.read(key) != b"first" or key not in [item.key for item in store.list("doctor")]:
        raise DataError("storage.root", "does not give back what was written", store.url)


def version_of(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
