"""The doctor finds what is wrong, and only that."""

import socket
from types import SimpleNamespace

import pytest

from dllm_core.storage.store import LocalStore
from workflows.console import Console
from workflows.doctor import here, nodes
from workflows.doctor.flow import examine


def one(findings):
    [finding] = list(findings)
    return finding


def test_this_machine_is_well():
    for check in (here.python, here.packages, here.devices, here.room):
        assert [finding for finding in check() if finding.verdict == "bad"] == []


def test_a_missing_and_an_old_package_are_named_with_what_is_taken(monkeypatch):
    monkeypatch.setattr(
        here.importlib.metadata, "requires", lambda name: ["ray>=99", "no-such-thing", "lora; extra=='x'"]
    )
    finding = one(here.packages())
    assert finding.verdict == "bad"
    assert "ray 2." in finding.told
    assert "is not >=99" in finding.told
    assert "no-such-thing is missing" in finding.told
    assert "lora" not in finding.told
    assert finding.remedy


@pytest.mark.parametrize(("limit", "told"), [(3 << 30, "3 GB of memory, 1 free"), ("max", None), (1 << 62, None)])
def test_a_container_s_memory_is_what_it_may_have(monkeypatch, tmp_path, limit, told):
    usual = next(here.devices())
    for name, text in (("memory.max", limit), ("memory.current", 3 << 30), ("memory.stat", f"inactive_file {1 << 30}")):
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(here, "_CGROUPS", [(tmp_path, "memory.max", "memory.current")])
    machine = next(here.devices())
    if told is None:
        assert machine.told.split(",")[:2] == usual.told.split(",")[:2]
    else:
        assert (machine.verdict, machine.told.partition(", ")[2]) == ("doubtful", told)


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(here.sys, "version_info", (3, 10))
    assert one(here.python()).verdict == "bad"


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        finding = one(here.port("127.0.0.1", number))
        assert (finding.verdict, finding.remedy) == ("doubtful", "serve.port=...")
    assert one(here.port("127.0.0.1", number)).verdict == "good"


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine speaks no IPv6")
def test_a_port_of_the_other_internet_is_free():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no ::1")
        number = probe.getsockname()[1]
    assert one(here.port("::1", number)).verdict == "good"


def test_an_address_that_is_not_this_machine_s_is_not_said_to_be_taken():
    finding = one(here.port("192.0.2.1", 8000))
    assert finding.verdict == "doubtful"
    assert "192.0.2.1:8000 cannot be listened on" in finding.told


@pytest.mark.parametrize(
    ("offsets", "verdict", "told"),
    [
        ((0.0, 1.5), "good", 1.5),
        ((1.9, -1.9), "bad", 3.8),
        ((0.0, 5.0, 1.0), "bad", 5.0),
        ((0.0,), "good", 0.0),
    ],
)
def test_clocks_are_held_against_each_other_and_not_against_ours_alone(monkeypatch, offsets, verdict, told):
    import ray

    def remote(offset):
        return lambda function: SimpleNamespace(remote=lambda: function() + offset)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    finding = one(nodes._clocks({f"node {number}": {"offset": offset} for number, offset in enumerate(offsets)}))
    assert finding.verdict == verdict
    assert told - 0.5 < float(finding.told.split()[0]) <= told  # the time that asking took is taken off
    assert ("node" in finding.told) is (verdict == "bad")


@pytest.mark.parametrize("others", [1, 0])
def test_a_node_that_tells_its_time_no_more_is_named_and_hides_no_other(monkeypatch, others):
    import ray

    def get(answer, timeout):
        assert timeout < 600
        if answer is None:
            raise ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")
        return answer

    monkeypatch.setattr(
        ray, "remote", lambda time: lambda function: SimpleNamespace(remote=lambda: time and function())
    )
    monkeypatch.setattr(ray, "get", get)
    nodes_asked = {"lost": {"time": None}, **{f"node {number}": {"time": True} for number in range(others)}}
    found = list(nodes._clocks(nodes_asked))
    assert [(finding.what, finding.verdict) for finding in found] == [("clocks", "bad"), ("clocks", "good")][
        : 1 + others
    ]
    assert found[0].told == "lost does not tell its time (Get timed out: some object(s) not ready.)"


def test_nodes_of_which_none_answers_are_not_said_to_be_well(monkeypatch):
    import ray

    def remote(**_):
        return lambda function: SimpleNamespace(remote=lambda *asked: None)

    def get(answer, timeout):
        raise ray.exceptions.RayError("gone")

    node = {"Alive": True, "NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.1"}
    for name, fake in (("remote", remote), ("get", get), ("nodes", lambda: [node])):
        monkeypatch.setattr(ray, name, fake)
    assert [finding.verdict for finding in nodes.nodes("s3://bucket")] == ["bad", "bad"]


def test_storage_is_exercised_and_left_as_it_was(tmp_path):
    assert one(here.storage(str(tmp_path))).verdict == "good"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    finding = one(here.storage(str(tmp_path / "file" / "below")))
    assert finding.verdict == "bad"
    assert finding.remedy


def test_what_to_do_is_said_once_behind_what_is_wrong(capsys):
    told = examine(None, "ftp://x", Console(), address="http://127.0.0.1:9", ca_file=None, only_nodes=True)
    assert told["exit_code"] == 3
    assert capsys.readouterr().out.count("ray dashboard cluster.yaml") == 1
    examine(None, "ftp://x", Console(), address=None, ca_file=None, only_nodes=False)
    line = "storage.root: unknown kind of storage, got 'ftp://x': a folder or s3://bucket/prefix"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"  {line}")


@pytest.mark.parametrize("broken", ["always", "never", "other"])
def test_storage_that_puts_over_what_is_there_or_forgets_it(tmp_path, monkeypatch, broken):
    """Planted: what an S3 server does that ignores If-None-Match, refuses it, or gives back something else."""
    if broken == "other":
        monkeypatch.setattr(LocalStore, "read", lambda self, key, *span: b"x")
    else:
        monkeypatch.setattr(
            LocalStore, "put_if_absent", lambda self, key, data: (self.put(key, data), broken == "always")[1]
        )
    finding = one(here.storage(str(tmp_path)))
    assert finding.verdict == "bad"
    assert "If-None-Match" in finding.remedy or "give back" in finding.told
